"""Relaxed routes in a study: replay-exact wherever it is broken off; evolution goes on from the route."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evomerge.evaluation import Evaluation, GradientRequest, Items, ItemScore, Slopes
from evomerge.optimizers.elitist import Elitist
from evomerge.recipes import Recipe
from evomerge.search import LearnedOpening, Opening, Plan, Relaxation, Stage, Start
from evomerge.spaces.routes import LayerPool, PositionChoiceSpace
from evomerge.spaces.routes.relaxation import RelaxedRouteSpace
from tests.support import learned_search
from tests.support.toy import ToyPool, stored_rows
from tests.support.toy_search import Killed, plan

MODELS, DEPTH = ("a", "b"), 3
BEST = ("b", "a", "b", "a")
"""Embeddings and head, then layers: where the loss is least."""
PLACES = {"embed": None, **{f"layer {layer}": layer for layer in range(DEPTH)}}
STEPS, ITEMS, SHARD, POPULATION = 12, 5, 4, 6
POOL = LayerPool(tuple((model, DEPTH) for model in MODELS), "a", bounds=(2, 5), out_dtype="float32")


class Relaxer(ToyPool):
    """The toy pool, with a loss that is linear in the shares of the models that `BEST` has not."""

    def __init__(self, fails_at: Sequence[int] = (), **hooks: Callable[[int], None]) -> None:
        super().__init__(**hooks)  # type: ignore[arg-type]
        self.fails_at = fails_at
        self.learned = 0

    def slopes(self, recipe: Recipe, items: Items, request: GradientRequest) -> Evaluation:
        self.learned += 1
        if self.learned in self.fails_at:
            return Evaluation(recipe.id, (), {}, {}, error="the gradient of the loss is not finite")
        scores = [ItemScore(task, item, 0.5, 0.5, -0.7) for task, ids in items.items() for item in ids]
        total = sum(request.weights[score.task] * (1 + len(score.item) % 3) for score in scores)
        loss, partials = 0.0, {}
        for tensor, best, mix in zip(PLACES, BEST, (recipe.embeddings, *recipe.layers), strict=True):
            for (model, _), share in zip(mix.sources, dict(mix.params)["weight"], strict=True):  # type: ignore[arg-type]
                slope = total * (model != best)
                partials[tensor, "weight", model] = slope
                loss += slope * float(share)  # type: ignore[arg-type]
        return Evaluation(recipe.id, tuple(scores), {}, {}, slopes=Slopes(loss, partials))


def relaxed_plan(evaluations: int = 12) -> Plan:
    """A search of one stage of relaxed routes."""
    space = RelaxedRouteSpace("a", MODELS, DEPTH, PLACES, out_dtype="float32")
    choices = PositionChoiceSpace(POOL, "none", categorical=True, outer=True)

    def rounded(genome: Sequence[float]) -> Recipe:
        outer, layers = space.route(genome)
        return POOL.recipe(layers, [1.0] * DEPTH, outer)

    descended = LearnedOpening(
        space, STEPS, 0.3, ITEMS, SHARD,
        annealed=lambda step, genome: space.at_step(step, STEPS, genome), name="relaxed",
    )  # fmt: skip

    def optimizer(start: Sequence[float], island: int) -> Any:
        return Elitist(
            start, 1.0, categories=choices.categories, keep_probability=choices.keep_probability,
            population=POPULATION, seed=5,
        )  # fmt: skip

    relaxation = Relaxation(descended, rounded, "relaxed route")

    def open_stage(start: Start) -> Opening:
        return Opening(choices, optimizer, at_best=True, late=0.0, relaxation=relaxation)

    return replace(plan(), stages=(Stage("routes", evaluations, open_stage),))


def run(file: Path, pool: Relaxer, budget: int | None = None) -> str:
    """One process' life of the relaxed search; how it ended."""
    return learned_search.run(file, pool, relaxed_plan(), budget)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[dict[str, Any]]], Relaxer]:
    """(rows, pool) of a search that nothing interrupted."""
    file = tmp_path_factory.mktemp("whole") / "trial" / "study.db"
    pool = Relaxer()
    assert run(file, pool) == "done"
    return stored_rows(file), pool


def test_the_descent_ends_at_the_route_of_least_loss_and_evolution_begins_there(
    whole: tuple[dict[str, list[dict[str, Any]]], Relaxer],
) -> None:
    rows, _ = whole
    scores = {row["id"]: row["score"] for row in rows["evaluations"]}
    steps = [row for row in rows["trials"] if row["origin"] == "learned"]
    assert [row["generation"] for row in steps] == list(range(1, STEPS + 1))
    assert [row["label"] for row in steps] == [f"relaxed, step {number}" for number in range(1, STEPS + 1)]
    assert all(scores[row["evaluation"]] is None for row in steps)
    (relaxed,) = [row for row in rows["trials"] if row["label"] == "relaxed route" and row["slot"] == 1]
    assert relaxed["recipe"] == POOL.recipe(list(zip(BEST[1:], range(DEPTH), strict=True)), [1.0] * 3, "b").id
    assert scores[relaxed["evaluation"]] is not None, "it is scored by the metric"
    assert relaxed["parents"] == f"[{steps[-1]['id']}]"
    evolved = [row for row in rows["trials"] if row["origin"] in ("sampled", "injected")]
    assert len(evolved) == 12
    injected = [row for row in evolved if row["origin"] == "injected"]
    assert relaxed["recipe"] in {row["recipe"] for row in injected}
    first = [row for row in evolved if row["generation"] == STEPS + 1 and row["origin"] == "sampled"]
    assert all(row["parents"] == f"[{relaxed['id']}]" for row in first)


def test_the_relaxed_route_is_validated(whole: tuple[dict[str, list[dict[str, Any]]], Relaxer]) -> None:
    rows, _ = whole
    recipe = next(row["recipe"] for row in rows["trials"] if row["label"] == "relaxed route")
    assert any(row["recipe"] == recipe and row["role"] == "validation" for row in rows["evaluations"])


@pytest.mark.parametrize("how", ["before", "after"])
def test_killed_at_any_evaluation_and_resumed_it_is_the_same_search(
    how: str, whole: tuple[dict[str, list[dict[str, Any]]], Relaxer], tmp_path: Path
) -> None:
    rows, pool = whole
    for at in range(1, len(pool.calls), 11):

        def kill(made: int, at: int = at) -> None:
            if made == at:
                raise Killed

        file = tmp_path / str(at) / "study.db"
        assert run(file, Relaxer(**{how: kill})) == "killed"
        assert run(file, Relaxer()) == "done"
        assert stored_rows(file) == rows, at


def test_rows_do_not_depend_on_the_order_in_which_shards_come(
    whole: tuple[dict[str, list[dict[str, Any]]], Relaxer], tmp_path: Path
) -> None:
    class Backwards(Relaxer):
        def submit(self, jobs: Sequence[Any]) -> None:
            super().submit(list(reversed(jobs)))

    assert run(tmp_path / "trial" / "study.db", Backwards()) == "done"
    assert stored_rows(tmp_path / "trial" / "study.db") == whole[0]


def test_a_budget_that_ends_in_the_descent_leaves_its_route_and_a_larger_one_goes_on(
    whole: tuple[dict[str, list[dict[str, Any]]], Relaxer], tmp_path: Path
) -> None:
    file = tmp_path / "trial" / "study.db"
    shards = -(-2 * ITEMS // SHARD)
    assert run(file, Relaxer(), budget=5 * shards) == "done"
    before = stored_rows(file)["trials"]
    assert max(row["generation"] for row in before) == 5
    assert [row["label"] for row in before if row["origin"] == "mean"] == ["relaxed route"]
    assert run(file, Relaxer()) == "done"

    def searched(rows: list[dict[str, Any]]) -> list[tuple[int, int, str]]:
        return [(r["generation"], r["slot"], r["genome"]) for r in rows if r["genome"]]

    assert searched(stored_rows(file)["trials"]) == searched(whole[0]["trials"])


def test_a_step_that_fails_is_a_value_and_the_descent_goes_on(tmp_path: Path) -> None:
    shards = -(-2 * ITEMS // SHARD)
    file = tmp_path / "trial" / "study.db"
    assert run(file, Relaxer(fails_at=[3 * shards + 1])) == "done"
    rows = stored_rows(file)
    errors = {row["id"]: row["error"] for row in rows["evaluations"]}
    steps = [row for row in rows["trials"] if row["origin"] == "learned"]
    assert [bool(errors[row["evaluation"]]) for row in steps] == [number == 3 for number in range(STEPS)]
    assert any(row["label"] == "relaxed route" for row in rows["trials"])
