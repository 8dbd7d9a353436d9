"""Poisoned tasks end as a refusal at the start, or as a candidate with a cause: never as a crash, never as a silent zero."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_lm_harness import BATCH, CHOOSE, GENERATE, LIKELIHOOD, own_id, sums, write_task
from toy import zoo_folder

from evomerge import worker
from evomerge.checkpoint import Checkpoint
from evomerge.errors import TaskError
from evomerge.evaluation import Evaluation
from evomerge.lm_harness import LmHarness, TaskSpec
from evomerge.recipe import Mix, Recipe
from evomerge.worker import Worker

FEW = {"search": sums(4), "validation": sums(3, 10), "test": sums(6, 20)}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return worker.load_tokenizer(Checkpoint(zoo_folder() / "base"))


class Nothing:
    """Stands where a test's own evaluator will."""

    def items(self, role: str) -> dict[str, Sequence[str]]:
        return {}

    def score(self, model: Any, items: Any) -> Any:
        raise AssertionError


@pytest.fixture(scope="module")
def scorer() -> Worker:
    return Worker({"base": Checkpoint(zoo_folder() / "base")}, "base", Nothing(), dtype="float32")


@pytest.fixture(scope="module")
def recipe(scorer: Worker) -> Recipe:
    def whole(layer: int | None) -> Mix:
        return Mix("passthrough", (("base", layer),))

    return Recipe("base", tuple(whole(i) for i in range(scorer.parents["base"].num_layers)), whole(None), whole(None), "float32")


def harness(
    folder: Path, tokenizer: Any, settings: Mapping[str, Any], docs: Mapping[str, Sequence[Any]] = FEW, code: str = "", **more: Any
) -> LmHarness:
    write_task(folder, "trial", settings, docs)
    (folder / "own.py").write_text(code)
    return LmHarness([TaskSpec("trial", splits="declared", **more)], tokenizer, batch_size=BATCH, include=[folder])


def scored(scorer: Worker, recipe: Recipe, own: LmHarness) -> Evaluation:
    """What the worker makes of the test items."""
    scorer.evaluator = own
    return scorer.evaluate(recipe, own.items("test"))


# ---- candidates that fail with a cause -------------------------------------------------------------------------------

OWN_METRIC = {"process_results": "!function own.judge", "metric_list": [{"metric": "own", "aggregation": "mean"}]}
OWN_FILTER = {"filter_list": [{"name": "x", "filter": [{"function": "custom", "filter_fn": "!function own.sift"}, {"function": "take_first"}]}]}
METRICS = {
    "raises": ("raise RuntimeError('the metric broke')", "the metric broke"),
    "raises for one item": ("return {'own': 1 / (doc['n'] - 22)}", "division by zero"),
    "gives NaN": ("return {'own': float('nan')}", "'trial' gave nan for item|'trial' gave the metric nan"),
    "gives nothing": ("return {}", "'trial' reports no 'own'"),
    "gives None": ("return {'own': None}", "NoneType|'trial' gave None"),
    "gives another name": ("return {'owm': 1.0}", "it reports \\['owm'\\]"),
}


@pytest.mark.parametrize("how", METRICS)
def test_a_metric_that_fails_is_the_candidates_cause(how: str, tmp_path: Path, tokenizer: Any, scorer: Worker, recipe: Recipe) -> None:
    body, words = METRICS[how]
    own = harness(tmp_path, tokenizer, LIKELIHOOD | OWN_METRIC, code=f"def judge(doc, results):\n    {body}\n")
    evaluation = scored(scorer, recipe, own)
    assert evaluation.error is not None
    assert re.search(words, evaluation.error), evaluation.error
    assert (evaluation.items, evaluation.metrics) == ((), {})


def test_a_filter_that_raises_is_the_candidates_cause(tmp_path: Path, tokenizer: Any, scorer: Worker, recipe: Recipe) -> None:
    folder = write_task(tmp_path, "trial", GENERATE, FEW)
    yaml = (folder / "trial.yaml").read_text().splitlines()
    kept = [line for line in yaml if not line.startswith("filter_list")]
    lines = ["filter_list:", "- name: x", "  filter:", "  - function: custom", "    filter_fn: !function own.sift", "  - function: take_first"]
    (folder / "trial.yaml").write_text("\n".join([*kept, *lines]) + "\n")
    (folder / "own.py").write_text("def sift(resps, docs):\n    raise KeyError('the filter broke')\n")
    own = LmHarness([TaskSpec("trial", splits="declared")], tokenizer, batch_size=BATCH, include=[folder])
    evaluation = scored(scorer, recipe, own)
    assert evaluation.error is not None
    assert "the filter broke" in evaluation.error


@pytest.mark.parametrize("settings", [LIKELIHOOD, CHOOSE, GENERATE], ids=["loglikelihood", "choices", "generation"])
def test_nan_weights_are_the_candidates_cause(
    settings: Mapping[str, Any], tmp_path: Path, tokenizer: Any, scorer: Worker, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = harness(tmp_path, tokenizer, settings)
    well = scored(scorer, recipe, own)
    assert well.error is None

    def sick(*arguments: Any) -> None:
        with torch.no_grad():
            scorer.model.get_parameter("model.layers.3.mlp.up_proj.weight")[0, 0] = math.nan

    with monkeypatch.context() as patched:
        patched.setattr(worker.merge, "into", sick)
        evaluation = scored(scorer, recipe, own)
    assert evaluation.error is not None
    assert "NaN" in evaluation.error
    again = scored(scorer, recipe, own)
    assert (again.error, again.items, again.metrics) == (None, well.items, well.metrics), "the next candidate is not harmed"


IMPOSSIBLE: dict[str, tuple[Mapping[str, Any], str]] = {
    "more new tokens than the model has positions": (
        GENERATE | {"generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 4096}},
        "'trial' asks for 4096 new tokens.*max_gen_toks",
    ),
    "an answer longer than the model": (
        LIKELIHOOD | {"doc_to_target": " {% for i in range(3000) %}one {% endfor %}"},
        "'trial' cannot be scored: .*longer",
    ),
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_what_no_model_of_that_length_can_answer_is_the_candidates_cause(
    what: str, tmp_path: Path, tokenizer: Any, scorer: Worker, recipe: Recipe
) -> None:
    settings, words = IMPOSSIBLE[what]
    evaluation = scored(scorer, recipe, harness(tmp_path, tokenizer, settings))
    assert evaluation.error is not None
    assert re.search(words, evaluation.error), evaluation.error


# ---- refused at the start --------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "empty split": (GENERATE, FEW | {"test": []}),
    "template that raises for one item": (GENERATE | {"doc_to_text": "{{7 // (n - 22)}}"}, FEW),
    "target that raises for one item": (LIKELIHOOD | {"doc_to_target": "{{7 // (n - 22)}}"}, FEW),
    "gold index out of range": (CHOOSE, FEW | {"test": [*sums(3, 20), sums(1, 30)[0] | {"label": 4}]}),
    "negative gold index": (CHOOSE, FEW | {"test": [*sums(3, 20), sums(1, 30)[0] | {"label": -2}]}),
    "right context out of range": (
        CHOOSE | {"doc_to_text": "label", "doc_to_choice": "{{['one', 'two']}}", "doc_to_target": "{{answer}}"},
        FEW | {"test": [*sums(3, 20), sums(1, 30)[0] | {"label": 2}]},
    ),
}


@pytest.mark.parametrize("how", REFUSED)
def test_a_task_that_cannot_be_asked_is_refused_by_name(how: str, tmp_path: Path, tokenizer: Any) -> None:
    settings, docs = REFUSED[how]
    with pytest.raises(TaskError, match="'trial'"):
        harness(tmp_path, tokenizer, settings, docs)


# ---- scored, as lm-eval scores it, and said --------------------------------------------------------------------------


def lm_evals(model: Any, tokenizer: Any, folder: Path, metric: str) -> dict[str, float]:
    """Item -> value, by `simple_evaluate`."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1), tasks=["trial"], log_samples=True, bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )  # fmt: skip
    assert found is not None
    samples: dict[str, Any] = dict(found)["samples"]
    first = samples["trial"][0]["filter"]
    return {own_id(row["doc"]): row[metric] for row in samples["trial"] if row["filter"] == first}


ODD: dict[str, Mapping[str, Any]] = {
    "a stop sequence that is never met": {"generation_kwargs": {"until": ["never said"], "do_sample": False, "max_gen_toks": 5}},
    "no stop sequence": {"generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": 3}},
    "texts that are empty": {"generation_kwargs": {"until": [*"0123456789", " "], "do_sample": False, "max_gen_toks": 4}, "doc_to_target": ""},
    "an answer that no filter finds": {
        "filter_list": [{"name": "x", "filter": [{"function": "regex", "regex_pattern": "(never)"}, {"function": "take_first"}]}]
    },
}


@pytest.mark.parametrize("how", ODD)
def test_odd_generations_are_scored_as_by_lm_eval(how: str, tmp_path: Path, tokenizer: Any, scorer: Worker, recipe: Recipe) -> None:
    own = harness(tmp_path, tokenizer, GENERATE | ODD[how])
    evaluation = scored(scorer, recipe, own)
    assert evaluation.error is None
    assert {s.item: s.value for s in evaluation.items} == lm_evals(scorer.model, tokenizer, tmp_path, "exact_match")
    if how == "texts that are empty":
        assert {sample.output for sample in own.samples(scorer.model, own.items("test"))} == {""}
        assert evaluation.metrics["trial"] == 1.0, "an empty answer is right where the target is empty"


LONG = "{% for i in range(300) %}one {% endfor %}{{prompt}}"


@pytest.mark.parametrize(("settings", "metric"), [(LIKELIHOOD, "perplexity"), (CHOOSE, "acc_norm"), (GENERATE, "exact_match")])
def test_contexts_longer_than_the_model_are_cut_as_by_lm_eval_and_named(
    settings: Mapping[str, Any], metric: str, tmp_path: Path, tokenizer: Any, scorer: Worker, recipe: Recipe
) -> None:
    text = "{% if n % 2 %}" + LONG + "{% else %}{{prompt}}{% endif %}"
    own = harness(tmp_path, tokenizer, settings | {"doc_to_text": text}, metric=metric)
    evaluation = scored(scorer, recipe, own)
    assert evaluation.error is None
    theirs = lm_evals(scorer.model, tokenizer, tmp_path, metric)
    assert {s.item: s.value for s in evaluation.items} == pytest.approx(theirs, rel=1e-5)
    assert own.findings() == ()
    found = own.findings(scorer.model)
    assert next(f for f in found if "of test" in f).startswith("task 'trial': 3 of 6 items of test are truncated")
    length = scorer.model.config.max_position_embeddings
    assert f"model's {length} tokens" in found[0]
    first = next(d for d in FEW["test"] if d["n"] % 2)
    asked = own._tasks["trial"].requests[own_id(first)][0]
    if metric == "perplexity":
        over = len(tokenizer("".join(asked.args)).input_ids) - (length + 1)
        assert any(f"{own_id(first)} by {over}" in f for f in found)


def test_short_items_are_not_named(tmp_path: Path, tokenizer: Any, scorer: Worker) -> None:
    assert harness(tmp_path, tokenizer, CHOOSE).findings(scorer.model) == ()
