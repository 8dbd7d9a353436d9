"""Poisoned tasks end as a refusal at the start, or as a candidate with a cause: never as a crash, never as a
silent zero.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.checkpoints import Checkpoint
from evomerge.errors import TaskError
from evomerge.evaluation import Evaluation
from evomerge.evaluation.lm_harness.harness import LmHarness
from evomerge.evaluation.lm_harness.task_loading import TaskSpec
from evomerge.merging import live_model, model_loading
from evomerge.recipes import Mix, Recipe
from evomerge.workers.worker import Worker
from tests.support.lm_eval_tasks import (
    BATCH,
    CHOOSE,
    GENERATE,
    LIKELIHOOD,
    own_id,
    sums,
    write_task,
)
from tests.support.toy import zoo_folder

FEW = {"search": sums(4), "validation": sums(3, 10), "test": sums(6, 20)}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return model_loading.load_tokenizer(Checkpoint(zoo_folder() / "base"))


# ---- every task that loads, in one harness: the model is probed once ---------------------------------------

OWN = {"metric_list": [{"metric": "own", "aggregation": "mean", "higher_is_better": True}]}
METRICS = {
    "raises": ("raise RuntimeError('the metric broke')", "the metric broke"),
    "raises_once": ("return {'own': 1 / (doc['n'] - 22)}", "division by zero"),
    "gives_nan": ("return {'own': float('nan')}", "gave nan for item|gave the metric nan"),
    "gives_nothing": ("return {}", "reports no 'own'"),
    "gives_none": ("return {'own': None}", "NoneType|gave None"),
    "misspells": ("return {'owm': 1.0}", r"it reports \['owm'\]"),
}
IMPOSSIBLE: dict[str, tuple[Mapping[str, Any], str]] = {
    "too_many_new_tokens": (
        GENERATE | {"generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 4096}},
        "'too_many_new_tokens' asks for 4096 new tokens.*max_gen_toks",
    ),
    "answer_too_long": (
        LIKELIHOOD | {"doc_to_target": " {% for i in range(3000) %}one {% endfor %}"},
        "'answer_too_long' cannot be scored: .*longer",
    ),
}
SIFTED = """filter_list:
- name: x
  filter:
  - function: custom
    filter_fn: !function sift.sift
  - function: take_first
"""
PLAIN = {
    "filter_list": [
        {"name": "plain", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
    ]
}
ODD: dict[str, Mapping[str, Any]] = {
    "never_stops": GENERATE
    | {"generation_kwargs": {"until": ["never said"], "do_sample": False, "max_gen_toks": 5}},
    "no_stop": GENERATE | {"generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": 3}},
    "empty_texts": GENERATE
    | PLAIN
    | {
        "generation_kwargs": {"until": [*"0123456789", " "], "do_sample": False, "max_gen_toks": 4},
        "doc_to_target": "{{'' if n % 2 else 'x'}}",
    },
    "never_found": GENERATE
    | {
        "filter_list": [
            {
                "name": "x",
                "filter": [{"function": "regex", "regex_pattern": "(never)"}, {"function": "take_first"}],
            }
        ]
    },
}
TEXT = "{% if n % 2 %}{% for i in range(300) %}one {% endfor %}{% endif %}{{prompt}}"
LONG = {
    "long_likelihood": (LIKELIHOOD, "perplexity"),
    "long_choices": (CHOOSE, "acc_norm"),
    "long_generation": (GENERATE, "exact_match"),
}
WELL: dict[str, Mapping[str, Any]] = {"likelihood": LIKELIHOOD, "choices": CHOOSE, "generation": GENERATE}


class Nothing:
    """Stands where the harness will."""

    def items(self, role: str) -> dict[str, Sequence[str]]:
        return {}

    def score(self, model: Any, items: Any) -> Any:
        raise AssertionError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("poisoned")
    for name, (body, _) in METRICS.items():
        write_task(made, name, LIKELIHOOD | OWN | {"process_results": f"!function {name}.judge"}, FEW)
        (made / f"{name}.py").write_text(f"def judge(doc, results):\n    {body}\n")
    write_task(made, "sifted", {k: v for k, v in GENERATE.items() if k != "filter_list"}, FEW)
    with (made / "sifted.yaml").open("a") as file:
        file.write(SIFTED)
    (made / "sift.py").write_text("def sift(resps, docs):\n    raise KeyError('the filter broke')\n")
    for name, (settings, _) in IMPOSSIBLE.items():
        write_task(made, name, settings, FEW)
    for name, settings in (ODD | WELL).items():
        write_task(made, name, settings, FEW)
    for name, (settings, _) in LONG.items():
        write_task(made, name, settings | {"doc_to_text": TEXT}, FEW)
    return made


@pytest.fixture(scope="module")
def scorer(folder: Path, tokenizer: Any) -> Worker:
    one = Worker({"base": Checkpoint(zoo_folder() / "base")}, "base", Nothing(), dtype="float32")
    names = {
        **dict.fromkeys([*METRICS, "sifted", *IMPOSSIBLE, *ODD, *WELL]),
        **{name: metric for name, (_, metric) in LONG.items()},
    }
    specs = [TaskSpec(name, metric, splits="declared") for name, metric in names.items()]
    one.evaluator = LmHarness(specs, tokenizer, batch_size=BATCH, include=[folder])
    assert scored(one, "long_generation").error is None, (
        "the longest first: what is shorter needs no second probe"
    )
    return one


def scored(scorer: Worker, task: str) -> Evaluation:
    """What the worker makes of the test items of one task, for the base as it is."""

    def whole(layer: int | None) -> Mix:
        return Mix("passthrough", (("base", layer),))

    recipe = Recipe(
        "base",
        tuple(whole(i) for i in range(scorer.parents["base"].layout.num_layers)),
        whole(None),
        whole(None),
        "float32",
    )
    return scorer.evaluate(recipe, {task: scorer.evaluator.items("test")[task]})


# ---- candidates that fail with a cause ---------------------------------------------------------------------

CAUSES = {name: words for name, (_, words) in (METRICS | IMPOSSIBLE).items()} | {"sifted": "the filter broke"}


@pytest.mark.parametrize("task", CAUSES)
def test_a_task_that_fails_is_the_candidates_cause(task: str, scorer: Worker) -> None:
    evaluation = scored(scorer, task)
    assert re.search(CAUSES[task], str(evaluation.error)), evaluation.error
    assert (evaluation.items, evaluation.metrics) == ((), {})
    assert scored(scorer, "likelihood").error is None, "the next is not harmed"


@pytest.mark.parametrize("task", WELL)
def test_nan_weights_are_the_candidates_cause(
    task: str, scorer: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    well = scored(scorer, task)
    assert well.error is None

    def sick(*arguments: Any) -> None:
        with torch.no_grad():
            scorer.model.get_parameter("model.layers.3.mlp.up_proj.weight")[0, 0] = math.nan

    with monkeypatch.context() as patched:
        patched.setattr(live_model, "merge_into", sick)
        evaluation = scored(scorer, task)
    assert "NaN" in str(evaluation.error)
    again = scored(scorer, task)
    assert (again.error, again.items, again.metrics) == (None, well.items, well.metrics), (
        "the next candidate is not harmed"
    )


# ---- refused at the start ----------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "empty split": (GENERATE, FEW | {"test": []}),
    "template that raises for one item": (GENERATE | {"doc_to_text": "{{7 // (n - 22)}}"}, FEW),
    "target that raises for one item": (LIKELIHOOD | {"doc_to_target": "{{7 // (n - 22)}}"}, FEW),
    "gold index out of range": (CHOOSE, FEW | {"test": [*sums(3, 20), sums(1, 30)[0] | {"label": 4}]}),
    "negative gold index": (CHOOSE, FEW | {"test": [*sums(3, 20), sums(1, 30)[0] | {"label": -2}]}),
    "right context out of range": (
        CHOOSE
        | {"doc_to_text": "label", "doc_to_choice": "{{['one', 'two']}}", "doc_to_target": "{{answer}}"},
        FEW | {"test": [*sums(3, 20), sums(1, 30)[0] | {"label": 2}]},
    ),
}


@pytest.mark.parametrize("how", REFUSED)
def test_a_task_that_cannot_be_asked_is_refused_by_name(how: str, tmp_path: Path, tokenizer: Any) -> None:
    settings, docs = REFUSED[how]
    with pytest.raises(TaskError, match="'trial'"):
        LmHarness(
            [TaskSpec("trial", splits="declared")],
            tokenizer,
            include=[write_task(tmp_path, "trial", settings, docs)],
        )


# ---- scored, as lm-eval scores it, and said ----------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs(scorer: Worker, tokenizer: Any, folder: Path) -> dict[str, dict[str, float]]:
    """Task -> item -> value, by `simple_evaluate`."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    names = [*ODD, *LONG]
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=scorer.model, tokenizer=tokenizer, batch_size=1),
        tasks=names,
        log_samples=True,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )
    assert found is not None
    samples: dict[str, Any] = dict(found)["samples"]
    values = {}
    for name in names:
        metric, first = LONG[name][1] if name in LONG else "exact_match", samples[name][0]["filter"]
        values[name] = {own_id(row["doc"]): row[metric] for row in samples[name] if row["filter"] == first}
    return values


@pytest.mark.parametrize("task", ODD)
def test_odd_generations_are_scored_as_by_lm_eval(task: str, scorer: Worker, theirs: Any) -> None:
    evaluation = scored(scorer, task)
    assert evaluation.error is None
    assert {s.item: s.value for s in evaluation.items} == theirs[task]
    if task == "empty_texts":
        own: Any = scorer.evaluator
        assert {sample.output for sample in own.samples(scorer.model, {task: own.items("test")[task]})} == {
            ""
        }
        assert evaluation.metrics[task] == 0.5, (
            "an empty answer is right where the target is empty, and only there"
        )


@pytest.mark.parametrize("task", LONG)
def test_contexts_longer_than_the_model_are_cut_as_by_lm_eval(task: str, scorer: Worker, theirs: Any) -> None:
    evaluation = scored(scorer, task)
    assert evaluation.error is None
    assert {s.item: s.value for s in evaluation.items} == pytest.approx(theirs[task], rel=1e-5)


def test_truncated_items_are_counted_and_named(scorer: Worker, tokenizer: Any) -> None:
    own: Any = scorer.evaluator
    length = scorer.model.config.max_position_embeddings
    assert own.warnings() == ()
    found = [f for f in own.warnings(scorer.model) if " of test " in f]
    cut = {f.split("'")[1]: f for f in found}
    assert set(cut) == {*LONG, *IMPOSSIBLE}
    for task in LONG:
        assert f"3 of 6 items of test are truncated, longer than the model's {length} tokens" in cut[task]
    first = own_id(next(d for d in FEW["test"] if d["n"] % 2))
    asked = own.tasks["long_likelihood"].requests[first][0]
    over = len(tokenizer("".join(asked.args)).input_ids) - (length + 1)
    assert f"{first} by {over}" in cut["long_likelihood"]
    asked = own.tasks["long_generation"].requests[first][0]
    over = len(tokenizer(asked.args[0]).input_ids) - (length - 4)
    assert f"{first} by {over}" in cut["long_generation"], "room is left for what is generated"
