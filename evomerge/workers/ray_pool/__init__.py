"""Workers on a Ray cluster: the `Pool` protocol over plain actors. No other package imports ray.

- `pool.RayPool` is the pool: jobs in, evaluations out;
- `actor_fleet` starts, opens, watches and ends the actors, one for each worker;
- `actor` is what runs in an actor's process;
- `cluster` joins or starts a cluster and says how many workers fit where;
- `ray_errors` says what Ray's errors mean.
"""

import os

# Ray prints these on stdout, among a search's own results; the pool logs them with their causes.
# Ray reads the variable as it is imported.
os.environ.setdefault(
    "RAY_DEDUP_LOGS_SKIP_REGEX",
    "A worker died or was killed|The node with node id|killed due to memory pressure",
)

from evomerge.workers.failure_policy import Limits
from evomerge.workers.ray_pool.pool import RayPool

__all__ = ["Limits", "RayPool"]
