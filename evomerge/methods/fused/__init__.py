"""One-pass merges of weighted sums of task vectors: linear, task arithmetic, TIES, DARE, breadcrumbs, DELLA.

`merge_tensor` turns a method's values for one tensor into a `WeightedSum` and runs it with the first kernel backend that fits.
"""

from __future__ import annotations

from evomerge.methods.fused.magnitude_tables import MagnitudeTables
from evomerge.methods.fused.merge_tensor import by_angles, merge
from evomerge.methods.fused.weighted_sum import Kind, Level, Pair, Summand, WeightedSum

__all__ = ["Kind", "Level", "MagnitudeTables", "Pair", "Summand", "WeightedSum", "by_angles", "merge"]
