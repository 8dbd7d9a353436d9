"""Nodes that come, go and freeze: the pool on a Ray cluster of several nodes on this machine."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from evomerge.workers.ray_pool.pool import RayPool
from tests.support.coded_workers import FINE, WAITS, Coded, begun, every, jobs, toy, until

pytestmark = pytest.mark.cluster

STORE = 80 << 20
QUICK = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 4,
}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, RayPool, Path]]:
    """A head without room for workers, two nodes with room for one each, and a pool that takes as many as
    fit.
    """
    folder = tmp_path_factory.mktemp("marks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")
        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "include_dashboard": False,
                "object_store_memory": STORE,
                "_system_config": QUICK,
            },
        )
        try:
            for _ in range(2):
                cluster.add_node(num_cpus=1, object_store_memory=STORE)
            with RayPool(functools.partial(Coded, folder), address=cluster.address, replan=0.5) as pool:
                yield cluster, pool, folder
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture
def two(nodes: tuple[Cluster, RayPool, Path]) -> tuple[Cluster, RayPool, Path]:
    """Two workers ready on two nodes, no marks and nothing out."""
    cluster, pool, folder = nodes
    while len(cluster.list_all_nodes()) < 3:
        cluster.add_node(num_cpus=1, object_store_memory=STORE)
    for file in [*folder.glob("*.*.*"), *folder.glob("go")]:
        file.unlink()
    until(lambda: pool._step(0.1) is None and pool.ready == 2, "two workers")
    assert pool.out == 0
    pool.attempts()
    return nodes


def at_work(pool: RayPool, folder: Path, count: int) -> bool:
    return pool.result(0.05) is None and sum(len(begun(folder, WAITS, i)) for i in range(9)) >= count


def host_of(cluster: Cluster, pool: RayPool, name: str) -> Any:
    """The cluster's node that a worker sits on."""
    (record,) = [c for c in pool._actors.records if c.name == name]
    (node,) = [n for n in cluster.list_all_nodes() if n.node_id == record.node.id]
    return node


def test_a_lost_node_loses_no_candidate(
    two: tuple[Cluster, RayPool, Path], caplog: pytest.LogCaptureFixture
) -> None:
    cluster, pool, folder = two
    work = jobs(WAITS, WAITS, *[FINE] * 6)
    pool.submit(work)
    until(lambda: at_work(pool, folder, 2), "both workers at work")
    with caplog.at_level(logging.WARNING):
        cluster.remove_node(host_of(cluster, pool, "w1"), allow_graceful=False)
        until(lambda: pool.result(0.05) is None and pool.ready == 1, "the loss seen")
        (folder / "go").touch()
        assert every(pool, 120) == {job.slot: toy(job) for job in work}
    ended = pool.attempts()
    assert [(a.cause, a.worker) for a in ended if a.cause != "done"] == [("lost", "w1")]
    assert {a.worker for a in ended if a.cause == "done"} == {"w0"}
    (lost,) = [a for a in ended if a.cause == "lost"]
    assert [a.number for a in ended if a.recipe_id == lost.recipe_id and a.cause == "done"] == [2]
    assert "is gone" in caplog.text


def test_a_node_that_joins_is_used(two: tuple[Cluster, RayPool, Path]) -> None:
    cluster, pool, folder = two
    pool.submit(jobs(WAITS, WAITS, WAITS, FINE))
    until(lambda: at_work(pool, folder, 2), "both workers at work")
    joined = cluster.add_node(num_cpus=1, object_store_memory=STORE)
    until(lambda: pool.result(0.05) is not None or pool.ready == 3, "a third worker")
    until(lambda: at_work(pool, folder, 3), "three at work")
    assert len({a.name.split(".")[2] for i in range(3) for a in begun(folder, WAITS, i)}) == 3
    assert pool.describe().count("1 workers") == 3
    (folder / "go").touch()
    assert len(every(pool, 120)) == 4
    cluster.remove_node(joined, allow_graceful=False)
    until(lambda: pool._step(0.05) is None and pool.ready == 2, "the loss of an idle worker")
    assert "lost" not in {a.cause for a in pool.attempts()}, "nothing was in flight there"


def test_where_a_cluster_has_gpus_each_worker_has_one(two: tuple[Cluster, RayPool, Path]) -> None:
    cluster, _, folder = two
    joined = cluster.add_node(num_cpus=0, num_gpus=2, object_store_memory=STORE)
    with RayPool(functools.partial(Coded, folder), address=cluster.address, cpus=0.0) as pool:
        until(lambda: pool._step(0.05) is None and pool.ready == 2, "a worker for each GPU")
        assert {record.location.device for record in pool._actors.records if record.location} == {
            "cuda:0",
            "cuda:1",
        }
        assert "and 1 GPUs each" in pool.describe()
    cluster.remove_node(joined, allow_graceful=False)


def test_a_frozen_node_does_not_hold_up_the_rest(two: tuple[Cluster, RayPool, Path]) -> None:
    cluster, pool, folder = two
    work = jobs(WAITS, WAITS, FINE)
    pool.submit(work)
    until(lambda: at_work(pool, folder, 2), "both workers at work")
    node = host_of(cluster, pool, "w0")
    (worker,) = [c.location.pid for c in pool._actors.records if c.name == "w0" and c.location is not None]
    frozen = [worker, *(info.process.pid for infos in node.all_processes.values() for info in infos)]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    try:
        until(lambda: pool.result(0.05) is None and pool.ready == 1, "the loss seen")
        (folder / "go").touch()
        assert every(pool, 120) == {job.slot: toy(job) for job in work}
        assert [(a.cause, a.worker) for a in pool.attempts() if a.cause != "done"] == [("lost", "w0")]
    finally:
        for pid in frozen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        cluster.remove_node(node, allow_graceful=False)
