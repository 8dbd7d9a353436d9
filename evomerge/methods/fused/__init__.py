"""One-pass merges: a tensor is merged in one pass over the parents, in C or in torch with the same bits.

`merge_tensor` turns a method's values for one tensor into a `WeightedSum` and runs it with the first kernel
backend that fits: sums of task vectors (linear, task arithmetic, TIES, DARE, breadcrumbs, DELLA).
`combine_by_dot_products` does so for methods whose result is a combination of whole tensors (slerp, karcher,
model stock, ...). `MagnitudeTables` caches what a search asks for again and again. `one_pass.BACKENDS` is the
registry of kernel backends: `c_kernels`, `triton_kernels`, `torch_kernels`. `table_sums.write_sums` merges
all tensors of a `tensor_table.TensorTable` at once by the numbers of a candidate, `LaunchNumbers`.
"""

from __future__ import annotations

from evomerge.methods.fused.magnitude_tables import MagnitudeTables
from evomerge.methods.fused.merge_tensor import (
    MergeInputs,
    combine_by_dot_products,
    merge_tensor,
    weighted_sum_of,
)
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
    "weighted_sum_of",
]
