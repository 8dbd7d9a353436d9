"""The pool over a real Ray on this machine: the protocol, what it refuses, what it shows, and that nothing
outlives it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from evomerge.checkpoints import Checkpoint
from evomerge.errors import SetupError
from evomerge.workers import InProcessPool, Job
from evomerge.workers.ray_pool import cluster
from evomerge.workers.ray_pool.pool import RayPool
from evomerge.workers.worker import Worker
from tests.support.coded_workers import (
    FINE,
    ITEMS,
    LOGS,
    SECRET,
    WAITS,
    Coded,
    alive,
    begun,
    every,
    jobs,
    opened,
    recipe,
    until,
)
from tests.support.coded_workers import toy as scored
from tests.support.toy import REPO, environment, llama


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cluster with room for four, that the pools of this file join; a folder for each."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("ray")
        patch.setenv("RAY_worker_niceness", "0")
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=80 << 20,
            log_to_driver=False,
            logging_level="error",
        )
        yield folder
        ray.shutdown()


@pytest.fixture(scope="module")
def shared(here: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RayPool, Path]]:
    """A pool of two workers for tests that break none, and the folder of their marks."""
    folder = tmp_path_factory.mktemp("marks")
    with RayPool(functools.partial(Coded, folder), workers=2) as pool:
        yield pool, folder


def test_results_are_those_of_one_process_and_come_from_several(shared: tuple[RayPool, Path]) -> None:
    pool, folder = shared
    assert pool.result(0.0) is None, "nothing is out"
    work = jobs(WAITS, WAITS, *[FINE] * 30)
    (folder / "go").unlink(missing_ok=True)
    pool.submit(work[:20])
    pool.submit(work[20:])  # others are out already
    until(
        lambda: pool.result(0.05) is None and len(begun(folder, WAITS, 0) + begun(folder, WAITS, 1)) == 2,
        "both workers at work",
    )
    assert pool.out == 32
    (folder / "go").touch()
    assert every(pool) == {job.slot: scored(job) for job in work}
    ended = pool.attempts()
    assert pool.attempts() == []
    assert sorted(a.recipe_id for a in ended) == sorted(job.recipe.id for job in work)
    assert {(a.cause, a.number, a.device, a.host, a.error) for a in ended} == {
        ("done", 1, "cpu", socket.gethostname(), None)
    }
    assert {a.worker for a in ended} == {"w0", "w1"}
    assert len({a.pid for a in ended} - {os.getpid()}) == 2
    used = pool.usage()
    assert {name: use.jobs for name, use in used.items()} == {
        name: sum(a.worker == name for a in ended) for name in ("w0", "w1")
    }
    assert all(0 < use.busy < use.alive for use in used.values())
    assert not pool._actors.calls, "finished jobs leave nothing behind"


def test_the_longest_begin_first(shared: tuple[RayPool, Path]) -> None:
    pool, folder = shared
    (folder / "go").unlink(missing_ok=True)
    pool.submit([Job(i, recipe(WAITS, 100 + i), ITEMS) for i in range(2)])
    until(
        lambda: pool.result(0.05) is None and len(begun(folder, WAITS, 100) + begun(folder, WAITS, 101)) == 2,
        "both workers at work",
    )
    pool.submit(
        [Job(10 + i, recipe(FINE, 100 + i), ITEMS, cost) for i, cost in enumerate((1.0, 4.0, 3.0, 2.0))]
    )
    (folder / "go").touch()
    assert len(every(pool)) == 6
    order = sorted(
        (a for a in pool.attempts() if a.recipe_id in {recipe(FINE, 100 + i).id for i in range(4)}),
        key=lambda a: a.started,
    )
    cost = {recipe(FINE, 100 + i).id: cost for i, cost in enumerate((1.0, 4.0, 3.0, 2.0))}
    first, *_, last = (cost[a.recipe_id] for a in order)
    assert first in {4.0, 3.0}, "two workers begin at once, and either may be the first by the clock"
    assert last == 1.0


def test_draining_drops_what_is_not_begun_and_what_is_in_flight_still_comes(
    shared: tuple[RayPool, Path],
) -> None:
    pool, folder = shared
    (folder / "go").unlink(missing_ok=True)
    pool.submit([Job(i, recipe(WAITS, 200 + i), ITEMS) for i in range(8)])
    pool.drain()
    assert pool.out == 2
    (folder / "go").touch()
    assert sorted(every(pool)) == [0, 1]
    assert not any(begun(folder, WAITS, 200 + i) for i in range(2, 8))
    pool.submit(jobs(FINE))
    assert sorted(every(pool)) == [0], "the pool goes on"
    pool.attempts()


def test_signals_are_the_drivers_to_answer(shared: tuple[RayPool, Path]) -> None:
    pool, folder = shared
    (folder / "go").unlink(missing_ok=True)
    pool.submit([Job(0, recipe(WAITS, 300), ITEMS)])
    until(lambda: pool.result(0.05) is None and begun(folder, WAITS, 300) != [], "the worker at work")
    pid = int(begun(folder, WAITS, 300)[0].name.split(".")[2])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(pid, number)
    (folder / "go").touch()
    assert every(pool)[0].error is None
    assert [(a.cause, a.pid) for a in pool.attempts()] == [("done", pid)]


def test_a_failure_comes_with_the_workers_last_lines_and_without_secrets(
    shared: tuple[RayPool, Path],
) -> None:
    pool, _ = shared
    pool.submit(jobs(LOGS, FINE))
    assert every(pool)[0].error == "ValueError: no"
    failed, done = sorted(pool.attempts(), key=lambda a: a.cause != "failed")
    assert (failed.cause, failed.log) == ("failed", "WARNING evomerge.workers.worker: read with token ***")
    assert SECRET not in repr(failed)
    assert done.log == ""


def test_it_says_where_workers_are(shared: tuple[RayPool, Path]) -> None:
    pool, _ = shared
    head, *lines = pool.describe().splitlines()
    assert head == f"Ray {ray.__version__}, joined; workers of 1 CPUs each"
    assert [line.rpartition(": ")[2] for line in lines] == ["2 workers w0, w1"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            {"workers": 4000},
            r"has room for \d+ workers of 1 CPUs and 0 GPUs each, 4000 requested; "
            r"it has .*: \d+ CPUs, 0 GPUs",
        ),
        ({"gpus": 1.0}, r"has room for 0 workers of 1 CPUs and 1 GPUs each, at least 1 requested"),
        ({"gpus": 0.25}, r"has room for 0 workers"),
        ({"cpus": 1e6}, r"has room for 0 workers"),
        ({"gpus": 1.5}, r"whole number or a share of one, got 1.5; take 1 or 2"),
        ({"cpus": 0.0}, r"needs a share of a CPU or a GPU"),
    ],
)
def test_what_the_cluster_cannot_give_is_refused_at_once(
    here: Path, asked: dict[str, float], said: str
) -> None:
    with pytest.raises(SetupError, match=said):
        RayPool(functools.partial(Coded, here.parent), **asked)  # type: ignore[arg-type]


def test_workers_on_other_machines_get_what_decides_scores_and_no_secret(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in (
        "EVOMERGE_THREADS",
        "EVOMERGE_API_KEY",
        "HF_TOKEN",
        "HF_HUB_OFFLINE",
        "WANDB_API_KEY",
        "HOME",
    ):
        monkeypatch.setenv(name, "1")
    found = cluster.environment()
    assert (found["EVOMERGE_THREADS"], found["HF_HUB_OFFLINE"]) == ("1", "1")
    assert not {"EVOMERGE_API_KEY", "HF_TOKEN", "WANDB_API_KEY", "HOME"} & set(found)


def test_no_cluster_at_an_address_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(SetupError, match=r"no Ray cluster answers at 127.0.0.1:1: .*refused"):
        cluster.find("127.0.0.1:1")
    with pytest.raises(SetupError, match=r"is HOST:PORT, got 'ray://x:10001'"):
        cluster.find("ray://x:10001")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:2")
    with pytest.raises(SetupError, match=r"answers at 127.0.0.1:2"):
        cluster.find("auto")


@pytest.mark.parametrize(
    "error",
    [
        Exception("The current node timed out during startup.\nThis could happen because"),
        TimeoutError("no answer"),
        ConnectionError("Could not find any running Ray instance"),
        AssertionError(),
    ],
    ids=repr,
)
def test_a_ray_that_is_slow_to_start_is_one_sentence(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def slow(**options: object) -> None:
        raise error

    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", slow)
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: None)  # of the cluster of other tests
    with pytest.raises(SetupError, match=r"Ray cannot be started or joined: .*; try again") as raised:
        cluster.join("local")
    assert "\n" not in str(raised.value)


def test_workers_that_cannot_be_opened_end_it_with_the_cause(here: Path) -> None:
    with RayPool(broken, workers=1) as pool:
        pool.submit(jobs(FINE))
        with pytest.raises(
            SetupError,
            match="no worker could be started, 3 tries; the first failed because: model 'x' is not here",
        ):
            every(pool)


def broken() -> Coded:
    raise SetupError("model 'x' is not here")


def test_closing_ends_the_workers_and_leaves_the_cluster_to_its_owner(here: Path, tmp_path: Path) -> None:
    with RayPool(functools.partial(Coded, tmp_path), cpus=0.5, workers=1) as pool:
        pool.submit(jobs(FINE))
        every(pool)
        (pid,) = opened(tmp_path)
        assert alive(pid)
    until(lambda: not alive(pid), "the end of the worker")
    pool.close()
    assert ray.is_initialized()


# ---- a worker with a model ---------------------------------------------------------------------------------


def real(folder: Path) -> Worker:
    from tests.support.logit_tasks import Logits

    parents = {name: Checkpoint(folder / name) for name in ("base", "a", "b")}
    return Worker(parents, "base", Logits(), dtype="bfloat16")


def test_a_model_is_scored_as_in_this_process(here: Path, tmp_path: Path) -> None:
    from tests.support.logit_tasks import ITEMS as WORDS
    from tests.support.logit_tasks import recipe as mixed

    base = llama(tmp_path / "base", 0, layers=3)
    for seed, name in enumerate("ab", 1):
        llama(tmp_path / name, seed, layers=3, near=base)
    work = [Job(i, mixed(0.2 * i, "ties" if i % 2 else "task_arithmetic"), WORDS) for i in range(4)]
    work.append(Job(4, mixed(0.5), {"first": ("1", "none")}))
    alone = InProcessPool(real(tmp_path))
    alone.submit(work)
    with RayPool(functools.partial(real, tmp_path), cpus=0.25, workers=1) as pool:
        pool.submit(work)
        found, wanted = every(pool), every(alone)
    assert {i: (e.items, e.metrics, e.error, e.costs) for i, e in found.items()} == {
        i: (e.items, e.metrics, e.error, e.costs) for i, e in wanted.items()
    }
    assert [e.error is None for _, e in sorted(found.items())] == [True] * 4 + [False]


# ---- a driver of its own -----------------------------------------------------------------------------------

DRIVER = """
import functools, json, os, pathlib, signal, sys
import ray
from tests.support.coded_workers import Coded, jobs, FINE, WAITS
from evomerge.workers.ray_pool import RayPool
def mine(number, frame): pass
numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
for number in numbers: signal.signal(number, mine)
folder = pathlib.Path(sys.argv[1])
pool = RayPool(functools.partial(Coded, folder / "marks"), address="local", workers=1)
pool.submit(jobs(FINE))
while pool.out: pool.result(1.0)
own = all(signal.getsignal(n) is mine for n in numbers)
facts = {"own": own, "said": pool.describe(), "at": ray.get_runtime_context().gcs_address}
(folder / "draft").write_text(json.dumps(facts))
(folder / "draft").rename(folder / "facts")
pool.submit(jobs(WAITS))
while True: pool.result(1.0)
"""


def children(pid: int) -> set[int]:
    """All processes that descend from one."""
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(file.parent.name)] = int(file.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, new = set(), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return found


def listening(pids: set[int]) -> list[str]:
    """Addresses, as the kernel writes them, of the TCP sockets that processes listen on."""
    inodes = set()
    for pid in pids:
        for file in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                inodes.add(os.readlink(file).removeprefix("socket:[").removesuffix("]"))
            except OSError:
                continue
    rows = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return [row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes]


@pytest.mark.cluster
def test_a_cluster_of_its_own_is_shut_to_others_and_ends_with_a_driver_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "marks").mkdir()
    token = tmp_path / "secret" / "token"
    plain = {k: v for k, v in environment().items() if not k.startswith("RAY_")}
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path)],
        cwd=REPO,
        env=plain | {"RAY_AUTH_TOKEN_PATH": str(token)},
    )
    try:
        until(
            lambda: (tmp_path / "facts").is_file() and begun(tmp_path / "marks", WAITS, 0) != [],
            "the driver at work",
            240,
        )
        facts = json.loads((tmp_path / "facts").read_text())
        assert facts["own"], "signal handlers are what they were"
        assert "a cluster of its own on this machine" in facts["said"]
        there = children(driver.pid)
        assert opened(tmp_path / "marks") <= there
        bound = listening(there | {driver.pid})
        assert len(bound) > 3
        assert set(bound) <= {"0100007F", "0000000000000000FFFF00000100007F"}, "127.0.0.1, in both spellings"
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
        assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700
        asked = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1])"
        for word, welcome in ((token.read_text(), True), ("0" * 64, False)):
            own = plain | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": word}
            done = subprocess.run(
                [sys.executable, "-c", asked, facts["at"]],
                env=own,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            assert (done.returncode == 0) is welcome, done.stderr
            assert ("AuthenticationError" in done.stderr) is not welcome
    finally:
        driver.kill()
        driver.wait()
    agents = {
        pid for pid in there if b"Agent" in command(pid)
    }  # two of Ray's own, which hold nothing, end a minute later
    until(lambda: not any(alive(pid) for pid in there - agents), "the end of the workers and the cluster")
    for pid in agents:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_the_engine_is_imported_without_ray() -> None:
    code = (
        "import sys; sys.modules['ray'] = None; import evomerge.launch.prepare, evomerge.search.study; "
        "import evomerge.workers.scheduler, evomerge.cli; print('ok')"
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
    assert done.stdout == "ok\n", done.stderr
