"""Where candidates are built and scored: one worker, and pools of workers in this process, in several, on Ray.

`worker.Worker` and `ray_pool.RayPool` are imported by their path: they load torch and Ray.
"""

from __future__ import annotations

from evomerge.workers.failure_policy import Limits
from evomerge.workers.pool import InProcessPool, Job, Pool, Scorer
from evomerge.workers.process_pool import ProcessPool

__all__ = ["InProcessPool", "Job", "Limits", "Pool", "ProcessPool", "Scorer"]
