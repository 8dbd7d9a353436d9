"""Merges the tensors of a candidate in one launch for each kind of sum, into a live model.

Where the parents and the live model do not move, the addresses of all tensors are one table, made once for a
shape of recipe; a candidate is the numbers beside it. What no table can hold is merged tensor by tensor, with
the same bits: tensors whose rows a vocabulary aligns or weights by row mix, intermediate merges, mergekit's
arithmetic, and methods that are no sums. Whether results are finite is read when it is asked for, so that
nothing waits for the device between a merge and the scores.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from evomerge.errors import EvomergeError
from evomerge.merging.merge_plan import MergePlan
from evomerge.merging.row_weights import row_weights
from evomerge.merging.tensor_plan import DTYPES, Step
from evomerge.merging.weight_map import WeightMap
from evomerge.methods import Method, method
from evomerge.methods.fused import MagnitudeTables, MaskKind, MergeInputs
from evomerge.methods.fused.difference_rows import DifferenceRows
from evomerge.methods.fused.launch_numbers import LaunchNumbers
from evomerge.methods.fused.sum_numbers import MaskKeys, dense_numbers, split_words, sum_numbers
from evomerge.methods.fused.table_sums import write_sums
from evomerge.methods.fused.tensor_table import MOST_ELEMENTS, PADDING, TYPE_CODES, TensorTable, row_layout

if TYPE_CHECKING:
    from evomerge.merging.merge import Merge

Array = np.ndarray[Any, np.dtype[Any]]
Target = tuple[Step, str]
"""A step of a merge and the name on disk of the tensor that it is written to."""
_MOST_PLANS = 8  # tables that are kept; each holds the blocks of a model
_SCRATCH = 1 << 28  # bytes of results that are copied into parameters of another order


@runtime_checkable
class ResidentParent(Protocol):
    """A parent whose tensors stay at their addresses.

    Attributes:
        is_resident: Whether `tensor` gives the same memory at every call.
        is_padded: Whether nothing but zeros follows each tensor up to a multiple of 16 elements.
    """

    is_resident: bool
    is_padded: bool


@dataclass(frozen=True, slots=True)
class _Row:
    """One tensor of a launch. step: its number in the plan; row: in its group of values."""

    step: int
    target: str
    row: int
    inputs: MergeInputs
    out: Tensor
    ranks: tuple[Tensor, ...] | None
    is_scratch: bool
    is_padded: bool


@dataclass(slots=True)
class _Group:
    """Tensors that one launch merges.

    values: number of their group of values in the plan; products: of each row's vectors, for methods that
    combine whole tensors; keys: of the seed that was merged last.
    """

    rule: Method
    values: int
    rows: tuple[_Row, ...]
    at: Array
    table: TensorTable
    differences: DifferenceRows | None
    products: list[list[list[float]]]
    keys: MaskKeys | None = None


@dataclass(frozen=True, slots=True)
class _LaunchPlan:
    """How the tensors of a shape of recipe are merged. plan, weights: kept: they are known by their ids."""

    plan: MergePlan
    weights: WeightMap
    groups: tuple[_Group, ...]
    rest: tuple[int, ...]


@dataclass(slots=True)
class CandidateLaunches:
    """Merges candidates of a search, and tells whether their values are finite when it is asked.

        launches = CandidateLaunches(tables)
        launches.write(merge, targets, weights)
        launches.check()

    Attributes:
        tables: Magnitudes of task vectors that a search shares.
    """

    tables: MagnitudeTables
    _plans: OrderedDict[Hashable, _LaunchPlan] = field(default_factory=OrderedDict)
    _pending: list[tuple[Merge, _Group, Tensor]] = field(default_factory=list)

    def write(self, merge: Merge, targets: Sequence[Target], weights: WeightMap) -> None:
        """Merges tensors into a live model; what is not finite is found by `check`.

        Args:
            merge: The merge.
            targets: What is written where.
            weights: The live model.

        Raises:
            CandidateError: A value of a tensor that is merged by itself is not finite, or one before it.
        """
        launch = self._plan(merge, targets, weights)
        with torch.no_grad():
            rest = list(launch.rest)
            for group in launch.groups:
                if not self._launch(merge, group, weights):
                    rest += [row.step for row in group.rows]
            names = {step.name: name for step, name in targets}
            for number in sorted(rest):
                step = merge.steps[number]
                try:
                    merge.write(step, names[step.name], weights)
                except EvomergeError:
                    self.check(before=number)
                    raise

    def check(self, before: int | None = None) -> None:
        """Reads whether everything that was written is finite; waits for the device.

        Args:
            before: Number of a step; only what comes before it is looked at. None for all.

        Raises:
            CandidateError: A value is not; names the first tensor.
            CheckpointError: Since one of a parent is not.
        """
        pending, self._pending = self._pending, []
        for merge, step in _not_finite(pending):
            if before is None or step < before:
                merge.refuse(merge.steps[step])

    def _launch(self, merge: Merge, group: _Group, weights: WeightMap) -> bool:
        """Merges a group; False where its numbers do not fit one launch."""
        found = self._numbers(merge, group)
        if found is None:
            return False
        numbers, units = found
        of_device = None if units is None else torch.from_numpy(units.astype(np.float32))
        self._pending.append((merge, group, write_sums(group.table, numbers, of_device)))
        for row in group.rows:
            if row.is_scratch:
                weights.put(row.target, row.out)
        return True

    def _numbers(self, merge: Merge, group: _Group) -> tuple[LaunchNumbers, Array | None] | None:
        rule = group.rule
        if rule.task_vector_sum is not None:
            if rule.randomized and (group.keys is None or group.keys.seed != merge.recipe.seed):
                keys = [merge.mask_keys(merge.steps[row.step]) for row in group.rows]
                group.keys = MaskKeys(merge.recipe.seed, split_words(keys))
            values = {name: array[group.at] for name, array in merge.values.arrays(group.values).items()}
            return sum_numbers(
                *(rule.task_vector_sum, values, group.differences, group.keys),
                finds_scales=group.table.device.type != "cpu",
            )
        assert rule.coefficients is not None
        found = []
        for row, products in zip(group.rows, group.products, strict=True):
            coefficients = rule.coefficients(products, merge.values.of(row.step))
            if coefficients is None:
                return None
            found.append(coefficients)
        return dense_numbers(np.array(found, np.float64)), None

    def _plan(self, merge: Merge, targets: Sequence[Target], weights: WeightMap) -> _LaunchPlan:
        key = (id(merge.plan), id(weights), tuple(name for _, name in targets))
        if key not in self._plans:
            self._plans[key] = self._planned(merge, targets, weights)
            if len(self._plans) > _MOST_PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return self._plans[key]

    def _planned(self, merge: Merge, targets: Sequence[Target], weights: WeightMap) -> _LaunchPlan:
        """Divides the tensors among tables, by method and layout."""
        groups: dict[Hashable, list[_Row]] = {}
        rest: list[int] = []
        scratch = 0
        for step, name in targets:
            row = self._row(merge, step, name, weights)
            scratch += row.out.nbytes if row is not None and row.is_scratch else 0
            if row is None or (row.is_scratch and scratch > _SCRATCH):
                rest.append(merge.number(step))
                continue
            layout = row_layout(row.out, row.inputs.base, row.inputs.sources, is_padded=row.is_padded)
            key = (merge.plan.places[row.step][0], layout, row.is_padded)
            groups.setdefault(key, []).append(row)
        made = tuple(self._group(merge, rows) for rows in groups.values())
        return _LaunchPlan(merge.plan, weights, made, tuple(rest))

    def _row(self, merge: Merge, step: Step, name: str, weights: WeightMap) -> _Row | None:
        """A tensor as a row of a table; None where no table can hold it."""
        number = merge.number(step)
        inputs = _resident_inputs(merge, step)
        if inputs is None:
            return None
        assert step.mix is not None
        rule = method(step.mix.method)
        dtype = DTYPES[merge.recipe.out_dtype]
        out = weights.run(name, dtype)
        is_scratch = out is None
        if out is None:
            out = torch.empty(step.info.shape, dtype=dtype, device=inputs.sources[0].device)
        sources, base = list(inputs.sources), inputs.base
        if not _fits([out, *sources, *([] if base is None else [base])]):
            return None
        ranks = self._ranks(rule, inputs)
        if ranks is None:
            return None
        is_padded = _is_padded(merge, step) and (weights.is_padded(name) if not is_scratch else False)
        if out.numel() % PADDING == 0:
            is_padded = True
        elif ranks:
            is_padded = False
        vectors = inputs
        if rule.task_vector_sum is None and base is not None and not rule.base_is_origin:
            vectors = MergeInputs([base, *sources], None, (), [inputs.base_id, *inputs.source_ids])
        return _Row(
            number,
            name,
            merge.plan.places[number][1],
            vectors,
            out,
            ranks or None,
            is_scratch,
            is_padded,
        )

    def _ranks(self, rule: Method, inputs: MergeInputs) -> tuple[Tensor, ...] | None:
        """Ranks for masks that need them, none for others; None where they are not kept."""
        own = rule.task_vector_sum
        if own is None or own.sparsifier is None or own.sparsifier.masks is None:
            return ()
        if own.sparsifier.masks.kind is not MaskKind.RANKED:
            return ()
        found = [self.tables.kept_ranks(pair) for pair in inputs.pairs()]
        ranks = tuple(r for r in found if r is not None and r.dtype == torch.uint16)
        return ranks if len(ranks) == len(found) else None

    def _group(self, merge: Merge, rows: Sequence[_Row]) -> _Group:
        first = rows[0]
        values = merge.plan.places[first.step][0]
        rule = merge.plan.groups[values].rule
        bases = [row.inputs.base for row in rows if row.inputs.base is not None]
        table = TensorTable(
            [row.out for row in rows],
            bases or None,
            [row.inputs.sources for row in rows],
            ranks=None if first.ranks is None else [row.ranks or () for row in rows],
            is_padded=first.is_padded,
        )
        own = rule.task_vector_sum
        differences, products = None, []
        if own is None:
            products = [self._products(row.inputs) for row in rows]
        elif bases:
            differences = DifferenceRows([row.inputs.pairs() for row in rows], self.tables)
        at = np.array([row.row for row in rows], np.intp)
        return _Group(rule, values, tuple(rows), at, table, differences, products)

    def _products(self, inputs: MergeInputs) -> list[list[float]]:
        ids = inputs.source_ids if inputs.base is None else inputs.difference_ids()
        return self.tables.dot_products(inputs.base, inputs.sources, ids)


def _resident_inputs(merge: Merge, step: Step) -> MergeInputs | None:
    """What a step merges, where it stays in place and is a sum of it; else None."""
    mix, recipe = step.mix, merge.recipe
    if mix is None or recipe.policy == "mergekit" or recipe.stages or step.name in merge.plan.resized:
        return None
    rule = method(mix.method)
    own = rule.task_vector_sum
    if (own is None and rule.coefficients is None) or row_weights(step) is not None:
        return None
    if own is not None and own.sparsifier is not None and own.sparsifier.masks is None:
        return None
    if not all(_attribute(merge, model, "is_resident") for model in mix.models):
        return None
    return merge.inputs(step)


def _is_padded(merge: Merge, step: Step) -> bool:
    return step.mix is not None and all(_attribute(merge, m, "is_padded") for m in step.mix.models)


def _attribute(merge: Merge, model: str, name: str) -> bool:
    parent = merge.parents[model]
    return isinstance(parent, ResidentParent) and bool(getattr(parent, name))


def _fits(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors can be a row of a table."""
    return (
        all(t.dtype in TYPE_CODES and t.is_contiguous() for t in tensors)
        and len({t.device for t in tensors}) == 1
        and 0 < tensors[0].numel() <= MOST_ELEMENTS
    )


def _not_finite(pending: Sequence[tuple[Merge, _Group, Tensor]]) -> list[tuple[Merge, int]]:
    """The tensors with values that are not finite, those of the first merge and step first."""
    found = []
    for merge, group, flags in pending:
        found += [(merge, group.rows[row].step) for row in flags.nonzero().reshape(-1).tolist()]
    order = {id(merge): number for number, (merge, _, _) in reversed(list(enumerate(pending)))}
    return sorted(found, key=lambda one: (order[id(one[0])], one[1]))
