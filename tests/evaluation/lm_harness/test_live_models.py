"""Where a card lacks memory for a forward, smaller ones give the same scores, from then on and said once.

No card is here: a hook of the model raises torch's error for forwards above a size.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.checkpoints import Checkpoint
from evomerge.evaluation import ItemScore
from evomerge.evaluation.lm_harness.harness import LmHarness
from evomerge.evaluation.lm_harness.task_loading import TaskSpec
from evomerge.merging import model_loading
from tests.support.lm_eval_tasks import CHOOSE, GENERATE, load, sums, write_task
from tests.support.toy import zoo_folder

TASKS = {"trial_choose": CHOOSE, "trial_generate": GENERATE}
FEW = {"validation": sums(4, 300), "test": sums(4, 400)}
DOCS = {
    "trial_choose": {"search": sums(150), **FEW},
    "trial_generate": {"search": sums(6, 200), **FEW},
}
CPU_TOKENS = 1024


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tasks")
    for name, settings in TASKS.items():
        write_task(root, name, settings, DOCS[name])
    return root


@pytest.fixture(scope="module")
def model() -> Any:
    return model_loading.load_base(Checkpoint(zoo_folder() / "math"), "float32")


@pytest.fixture
def harness(folder: Path) -> LmHarness:
    tokenizer = model_loading.load_tokenizer(Checkpoint(zoo_folder() / "base"))
    return load(folder, tokenizer, *[TaskSpec(t, splits="declared", soft=True) for t in TASKS])


@contextlib.contextmanager
def card(model: Any, room: int) -> Iterator[list[int]]:
    """A card with room for forwards of so many tokens. Gives the size of each forward."""
    sizes: list[int] = []

    def look(module: Any, args: Any, inputs: dict[str, Any]) -> None:
        sizes.append(inputs["input_ids"].numel())
        if sizes[-1] > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield sizes
    finally:
        handle.remove()


def numbers(scores: tuple[ItemScore, ...]) -> list[float]:
    return [value for s in scores for value in (s.value, s.probability, s.logprob) if value is not None]


def test_smaller_forwards_score_what_does_not_fit_and_are_said_once(
    harness: LmHarness, folder: Path, model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    items = harness.items("search")
    with card(model, CPU_TOKENS) as sizes:
        expected, metrics = harness.score(model, items)
    assert max(sizes) > 600, "the forwards are too small to show anything"
    with caplog.at_level(logging.WARNING), card(model, 600) as sizes:
        scores, halved_metrics = harness.score(model, items)
        first = len(sizes)
        again, _ = harness.score(model, items)  # its plans are the small ones already
        harness.score(model, harness.items("test"))
    assert numbers(scores) == pytest.approx(numbers(expected), abs=1e-4)
    assert halved_metrics == pytest.approx(metrics, abs=1e-4)
    assert numbers(again) == numbers(scores)
    assert max(sizes[first:]) <= CPU_TOKENS // 2
    assert caplog.text.count("half as many tokens") == 1


def test_what_does_not_fit_with_half_either_is_the_candidates_error(harness: LmHarness, model: Any) -> None:
    items = {"trial_choose": harness.items("search")["trial_choose"]}
    harness.prepare(model, items)
    with card(model, 100), pytest.raises(torch.OutOfMemoryError):
        harness.score(model, items)
    with card(model, 600):  # the next candidate is scored
        harness.score(model, items)


def test_a_model_that_comes_later_has_small_forwards_from_its_first(harness: LmHarness, model: Any) -> None:
    items = {"trial_choose": harness.items("search")["trial_choose"]}
    harness.prepare(model, items)
    with card(model, 600):
        harness.score(model, items)
    later = model_loading.load_base(Checkpoint(zoo_folder() / "lang"), "float32")
    with card(later, 600) as sizes:
        harness.score(later, items)
    assert max(sizes) <= 600
