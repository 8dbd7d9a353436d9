"""The rows of the fault table that are a worker's, injected into a real Ray on this machine.

Nodes: see test_ray_nodes.py.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from evomerge.evaluation import Attempt, Evaluation
from evomerge.workers import Job, Limits
from evomerge.workers.ray_pool.pool import RayPool
from tests.support.coded_workers import (
    CUDA,
    CUDA_ONCE,
    FINE,
    FREEZES_ONCE,
    GROWS,
    HANGS,
    HANGS_ONCE,
    KILLS,
    KILLS_ONCE,
    NAN,
    RAISES,
    WAITS,
    Coded,
    alive,
    begun,
    every,
    jobs,
    toy,
    until,
)  # fmt: skip

pytestmark = pytest.mark.cluster

LIMITS = Limits(floor=6.0, first=6.0, look=1.0, memory=100 << 20, backoff=0.01, longest_backoff=0.05)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RayPool, Path]]:
    """Two workers, and the folder of their marks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=80 << 20,
            log_to_driver=False,
            logging_level="error",
        )
        folder = tmp_path_factory.mktemp("marks")
        with RayPool(functools.partial(Coded, folder), limits=LIMITS) as pool:
            yield pool, folder
        ray.shutdown()


@pytest.fixture
def pool(shared: tuple[RayPool, Path]) -> Iterator[RayPool]:
    """The pool with both workers ready and no marks; after a test it has nothing out and nothing kept."""
    found, folder = shared
    for file in folder.glob("*.*.*"):
        file.unlink()
    (folder / "go").unlink(missing_ok=True)
    until(lambda: found._step(0.1) is None and found.ready == 2, "two workers")
    found.attempts()
    yield found
    assert found.out == 0
    assert all(call.execution is None for call in found._actors.calls.values())


def run(pool: RayPool, *codes: int) -> tuple[dict[int, Evaluation], list[Attempt]]:
    """Results by slot, each once, and the attempts; checks that candidates that do no harm have what they
    should.
    """
    work = jobs(*codes)
    pool.submit(work)
    found = every(pool, 120)
    ended = pool.attempts()
    assert sorted(found) == list(range(len(codes)))
    for job in work:
        if codes[job.slot] == FINE:
            assert found[job.slot] == toy(job)
    return found, ended


def tries(ended: list[Attempt], job: Job) -> list[Attempt]:
    own = sorted((a for a in ended if a.recipe_id == job.recipe.id), key=lambda a: a.number)
    assert [a.number for a in own] == list(range(1, len(own) + 1))
    return own


def test_a_worker_is_killed(pool: RayPool) -> None:
    work = jobs(KILLS_ONCE)
    found, ended = run(pool, KILLS_ONCE, *[FINE] * 5)
    own = tries(ended, work[0])
    assert [a.cause for a in own] == ["died", "done"]
    assert own[0].pid != own[1].pid
    assert "SYSTEM_ERROR" in str(own[0].error)
    assert found[0] == toy(work[0]), "what it gives is what it would have given"


def test_a_candidate_that_kills_every_worker_is_poison_and_the_others_are_scored(pool: RayPool) -> None:
    found, ended = run(pool, FINE, KILLS, *[FINE] * 6)
    assert found[1].error == "poison: 3 worker processes died while it was evaluated"
    assert Counter(a.cause for a in ended) == {"died": 3, "done": 7}
    assert len({a.pid for a in ended if a.cause == "died"}) == 3


def test_a_hang_is_killed_and_done_elsewhere(pool: RayPool) -> None:
    work = jobs(HANGS_ONCE)
    found, ended = run(pool, HANGS_ONCE, FINE, FINE)
    own = tries(ended, work[0])
    assert [a.cause for a in own] == ["hung", "done"]
    assert own[0].worker != own[1].worker
    assert found[0] == toy(work[0])


def test_a_frozen_process_is_killed_and_its_job_done_elsewhere(pool: RayPool) -> None:
    work = jobs(FREEZES_ONCE)
    found, ended = run(pool, FREEZES_ONCE, FINE)
    own = tries(ended, work[0])
    assert [a.cause for a in own] == ["frozen", "done"]
    assert found[0] == toy(work[0])
    until(lambda: not alive(own[0].pid), "the end of the frozen process")


def test_a_second_time_out_is_a_result(pool: RayPool) -> None:
    found, ended = run(pool, FINE, HANGS, FINE)
    assert str(found[1].error).startswith(
        "timed out twice; the limit is 4 times the median, and at least 6 s"
    )
    assert Counter(a.cause for a in ended) == {"hung": 2, "done": 2}


def test_an_error_of_the_device_is_done_elsewhere_by_new_processes(pool: RayPool) -> None:
    work = jobs(CUDA_ONCE)
    found, ended = run(pool, CUDA_ONCE, *[FINE] * 4)
    own = tries(ended, work[0])
    assert [a.cause for a in own] == ["failed", "done"]
    assert own[0].worker != own[1].worker
    assert found[0] == toy(work[0])
    until(lambda: not alive(own[0].pid), "the end of the process whose device is lost")


def test_the_same_error_at_two_workers_is_the_candidates(pool: RayPool) -> None:
    found, ended = run(pool, CUDA, *[FINE] * 8)
    assert found[0].error == "AcceleratorError: CUDA error: an illegal memory access was encountered"
    own = tries(ended, jobs(CUDA)[0])
    assert [a.cause for a in own] == ["failed", "failed"]
    assert own[0].pid != own[1].pid


def test_nan_and_exceptions_are_results_without_a_second_try(pool: RayPool) -> None:
    found, ended = run(pool, NAN, FINE, RAISES)
    assert found[0].error == "the model's logits are NaN"
    assert found[2].error == "RuntimeError: a worker that does not catch"
    assert len(ended) == 3
    assert len({a.pid for a in ended}) <= 2, "no process was replaced"


def test_a_worker_whose_memory_grew_is_replaced_after_its_result(pool: RayPool) -> None:
    run(pool, *[FINE] * 20)  # every worker has had its first job
    found, ended = run(pool, GROWS)
    assert found[0] == toy(jobs(GROWS)[0])
    assert [a.cause for a in ended] == ["done"]
    until(lambda: pool._step(0.1) is None and not alive(ended[0].pid), "the end of the process that grew")
    run(pool, *[FINE] * 3)


def test_a_whole_generation_that_fails_is_given_back_as_values(pool: RayPool) -> None:
    found, _ = run(pool, *[NAN] * 12)
    assert {e.error for e in found.values()} == {"the model's logits are NaN"}


def test_of_two_results_the_first_wins(
    shared: tuple[RayPool, Path], pool: RayPool, caplog: pytest.LogCaptureFixture
) -> None:
    _, folder = shared
    work = jobs(WAITS)
    pool.submit(work)
    until(lambda: pool.result(0.02) is None and len(begun(folder, WAITS, 0)) == 1, "the first try")
    (worker,) = pool._scheduler.overdue(
        pool._now() + 3600
    )  # as if an hour had passed and the kill did not reach it
    until(lambda: pool.result(0.02) is None and len(begun(folder, WAITS, 0)) == 2, "the second try")
    with caplog.at_level(logging.WARNING):
        (folder / "go").touch()
        result = pool.result(120)
        assert result == (work[0], toy(work[0]))
        until(lambda: pool._step(0.05) is None and not pool._scheduler._open_tries, "the second result")
    assert pool.out == 0
    assert sorted(a.cause for a in pool.attempts()) == ["done", "hung", "late"]
    assert "not deterministic" not in caplog.text
    pool._actors.end(pool._actors.ready[worker.number], pool._now())
