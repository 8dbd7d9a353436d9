"""Which texts an engine generates, and what is said where it does not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from evomerge.checkpoints import Checkpoint
from evomerge.errors import EngineSetupError
from evomerge.evaluation.engines.choice import TextVolume, why_not_faster
from evomerge.evaluation.engines.installed import vllm_version
from evomerge.evaluation.lm_harness.backends import vllm
from evomerge.evaluation.lm_harness.harness import LmHarness
from evomerge.evaluation.lm_harness.task_loading import TaskSpec
from evomerge.merging import model_loading
from evomerge.merging.routing.routed_model import RoutedModel
from tests.support.lm_eval_tasks import CHOOSE, GENERATE, sums, write_task
from tests.support.toy import zoo_folder


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "vllm_version", lambda python: "1.0")


@pytest.fixture(scope="module")
def model() -> Any:
    return model_loading.load_base(Checkpoint(zoo_folder() / "base"), "float32")


def harness(folder: Path, backend: str) -> LmHarness:
    few = {"search": sums(4), "validation": sums(2, 10), "test": sums(2, 20)}
    write_task(folder, "texts", GENERATE, few)
    write_task(folder, "choices", CHOOSE, few)
    sampling = {"until": ["\n"], "do_sample": True, "temperature": 1.0, "max_gen_toks": 4}
    write_task(folder, "samples", GENERATE | {"generation_kwargs": sampling}, few)
    specs = [TaskSpec(task, splits="declared") for task in ("texts", "choices", "samples")]
    tokenizer = model_loading.load_tokenizer(Checkpoint(zoo_folder() / "base"))
    return LmHarness(specs, tokenizer, backend=backend, include=[folder])


def test_an_engine_answers_greedy_texts_and_nothing_else(tmp_path: Path, model: Any) -> None:
    found = harness(tmp_path, "vllm").backends(model)
    assert found["texts"] == "vllm 1.0: greedy, at most 256 at once"
    assert found["choices"] == "compiled"
    assert found["samples"] == "lm-eval: do_sample asks for sampling"


def test_auto_leaves_a_small_model_on_a_cpu_to_our_decoder(tmp_path: Path, model: Any) -> None:
    assert harness(tmp_path, "auto").backends(model)["texts"] == "compiled"


def test_a_model_that_takes_routes_is_no_engines_model(tmp_path: Path, model: Any) -> None:
    """Its layers change from candidate to candidate; the engine would go on with those it opened with."""
    assert harness(tmp_path, "vllm").backends(RoutedModel(model).model)["texts"] == "compiled"


@pytest.mark.parametrize(
    ("prompts", "new", "parameters", "device", "reason"),
    [
        (64, 128, 3_000_000_000, "cuda", None),
        (64, 128, 3_000_000_000, "cpu", "on a CPU"),
        (63, 128, 7_000_000_000, "cuda", "63 prompts of 128 new tokens"),
        (64, 127, 7_000_000_000, "cuda", "64 prompts of 127 new tokens"),
        (500, 500, 500_000_000, "cuda", "fewer than 3e9 parameters"),
    ],
)
def test_the_rule_of_auto(prompts: int, new: int, parameters: int, device: str, reason: str | None) -> None:
    found = why_not_faster(TextVolume(prompts, new), parameters, device)
    assert found is None if reason is None else found is not None
    assert (reason or "") in (found or "")


def test_an_environment_without_vllm_is_named_with_what_to_do() -> None:
    with pytest.raises(EngineSetupError, match=r"has no vLLM; pip install 'evomerge\[vllm\]'"):
        vllm_version(sys.executable)
    with pytest.raises(EngineSetupError, match=r"'/no/such/python' does not run \(FileNotFoundError\)"):
        vllm_version("/no/such/python")
