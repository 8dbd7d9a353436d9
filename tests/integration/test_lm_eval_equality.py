"""Every response, item and metric is lm-eval's own: all kinds of tasks, on delicate architectures, in
float32; trained models in bfloat16.

scripts/validation/lm_eval_equality.py compares many more models.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.checkpoints import Checkpoint
from evomerge.merging import model_loading
from tests.support import equality_oracle as oracle
from tests.support import equality_tasks as tasks
from tests.support import text_architectures
from tests.support.equality_oracle import Results
from tests.support.equality_tasks import SOME, TASKS
from tests.support.sweeps import sweep
from tests.support.toy import zoo_folder


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tasks.write(tmp_path_factory.mktemp("equality") / "tasks", count=4)


@pytest.fixture(scope="module")
def plain(folder: Path) -> tuple[Results, Results]:
    """(lm-eval's, ours) of a model with windows."""
    model, tokenizer, scores = (
        text_architectures.build("mistral"),
        text_architectures.tokenizer(),
        tasks.scores(),
    )
    wanted = oracle.theirs(model, tokenizer, folder, scores)
    return wanted, oracle.ours(oracle.load(tokenizer, folder, scores), model, scores)


@pytest.mark.parametrize("task", TASKS)
def test_each_kind_of_task_is_lm_evals(task: str, plain: tuple[Results, Results]) -> None:
    wanted, found = (results.of(task) for results in plain)
    assert wanted.values
    assert oracle.compare(wanted, found).said == []


def test_the_tasks_can_tell(plain: tuple[Results, Results]) -> None:
    """Answers are many and different, and a difference would be seen."""
    wanted, found = plain
    flat = [a for requests in wanted.answers.values() for answers in requests for a in answers]
    assert {a[1] for a in flat if not isinstance(a, str)} == {True, False, None}
    assert len({a for a in flat if isinstance(a, str)}) > 25
    (key, requests), *_ = found.answers.items()
    assert isinstance(requests[0][0], tuple)
    changed = [[(requests[0][0][0] * 1.001, requests[0][0][1])], *requests[1:]]
    other = dataclasses.replace(found, answers={**found.answers, key: changed})
    assert oracle.compare(wanted, other).other_sums == 1
    (score, item), *_ = found.values
    other = dataclasses.replace(
        found, values={**found.values, (score, item): 7.0}, metrics={**found.metrics, score: 7.0}
    )
    differences = oracle.compare(wanted, other)
    assert (differences.other_items, differences.other_metrics) == (1, 1)


@pytest.mark.parametrize("name", ["gpt_neo", "lfm2"])
def test_chat_templates_and_other_architectures(name: str, folder: Path) -> None:
    """Few-shot examples as turns, a system prompt, a tokenizer that begins with BOS, and weights that share
    less or nothing.
    """
    model, tokenizer, scores = (
        text_architectures.build(name),
        text_architectures.tokenizer(bos=True),
        tasks.scores(SOME),
    )
    wanted = oracle.theirs(model, tokenizer, folder, scores, chat=True)
    assert (
        oracle.compare(
            wanted, oracle.ours(oracle.load(tokenizer, folder, scores, chat=True), model, scores)
        ).said
        == []
    )


def test_a_group_is_lm_evals(folder: Path) -> None:
    model, tokenizer = text_architectures.build("bloom"), text_architectures.tokenizer()
    wanted = oracle.their_group(model, tokenizer, folder, "pair", ("acc", "acc_norm"))
    assert oracle.our_group(model, tokenizer, folder, "pair", ("acc", "acc_norm")) == wanted
    assert len(set(wanted)) == 2


def _penalty(model: Any) -> None:
    model.generation_config.repetition_penalty = 1.3


def _other_end(model: Any) -> None:
    model.generation_config.eos_token_id = 30


def _no_end(model: Any) -> None:
    model.generation_config.eos_token_id = None


@pytest.mark.parametrize("change", sweep([_penalty, _other_end, _no_end], [_other_end]))
def test_a_generation_config_is_honoured_as_lm_eval_does(change: Any, folder: Path) -> None:
    model, tokenizer, scores = (
        text_architectures.build("llama"),
        text_architectures.tokenizer(),
        tasks.scores(("generate_none", "generate_3shot")),
    )
    before = oracle.theirs(model, tokenizer, folder, scores)
    change(model)
    wanted = oracle.theirs(model, tokenizer, folder, scores)
    if change is _penalty:
        assert wanted.answers != before.answers
    assert (
        oracle.compare(wanted, oracle.ours(oracle.load(tokenizer, folder, scores), model, scores)).said == []
    )


def test_trained_weights_in_bfloat16_give_no_other_result(folder: Path) -> None:
    """Random weights have near ties at every token; trained ones do not."""
    checkpoint = Checkpoint(zoo_folder() / "math")
    model, tokenizer, scores = (
        model_loading.load_base(checkpoint, "bfloat16"),
        model_loading.load_tokenizer(checkpoint),
        tasks.scores(SOME),
    )
    wanted = oracle.theirs(model, tokenizer, folder, scores)
    found = oracle.ours(oracle.load(tokenizer, folder, scores), model, scores)
    assert oracle.compare(wanted, found, exact=False).said == []
