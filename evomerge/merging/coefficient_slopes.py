"""Gradients of a live model's parameters, taken as derivatives by the coefficients of the merge that made it.

Knows nothing of what the loss is: whoever runs a backward pass while the slopes are open has its gradients
turned into dot products. Those of a small model are added up and taken at the end; of a larger one that of
one parameter is alive at a time, of a linear layer or an embedding a few of its rows. Where all sources of a
linear layer are LoRA adapters of the base, its gradient is never made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from types import TracebackType

import torch
from torch import Tensor, nn

from evomerge.errors import CandidateError
from evomerge.merging import step_slopes
from evomerge.merging.low_rank import LowRankTaskVectors, low_rank_task_vectors
from evomerge.merging.merge import Merge
from evomerge.merging.tensor_plan import Step
from evomerge.merging.weight_gradients import GradientTaker, WeightGradients
from evomerge.merging.weight_map import WeightMap
from evomerge.methods import method
from evomerge.methods.task_vector_slopes import has_slopes

_SMALL = 1 << 26  # bytes of gradients that are kept until the end
_BLOCK = 1 << 22  # elements of a linear layer's gradient that are made at once


class CoefficientSlopes:
    """Collects dL/dc = <dL/dW, dW/dc> over every tensor of a merge. A context manager.

        with CoefficientSlopes(merge, weights) as slopes:
            loss(model).backward()
    slopes.partials["model.norm.weight", "weight", "math"]

    Dot products are linear in the gradient: several backward passes add up. They are complete once it is
    left; then the model's parameters require no gradient again.

    Attributes:
        partials: (output tensor, parameter, source model or '') -> derivative so far, in the order in which
            gradients came.
        rows: The same of the weights of rows -> [rows] of float64.
    """

    def __init__(self, merge: Merge, weights: WeightMap, *, adds_up: bool | None = None) -> None:
        """Checks that the derivatives of the merge are known.

        Args:
            merge: What the live model holds.
            weights: The live model.
            adds_up: Whether gradients are kept and taken at the end, each once; None for those of a model
                below 64 MiB, a bound that is the same on every machine.

        Raises:
            CandidateError: A method of the merge is no sum of task vectors with weights; names it.
        """
        self._merge, self._weights = merge, weights
        self._steps: dict[str, Step] = {}
        for step in merge.steps:
            if step.mix is None:
                continue
            if not has_slopes(method(step.mix.method)):
                raise CandidateError(
                    f"'{step.mix.method}' is no sum of task vectors with weights, so its coefficients have "
                    "no known derivative; use task_arithmetic, ties, dare_linear or another sum, or a stage "
                    "of weights"
                )
            self._steps[step.name] = step
        self.partials: dict[tuple[str, str, str], float] = {}
        self.rows: dict[tuple[str, str, str], Tensor] = {}
        size = sum(p.numel() * p.element_size() for p in weights.model.parameters())
        self._adds_up = size <= _SMALL if adds_up is None else adds_up
        self._open = ExitStack()

    def __enter__(self) -> CoefficientSlopes:
        takers: dict[int, GradientTaker] = {}
        for parameter in self._weights.model.parameters():
            names = [name for name in self._weights.fed_by(parameter) if name in self._steps]
            parameter.requires_grad_(bool(names) and parameter.is_floating_point())
            if not parameter.requires_grad:
                continue
            taker = _Taker(self, names, parameter)
            if not self._adds_up or taker.low_rank is not None:
                takers[id(parameter)] = taker
            if self._adds_up:
                self._open.callback(taker, parameter)
                continue
            handle = parameter.register_post_accumulate_grad_hook(taker)  # type: ignore[no-untyped-call]
            self._open.callback(handle.remove)
        if takers:
            self._open.enter_context(WeightGradients(takers))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        parameters = list(self._weights.model.parameters())
        try:
            if error is not None:
                for parameter in parameters:
                    parameter.grad = None
            self._open.close()
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)
                parameter.grad = None

    def take(self, names: Sequence[str], gradient: Tensor, rows: Tensor | slice | None = None) -> None:
        """Adds the derivatives by the coefficients of the tensors that one parameter is made of.

        Args:
            names: The disk tensors that feed the parameter.
            gradient: Of the parameter.
            rows: The rows of the parameter that it is of, where one tensor is all of it; None for all.
        """
        for name in names:
            step = self._steps[name]
            part = gradient if rows is not None else self._weights.gradient(name, gradient)
            self._add(name, step_slopes.slopes(self._merge, step, part, rows))
            for source, slopes in step_slopes.row_slopes(self._merge, step, part).items():
                key = (name, "weight", source)
                self.rows[key] = self.rows[key] + slopes if key in self.rows else slopes

    def take_products(self, name: str, products: Sequence[float]) -> None:
        """Adds the derivatives by the coefficients of one tensor.

        Args:
            name: The tensor.
            products: Dot product of its gradient with the task vector of each source.
        """
        self._add(name, step_slopes.slopes_of_products(self._merge, self._steps[name], products))

    def low_rank(self, names: Sequence[str], device: torch.device) -> LowRankTaskVectors | None:
        """Finds the task vectors of a parameter that are known as products of thin matrices.

        Args:
            names: The disk tensors that feed the parameter.
            device: Where they are wanted.

        Returns:
            Those of all sources; None where they are not all known so.
        """
        found = low_rank_task_vectors(self._steps[names[0]], self._merge.parents, device)
        return found if found is not None and self.goes_by_rows(names) else None

    def _add(self, name: str, slopes: Mapping[tuple[str, str], float]) -> None:
        for (param, source), slope in slopes.items():
            key = (name, param, source)
            self.partials[key] = self.partials.get(key, 0.0) + slope

    def goes_by_rows(self, names: Sequence[str]) -> bool:
        """Whether the gradient of a parameter can be taken some rows at a time.

        Args:
            names: The disk tensors that feed the parameter.

        Returns:
            True if one tensor is all of it, of which no task vector is masked and no sign elected.
        """
        return (
            len(names) == 1
            and self._weights.is_whole(names[0])
            and step_slopes.is_plain(self._merge, self._steps[names[0]])
        )


class _Taker:
    """Takes the gradient of one parameter: whole as its hook, or as the factors of `WeightGradients`."""

    def __init__(self, slopes: CoefficientSlopes, names: list[str], parameter: Tensor) -> None:
        self._slopes, self._names, self._shape = slopes, names, parameter.shape
        self.low_rank = slopes.low_rank(names, parameter.device)

    @cached_property
    def _goes_by_rows(self) -> bool:
        return self._slopes.goes_by_rows(self._names)

    def __call__(self, parameter: nn.Parameter | Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            self._slopes.take(self._names, gradient)

    def take_linear(self, inputs: Tensor, gradients: Tensor) -> None:
        """See `GradientTaker`."""
        if self.low_rank is not None:
            self._slopes.take_products(self._names[0], self.low_rank.products(inputs, gradients))
            return
        if not self._goes_by_rows:
            self._slopes.take(self._names, gradients.T @ inputs)
            return
        count = max(1, _BLOCK // self._shape[1])
        for first in range(0, self._shape[0], count):
            rows = slice(first, first + count)
            self._slopes.take(self._names, gradients[:, rows].T @ inputs, rows)

    def take_lookups(self, ids: Tensor, gradients: Tensor) -> None:
        """See `GradientTaker`. Rows are added up in float32, which thousands of a frequent token ask for."""
        rows, places = torch.unique(ids, return_inverse=True)
        found = torch.zeros(len(rows), self._shape[1], dtype=torch.float32, device=gradients.device)
        found.index_add_(0, places, gradients.float())
        if self._goes_by_rows:
            self._slopes.take(self._names, found, rows)
            return
        whole = torch.zeros(self._shape, dtype=torch.float32, device=gradients.device)
        self._slopes.take(self._names, whole.index_copy_(0, rows, found))
