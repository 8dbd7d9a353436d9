"""What answers a task: the compiled requests, lm-eval's own path on the same model, and soft scores against
plain loops.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.checkpoints import Checkpoint
from evomerge.evaluation.lm_harness.harness import LmHarness
from evomerge.evaluation.lm_harness.task_loading import TaskSpec
from evomerge.merging import model_loading
from tests.support.lm_eval_tasks import (
    CHOOSE,
    GENERATE,
    LIKELIHOOD,
    ROLLING,
    lm_eval_itself,
    load,
    write_task,
)
from tests.support.toy import zoo_folder

KINDS = {
    "trial_generate": GENERATE,
    "trial_choose": CHOOSE,
    "trial_likelihood": LIKELIHOOD,
    "trial_rolling": ROLLING,
}
SAMPLE = GENERATE | {
    "generation_kwargs": {"until": ["\n"], "do_sample": True, "temperature": 1.0, "max_gen_toks": 4}
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return model_loading.load_tokenizer(Checkpoint(zoo_folder() / "base"))


@pytest.fixture(scope="module")
def model() -> Any:
    return model_loading.load_base(Checkpoint(zoo_folder() / "math"), "bfloat16")


@pytest.fixture(scope="module")
def exact() -> Any:
    """In float32: in bfloat16 some CPUs give a row another value in another batch."""
    return model_loading.load_base(Checkpoint(zoo_folder() / "math"), "float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tasks")
    for name, settings in {**KINDS, "trial_sample": SAMPLE}.items():
        write_task(root, name, settings)
    return root


@pytest.fixture(scope="module")
def compiled(folder: Path, tokenizer: Any) -> LmHarness:
    return load(folder, tokenizer, *[TaskSpec(t, splits="declared", soft=True) for t in KINDS])


@pytest.mark.parametrize("role", ["search", "test"])
def test_both_backends_give_the_same_scores(
    role: Any, compiled: LmHarness, folder: Path, tokenizer: Any, exact: Any
) -> None:
    theirs = load(
        folder, tokenizer, *[TaskSpec(t, splits="declared", soft=True) for t in KINDS], backend="lm-eval"
    )
    items = compiled.items(role)
    ours, metrics = compiled.score(exact, items)
    wanted, numbers = theirs.score(exact, items)
    assert [(s.task, s.item) for s in ours] == [(s.task, s.item) for s in wanted]
    assert [s.value for s in ours] == pytest.approx([s.value for s in wanted], rel=1e-5, abs=5e-6)
    assert [s.logprob for s in ours] == pytest.approx([s.logprob for s in wanted], rel=1e-5, abs=5e-6)
    assert metrics == pytest.approx(numbers, rel=1e-5)
    assert set(compiled.backends(exact).values()) == {"compiled"}
    assert set(theirs.backends(exact).values()) == {"lm-eval: asked for by the configuration"}
    assert theirs.optimizations(exact, items) == {}


def test_sampling_goes_to_lm_eval_and_is_said_and_is_the_same_every_time(
    folder: Path, tokenizer: Any, model: Any
) -> None:
    harness = load(
        folder,
        tokenizer,
        TaskSpec("trial_sample", splits="declared"),
        TaskSpec("trial_generate", splits="declared"),
    )
    assert harness.backends(model) == {
        "trial_sample": "lm-eval: do_sample asks for sampling",
        "trial_generate": "compiled",
    }
    state = torch.random.get_rng_state()
    first = harness.samples(model, harness.items("test"))
    assert torch.equal(torch.random.get_rng_state(), state), "torch's generator is left as it was"
    torch.manual_seed(99)
    assert harness.samples(model, harness.items("test")) == first
    texts = {task: [s.output for s in first if s.task == task] for task in ("trial_sample", "trial_generate")}
    assert texts["trial_sample"] != texts["trial_generate"], "it samples"


def test_sampled_answers_are_lm_evals(folder: Path, tokenizer: Any, model: Any) -> None:
    torch.manual_seed(1234)
    values, _, metric = lm_eval_itself(
        model, tokenizer, ["trial_sample"], folder, {"trial_sample": "exact_match"}
    )["trial_sample"]
    harness = load(folder, tokenizer, TaskSpec("trial_sample", splits="declared"))
    scores, metrics = harness.score(model, harness.items("test"))
    assert {s.item: s.value for s in scores} == values
    assert metrics["trial_sample"] == metric


def looped(model: Any, tokenizer: Any, context: str, text: str) -> tuple[float, int]:
    """(log-likelihood of a text after a context in float64 from the model's logits, its tokens)."""
    before = tokenizer.encode(context)
    ids = tokenizer.encode(context + text)
    with torch.no_grad():
        rows = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
    return math.fsum(float(rows[k - 1, ids[k]]) for k in range(len(before), len(ids))), len(ids) - len(before)


@pytest.mark.parametrize("task", ["trial_choose", "trial_likelihood", "trial_generate"])
def test_soft_scores_are_those_of_a_loop(task: str, compiled: LmHarness, tokenizer: Any, exact: Any) -> None:
    items = {task: compiled.items("search")[task][:12]}
    scores, metrics = compiled.score(exact, items)
    for score in scores:
        doc = compiled.tasks[task].requests[score.item][0].doc
        if task == "trial_choose":
            sums = [looped(exact, tokenizer, doc["prompt"], f" {c}") for c in doc["choices"]]
            probability = math.exp(sums[0][0]) / math.fsum(math.exp(s) for s, _ in sums)
            total, tokens = sums[doc["label"]]
        else:
            total, tokens = looped(exact, tokenizer, doc["prompt"], f" {doc['answer']}")
            probability = math.exp(total)
        assert score.probability == pytest.approx(probability, rel=1e-4)
        assert score.logprob == pytest.approx(total / tokens, rel=1e-4, abs=1e-5), (
            "float32 of numbers of about ten"
        )
    for measure in ("probability", "logprob"):
        values = [getattr(s, measure) for s in scores]
        assert metrics[f"{task}:{measure}"] == pytest.approx(math.fsum(values) / len(values), rel=1e-12)
    assert len({s.probability for s in scores}) > 3


def test_generated_tasks_have_soft_scores_only_where_asked(
    folder: Path, tokenizer: Any, compiled: LmHarness
) -> None:
    plain = load(folder, tokenizer, TaskSpec("trial_generate", splits="declared"))
    assert plain.soft_metrics("trial_generate") == ()
    assert compiled.soft_metrics("trial_generate") == ("probability", "logprob")
    assert compiled.soft_metrics("trial_rolling") == ("logprob",)


def test_search_items_are_scored_finer_than_lm_eval_rounds(compiled: LmHarness, model: Any) -> None:
    task = "trial_likelihood"
    found = {
        role: [s.logprob for s in compiled.score(model, {task: compiled.items(role)[task]})[0]]
        for role in ("search", "test")
    }

    def on_the_grid(value: float | None) -> bool:
        return value is not None and float(torch.tensor(value).to(torch.bfloat16)) == pytest.approx(
            value, rel=1e-9
        )

    assert all(on_the_grid(v) for v in found["test"]), (
        "one token each: its log-probability is rounded to the model's type"
    )
    assert not all(on_the_grid(v) for v in found["search"])


def test_a_text_seen_before_is_not_judged_again(
    compiled: LmHarness, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = compiled.tasks["trial_generate"].task
    items = {"trial_generate": compiled.items("validation")["trial_generate"]}
    calls: list[Any] = []
    own = task.process_results
    monkeypatch.setattr(task, "process_results", lambda doc, results: calls.append(doc) or own(doc, results))
    first = compiled.score(model, items)
    assert len(calls) == len(items["trial_generate"])
    assert compiled.score(model, items) == first
    assert len(calls) == len(items["trial_generate"])
