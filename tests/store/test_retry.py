"""Stores in which errors of the machine are results, as evomerge wrote them before, are mended by
--retry-failed: the rows become those of a machine that did not fail.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evomerge.evaluation import Evaluation
from evomerge.search.racing import Race
from evomerge.store import Store, paths
from evomerge.workers import Job
from evomerge.workers.machine_errors import is_worth_retrying
from tests.support.toy import ToyPool, in_process, stored_rows
from tests.support.toy_search import plan, search

ERRORS = (
    "OSError: [Errno 28] No space left on device",
    "poison: 3 worker processes died while it was evaluated",
    "timed out twice; the limit is 4 times the median, and at least 60 s",
)
PLANS = {"plain": plan(), "raced": plan(race=Race((0.5, 1.0), 0.2), evaluations=12)}


class StoresFailures(ToyPool):
    """Gives errors of the machine as results, as pools did. fails: which of its results."""

    def __init__(self, fails: Callable[[int, Job], bool]) -> None:
        super().__init__()
        self._fail, self._made = fails, 0

    def result(self, timeout: float | None = None) -> tuple[Job, Evaluation] | None:
        found = super().result(timeout)
        if found is None or not self._fail(self._made, found[0]):
            self._made += 1
            return found
        self._made += 1
        error = ERRORS[self._made % len(ERRORS)]
        return found[0], Evaluation(found[0].recipe.id, (), {}, {}, error=error)


def role(job: Job) -> str:
    return next(ids[0][0] for ids in job.items.values() if ids)


@pytest.fixture(scope="module", params=list(PLANS))
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """(plan, rows) of a search on a machine that did not fail."""
    file = tmp_path_factory.mktemp("whole") / "trial" / "study.db"
    search(file, ToyPool(), PLANS[request.param])
    return PLANS[request.param], stored_rows(file)


@pytest.mark.parametrize(
    "fails",
    [
        lambda made, job: made in (12, 13, 20) and role(job) == "s",
        lambda made, job: made == 2,
        lambda made, job: role(job) == "v" and made % 3 == 0,
        lambda made, job: role(job) == "t" and made % 2 == 0,
        lambda made, job: made % 7 == 3,
    ],
    ids=["in the search", "a reference", "in validation", "in the test", "everywhere"],
)
def test_stored_errors_of_the_machine_are_taken_out_and_the_rows_are_those_of_one_that_did_not_fail(
    whole: tuple[Any, Any], fails: Callable[[int, Job], bool], tmp_path: Path
) -> None:
    of, rows = whole
    file = tmp_path / "trial" / "study.db"
    search(file, StoresFailures(fails), of)
    assert stored_rows(file) != rows
    with Store.open(file, write=True) as store:
        store.backup()
        before = store.count_evaluations()
        done = store.retry.forget(is_worth_retrying, of.objective.task_values)
        assert done is not None
        assert done.evaluations >= 1
        assert store.count_evaluations()["failed"] == 0
        assert store.check() == "ok"
        row = store.study()
        assert row is not None
        assert row.state == "paused"
    with Store.open(done.copy) as copy:
        assert copy.count_evaluations() == before
    pool = ToyPool()
    search(file, pool, of)
    assert stored_rows(file) == rows
    with Store.open(file) as store:
        assert store.check() == "ok"


def test_a_store_without_such_failures_is_left_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "trial" / "study.db"
    search(file, ToyPool(fails=lambda recipe: int(recipe.id, 16) % 9 == 0), plan())
    rows = stored_rows(file)
    with Store.open(file, write=True) as store:
        assert store.retry.forget(is_worth_retrying, plan().objective.task_values) is None
    assert stored_rows(file) == rows
    assert not file.with_name(paths.BEFORE_RETRY.format(1)).exists()


def test_what_a_kept_evaluation_knows_is_not_scored_again(tmp_path: Path) -> None:
    file = tmp_path / "trial" / "study.db"
    first = StoresFailures(lambda made, job: made == len(plan().baselines) + 10)
    search(file, first, plan())
    with Store.open(file, write=True) as store:
        done = store.retry.forget(is_worth_retrying, plan().objective.task_values)
    assert done is not None
    assert done.generation == 2
    again = ToyPool()
    search(file, again, plan())
    kept = [call for call in first.calls if call in again.calls and call[1]["first"][0].startswith("s")]
    assert len([1 for recipe, _ in kept]) <= 6 + 1 + 3, (
        "of generation 2 only the one that failed, and what follows"
    )


def test_resume_mends_a_study_that_stored_an_error_of_the_machine(finished: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(finished, root)
    file = root / "small" / "study.db"
    rows = stored_rows(file)
    with Store.open(file, write=True) as store:
        row = next(t for t in store.trials() if t.generation == 1)
        with store._file.transaction():
            number = store._file.row("SELECT evaluation FROM trials WHERE id = ?", (row.id,))[0]
            store._file.db.execute("DELETE FROM front WHERE evaluation = ?", (number,))
            empty = {"metrics": "{}", "scores": "[]", "probabilities": None, "logprobs": None}
            store._file.change("evaluations", number, error=ERRORS[0], score=None, reported=None, **empty)
            store._file.change("study", 1, outcome=None, state="paused")  # it names the score of before
    code, _, err = in_process("resume", "small", "--retry-failed", "--root", root)
    assert code == 0, err
    assert "1 evaluations that failed by their machine are scored anew" in err
    assert stored_rows(file) == rows
    code, _, err = in_process("resume", "small", "--retry-failed", "--root", root)
    assert code == 0, err
    assert "no evaluation failed by its machine: nothing is scored anew" in err
