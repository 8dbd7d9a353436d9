"""Whole searches on a real Ray: the rows of one process, whatever dies on the way; a preempted one is gone on
with elsewhere.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evomerge.config import loading
from evomerge.errors import SetupError
from evomerge.evaluation import Evaluation, Items
from evomerge.launch import facts
from evomerge.launch import pool as pool_module
from evomerge.recipes import Recipe
from evomerge.search import Plan
from evomerge.store import Store
from evomerge.workers import Limits
from evomerge.workers.ray_pool.pool import RayPool
from tests.support.landscape import uniform
from tests.support.toy import ToyPool, command, count_rows, environment, evomerge, search_file, stored_rows
from tests.support.toy_search import islands, pipelined, run


class Dying:
    """Scores as the toy does; of the attempts at a recipe and its items each kills the process with a chance
    of `rate`.
    """

    def __init__(self, folder: Path, rate: float) -> None:
        self.folder, self.rate = folder, rate

    def evaluate(self, recipe: Recipe, items: Items) -> Evaluation:
        key = f"{recipe.id}.{uniform(str(items))}"
        attempt = len(list(self.folder.glob(f"{key}.*")))
        (self.folder / f"{key}.{attempt}").touch()
        if uniform("dies", key, attempt) < self.rate:
            os.kill(os.getpid(), signal.SIGKILL)
        return ToyPool().evaluate(recipe, items)


@pytest.mark.cluster
@pytest.mark.parametrize(
    "of", [islands(2, evaluations=12), pipelined(evaluations=12)], ids=["islands", "pipelined"]
)
def test_workers_that_die_change_no_row_and_are_all_told_of(of: Plan, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    limits = Limits(poison=1000, tries=1000, breaker=100_000, strikes=1000, backoff=0.0)
    with RayPool(functools.partial(Dying, marks, 0.08), address="local", workers=2, limits=limits) as pool:
        run(tmp_path / "many" / "study.db", of, pool)
    run(tmp_path / "one" / "study.db", of, ToyPool())
    assert stored_rows(tmp_path / "many" / "study.db") == stored_rows(tmp_path / "one" / "study.db")
    with Store.open(tmp_path / "many" / "study.db") as store:
        told = store.activity.attempts()
        died = [a for a in told if a.cause == "died"]
        assert died, "at this rate some do"
        assert len(told) == len(list(marks.iterdir())), "every attempt is stored, and none is made up"
        assert sum(a.cause == "done" for a in told) == sum(
            v for role, v in store.count_evaluations().items() if role != "failed"
        )
        assert {a.worker for a in told} >= {"w0", "w1"}
        assert all(a.seconds >= 0 and a.host and a.pid for a in told)


LOSES = """
import functools, sys
from pathlib import Path
from tests.support.coded_workers import FINE, KILLS, Coded, jobs
from evomerge.workers.failure_policy import Limits
from evomerge.workers.ray_pool import RayPool

make = functools.partial(Coded, Path(sys.argv[1]))
with RayPool(make, address="local", workers=2, limits=Limits(backoff=0.01)) as pool:
    pool.submit(jobs(KILLS, FINE, FINE))
    while pool.out:
        pool.result(1.0)
    print([a.cause for a in pool.attempts()].count("died"), "died")
"""


@pytest.mark.cluster
def test_what_ray_says_of_a_dead_worker_is_not_printed_among_the_results(tmp_path: Path) -> None:
    """Ray printed '(raylet) A worker died or was killed' on stdout; the pool says it on stderr, with the
    cause.
    """
    done = subprocess.run(
        [sys.executable, "-c", LOSES, str(tmp_path)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "3 died\n"), done.stderr
    assert done.stderr.count("is gone: ") == 3


@pytest.mark.cluster
def test_a_search_that_is_preempted_on_ray_goes_on_in_one_process(tmp_path: Path) -> None:
    files = {}
    for name in ("ray", "one"):
        file = search_file(tmp_path, name, evaluations=8, population=4)
        file.write_text(json.dumps(json.loads(file.read_text()) | {"out_dtype": "float32"}))
        files[name] = file
    root, store = tmp_path / "studies", tmp_path / "studies" / "ray" / "study.db"
    with (tmp_path / "err").open("w") as err:
        driver = subprocess.Popen(
            command("run", files["ray"], "--root", root, "--ray", "local", "--workers", 2),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=err,
        )
        while count_rows(store, "evaluations") < 5:
            assert driver.poll() is None, (tmp_path / "err").read_text()
            time.sleep(0.1)
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(120) == 75
    said = (tmp_path / "err").read_text()
    assert "stopping within 600 s" in said
    assert said.splitlines()[-1].startswith("error[E500] stopped by a signal")
    assert "2 workers" in said, "where workers are placed is said before the search begins"
    with Store.open(store) as paused:
        assert paused.study().state == "paused"  # type: ignore[union-attr]
        assert paused.count_evaluations()["search"] >= 5
        assert {a.worker for a in paused.activity.attempts()} <= {"w0", "w1"}
    done = evomerge("run", files["ray"], "--root", root, "--resume")
    assert done.returncode == 0, done.stderr
    assert evomerge("run", files["one"], "--root", root).returncode == 0
    rows, wanted = stored_rows(store), stored_rows(root / "one" / "study.db")
    assert {t: rows[t] for t in rows if t != "study"} == {t: wanted[t] for t in wanted if t != "study"}
    assert rows["study"][0]["outcome"] == wanted["study"][0]["outcome"]


def test_without_ray_installed_that_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "evomerge.workers.ray_pool", None)
    settings, _ = loading.load(str(search_file(tmp_path, "none")))
    asked = loading.placed(settings, ray="local", workers=None, gpus=None, grace=None, reuse=None)
    with pytest.raises(SetupError, match=r"pip install 'evomerge\[ray\]'"):
        pool_module.open_pool(asked, ToyPool(), functools.partial(Dying, tmp_path, 0.0), 1, print)


@pytest.mark.parametrize(
    ("num_workers", "islands", "population"),
    [(1, 1, 12), (2, 2, 12), (8, 2, 16), (64, 4, 64), (1024, 8, 512)],
)
def test_auto_keeps_the_workers_busy_that_a_study_begins_with(
    num_workers: int, islands: int, population: int, tmp_path: Path
) -> None:
    document = json.loads(search_file(tmp_path, "auto").read_text())
    document["search"] |= {"population": "auto", "islands": "auto"}
    (tmp_path / "auto.yaml").write_text(json.dumps(document))
    settings, _ = loading.load(str(tmp_path / "auto.yaml"))
    assert pool_module.islands(settings, num_workers) == islands
    assert (
        pool_module.population(settings, num_workers, 20)
        == population
        == max(4 + int(3 * 2.9957), -(-4 * num_workers // islands))
    )


def test_where_it_runs_and_what_it_may_use_can_change_and_what_it_is_cannot(tmp_path: Path) -> None:
    document = json.loads(search_file(tmp_path, "same").read_text())
    before = facts._comparable(loading.load(str(tmp_path / "same.yaml"))[0])
    document |= {
        "cluster": {"ray": "auto", "workers": 3, "gpus": 0.5, "grace": 5},
        "budget": {"hours": 2},
        "reuse": ["other"],
    }
    (tmp_path / "same.yaml").write_text(json.dumps(document))
    assert facts._comparable(loading.load(str(tmp_path / "same.yaml"))[0]) == before
    document["search"]["islands"] = 2
    (tmp_path / "same.yaml").write_text(json.dumps(document))
    assert facts._comparable(loading.load(str(tmp_path / "same.yaml"))[0]) != before
