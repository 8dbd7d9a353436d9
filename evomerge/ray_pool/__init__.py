"""Workers on a Ray cluster: the `Pool` protocol over plain actors. The only room that imports ray; importing it needs ray installed."""

import os

# Ray prints these on stdout, among a search's own results; the pool logs them with their causes. Ray reads the variable as it is imported.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed|The node with node id|killed due to memory pressure")

from evomerge.faults import Limits
from evomerge.ray_pool.pool import RayPool

__all__ = ["Limits", "RayPool"]
