"""One-pass merges of weighted sums of task vectors: linear, task arithmetic, TIES, DARE, breadcrumbs, DELLA.

`merge_tensor` turns a method's values for one tensor into a `WeightedSum` and runs it with the first kernel backend that fits.
"""

from __future__ import annotations

from evomerge.methods.fused.magnitude_tables import Tables
from evomerge.methods.fused.merge_tensor import by_angles, merge
from evomerge.methods.fused.weighted_sum import Kind, Level, Pair, Share, Sum

__all__ = ["Kind", "Level", "Pair", "Share", "Sum", "Tables", "by_angles", "merge"]
