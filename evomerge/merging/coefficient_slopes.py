"""Gradients of a live model's parameters, taken as derivatives by the coefficients of the merge that made it.

Knows nothing of what the loss is: whoever runs a backward pass while the slopes are open has each gradient
turned into dot products and freed, so that one parameter's gradient is alive at a time.
"""

from __future__ import annotations

from types import TracebackType

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from evomerge.errors import CandidateError
from evomerge.merging.merge import Merge
from evomerge.merging.tensor_plan import Step
from evomerge.merging.weight_map import WeightMap
from evomerge.methods import method
from evomerge.methods.task_vector_slopes import has_slopes


class CoefficientSlopes:
    """Collects dL/dc = <dL/dW, dW/dc> over every tensor of a merge. A context manager.

        with CoefficientSlopes(merge, weights) as slopes:
            loss(model).backward()
        slopes.partials["model.norm.weight", "weight", "math"]

    Dot products are linear in the gradient: several backward passes add up. On leaving, the model's
    parameters require no gradient again.

    Attributes:
        partials: (output tensor, parameter, source model or '') -> derivative so far, in the order in which
            gradients came.
        rows: The same of the weights of rows -> [rows] of float64.
    """

    def __init__(self, merge: Merge, weights: WeightMap) -> None:
        """Checks that the derivatives of the merge are known.

        Args:
            merge: What the live model holds.
            weights: The live model.

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
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> CoefficientSlopes:
        for parameter in self._weights.model.parameters():
            names = [name for name in self._weights.fed_by(parameter) if name in self._steps]
            if names and parameter.is_floating_point():
                parameter.requires_grad_(True)
                taker = _Taker(self, names)
                handle = parameter.register_post_accumulate_grad_hook(taker)  # type: ignore[no-untyped-call]
                self._handles.append(handle)
            else:
                parameter.requires_grad_(False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for parameter in self._weights.model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None

    def take(self, names: list[str], gradient: Tensor) -> None:
        """Adds the derivatives by the coefficients of the tensors that one parameter is made of.

        Args:
            names: The disk tensors that feed the parameter.
            gradient: Of the parameter.
        """
        for name in names:
            part = self._weights.gradient(name, gradient)
            for (param, source), slope in self._merge.slopes(self._steps[name], part).items():
                key = (name, param, source)
                self.partials[key] = self.partials.get(key, 0.0) + slope
            for source, slopes in self._merge.row_slopes(self._steps[name], part).items():
                key = (name, "weight", source)
                self.rows[key] = self.rows[key] + slopes if key in self.rows else slopes


class _Taker:
    """The hook of one parameter: hands its gradient over and frees it."""

    def __init__(self, slopes: CoefficientSlopes, names: list[str]) -> None:
        self._slopes, self._names = slopes, names

    def __call__(self, parameter: nn.Parameter | Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            self._slopes.take(self._names, gradient)
