"""Workers on a Ray cluster: the `Pool` protocol over plain actors. The only room that imports ray; importing it needs ray installed."""

from evomerge.faults import Limits
from evomerge.ray_pool.pool import RayPool

__all__ = ["Limits", "RayPool"]
