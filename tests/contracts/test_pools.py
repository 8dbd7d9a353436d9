"""The contract of every pool of the registry: each job is answered once, failures are values, and closing
ends it.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from evomerge.evaluation import Evaluation, GradientRequest, Slopes
from evomerge.workers import POOLS, Job, Pool, PoolSettings
from tests.support.coded_workers import FINE, ITEMS, NAN, Coded, every, jobs, recipe, toy
from tests.support.toy import REPO, environment

NAMES = [pytest.param(name, marks=[pytest.mark.cluster] if name == "ray" else [], id=name) for name in POOLS]


def opened(name: str, folder: Path) -> Pool:
    """A pool of two workers, where it can have several."""
    settings = PoolSettings(
        Coded(folder), functools.partial(Coded, folder), workers=2, address="local", cpus=0.5
    )
    return POOLS[name].open(settings)


@pytest.fixture(scope="module", params=NAMES)
def pool(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """One pool of a kind for all tests, which leave nothing out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")
        shared = opened(request.param, tmp_path_factory.mktemp("marks"))
        yield shared
        shared.close()


def test_each_job_is_answered_once_with_its_evaluation(pool: Pool) -> None:
    work = jobs(*[FINE] * 12)
    pool.submit(work)
    assert pool.out == 12
    assert every(pool) == {job.slot: toy(job) for job in work}
    assert pool.out == 0
    pool.attempts()


def test_without_jobs_there_is_no_result(pool: Pool) -> None:
    assert pool.out == 0
    assert pool.result(0.0) is None
    assert pool.result() is None
    pool.submit([])
    assert (pool.out, pool.result()) == (0, None)
    assert pool.attempts() == []


def test_jobs_may_be_handed_over_while_others_are_out(pool: Pool) -> None:
    work = jobs(*[FINE] * 6)
    pool.submit(work[:3])
    first = pool.result(200.0)
    assert first is not None
    pool.submit(work[3:])
    assert pool.out == 5
    others = every(pool)
    assert {first[0].slot, *others} == set(range(6))
    assert {first[0].slot: first[1], **others} == {job.slot: toy(job) for job in work}
    pool.attempts()


def test_a_job_that_asks_for_a_gradient_is_answered_with_slopes(pool: Pool) -> None:
    request = GradientRequest({"first": 0.25})
    pool.submit([Job(0, recipe(FINE, 600), ITEMS, gradient=request), Job(1, recipe(FINE, 600), ITEMS)])
    found = every(pool)
    assert found[0].slopes == Slopes(1.0, {("first", "weight", "a"): 0.25})
    assert found[1] == toy(Job(1, recipe(FINE, 600), ITEMS))
    pool.attempts()


def test_a_slot_may_be_used_again_when_its_result_was_taken(pool: Pool) -> None:
    for number in range(3):
        job = Job(0, recipe(FINE, 500 + number), ITEMS, cost=2.0, turn=number)
        pool.submit([job])
        assert every(pool) == {0: toy(job)}
    pool.attempts()


def test_a_candidate_that_fails_is_a_value_and_the_next_is_scored(pool: Pool) -> None:
    work = jobs(NAN, FINE, NAN, FINE)
    pool.submit(work)
    evaluations = every(pool)
    for slot in (0, 2):
        expected = Evaluation(work[slot].recipe.id, (), {}, {}, error="the model's logits are NaN")
        assert evaluations[slot] == expected
    assert [evaluations[slot] for slot in (1, 3)] == [toy(work[1]), toy(work[3])]
    pool.attempts()


def test_every_attempt_is_reported_once_with_its_end(pool: Pool) -> None:
    work = jobs(FINE, NAN, FINE)
    pool.attempts()
    pool.submit(work)
    every(pool)
    attempts = {attempt.recipe_id: attempt for attempt in pool.attempts()}
    assert pool.attempts() == []
    assert set(attempts) == {job.recipe.id for job in work}
    assert [attempts[job.recipe.id].cause for job in work] == ["done", "failed", "done"]
    assert [attempts[job.recipe.id].error for job in work] == [None, "the model's logits are NaN", None]
    for attempt in attempts.values():
        assert attempt.number == 1
        assert attempt.worker
        assert attempt.host
        assert attempt.pid > 0
        assert attempt.started > 1e9
        assert attempt.seconds >= 0


def test_what_is_drained_is_not_evaluated_and_the_pool_goes_on(pool: Pool) -> None:
    pool.submit([Job(i, recipe(FINE, 600 + i), ITEMS) for i in range(200)])
    first = pool.result(200.0)
    assert first is not None
    pool.drain()
    left = pool.out
    assert left < 199
    assert len(every(pool)) == left
    evaluated = {attempt.recipe_id for attempt in pool.attempts()}
    assert len(evaluated) == left + 1
    work = jobs(FINE, FINE)
    pool.submit(work)
    assert every(pool) == {job.slot: toy(job) for job in work}
    pool.attempts()


@pytest.mark.parametrize("name", NAMES)
def test_a_pool_is_closed_with_jobs_out_and_closed_twice(name: str, tmp_path: Path) -> None:
    pool = opened(name, tmp_path)
    pool.submit(jobs(*[FINE] * 50))
    assert pool.result(200.0) is not None
    pool.close()
    pool.close()


def test_an_entry_says_what_it_is() -> None:
    for name, entry in POOLS.items():
        assert entry.name == name
        assert entry.summary
        module, _, class_name = entry.path.partition(":")
        assert module.startswith("evomerge.workers")
        assert class_name.isidentifier()


def test_a_pool_of_processes_needs_what_opens_a_worker() -> None:
    with pytest.raises(ValueError, match="`make` must be given"):
        POOLS["processes"].open(PoolSettings(Coded.__new__(Coded), workers=2))


def test_the_registry_loads_neither_ray_nor_torch() -> None:
    code = (
        "import sys; import evomerge.workers; from evomerge.workers import POOLS; POOLS['processes'].load(); "
        "print({'ray', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPO,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "set()\n", done.stderr
