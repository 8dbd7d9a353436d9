"""Answers of models that may be labels, and right answers that no model could have written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.checkpoints import Checkpoint
from evomerge.errors import TaskError
from evomerge.evaluation.lm_harness.harness import LmHarness
from evomerge.evaluation.lm_harness.task_loading import TaskSpec
from evomerge.merging import model_loading
from tests.support.lm_eval_tasks import (
    BATCH,
    CHOOSE,
    GENERATE,
    LIKELIHOOD,
    ROLLING,
    load,
    write_task,
)
from tests.support.toy import zoo_folder

TASKS = ("zoo_arithmetic", "zoo_lookup", "zoo_string")
ITEMS = 8
REGEX = [{"function": "regex", "regex_pattern": r"#### (\d+)"}, {"function": "take_first"}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return model_loading.load_tokenizer(Checkpoint(zoo_folder() / "base"))


@pytest.fixture(scope="module")
def model() -> Any:
    return model_loading.load_base(Checkpoint(zoo_folder() / "string"), "float32")


def naive_continuation(model: Any, tokenizer: Any, prompt: str, most: int, ends: set[int]) -> list[int]:
    """Token by token the likeliest, without a cache."""
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    new: list[int] = []
    with torch.no_grad():
        while len(new) < most and not (new and new[-1] in ends):
            new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
    return new


@pytest.mark.parametrize("task", TASKS)
def test_an_answer_is_the_likeliest_choice_or_the_greedy_text(task: str, model: Any, tokenizer: Any) -> None:
    harness = LmHarness([TaskSpec(task, splits="declared")], tokenizer, batch_size=BATCH)
    items = {task: harness.items("search")[task][:ITEMS]}
    scores, metrics, answers = harness.answers(model, items)
    assert (scores, metrics) == harness.score(model, items)
    assert len(answers) == ITEMS
    for item, answer in zip(items[task], answers, strict=True):
        requests = harness.tasks[task].requests[item]
        if task == "zoo_lookup":
            sums_ = [float(request.resps[0][0]) for request in requests]
            assert answer == max(range(len(sums_)), key=lambda i: sums_[i])
            continue
        end = tokenizer.eos_token_id
        new_line = tokenizer.encode("\n", add_special_tokens=False)[-1]
        text = task == "zoo_string"
        ends = {end} if text else {end, new_line}
        ids = naive_continuation(model, tokenizer, str(requests[0].args[0]), 24 if text else 4, ends)
        if ids[-1] not in ends:
            assert answer is None or text
            continue
        wanted = tokenizer.decode(ids[:-1])
        assert answer == (wanted + tokenizer.eos_token if text else wanted)
    assert any(answer is not None for answer in answers)


def test_an_answer_that_is_cut_off_by_its_length_is_none(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    kwargs = {"until": ["\n"], "do_sample": False, "max_gen_toks": 1}
    write_task(tmp_path, "short", GENERATE | {"generation_kwargs": kwargs})
    harness = load(tmp_path, tokenizer, TaskSpec("short", splits="declared"))
    items = {"short": harness.items("search")["short"][:ITEMS]}
    assert harness.answers(model, items)[2] == (None,) * ITEMS


def test_the_answer_to_a_text_without_an_end_is_as_long_as_the_text(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    write_task(tmp_path, "texts", LIKELIHOOD)
    harness = load(tmp_path, tokenizer, TaskSpec("texts", "acc", splits="declared"))
    items = {"texts": harness.items("search")["texts"][:ITEMS]}
    for item, answer in zip(items["texts"], harness.answers(model, items)[2], strict=True):
        (request,) = harness.tasks["texts"].requests[item]
        most = len(tokenizer.encode(request.args[1], add_special_tokens=False))
        end = tokenizer.eos_token_id
        ids = naive_continuation(model, tokenizer, request.args[0], most, {end})
        assert answer == (tokenizer.decode([i for i in ids if i != end]) or None)


# ---- right answers that cannot be climbed ------------------------------------------------------------------


def checked(folder: Path, tokenizer: Any, settings: dict[str, Any], source: str, **docs: Any) -> Any:
    """What `check_losses` says of a task with one source of labels."""
    write_task(folder, "trial", settings, **docs)
    harness = load(folder, tokenizer, TaskSpec("trial", splits="declared"))
    return harness.check_losses({"trial": source})


def test_a_right_answer_that_the_metric_would_find_wrong_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    """The final answer alone, where the metric takes it out of a text with reasoning."""
    settings = GENERATE | {"filter_list": [{"name": "strict", "filter": REGEX}]}
    with pytest.raises(TaskError, match=r"would find its right answer wrong .*labels: \{trial: samples\}"):
        checked(tmp_path, tokenizer, settings, "gold")
    for source in ("samples", "math", "none"):
        assert checked(tmp_path, tokenizer, settings, source) == ()


def test_a_data_sets_own_rationale_is_a_right_answer(tokenizer: Any, tmp_path: Path) -> None:
    settings = GENERATE | {
        "filter_list": [{"name": "strict", "filter": REGEX}],
        "doc_to_target": "one and one more.\n#### {{answer}}",
        "metric_list": [
            {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
            | {"regexes_to_ignore": ["(?s).*#### "]}
        ],
        "generation_kwargs": {"until": ["Q:"], "do_sample": False, "max_gen_toks": 64},
    }
    assert checked(tmp_path, tokenizer, settings, "gold") == ()
    cut = settings | {"generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 64}}
    with pytest.raises(TaskError, match="would find its right answer wrong"):
        checked(tmp_path / "cut", tokenizer, cut, "gold")


def test_a_final_answer_that_is_found_in_longer_texts_is_warned_of(tokenizer: Any, tmp_path: Path) -> None:
    kwargs = {"until": ["Q:"], "do_sample": False, "max_gen_toks": 64}
    (warning,) = checked(tmp_path, tokenizer, GENERATE | {"generation_kwargs": kwargs}, "gold")
    assert "'number' finds those in texts of up to 64 tokens" in warning
    assert checked(tmp_path / "short", tokenizer, GENERATE, "gold") == ()


def test_a_space_before_the_answer_is_no_wrong_answer(tokenizer: Any, tmp_path: Path) -> None:
    """Without a filter 'exact_match' finds ' 9' wrong; a tokenizer may drop that space when it decodes."""
    settings = {key: value for key, value in GENERATE.items() if key != "filter_list"}
    assert checked(tmp_path, tokenizer, settings, "gold") == ()


def test_a_task_without_a_right_answer_as_text_needs_labels(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"has no right answer as text.*labels: \{trial: samples\}"):
        checked(tmp_path, tokenizer, GENERATE | {"doc_to_target": ""}, "gold")
    assert checked(tmp_path, tokenizer, GENERATE | {"doc_to_target": ""}, "samples") == ()


@pytest.mark.parametrize(
    ("settings", "source", "words"),
    [
        (ROLLING, "math", "asks how likely a text is, which no model answers"),
        (ROLLING, "samples", "asks how likely a text is"),
        (CHOOSE, "samples", "knows its right answers as texts"),
        (LIKELIHOOD, "samples", "knows its right answers as texts"),
    ],
)
def test_labels_that_a_task_cannot_have_are_refused_with_the_remedy(
    settings: dict[str, Any], source: str, words: str, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(TaskError, match=words) as refused:
        checked(tmp_path, tokenizer, settings, source)
    assert "write labels: {trial: gold}" in str(refused.value)
