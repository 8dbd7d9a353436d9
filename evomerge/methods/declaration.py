"""What a merge method declares about itself. Knows nothing of names, files or dtype policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from evomerge.errors import RecipeError

Values = Mapping[str, float | tuple[float, ...]]
"""Parameter values of one tensor: a float per merge parameter, a tuple with one float per source otherwise."""


Coefficients = Callable[[Sequence[Sequence[float]], Values], Sequence[float] | None]
"""(dot products of all pairs of vectors, values) -> a coefficient for each vector; None where the method needs more."""


class Kernel(Protocol):
    """Merges one tensor. Pure: inputs are left as they are, no I/O, no global generator."""

    def __call__(
        self,
        tensors: Sequence[Tensor],
        base: Tensor | None,
        values: Values,
        keys: Sequence[int],
        *,
        mergekit_compatible: bool = False,
    ) -> Tensor:
        """tensors: one per source, all of one shape and floating dtype; base: same shape or None; keys: one
        signed 64-bit mask key per source. parity: do as mergekit 0.1.5 does, in its order of operations and with its
        faults, where the two differ. Returns a new tensor of that shape and dtype; with parity of a wider one where
        mergekit does.
        """
        ...


@dataclass(frozen=True, slots=True)
class TaskVectorSum:
    """A method that is a sum of (sparsified) task vectors: `evomerge.methods.fused.merge_tensor` merges those in one pass.

    sparsify: which entries of x - base stay: the largest, a random part, a band of magnitudes, or at random by rank.
    elect_sign: sum only what has the sign of the sum. without_base: sum the models themselves.
    """

    sparsify: Literal["largest", "random", "band", "rank"] | None = None
    elect_sign: bool = False
    without_base: bool = False


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter: interval of useful values, default, and whether each model or the whole merge has one.

    low, high: bounds of a search; closed. hard_low, hard_high: outside them the method is undefined.
    flag: the parameter is a switch (1.0 or 0.0) and is never searched. required: mergekit has no default for it.
    digits: decimals of a searched value.
    """

    name: str
    low: float
    high: float
    default: float
    per: Literal["model", "merge"] = "model"
    hard_low: float = -math.inf
    hard_high: float = math.inf
    flag: bool = False
    required: bool = False
    digits: int = 4

    def check(self, value: float, where: str) -> float:
        """The value itself if the method is defined there, else RecipeError."""
        if self.flag and value not in (0, 1):
            raise RecipeError(f"{self.name} is a switch: true or false, got {value:g} ({where})")
        if math.isfinite(value) and self.hard_low <= value <= self.hard_high:
            return value
        raise RecipeError(
            f"{self.name} must be in [{self.hard_low:g}, {self.hard_high:g}], got {value:g} ({where})"
        )


def switch(name: str, default: bool) -> Param:
    """A parameter of the merge that is on (1.0) or off (0.0)."""
    return Param(name, 0.0, 1.0, float(default), per="merge", hard_low=0.0, hard_high=1.0, flag=True)


@dataclass(frozen=True, slots=True)
class Method:
    """A merge method. models: allowed number of sources, the base not counted, as (least, most).

    needs_base: it cannot do without a base model; takes_base: it merges differences from a base if there is one.
    coefficients: for methods whose result combines whole tensors; base_is_origin: those are then the differences from the
    base, to which the result is added; else the base is the first of the vectors.
    """

    name: str
    kernel: Kernel
    params: tuple[Param, ...]
    needs_base: bool
    paper: str
    summary: str
    randomized: bool = False
    takes_base: bool = False
    task_vector_sum: TaskVectorSum | None = None
    coefficients: Coefficients | None = None
    base_is_origin: bool = True
    models: tuple[int, int] = (1, 1_000)

    def param(self, name: str) -> Param | None:
        """The declared parameter of that name, or None."""
        return next((p for p in self.params if p.name == name), None)
