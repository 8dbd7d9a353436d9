"""The execution of a job: what comes before scoring is done apart; an error of the machine is told as one."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest

from evomerge.checkpoints import Checkpoint
from evomerge.errors import CandidateError, CheckpointError
from evomerge.workers import POOLS, InProcessPool, Job, Limits, PoolSettings
from evomerge.workers.machine_errors import is_only_machines
from tests.support.coded_workers import FINE, jobs
from tests.support.faulty_workers import ParentChanged
from tests.support.logit_tasks import ITEMS, Logits, recipe, worker
from tests.support.toy import results


def test_what_is_prepared_is_scored_as_without_that(parents: dict[str, Checkpoint]) -> None:
    plain, apart = worker(parents), worker(parents)
    for weight, prepared in ((0.1, 0.1), (0.7, 0.7), (0.7, 0.2), (0.3, None), (0.3, 0.3)):
        if prepared is not None:
            apart.prepare(recipe(prepared), ITEMS)
        ours, theirs = apart.evaluate(recipe(weight), ITEMS), plain.evaluate(recipe(weight), ITEMS)
        assert (ours.items, ours.metrics, ours.costs) == (theirs.items, theirs.metrics, theirs.costs)
        assert set(ours.seconds) == {"merge", "score"}


def test_what_cannot_be_prepared_is_the_error_of_its_evaluation(parents: dict[str, Checkpoint]) -> None:
    one = worker(parents)
    one.builder.build = _raises  # type: ignore[method-assign]
    one.prepare(recipe(), ITEMS)
    assert one.evaluate(recipe(), ITEMS).error == "this cannot be merged"


def _raises(of: Any, **how: Any) -> Any:
    raise CandidateError("this cannot be merged")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EMFILE, errno.ENOMEM])
@pytest.mark.parametrize("hidden", [False, True])
def test_an_error_of_the_machine_is_told_though_another_hides_it(
    number: int, hidden: bool, parents: dict[str, Checkpoint]
) -> None:
    def fails() -> None:
        evaluator.before = lambda: None
        try:
            raise OSError(number, os.strerror(number))
        except OSError as error:
            raise CandidateError("the cache cannot be written") from (None if hidden else error)

    evaluator = Logits(fails)
    error = str(worker(parents, evaluator).evaluate(recipe(), ITEMS).error)
    assert error.startswith("the cache cannot be written (because of OSError: [Errno ")
    assert is_only_machines(error)


def test_a_candidate_of_the_real_worker_is_scored_when_the_disk_has_room_again(
    parents: dict[str, Checkpoint],
) -> None:
    def fails() -> None:
        full.append(1)
        if len(full) < 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    full: list[int] = []
    pool = InProcessPool(worker(parents, Logits(fails)), Limits(backoff=0.0))
    ((_, evaluation),) = results(pool, [Job(0, recipe(), ITEMS)])
    assert evaluation.error is None
    assert [a.cause for a in pool.attempts()] == ["failed", "failed", "failed", "done"]


@pytest.mark.parametrize("name", ["in-process", "processes"])
def test_a_parent_that_was_changed_ends_the_search_and_is_no_candidates_failure(
    name: str,
) -> None:
    pool = POOLS[name].open(PoolSettings(ParentChanged(), ParentChanged, workers=2))
    try:
        pool.submit(jobs(FINE, FINE))
        with pytest.raises(CheckpointError, match="was changed"):
            pool.result()
    finally:
        pool.close()
