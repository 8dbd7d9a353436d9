"""Workers in processes: the rows of one worker, whatever dies on the way."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import SetupError
from evomerge.evaluation import Objective, Term
from evomerge.optimizers.cma_es import CmaEs
from evomerge.recipes import Recipe
from evomerge.search import Plan, Study, one_stage
from evomerge.store import Store, StudyFacts
from evomerge.workers import Job, Limits, Pool, ProcessPool
from tests.support.coded_workers import alive, until
from tests.support.faulty_workers import Blocked, Company, Deadly, drive, fails_to_open
from tests.support.toy import REPO, ToyPool, environment, results, stored_rows, weight_space

ITEMS = {"first": ("a", "b", "c")}
QUICK = Limits(backoff=0.01, longest_backoff=0.05)
POISON = "poison: 3 worker processes died while it was evaluated"
SPACE = weight_space()


def recipes(count: int) -> list[Recipe]:
    return [SPACE.decode([i / 10] * len(SPACE.axes)) for i in range(count)]


def jobs(count: int) -> list[Job]:
    return [Job(i, recipe, ITEMS) for i, recipe in enumerate(recipes(count))]


def test_each_job_is_answered_once_by_several_processes(tmp_path: Path) -> None:
    with ProcessPool(functools.partial(Deadly, tmp_path), 2) as pool:
        found = results(pool, jobs(12))
        assert pool.result() is None
    assert found == results(ToyPool(), jobs(12))
    assert str(os.getpid()) not in {file.name.split(".")[1] for file in tmp_path.iterdir()}


def study(folder: Path, pool: Pool) -> dict[str, list[dict[str, Any]]]:
    ids = {
        role: {"first": tuple(f"{role}{i}" for i in range(30))} for role in ("search", "validation", "test")
    }
    plan = Plan(
        stages=one_stage(SPACE, lambda start: CmaEs(start, 0.2, population=6, seed=1), 18),
        baselines=[],
        objective=Objective((Term("first"),)),
        items=ids,
        per_generation=10,
        finalists=3,
        seed=1,
    )
    from evomerge.spaces import baselines

    plan = Plan(**{f: getattr(plan, f) for f in plan.__dataclass_fields__} | {"baselines": baselines(SPACE)})
    folder.mkdir()
    with Store.open(folder / "study.db", write=True) as store:
        store.begin(
            "toy", 1, "study: toy", {}, StudyFacts.from_json({"tasks": {"first": "x"}, "versions": {}})
        )
        Study(plan, store, pool).run()
    return stored_rows(folder / "study.db")


def test_a_study_has_the_rows_of_one_worker(tmp_path: Path) -> None:
    (tmp_path / "marks").mkdir()
    with ProcessPool(functools.partial(Deadly, tmp_path / "marks"), 2) as pool:
        assert study(tmp_path / "two", pool) == study(tmp_path / "one", ToyPool())


def test_a_process_that_dies_loses_no_candidate(tmp_path: Path) -> None:
    work = jobs(8)
    with ProcessPool(functools.partial(Deadly, tmp_path, (), work[3].recipe.id), 2) as pool:
        assert results(pool, work) == results(ToyPool(), work)
    assert (tmp_path / "died").exists(), "one did die"


def test_a_candidate_that_kills_every_process_fails_and_the_others_do_not(tmp_path: Path) -> None:
    work = jobs(5)
    with ProcessPool(functools.partial(Deadly, tmp_path, (work[2].recipe.id,)), 1) as pool:
        found = [evaluation for _, evaluation in results(pool, work)]
    wanted = [evaluation for _, evaluation in results(ToyPool(), work)]
    assert [e.error for e in found] == [
        None,
        None,
        "poison: 3 worker processes died while it was evaluated",
        None,
        None,
    ]
    assert [e for e in found if e.error is None] == [e for e in wanted if e.recipe_id != work[2].recipe.id]


def test_a_worker_that_cannot_be_opened_is_said_at_the_start() -> None:
    with pytest.raises(SetupError, match=r"no worker could be started, \d+ tries; .* because: no model here"):
        ProcessPool(fails_to_open, 2)


def test_a_drained_pool_gives_what_is_in_flight_and_goes_on(tmp_path: Path) -> None:
    with ProcessPool(functools.partial(Deadly, tmp_path), 1) as pool:
        pool.submit(jobs(200))
        pool.result()
        pool.drain()
        left = pool.out
        assert left < 100
        assert len([pool.result() for _ in range(left)]) == left
        assert pool.result() is None
        assert len(list(tmp_path.iterdir())) == left + 1
        assert [e.error for _, e in results(pool, jobs(2))] == [None, None], "the pool goes on"


def test_a_slow_innocent_beside_candidates_that_kill_their_processes_is_scored(tmp_path: Path) -> None:
    work = jobs(4)
    slow, deadly = work[0].recipe.id, work[1].recipe.id
    with ProcessPool(functools.partial(Company, tmp_path, (deadly,), slow), 2, QUICK) as pool:
        found = {job.slot: evaluation for job, evaluation in results(pool, work)}
        told = pool.attempts()
    assert found[0] == results(ToyPool(), work)[0][1]
    assert found[1].error == POISON
    assert [a.cause for a in told if a.recipe_id == slow] == ["done"], "it is begun once"
    assert [a.recipe_id for a in told if a.cause == "died"] == [deadly] * 3


def test_a_study_with_deadly_candidates_has_the_rows_of_one_worker(tmp_path: Path) -> None:
    from evomerge.spaces import baselines

    deadly = (baselines(SPACE)[3].recipe.id,)
    stored = []
    for workers in (1, 2):
        marks = tmp_path / f"marks{workers}"
        marks.mkdir()
        with ProcessPool(functools.partial(Company, marks, deadly), workers, QUICK) as pool:
            stored.append(study(tmp_path / str(workers), pool))
    assert stored[0] == stored[1]
    assert sum(row["error"] == POISON for row in stored[0]["evaluations"]) == 3


def test_a_stop_does_not_wait_for_a_worker_that_opens(tmp_path: Path) -> None:
    with ProcessPool(functools.partial(Blocked, tmp_path), 1, QUICK) as pool:
        pool.submit(jobs(3))
        until(
            lambda: pool.result(0.1) is None and list(tmp_path.glob("blocked.*")) != [], "a worker that opens"
        )
        assert pool.out == 3
        pool.drain()
        assert pool.out == 0
        assert pool.result() is None


OPENS = """
import functools, sys
from pathlib import Path
from evomerge.cli.progress import stop_while_opening
from evomerge.workers import ProcessPool
from tests.support.faulty_workers import Blocked

if __name__ == "__main__":
    with stop_while_opening():
        ProcessPool(functools.partial(Blocked, Path(sys.argv[1]), False), 2)
"""


def test_sigterm_is_answered_while_the_first_workers_open(tmp_path: Path) -> None:
    script = tmp_path / "opens.py"
    script.write_text(OPENS)
    driver = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        cwd=REPO,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    until(
        lambda: len(list(tmp_path.glob("blocked.*"))) == 2 or driver.poll() is not None, "workers that open"
    )
    driver.terminate()
    try:
        _, err = driver.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        driver.kill()
        pytest.fail("it waits for workers that never open")
    assert driver.returncode == 75, err
    assert "stopped while opening" in err
    pids = [int(file.name.split(".")[1]) for file in tmp_path.glob("blocked.*")]
    until(lambda: not any(alive(pid) for pid in pids), "the end of the workers")


def test_every_try_is_told_with_its_end(tmp_path: Path) -> None:
    work = jobs(5)
    with ProcessPool(functools.partial(Deadly, tmp_path, (work[2].recipe.id,), work[0].recipe.id), 1) as pool:
        results(pool, work)
        told = pool.attempts()
        assert pool.attempts() == []
    ends = {
        job.recipe.id: [(a.number, a.cause) for a in told if a.recipe_id == job.recipe.id] for job in work
    }
    assert ends[work[2].recipe.id][-3:] == [(1, "died"), (2, "died"), (3, "died")]
    assert ends[work[4].recipe.id][-1][1] == "done"
    assert all(a.seconds >= 0 and a.pid and a.host for a in told if a.cause == "done")


def test_the_processes_end_with_a_driver_that_is_killed(tmp_path: Path) -> None:
    import multiprocessing

    driver = multiprocessing.get_context("spawn").Process(target=drive, args=(tmp_path, jobs(20)))
    driver.start()
    while not (pid := next((f.name.split(".")[1] for f in tmp_path.iterdir() if f.name.count(".") == 1), "")):
        time.sleep(0.05)
    driver.kill()
    driver.join()
    for _ in range(200):
        if not alive(int(pid)):
            return
        time.sleep(0.05)
    pytest.fail("the worker outlived its driver")
