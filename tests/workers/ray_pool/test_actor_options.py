"""What Ray is asked for a worker over several GPUs; no cluster is started."""

from __future__ import annotations

import pytest

from evomerge.workers.ray_pool.actor_fleet import ActorSize, actor_options
from evomerge.workers.ray_pool.cluster import Node, places

NODES = [Node("a" * 56, "one", "10.0.0.1", 64, 8), Node("b" * 56, "two", "10.0.0.2", 64, 6)]


@pytest.mark.parametrize(
    ("gpus", "rooms"), [(1, (8, 6)), (2, (4, 3)), (4, (2, 1)), (8, (1, 0)), (0.5, (16, 12))]
)
def test_workers_of_so_many_gpus_fit_on_nodes_not_across_them(gpus: float, rooms: tuple[int, int]) -> None:
    assert tuple(node.room(1, gpus) for node in NODES) == rooms
    placed = places(NODES, 1, gpus, None, {})
    assert [placed.count(node) for node in NODES] == list(rooms)


def test_all_gpus_of_a_worker_are_asked_of_one_node() -> None:
    options = actor_options(ActorSize(2, 4), NODES[0])
    assert (options["num_cpus"], options["num_gpus"]) == (2, 4)
    strategy = options["scheduling_strategy"]
    assert strategy.node_id == NODES[0].id
    assert not strategy.soft
    assert options["max_restarts"] == options["max_task_retries"] == 0
