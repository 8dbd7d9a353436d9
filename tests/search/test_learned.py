"""A learned stage: replay-exact wherever it is broken off, its steps free of scores, its end as finalist."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import FailureBudget, Paused
from evomerge.evaluation import Evaluation, GradientRequest, Items, ItemScore, Slopes
from evomerge.methods import method
from evomerge.recipes import Filtered, Recipe
from evomerge.search import LearnedOpening, Plan, Stage, Start, Study
from evomerge.spaces.tensor_weights import WEIGHT, TensorWeight, TensorWeightSpace
from evomerge.store import Store, StudyFacts
from tests.support.toy import ToyPool, stored_rows
from tests.support.toy_search import Killed, plan

NAMES = ("self_attn.q_proj.weight", "mlp.up_proj.weight")
STEPS, ITEMS, SHARD = 8, 5, 4


def tensor_space(depth: int = 3) -> TensorWeightSpace:
    """Two tensors a layer, the embeddings and the final norm, two models."""
    axes = [
        TensorWeight(f"model.layers.{layer}.{text}", text, layer, False, model)
        for layer in range(depth)
        for text in NAMES
        for model in ("a", "b")
    ]
    axes += [TensorWeight("model.embed_tokens.weight", "model.embed_tokens.weight", None, False, "a")]
    axes += [TensorWeight("model.norm.weight", "model.norm.weight", None, True, "b")]
    return TensorWeightSpace(
        method("task_arithmetic"), "base", ("a", "b"), depth, tuple(axes), start_weight=0.5
    )


def target(tensor: str, source: str) -> float:
    """Where the loss of a coefficient is least."""
    return int(hashlib.sha256(f"{tensor}/{source}".encode()).hexdigest()[:4], 16) / 65536


def weight_of(recipe: Recipe, tensor: str, source: str) -> float:
    """A coefficient read from a recipe by the tensor's full name."""
    mix = recipe.embeddings if "embed" in tensor else recipe.head
    if ".layers." in tensor:
        mix = recipe.layers[int(tensor.split(".")[2])]
    setting = dict(mix.params)[WEIGHT][mix.models.index(source)]  # type: ignore[index]
    number = setting.at(tensor) if isinstance(setting, Filtered) else setting
    assert number is not None
    return number


class Learner(ToyPool):
    """The toy pool, with a quadratic loss of each coefficient that items weigh differently."""

    def __init__(self, fails_at: Sequence[int] = (), **hooks: Callable[[int], None]) -> None:
        super().__init__(**hooks)  # type: ignore[arg-type]
        self.fails_at = fails_at
        self.learned = 0

    def slopes(self, recipe: Recipe, items: Items, request: GradientRequest) -> Evaluation:
        self.learned += 1
        if self.learned in self.fails_at:
            return Evaluation(recipe.id, (), {}, {}, error="the gradient of the loss is not finite")
        partials: dict[tuple[str, str, str], float] = {}
        scores, loss = [], 0.0
        for task, ids in items.items():
            for item in ids:
                scores.append(ItemScore(task, item, 0.5, 0.5, -0.7))
                for axis in tensor_space().axes:
                    off = weight_of(recipe, axis.tensor, axis.source) - target(axis.tensor, axis.source)
                    weight = request.weights[task] * (1 + len(item) % 3)
                    loss += weight * off**2
                    key = (axis.tensor, WEIGHT, axis.source)
                    partials[key] = partials.get(key, 0.0) + 2 * weight * off
        return Evaluation(recipe.id, tuple(scores), {}, {}, slopes=Slopes(loss, partials))


def learned_plan(**changes: Any) -> Plan:
    """A search of one learned stage."""
    given = {"steps": STEPS, "rate": 0.2, "items": ITEMS, "shard": SHARD} | changes
    opening = LearnedOpening(tensor_space(), **given)

    def open_stage(start: Start) -> LearnedOpening:
        return opening

    return Plan(
        **{
            **{name: getattr(plan(), name) for name in Plan.__dataclass_fields__},
            "stages": (Stage("learned", given["steps"], open_stage),),
        }
    )


def run(file: Path, pool: Learner, of: Plan | None = None) -> str:
    """One process' life; how it ended."""
    file.parent.mkdir(exist_ok=True)
    with Store.open(file, write=True) as store:
        if store.study() is None:
            store.begin("trial", 5, "study: trial\n", {}, StudyFacts())
        study = Study(of or learned_plan(), store, pool)
        pool.study = study  # type: ignore[attr-defined]
        try:
            study.run()
        except Killed:
            return "killed"
        except Paused:
            return "paused"
    return "done"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[dict[str, Any]]], Learner]:
    """(rows, pool) of a learned search that nothing interrupted."""
    file = tmp_path_factory.mktemp("whole") / "trial" / "study.db"
    pool = Learner()
    assert run(file, pool) == "done"
    return stored_rows(file), pool


def test_each_step_is_a_trial_without_a_score_and_the_end_is_scored_and_validated(
    whole: tuple[dict[str, list[dict[str, Any]]], Learner],
) -> None:
    rows, _ = whole
    scores = {row["id"]: row["score"] for row in rows["evaluations"]}
    steps = [row for row in rows["trials"] if row["origin"] == "learned"]
    assert [row["generation"] for row in steps] == list(range(1, STEPS + 1))
    assert all(scores[row["evaluation"]] is None for row in steps)
    ends = [row for row in rows["trials"] if row["origin"] == "mean"]
    assert ends[0]["label"] == "end of the learned stage"
    assert len(ends) == 3
    assert all(scores[row["evaluation"]] is not None for row in ends)
    for before, after in itertools.pairwise(steps):
        assert after["parents"] == f"[{before['id']}]"


def test_a_step_goes_down_the_loss(whole: tuple[dict[str, list[dict[str, Any]]], Learner]) -> None:
    rows, _ = whole
    genomes = [row["genome"] for row in rows["trials"] if row["origin"] == "learned"]
    space = tensor_space()
    off = [
        sum(
            (value - target(axis.tensor, axis.source)) ** 2
            for value, axis in zip(json.loads(genome), space.axes, strict=True)
        )
        for genome in genomes
    ]
    assert off[-1] < 0.3 * off[0]


def test_a_step_is_cut_into_shards_whose_slopes_are_stored(
    whole: tuple[dict[str, list[dict[str, Any]]], Learner],
) -> None:
    rows, pool = whole
    gradients = [row for row in rows["evaluations"] if row["role"] == "gradient"]
    shards = -(-2 * ITEMS // SHARD)
    assert pool.learned == STEPS * shards
    assert len(gradients) == STEPS * (shards + 1)
    assert all(row["slopes"] for row in gradients)


@pytest.mark.parametrize("how", ["before", "after"])
def test_killed_at_any_evaluation_and_resumed_it_is_the_same_search(
    how: str, whole: tuple[dict[str, list[dict[str, Any]]], Learner], tmp_path: Path
) -> None:
    rows, pool = whole
    for at in range(1, len(pool.calls), 5):

        def kill(made: int, at: int = at) -> None:
            if made == at:
                raise Killed

        file = tmp_path / str(at) / "study.db"
        assert run(file, Learner(**{how: kill})) == "killed"
        assert run(file, Learner()) == "done"
        assert stored_rows(file) == rows, at


def test_a_stop_pauses_between_shards_and_nothing_is_scored_again(
    whole: tuple[dict[str, list[dict[str, Any]]], Learner], tmp_path: Path
) -> None:
    rows, pool = whole
    first = Learner()

    def stop(made: int) -> None:
        if made == 20:
            first.study.dispatch.request_stop()  # type: ignore[attr-defined]

    first._before = stop
    assert run(tmp_path / "trial" / "study.db", first) == "paused"
    second = Learner()
    assert run(tmp_path / "trial" / "study.db", second) == "done"
    assert stored_rows(tmp_path / "trial" / "study.db") == rows
    assert len(first.calls) + len(second.calls) == len(pool.calls)


def test_a_step_that_fails_is_a_value_and_the_next_begins_half_way_back(tmp_path: Path) -> None:
    shards = -(-2 * ITEMS // SHARD)
    assert run(tmp_path / "trial" / "study.db", Learner(fails_at=[3 * shards + 1])) == "done"
    rows = stored_rows(tmp_path / "trial" / "study.db")
    errors = {row["id"]: row["error"] for row in rows["evaluations"]}
    steps = [row for row in rows["trials"] if row["origin"] == "learned"]
    assert [bool(errors[row["evaluation"]]) for row in steps] == [number == 3 for number in range(STEPS)]
    before, failed, after = (json.loads(steps[number]["genome"]) for number in (2, 3, 4))
    assert after == pytest.approx([(x + y) / 2 for x, y in zip(before, failed, strict=True)], abs=2e-4)


def test_a_step_that_failed_by_its_machine_is_taken_out_with_all_that_came_of_it(
    whole: tuple[dict[str, list[dict[str, Any]]], Learner], tmp_path: Path
) -> None:
    file = tmp_path / "trial" / "study.db"
    shards = -(-2 * ITEMS // SHARD)
    assert run(file, Learner(fails_at=[3 * shards + 1])) == "done"
    with Store.open(file, write=True) as store:
        forgotten = store.retry.forget(lambda error: "not finite" in error, plan().objective.task_values)
        assert forgotten is not None
        assert forgotten.generation == 4
    assert run(file, Learner()) == "done"
    assert stored_rows(file) == whole[0]


def test_steps_that_fail_one_after_the_other_end_the_search_with_the_cause(tmp_path: Path) -> None:
    with pytest.raises(FailureBudget, match=r"3 steps .* not finite"):
        run(tmp_path / "trial" / "study.db", Learner(fails_at=range(1, 100)))


def test_rows_do_not_depend_on_the_order_in_which_shards_come(
    whole: tuple[dict[str, list[dict[str, Any]]], Learner], tmp_path: Path
) -> None:
    class Backwards(Learner):
        def submit(self, jobs: Sequence[Any]) -> None:
            super().submit(list(reversed(jobs)))

    assert run(tmp_path / "trial" / "study.db", Backwards()) == "done"
    assert stored_rows(tmp_path / "trial" / "study.db") == whole[0]
