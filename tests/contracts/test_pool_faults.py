"""The contract of every pool on a machine that fails: the rows are those of a machine that does not, whatever
fails in whichever phase; and where it stays ill the search pauses, and no candidate is blamed.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import MachineFault
from evomerge.search import Study
from evomerge.search.racing import Race
from evomerge.store import Store, StudyFacts
from evomerge.workers import POOLS, Limits, Pool, PoolSettings
from tests.support.faulty_workers import FAULTS, PHASES, TIMES, Faulty, failed
from tests.support.toy import ToyPool, stored_rows
from tests.support.toy_search import plan

LIMITS = Limits(
    floor=1.0, first=1.0, look=0.5, opening=60.0, backoff=0.01, longest_backoff=0.05, strikes=1000
)
CASES = [
    pytest.param(pool, fault, marks=[pytest.mark.cluster] if pool == "ray" else [], id=f"{pool}-{fault}")
    for pool in POOLS
    for fault in FAULTS
    if not (pool == "in-process" and fault in ("killed", "frozen"))  # that is the driver's end
]
NAMES = [pytest.param(name, marks=[pytest.mark.cluster] if name == "ray" else [], id=name) for name in POOLS]
Rows = dict[str, list[dict[str, Any]]]


def opened(name: str, make: Callable[[], Faulty], folder: Path, limits: Limits = LIMITS) -> Pool:
    """A pool of two workers, where it can have several."""
    scorer = make() if name == "in-process" else Faulty(folder)
    settings = PoolSettings(scorer, make, workers=2, address="local", cpus=0.5, limits=limits)
    return POOLS[name].open(settings)


def searched(file: Path, open_pool: Callable[[], Pool]) -> Rows:
    """The rows of a raced search, started again as often as the machine pauses it."""
    file.parent.mkdir(exist_ok=True)
    for _ in range(20):
        pool = open_pool()
        try:
            with Store.open(file, write=True) as store:
                if store.study() is None:
                    store.begin("trial", 5, "study: trial\n", {}, StudyFacts())
                Study(plan(evaluations=12, race=Race((0.5, 1.0), 0.2)), store, pool).run()
            return stored_rows(file)
        except MachineFault:
            continue
        finally:
            pool.close()
    pytest.fail("the search pauses again and again")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """The rows of a machine that does not fail."""
    return searched(tmp_path_factory.mktemp("whole") / "trial" / "study.db", ToyPool)


def attempts(file: Path) -> Counter[str]:
    """How often attempts ended by each cause."""
    with Store.open(file) as store:
        return Counter(attempt.cause for attempt in store.activity.attempts())


@pytest.mark.parametrize(("name", "fault"), CASES)
def test_a_machines_fault_in_any_phase_is_stored_as_an_attempt_and_changes_no_row(
    name: str, fault: str, unbroken: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_worker_niceness", "0")
    marks, file = tmp_path / "marks", tmp_path / "trial" / "study.db"
    marks.mkdir()
    (marks / "fault").write_text(fault)
    rows = searched(file, lambda: opened(name, functools.partial(Faulty, marks), marks))
    happened = [phase for phase in PHASES if list(marks.glob(f"{fault}.{phase}.*"))]
    assert happened == list(PHASES)
    assert rows == unbroken
    ends = attempts(file)
    cause = {"killed": "died", "frozen": "frozen"}.get(fault, "failed")
    assert ends[cause] == TIMES * len(PHASES)


@pytest.mark.parametrize(("name", "fault"), [case for case in CASES if "in-process" not in str(case.id)])
def test_a_machines_fault_while_workers_open_is_survived(
    name: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: Rows
) -> None:
    monkeypatch.setenv("RAY_worker_niceness", "0")
    limits = Limits(opening=10.0, look=0.5, backoff=0.01, longest_backoff=0.05)
    make = functools.partial(Faulty, tmp_path, opening=fault)
    assert searched(tmp_path / "trial" / "study.db", lambda: opened(name, make, tmp_path, limits)) == unbroken


@pytest.mark.parametrize("name", NAMES)
def test_a_machine_that_stays_ill_pauses_the_search_and_blames_nobody(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_worker_niceness", "0")
    marks, file = tmp_path / "marks", tmp_path / "trial" / "study.db"
    file.parent.mkdir()
    pool = opened(name, functools.partial(AlwaysIll, marks), marks)
    with Store.open(file, write=True) as store:
        store.begin("trial", 5, "study: trial\n", {}, StudyFacts())
        with pytest.raises(MachineFault, match=r"\[Errno 28\] No space left on device"):
            Study(plan(), store, pool).run()
        pool.close()
        assert store.count_evaluations()["failed"] == 0
        row = store.study()
        assert row is not None
        assert row.state == "paused"
    assert set(attempts(file)) == {"failed"}


class AlwaysIll(Faulty):
    """Its disk is full."""

    def evaluate(self, recipe: Any, items: Any) -> Any:
        """Fails."""
        return failed(recipe, "no-space")


@pytest.mark.parametrize("name", [case for case in NAMES if case.id != "in-process"])
def test_a_worker_that_is_late_to_score_is_not_killed_as_hung(
    name: str, tmp_path: Path, unbroken: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_worker_niceness", "0")
    file = tmp_path / "trial" / "study.db"
    make = functools.partial(Faulty, tmp_path, waits=3 * LIMITS.floor)
    assert searched(file, lambda: opened(name, make, tmp_path)) == unbroken
    assert set(attempts(file)) == {"done"}
