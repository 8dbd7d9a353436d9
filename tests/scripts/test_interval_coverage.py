"""A short run of scripts/validation/interval_coverage.py: whole studies on a landscape whose truth is known;
and a raced study beside its replay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from evomerge.config.schema import RaceConfig
from evomerge.evaluation import Evaluation, Items
from evomerge.recipes import Recipe
from evomerge.search import Opening, Plan, Start, Study
from evomerge.search.racing import Race, run
from evomerge.store import Store, StudyFacts
from evomerge.workers import InProcessPool, Job
from tests.support.toy import REPO, results


def opening(plan: Plan) -> Opening:
    """The only stage of a plan, ready to run."""
    return plan.stages[0].open(Start(plan.baselines[0].recipe, None))


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """scripts/validation/interval_coverage.py with shorter searches."""
    from scripts.validation import interval_coverage

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interval_coverage, "GENERATIONS", 3)
        yield interval_coverage


def test_intervals_hold_the_truth_and_the_best_search_score_does_not(script: ModuleType) -> None:
    """12 studies; the sweep of 400 is the script's.

    Fewer than 8 of the 95 % intervals, or none or all of the 50 %, would be a chance of 1 in 1,500.
    """
    outcomes = script.run(12)
    assert sum(script.covered(outcomes)) >= 8
    assert 1 <= sum(script.covered(outcomes, 0.5)) <= 11
    off = np.array([o.test.mean - o.truth for o in outcomes])
    assert abs(off.mean()) < 4 * off.std() / np.sqrt(len(outcomes))
    assert np.mean([o.best[0] - o.best[1] for o in outcomes]) > 0.03
    assert np.mean([o.best[0] - o.best[1] for o in outcomes]) > 3 * abs(
        np.mean([o.validation - o.truth for o in outcomes])
    )


def test_the_landscape_gives_each_item_its_probability(script: ModuleType) -> None:
    pool, plan = InProcessPool(script.Landscape(7)), script.plan(7)
    space = opening(plan).space
    recipe = space.decode(space.start)
    whole = {
        task: [i for role in script.SIZES for i in script.items(7)[role][task]] for task in script.WEIGHTS
    }
    ((_, found),) = results(pool, [Job(0, recipe, whole)])
    n = sum(script.SIZES.values())
    for task, p in script.truths(recipe).items():
        assert abs(found.metrics[task] - p) < 4 * np.sqrt(p * (1 - p) / n)
    ((_, part),) = results(pool, [Job(0, recipe, {"hard": whole["hard"][5:9]})])
    assert [s.value for s in part.items] == [s.value for s in found.items if s.task == "hard"][5:9], (
        "an item's score is its own"
    )


def test_a_raced_study_settles_what_a_replay_of_its_items_settles(script: ModuleType, tmp_path: Path) -> None:
    """The study's own races, from a store that fills as they go, against races on scores that are all known
    beforehand.
    """
    rules = Race((0.2, 0.4, 0.7, 1.0), 0.2)
    plan = script.plan(3, rules)
    with Store.open(tmp_path / "3.db", write=True) as store:
        store.begin("raced", 3, "", {}, StudyFacts())
        study = Study(plan, store, InProcessPool(script.Landscape(3)))
        study.run()
        trials = [t for t in store.trials() if t.generation > 0 and t.origin != "mean"]
        recipes = {t.id: store.recipe(t.recipe_id) for t in trials}
    pool, partial = InProcessPool(script.Landscape(3)), 0

    def score(raced: Sequence[Recipe], part: Items) -> dict[str, Evaluation]:
        return {
            job.recipe.id: evaluation
            for job, evaluation in results(pool, [Job(i, r, part) for i, r in enumerate(raced)])
        }

    mu = opening(plan).optimizer(opening(plan).space.start, 0).mu
    for number in range(1, script.GENERATIONS + 1):
        own = [t for t in trials if t.generation == number]
        fates = run(
            {t.slot: recipes[t.id] for t in own},
            study.runner.windows.items(number),
            rules,
            plan.objective,
            mu,
            score,
        )
        for t in own:
            fate = fates[t.slot]
            assert (t.dropped, t.whole is None) == (fate.dropped, fate.predicted is None)
            if fate.predicted is not None:
                assert t.score == fate.predicted
                partial += 1
    assert partial > 5, "or nothing was settled early"


def test_a_race_asked_for_without_numbers_is_the_one_that_was_measured() -> None:
    given = RaceConfig()
    assert (given.rungs, given.error) == (Race().rungs, Race().error)
    assert (
        f"eight: {', '.join(f'{r:g}' for r in given.rungs)}" in (REPO / "results" / "racing.md").read_text()
    )
