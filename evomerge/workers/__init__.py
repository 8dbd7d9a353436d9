"""Where candidates are built and scored: a worker, and pools of workers in this process, in several, on Ray.

A `Pool` takes a `Job` (a recipe and the items to score it on) and returns an evaluation; `POOLS` has all
pools by name.

- `worker.Worker` builds and scores one candidate at a time on one device;
- `InProcessPool` and `ProcessPool` run workers on this machine, `ray_pool.RayPool` on a cluster;
- `worker_memory` places a worker's parents; `parent_holder` keeps them beside the workers of a card;
- `scheduler` decides which worker does which job next, and `failure_policy` what a failure means.

`Worker` and `RayPool` are imported by their path: they load torch and Ray.
"""

from __future__ import annotations

from evomerge.workers.failure_policy import Limits
from evomerge.workers.in_process_pool import InProcessPool
from evomerge.workers.pool import DescribesWorkers, Job, Pool, PoolSettings, Scorer
from evomerge.workers.process_pool import ProcessPool
from evomerge.workers.registry import POOLS, PoolEntry

__all__ = [
    "POOLS",
    "DescribesWorkers",
    "InProcessPool",
    "Job",
    "Limits",
    "Pool",
    "PoolEntry",
    "PoolSettings",
    "ProcessPool",
    "Scorer",
]
