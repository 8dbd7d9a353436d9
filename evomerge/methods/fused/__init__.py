"""One-pass merges of weighted sums of task vectors: linear, task arithmetic, TIES, DARE, breadcrumbs, DELLA.

`merge_tensor` turns a method's values for one tensor into a `WeightedSum` and runs it with the first kernel backend that fits.
"""

from __future__ import annotations

from evomerge.methods.fused.magnitude_tables import MagnitudeTables
from evomerge.methods.fused.merge_tensor import MergeInputs, combine_by_dot_products, merge_tensor
from evomerge.methods.fused.weighted_sum import MaskKind, Summand, TensorPair, TopK, WeightedSum

__all__ = [
    "MagnitudeTables",
    "MaskKind",
    "MergeInputs",
    "Summand",
    "TensorPair",
    "TopK",
    "WeightedSum",
    "combine_by_dot_products",
    "merge_tensor",
]
