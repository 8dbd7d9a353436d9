"""The order of test files, those that `--quick` leaves out, and models that many tests read."""

import fcntl
import gc
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.support.tiny_models import build
from tests.support.toy import in_process, search_file

# a busy machine is no failure
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")

TESTS = Path(__file__).resolve().parent
# Files that take more than 3 s of a processor, the longest first as measured: they begin, so that no process
# is left with one at the end, and `--quick` leaves them out, with those that need a GPU or a Ray.
SLOW = (
    "integration/test_parity_methods.py",
    "cli/test_main.py",
    "evaluation/lm_harness/test_harness.py",
    "integration/test_lm_eval_equality.py",
    "integration/test_learned_search.py",
    "docs/test_first_half_hour.py",
    "methods/test_spherical_and_selecting.py",
    "launch/test_route_stages.py",
    "integration/test_mergekit_parity.py",
    "contracts/test_methods.py",
    "docs/test_code_blocks.py",
    "evaluation/engines/test_child_engine.py",
    "search/test_study.py",
    "contracts/test_optimizers.py",
    "launch/test_row_stage.py",
    "workers/ray_pool/test_ray_pool.py",
    "integration/test_kill.py",
    "contracts/test_pool_faults.py",
    "reports/test_dashboard_browser.py",
    "recipes/mergekit_yaml/test_ignored.py",
    "export/test_route_checkpoint.py",
    "merging/test_merge.py",
    "evaluation/inference/test_generation.py",
    "export/test_commands.py",
    "launch/test_verification.py",
    "merging/vocabulary/test_alignment.py",
    "scripts/test_real_model.py",
    "evaluation/inference/test_probes.py",
    "search/test_learned.py",
    "merging/routing/test_routed_model.py",
    "reports/test_derivatives.py",
    "scripts/test_older_transformers.py",
    "evaluation/test_python_losses.py",
    "launch/test_learned_stage.py",
    "merging/test_written_stages.py",
    "launch/test_first_scores.py",
    "merging/test_mergekit_check.py",
    "scripts/test_soak.py",
    "integration/test_method_search.py",
    "export/test_route_mergekit.py",
    "evaluation/lm_harness/test_task_names.py",
    "workers/test_worker.py",
    "cli/test_odd_places.py",
    "scripts/test_forged_stores.py",
    "workers/test_process_pool.py",
    "launch/test_relaxed_routes.py",
    "store/test_durability.py",
    "cli/test_folders.py",
    "search/test_pipelined.py",
    "integration/test_gguf_search.py",
    "checkpoints/test_lora_peft.py",
    "cli/test_moved_studies.py",
    "search/test_racing.py",
    "spaces/routes/test_routes.py",
    "launch/test_placement.py",
    "evaluation/inference/test_device_batching.py",
    "config/test_messages.py",
    "methods/fused/test_triton_kernels.py",
    "evaluation/lm_harness/test_items.py",
    "integration/test_route_lm_eval.py",
    "contracts/test_backends.py",
    "launch/test_verifications.py",
    "evaluation/test_python_tasks.py",
    "methods/test_methods.py",
    "methods/fused/test_one_pass.py",
    "integration/test_wheel.py",
    "reports/test_sensitivity.py",
    "cli/test_test_items.py",
    "checkpoints/test_gguf.py",
    "reports/test_comparison.py",
    "integration/test_security.py",
    "cli/test_resume_log.py",
    "scripts/test_interval_coverage.py",
    "integration/test_hostile_names.py",
    "search/test_learned_retention.py",
    "checkpoints/test_config_meanings.py",
    "merging/test_checkpoint_writer.py",
    "test_public_api.py",
    "search/test_islands.py",
    "optimizers/test_cma_es.py",
    "launch/test_dry_run.py",
    "evaluation/inference/test_plan_replay.py",
    "spaces/test_weights.py",
    "launch/test_learned_labels.py",
    "merging/test_intermediate_merges.py",
    "recipes/mergekit_yaml/test_reader_and_writer.py",
    "scripts/test_kernel_mutations.py",
    "optimizers/test_cat_cma.py",
    "evaluation/lm_harness/test_gradients.py",
    "search/test_selection.py",
    "evaluation/engines/test_live_engine.py",
    "merging/test_coefficient_slopes.py",
    "evaluation/inference/test_loglikelihood.py",
    "contracts/test_kernel_backends.py",
    "evaluation/test_python_sources.py",
    "store/test_retry.py",
    "scripts/test_machine_code.py",
    "merging/test_older_config_keys.py",
    "contracts/test_pools.py",
    "integration/test_safe_path.py",
    "scripts/test_fuzz_inputs.py",
    "merging/test_weight_map.py",
    "test_architecture.py",
    "store/test_strangers.py",
    "cli/test_init.py",
    "docs/test_reference.py",
    "merging/test_candidate_launch.py",
    "store/test_store.py",
    "merging/routing/test_scale_folding.py",
    "evaluation/lm_harness/test_chat_rendering.py",
    "launch/test_engine_facts.py",
    "integration/test_fuzz_findings.py",
    "merging/test_name_versions.py",
    "evaluation/lm_harness/test_splits.py",
    "evaluation/test_code_execution.py",
    "evaluation/lm_harness/test_backends.py",
    "evaluation/test_poisoned_tasks.py",
    "checkpoints/test_kinds_of_faults.py",
    "cli/test_usage_errors.py",
    "search/test_reuse.py",
    "recipes/test_recipe.py",
    "workers/test_scheduler.py",
    "methods/test_registry.py",
    "docs/test_extending.py",
    "scripts/test_edges.py",
    "scripts/test_benchmarks.py",
    "scripts/test_cluster_scripts.py",
    "checkpoints/test_hub.py",
    "evaluation/lm_harness/test_code_tasks.py",
    "evaluation/lm_harness/test_task_catalogue.py",
    "integration/test_gpu.py",
    "workers/ray_pool/test_ray_faults.py",
    "workers/ray_pool/test_ray_nodes.py",
    "workers/ray_pool/test_ray_search.py",
)
RAY_FILES = pytest.StashKey[set[Path]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--quick`."""
    parser.addoption("--quick", action="store_true", help="without the slow files: see tests/conftest.py")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves slow files unread in a quick run: importing them takes a part of their time."""
    if not config.getoption("--quick") or not collection_path.is_relative_to(TESTS):
        return None
    return True if collection_path.relative_to(TESTS).as_posix() in SLOW else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts slow files first."""
    rank = {TESTS / name: position for position, name in enumerate(SLOW)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fails where a slow file is listed that is not there; notes the files of tests that start Ray.

    What is imported and collected lives as long as the process: the garbage collector is told not to walk it.
    """
    missing = [name for name in SLOW if not (TESTS / name).is_file()]
    if missing:
        raise pytest.UsageError(f"SLOW of tests/conftest.py names files that are not there: {missing}")
    session.config.stash[RAY_FILES] = {i.path for i in session.items if i.get_closest_marker("cluster")}
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def one_ray_at_a_time(request: pytest.FixtureRequest) -> Iterator[None]:
    """Files of tests that start Ray take turns: two of them on two cores starve each other's start.

    Those that start it in this process have one token: a process keeps the first that it reads.
    """
    name = request.module.__name__.rpartition(".")[2]
    has_ray = request.path in request.config.stash[RAY_FILES]
    if not has_ray and not name.startswith(("test_ray_", "test_cluster_scripts")):
        yield
        return
    with (
        (Path(tempfile.gettempdir()) / "evomerge-tests-ray.lock").open("w") as turn,
        pytest.MonkeyPatch.context() as patch,
    ):
        fcntl.flock(turn, fcntl.LOCK_EX)
        if not name.startswith("test_cluster_scripts"):
            patch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build(tmp_path_factory.mktemp("bf16"), torch.bfloat16)


@pytest.fixture(scope="session")
def tiny32(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build(tmp_path_factory.mktemp("float32"), torch.float32)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a finished study 'small' over the zoo, beside its search file small.yaml.

    To be copied, not written to.
    """
    root = tmp_path_factory.mktemp("finished")
    file = search_file(root, "small", evaluations=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVOMERGE_THREADS", "1")
        code, _, err = in_process("run", file, "--root", root)
    assert code == 0, err
    return root


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where a study's store is to be made."""
    folder = tmp_path / "trial"
    folder.mkdir()
    return folder / "study.db"
