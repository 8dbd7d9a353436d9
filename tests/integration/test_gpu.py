"""On a GPU: merges are the CPU's bit for bit, routes are copied models, scores are lm-eval's, and a search is
gone on with row by row.

Skipped where there is none.
"""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.checkpoints import Checkpoint, Parent
from evomerge.evaluation import Items, ItemScore
from evomerge.merging import checkpoint_writer, model_loading
from evomerge.merging.live_model import ModelBuilder
from evomerge.merging.model_loading import load_base
from evomerge.merging.parent_placement import Placement, place_parent
from evomerge.merging.routing import decoder_layers, routed_model
from evomerge.merging.routing.routed_model import RoutedModel
from evomerge.methods.fused.magnitude_tables import MagnitudeTables
from evomerge.recipes import Mix, Recipe, params
from evomerge.store import Store
from evomerge.workers.worker import Worker
from tests.support import equality_oracle, equality_tasks, text_architectures
from tests.support import route_oracle as oracle
from tests.support.equality_tasks import SOME
from tests.support.live_recipes import RECIPES
from tests.support.toy import command, count_rows, environment, llama, search_file, stored_rows, zoo_folder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

ARCHITECTURES = ("llama", "gemma3_text", "olmo2", "gpt2", "mixtral", "qwen3_next", "deepseek_v3", "falcon_h1")
METHODS = {
    "ties": {"density": (0.4, 0.6)},
    "dare_ties": {"density": (0.4, 0.6)},
    "della": {"density": (0.4, 0.6), "epsilon": 0.1},
    "breadcrumbs": {"density": (0.4, 0.6), "gamma": 0.01},
    "model_stock": {},
    "slerp": {"t": 0.3},
}


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Parent]:
    root = tmp_path_factory.mktemp("parents")
    base = llama(root / "base", 0)
    return {
        "base": Checkpoint(base),
        **{name: Checkpoint(llama(root / name, seed, near=base)) for name, seed in (("a", 1), ("b", 2))},
    }


def on_gpu(parents: dict[str, Parent], place: Placement) -> ModelBuilder:
    kept = {name: place_parent(parent, place, "cuda") for name, parent in parents.items()}
    return ModelBuilder(
        parents,
        kept,
        "base",
        load_base(parents["base"], "bfloat16").cuda(),
        "bfloat16",
        "cuda",
        MagnitudeTables(build=True),
    )


def merged(name: str) -> Recipe:
    given = params(({"weight": (0.7, 0.5)} if name not in ("slerp", "model_stock") else {}) | METHODS[name])
    sources = ("a",) if name == "slerp" else ("a", "b")
    mixes = [
        Mix(name, tuple((source, layer) for source in sources), ("base", layer), given)
        for layer in (*range(5), None)
    ]
    return Recipe("base", tuple(mixes[:5]), mixes[5], mixes[5], seed=3)


@pytest.mark.parametrize("place", ["device", "pinned", "disk"])
def test_a_live_recipe_is_the_model_that_the_cpu_writes(
    place: Placement, parents: dict[str, Parent], tmp_path: Path
) -> None:
    live = on_gpu(parents, place)
    for number, recipe in enumerate([*RECIPES.values(), *map(merged, METHODS)]):
        checkpoint_writer.write(recipe, parents, tmp_path / str(number))
        written = load_base(Checkpoint(tmp_path / str(number)), "bfloat16").state_dict()
        view = live.build(recipe)
        view.install()
        found = view.module.state_dict()
        assert found.keys() == written.keys()
        assert all(
            tensor.is_cuda and torch.equal(tensor.cpu(), written[key]) for key, tensor in found.items()
        ), recipe


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_route_computes_the_bits_of_a_physical_copy(name: str, dtype: torch.dtype) -> None:
    models = tuple(text_architectures.build(name, dtype=dtype, seed=seed).cuda() for seed in (0, 1))
    inputs = {key: tensor.cuda() for key, tensor in oracle.batch().items()}
    for gains in (None, routed_model.gains(oracle.SCALES[:7], 7)):
        hops = oracle.hops(models, oracle.MIXED, gains)
        routed = RoutedModel(models[0], models)
        routed.install(hops)
        copied = oracle.copied(models[0], decoder_layers.stack(models[0])[0], hops).cuda()
        assert torch.equal(oracle.logits(routed.model, inputs), oracle.logits(copied, inputs))
        (tokens, steps), (expected, others) = (
            oracle.generated(model, inputs, cached=True) for model in (routed.model, copied)
        )
        assert torch.equal(tokens, expected)
        assert all(torch.equal(a, b) for a, b in zip(steps, others, strict=True))


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_scores_in_float32_are_lm_evals(name: str, tmp_path: Path) -> None:
    tasks, scores = equality_tasks.write(tmp_path / "tasks", count=4), equality_tasks.scores(SOME)
    model, tokenizer = text_architectures.build(name).cuda(), text_architectures.tokenizer()
    wanted = equality_oracle.theirs(model, tokenizer, tasks, scores)
    found = equality_oracle.ours(equality_oracle.load(tokenizer, tasks, scores), model, scores)
    assert equality_oracle.compare(wanted, found).said == []


def test_trained_weights_in_bfloat16_give_lm_evals_scores(tmp_path: Path) -> None:
    tasks, scores = equality_tasks.write(tmp_path / "tasks", count=4), equality_tasks.scores(SOME)
    checkpoint = Checkpoint(zoo_folder() / "math")
    model, tokenizer = (
        model_loading.load_base(checkpoint, "bfloat16").cuda(),
        model_loading.load_tokenizer(checkpoint),
    )
    wanted = equality_oracle.theirs(model, tokenizer, tasks, scores)
    found = equality_oracle.ours(equality_oracle.load(tokenizer, tasks, scores), model, scores)
    assert equality_oracle.compare(wanted, found, exact=False).said == []


class Greedy:
    """Asks for more memory than there is for the first candidate."""

    def __init__(self) -> None:
        self.asked = 0

    def items(self, role: str) -> Items:
        return {"task": ("one",)}

    def score(self, model: torch.nn.Module, items: Items) -> tuple[tuple[ItemScore, ...], dict[str, float]]:
        self.asked += 1
        if self.asked == 1:
            torch.empty(1 << 42, dtype=torch.uint8, device="cuda")
        return (ItemScore("task", "one", 1.0),), {"task": 1.0}


def test_a_candidate_that_runs_out_of_memory_is_a_value_and_the_next_is_scored(
    parents: dict[str, Parent],
) -> None:
    scorer = Worker(parents, "base", Greedy(), dtype="bfloat16", device="cuda")
    found = [scorer.evaluate(merged("ties"), {"task": ("one",)}) for _ in range(2)]
    assert "out of memory" in (found[0].error or "")
    assert found[1].error is None
    assert found[1].metrics == {"task": 1.0}


def study(root: Path, *flags: object, device: str = "cuda") -> Path:
    """The store of a search run to its end."""
    root.mkdir(exist_ok=True)
    words = command("run", search_file(root, "small", evaluations=24), "--root", root, "--resume", *flags)
    done = subprocess.run(
        words, env=environment() | {"EVOMERGE_DEVICE": device}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return root / "small" / "study.db"


def rows(store: Path) -> dict[str, list[dict[str, Any]]]:
    """All but those that tell how many workers there were."""
    found = stored_rows(store)
    assert found.pop("study") != []
    return found


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return study(tmp_path_factory.mktemp("unbroken"))


def test_a_search_that_is_killed_goes_on_row_by_row(unbroken: Path, tmp_path: Path) -> None:
    file, store = search_file(tmp_path, "small", evaluations=24), tmp_path / "small" / "study.db"
    words = command("run", file, "--root", tmp_path, "--resume")
    for seen in (3, 14):
        driver = subprocess.Popen(
            words,
            env=environment() | {"EVOMERGE_DEVICE": "cuda"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while count_rows(store, "evaluations") < seen:
            assert driver.poll() is None, "it ended before it was killed"
            time.sleep(0.01)
        driver.kill()
        driver.wait()
    assert stored_rows(study(tmp_path)) == stored_rows(unbroken)


@pytest.mark.parametrize(
    "flags", [("--ray", "local", "--workers", 2, "--gpus", 0.5), ("--workers", 2)], ids=["ray", "processes"]
)
def test_two_workers_on_one_gpu_give_the_rows_of_one(
    flags: tuple[object, ...], unbroken: Path, tmp_path: Path
) -> None:
    assert rows(study(tmp_path, *flags)) == rows(unbroken)


def test_a_search_is_near_the_cpus(unbroken: Path, tmp_path: Path) -> None:
    found: list[dict[str, dict[str, float]]] = []
    for store, device in ((unbroken, "cuda"), (study(tmp_path, device="cpu"), "cpu")):
        with Store.open(store) as opened:
            told = opened.study()
            assert told is not None
            assert told.facts.scoring["device"] == device
        evaluations = stored_rows(store)["evaluations"]
        found.append({row["id"]: json.loads(row["metrics"]) for row in evaluations})
    shared = found[0].keys() & found[1].keys()
    assert len(shared) >= 10, "what is scored before the first generation is told"
    apart = [abs(found[0][key][task] - found[1][key][task]) for key in shared for task in found[0][key]]
    assert sum(apart) / len(apart) < 0.02
