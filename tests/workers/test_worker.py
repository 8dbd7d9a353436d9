"""Whatever a candidate breaks is an error in its evaluation, and the next candidate never notices."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from evomerge import reports
from evomerge.checkpoints import Checkpoint
from evomerge.checkpoints.lora import AdaptedCheckpoint
from evomerge.config import loading
from evomerge.errors import CandidateError, CheckpointError, SetupError
from evomerge.evaluation import Evaluation, Evaluator, Items, ItemScore, Role
from evomerge.evaluation.lm_harness.harness import LmHarness
from evomerge.evaluation.lm_harness.task_loading import TaskSpec
from evomerge.launch.prepare import prepare_study
from evomerge.launch.search_request import SearchRequest
from evomerge.merging import merge
from evomerge.merging.model_loading import load_base, load_tokenizer
from evomerge.methods import METHODS, Method, Param
from evomerge.recipes import Filtered, Mix, Recipe, params
from evomerge.store import Store
from evomerge.workers import InProcessPool, Job
from evomerge.workers.worker import Worker
from tests.support.landscape import uniform
from tests.support.logit_tasks import ITEMS, Logits, recipe, worker
from tests.support.toy import in_process, llama, results, search_file, zoo_folder


def values(evaluation: Evaluation) -> tuple[Any, ...]:
    return evaluation.recipe_id, evaluation.items, dict(evaluation.metrics), evaluation.error


@pytest.fixture
def method() -> Iterator[Callable[[Callable[..., torch.Tensor]], str]]:
    """Adds a method to the registry for the test's duration."""
    added: list[str] = []

    def add(kernel: Callable[..., torch.Tensor]) -> str:
        name = f"poison{len(added)}"
        METHODS[name] = Method(
            name, kernel, (Param("weight", 0, 1, 1),), needs_base=True, paper="", summary=""
        )  # type: ignore[arg-type]
        added.append(name)
        return name

    yield add
    for name in added:
        del METHODS[name]


# ---- what a worker is --------------------------------------------------------------------------------------


def test_the_scored_weights_are_the_merged_ones(parents: dict[str, Checkpoint]) -> None:
    own = worker(parents)
    assert own.evaluate(recipe(), ITEMS).error is None
    inside = dict(own.model.named_parameters())
    merged = dict(merge.merged_tensors(recipe(), parents))
    assert set(inside) == set(merged)
    for name, tensor in merged.items():
        assert torch.equal(inside[name], tensor), name


def test_one_worker_after_many_is_a_fresh_one(parents: dict[str, Checkpoint]) -> None:
    one = worker(parents)
    recipes = [recipe(w) for w in (0.1, 0.7, -0.3, 0.7)] + [recipe(0.5, "ties"), recipe(0.5, "dare_ties")]
    fresh = {r: values(worker(parents).evaluate(r, ITEMS)) for r in recipes}
    assert len({f[1] for f in fresh.values()}) == 5
    for r in [*recipes, *recipes[::-1]]:
        assert values(one.evaluate(r, ITEMS)) == fresh[r]


def test_the_seconds_say_where_the_time_went(parents: dict[str, Checkpoint]) -> None:
    evaluation = worker(parents).evaluate(recipe(), ITEMS)
    assert set(evaluation.seconds) == {"merge", "score"}
    assert all(0 < s < 60 for s in evaluation.seconds.values())


def test_the_parents_stay_as_they_are(parents: dict[str, Checkpoint]) -> None:
    before = {name: p.content_hash() for name, p in parents.items()}
    kept = {(m, n): p.tensor(n).clone() for m, p in parents.items() for n in p.tensors}
    one = worker(parents)
    for method in ("task_arithmetic", "dare_ties"):
        one.evaluate(recipe(1.3, method), ITEMS)
    assert {name: p.content_hash() for name, p in parents.items()} == before
    assert all(torch.equal(parents[m].tensor(n), t) for (m, n), t in kept.items())


# ---- poison ------------------------------------------------------------------------------------------------


def nan_at_the_end(
    tensors: Sequence[torch.Tensor], base: torch.Tensor, values: Any, keys: Any
) -> torch.Tensor:
    out = base.clone()
    out.view(-1)[-1] = math.nan
    return out


def raises(tensors: Sequence[torch.Tensor], base: torch.Tensor, values: Any, keys: Any) -> torch.Tensor:
    raise ZeroDivisionError("the kernel divided by nothing")


def spoils_its_inputs(
    tensors: Sequence[torch.Tensor], base: torch.Tensor, values: Any, keys: Any
) -> torch.Tensor:
    for tensor in (*tensors, base):
        tensor.fill_(math.inf)
    return base


def wrong_shape(tensors: Sequence[torch.Tensor], base: torch.Tensor, values: Any, keys: Any) -> torch.Tensor:
    return base.reshape(-1)[:-1]


def huge() -> Recipe:
    """Finite weights whose activations are not."""
    return recipe(at={1: Mix("passthrough", (("a", 1),), None, params({"scale": (1e38,)}))})


Bad = tuple[Recipe, tuple[str, ...]]
"""A recipe that cannot be merged or scored, and words that its error must hold."""


def layer(mix: str, **more: Any) -> Recipe:
    """The good recipe with its layer 1 mixed by another method."""
    given = params(more or {"weight": (0.5, 0.5)})
    return recipe(at={1: Mix(mix, (("a", 1), ("b", 1)), ("base", 1), given)})


def poison(name: str, method: Callable[[Callable[..., torch.Tensor]], str]) -> Bad:
    """A bad recipe by its name; `method` registers a kernel."""
    match name:
        case "a kernel that gives NaN":
            return layer(method(nan_at_the_end)), ("not finite", "model.layers.1", "poison0")
        case "a kernel that raises":
            return layer(method(raises)), ("ZeroDivisionError", "divided by nothing")
        case "a kernel that spoils its inputs":
            return layer(method(spoils_its_inputs)), ("not finite", "model.layers.1")
        case "a kernel of the wrong shape":
            return layer(method(wrong_shape)), ("model.layers.1.input_layernorm.weight", "[7]", "[8]")
        case "weights that overflow":
            return layer("task_arithmetic", weight=(1e38, 1e38), **{"lambda": 1e30}), (
                "not finite",
                "model.layers.1",
                "task_arithmetic of a, b",
            )
        case "weights that cancel":
            given = params({"weight": (1.0, -1.0)})
            return recipe(at={1: Mix("linear", (("a", 1), ("b", 1)), None, given)}), (
                "not finite",
                "model.layers.1",
                "linear of a, b",
            )
        case "activations that overflow":
            return huge(), ("NaN",)
    return unfitting(name)


def unfitting(name: str) -> Bad:
    """A recipe that names what there is not, or values out of range."""
    good = recipe()
    match name:
        case "an unknown method":
            return layer("no_such_method"), ("unknown merge method 'no_such_method'",)
        case "an unknown parameter":
            return layer("task_arithmetic", wieght=(1.0, 1.0)), (
                "no parameter 'wieght'",
                "layer 1",
                "'weight'",
            )
        case "a parameter out of range":
            return layer("ties", density=(1.5, 0.5)), (
                "density must be in [0, 1], got 1.5",
                "layer 1",
                "model a",
            )
        case "a filter out of range":
            return layer("ties", density=(0.5, Filtered((("mlp", -1.0), ("*", 0.5))))), (
                "density must be in [0, 1], got -1",
                "model b",
            )
        case "too many models":
            return layer("slerp", t=0.5), ("slerp takes 1 source", "layer 1")
        case "an unknown model":
            return recipe(at={1: Mix("passthrough", (("nobody", 1),))}), ("nobody",)
        case "a layer that is not there":
            return recipe(at={1: Mix("passthrough", (("a", 9),))}), ("9",)
        case "scales of a layer that is not there":
            return Recipe(
                "base",
                (*good.layers[:1], Mix("passthrough", (("a", 7),))),
                good.embeddings,
                good.head,
                scales=(1.0, 0.5),
            ), ("7",)
        case "an unknown dtype":
            return Recipe("base", good.layers, good.embeddings, good.head, out_dtype="int8"), ("int8",)
    raise AssertionError(name)


POISON = (
    "a kernel that gives NaN",
    "a kernel that raises",
    "a kernel that spoils its inputs",
    "a kernel of the wrong shape",
    "weights that overflow",
    "weights that cancel",
    "activations that overflow",
    "an unknown method",
    "an unknown parameter",
    "a parameter out of range",
    "a filter out of range",
    "too many models",
    "an unknown model",
    "a layer that is not there",
    "scales of a layer that is not there",
    "an unknown dtype",
)


@pytest.mark.parametrize("name", POISON)
def test_a_poisonous_recipe_is_a_sentence_and_the_next_is_unharmed(
    name: str, method: Callable[[Callable[..., torch.Tensor]], str], parents: dict[str, Checkpoint]
) -> None:
    bad, words = poison(name, method)
    one = worker(parents)
    evaluation = one.evaluate(bad, ITEMS)
    assert evaluation.error
    for word in words:
        assert word in evaluation.error
    assert "\n" not in evaluation.error
    assert (evaluation.recipe_id, evaluation.items, dict(evaluation.metrics)) == (bad.id, (), {})
    assert values(one.evaluate(recipe(), ITEMS)) == values(worker(parents).evaluate(recipe(), ITEMS))
    assert {m: p.content_hash() for m, p in parents.items()} == {
        m: Checkpoint(p.path).content_hash() for m, p in parents.items()
    }


def test_a_nan_that_is_not_in_the_weights_is_found_in_the_logits(parents: dict[str, Checkpoint]) -> None:
    """An evaluator that only reads generated text would call it a wrong answer."""

    class Text(Logits):
        def score(self, model: Any, items: Items) -> tuple[tuple[ItemScore, ...], dict[str, float]]:
            """A greedy continuation; NaN logits have a first maximum too."""
            for ids in items.values():
                model.generate(
                    torch.tensor([[int(ids[0])]]), max_new_tokens=3, do_sample=False, pad_token_id=0
                )
            return tuple(ItemScore(t, i, 0.0) for t, ids in items.items() for i in ids), dict.fromkeys(
                items, 0.0
            )

    one = worker(parents, Text())
    assert "NaN" in str(one.evaluate(huge(), ITEMS).error)
    good = one.evaluate(recipe(), ITEMS)
    assert good.error is None
    assert len(good.items) == 4


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            RuntimeError("CUDA error: device-side assert\n\n  and a wall of frames"),
            "RuntimeError: CUDA error: device-side assert and a wall of frames",
        ),
        (CandidateError("the model gives NaN"), "the model gives NaN"),
        (MemoryError("no room"), "MemoryError: no room"),
        (AssertionError(), "AssertionError:"),
        (StopIteration("over"), "StopIteration: over"),
        (
            UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
            "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff in position 0: bad",
        ),
    ],
    ids=lambda e: type(e).__name__ if isinstance(e, Exception) else "",
)
def test_an_evaluator_that_raises_is_a_sentence(
    error: Exception, sentence: str, parents: dict[str, Checkpoint]
) -> None:
    def once() -> None:
        evaluator.before = lambda: None
        raise error

    evaluator = Logits(once)
    one = worker(parents, evaluator)
    bad = one.evaluate(recipe(), ITEMS)
    assert bad.error == sentence
    assert (bad.items, dict(bad.metrics)) == ((), {})
    assert values(one.evaluate(recipe(), ITEMS)) == values(worker(parents).evaluate(recipe(), ITEMS))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_is_a_failure(bad: float, parents: dict[str, Checkpoint]) -> None:
    class Wild(Logits):
        def score(self, model: Any, items: Items) -> tuple[tuple[ItemScore, ...], dict[str, float]]:
            """One metric is no number."""
            scores, metrics = super().score(model, items)
            return scores, metrics | {"second": bad}

    evaluation = worker(parents, Wild()).evaluate(recipe(), ITEMS)
    assert evaluation.error == f"task 'second' gave the metric {bad}"
    assert evaluation.items == ()


def test_a_request_to_stop_is_not_a_failure(parents: dict[str, Checkpoint]) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        worker(parents, Logits(stop)).evaluate(recipe(), ITEMS)


def test_a_pool_yields_every_job_once_in_order(parents: dict[str, Checkpoint]) -> None:
    jobs = [
        Job(7, recipe(), ITEMS),
        Job(3, recipe(method="no_such_method"), ITEMS),
        Job(5, recipe(0.1), {"first": ("1",)}),
    ]
    out = results(InProcessPool(worker(parents)), jobs)
    assert [job for job, _ in out] == jobs
    assert [e.recipe_id for _, e in out] == [job.recipe.id for job in jobs]
    assert [e.error is None for _, e in out] == [True, False, True]
    assert [len(e.items) for _, e in out] == [4, 0, 1]


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    folder = llama(tmp_path / "strange", 0, layers=3)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"model_type": "no_such_architecture"}))
    with pytest.raises(SetupError, match="strange"):
        load_base(Checkpoint(folder), "bfloat16")
    with pytest.raises(SetupError, match=r"tokenizer of .*plain"):
        load_tokenizer(Checkpoint(llama(tmp_path / "plain", 0)))


# ---- with lm-eval, in a real study -------------------------------------------------------------------------


def test_text_of_nan_logits_is_not_a_wrong_answer() -> None:
    zoo = {name: Checkpoint(zoo_folder() / name) for name in ("base", "math")}
    harness = LmHarness(
        [TaskSpec("zoo_arithmetic", splits="declared")], load_tokenizer(zoo["base"]), limits={"test": 10}
    )

    def scaled(by: float) -> Recipe:
        def mix(layer: int | None) -> Mix:
            return Mix(
                "passthrough", (("math", layer),), None, params({"scale": (by if layer == 2 else 1.0,)})
            )

        return Recipe("base", tuple(mix(i) for i in range(6)), mix(None), mix(None))

    one = Worker(zoo, "base", harness, dtype="bfloat16")
    before = one.evaluate(scaled(1.0), harness.items("test"))
    assert before.error is None
    assert before.metrics["zoo_arithmetic"] > 0.5
    assert "NaN" in str(one.evaluate(scaled(1e38), harness.items("test")).error)
    assert values(one.evaluate(scaled(1.0), harness.items("test"))) == values(before)


class Poisoned:
    """An evaluator that fails for some models, by a hash of their weights, during the search."""

    def __init__(self, inner: Evaluator) -> None:
        self.inner = inner

    def items(self, role: Role) -> Items:
        """Those of the evaluator inside."""
        return self.inner.items(role)

    def score(self, model: Any, items: Items) -> tuple[tuple[ItemScore, ...], dict[str, float]]:
        """Raises, gives NaN, or scores."""
        mark = uniform(float(model.get_parameter("model.layers.1.mlp.up_proj.weight").double().sum()))
        if mark < 0.12:
            raise RuntimeError("the evaluator\nbroke")
        scores, metrics = self.inner.score(model, items)
        return scores, dict.fromkeys(metrics, math.nan) if mark < 0.24 else metrics


def test_failed_candidates_are_shown_with_their_cause_and_the_study_ends_well(tmp_path: Path) -> None:
    settings, text = loading.load(str(search_file(tmp_path, "poisoned", evaluations=16)))
    study = prepare_study(SearchRequest(settings, text), tmp_path / "root", wrap=Poisoned)
    with study.store:
        outcome = study.run()
    assert outcome.best["test"] is not None
    with Store.open(tmp_path / "root" / "poisoned" / "study.db") as store:
        failed = [t for t in store.trials() if t.error]
        data = reports.study_summary(store)
        assert data["state"] == "done"
        assert data["failed"] >= len({t.recipe_id for t in failed}) >= 3
        assert {str(t.error) for t in failed} == {
            "RuntimeError: the evaluator broke",
            "task 'zoo_arithmetic' gave the metric nan",
        }
        text = reports.study_markdown(store)
        for t in failed:
            found = reports.candidate(store, t)
            assert found["error"] == t.error
            assert [s["error"] for s in found["scores"] if s["role"] == "search"] == [t.error]
            assert f"candidate {t.id}: {t.error}" in text
        assert not [t for t in failed if t.id == outcome.best["id"]]
    code, out, _ = in_process("show", f"poisoned/{failed[0].id}", "--root", tmp_path / "root")
    assert code == 0
    assert f"failed: {failed[0].error}" in out
    code, _, err = in_process(
        "export", f"poisoned/{failed[0].id}", tmp_path / "out", "--root", tmp_path / "root"
    )
    assert code == 4
    assert err.startswith("error[E310]")
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_is_written_to_under_the_search_is_an_error_too(
    parents: dict[str, Checkpoint], tmp_path: Path
) -> None:
    """Its file was not among those that are looked at."""
    base = parents["base"]
    suffix = next(s for s in base.layout.layer_suffixes(0) if s.endswith("q_proj.weight"))
    module, (rows, columns) = (
        base.layout.layer_name(0, suffix).removesuffix(".weight"),
        base.tensors[base.layout.layer_name(0, suffix)].shape,
    )
    names = (f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight")
    save_file(
        dict(zip(names, (torch.ones(2, columns), torch.ones(rows, 2)), strict=True)),
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]})
    )
    adapted = AdaptedCheckpoint(base, tmp_path)
    assert {*adapted.files} == {*base.files, tmp_path / "adapter_model.safetensors"}
    scorer = Worker({**parents, "a": adapted}, "base", Logits(), dtype="bfloat16")
    assert scorer.evaluate(recipe(), ITEMS).error is None
    os.utime(tmp_path / "adapter_model.safetensors", ns=(1, 1))
    with pytest.raises(
        CheckpointError, match=r"adapter_model.safetensors was changed or deleted while the search reads it"
    ):
        scorer.evaluate(recipe(), ITEMS)


def test_a_parent_that_is_written_to_under_the_search_is_an_error_and_no_candidates(
    parents: dict[str, Checkpoint], tmp_path: Path
) -> None:
    """A file that somebody changes while it is mapped would be another model, and one that is cut off ends
    the process.
    """
    copies = {
        name: Checkpoint(Path(shutil.copytree(parent.path, tmp_path / name)))
        for name, parent in parents.items()
    }
    scorer = worker(copies)
    assert scorer.evaluate(recipe(), ITEMS).error is None
    os.utime(tmp_path / "a" / "model.safetensors", ns=(1, 1))
    with pytest.raises(CheckpointError, match="changed or deleted while the search reads it"):
        scorer.evaluate(recipe(), ITEMS)
