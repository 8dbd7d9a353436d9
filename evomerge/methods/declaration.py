"""What a merge method declares of itself: parameters, kernel, and the form that the one-pass kernels run.

Nothing here knows tensor names, files or which types a merge reads and writes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, Protocol

from torch import Tensor

from evomerge.errors import RecipeError

if TYPE_CHECKING:
    from evomerge.methods.fused.difference_rows import Array, DifferenceRows
    from evomerge.methods.fused.launch_numbers import LaunchNumbers
    from evomerge.methods.fused.magnitude_tables import MagnitudeTables
    from evomerge.methods.fused.sum_numbers import MaskKeys
    from evomerge.methods.fused.weighted_sum import MaskKind, Summand, TensorPair

Values = Mapping[str, float | tuple[float, ...]]
"""Parameter values of one tensor: a float per merge parameter, else a tuple with one float per source."""
SourceValues = Mapping[str, float]
"""The values that one source has of the parameters that each model has its own of."""
EQUAL_SHARE: Final = "1 / number of parents"
"""A parameter's start that depends on how many models are merged."""


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
        """Merges one tensor.

        Args:
            tensors: One per source, all of one shape and floating dtype.
            base: The base model's tensor, of the same shape and dtype, or None.
            values: The method's parameter values.
            keys: One signed 64-bit mask key per source; used by randomized methods only.
            mergekit_compatible: Do as mergekit 0.1.5 does, in its order of operations and with its faults,
                where the two differ.

        Returns:
            A new tensor of that shape and dtype; with `mergekit_compatible` of a wider one where mergekit's
            is.
        """
        ...


class Coefficients(Protocol):
    """The coefficients of a method whose result is a combination of whole tensors, from dot products."""

    def __call__(self, products: Sequence[Sequence[float]], values: Values) -> Sequence[float] | None:
        """Computes the coefficients of one tensor's combination.

        Args:
            products: Dot products of all pairs of vectors, [vectors][vectors].
            values: The method's parameter values.

        Returns:
            A coefficient for each vector; None where the method needs more than dot products for these
            values.
        """
        ...


class MaskFunction(Protocol):
    """Which entries of one source's task vector a sparsifier keeps, on a whole tensor in any float type."""

    def __call__(
        self,
        delta: Tensor,
        density: float,
        key: int,
        values: SourceValues,
        mergekit_compatible: bool = False,
    ) -> Tensor:
        """Computes the mask.

        Args:
            delta: The task vector x - base.
            density: Share of entries to keep, in (0, 1).
            key: The source's signed 64-bit mask key.
            values: The source's own parameter values.
            mergekit_compatible: Break ties as mergekit 0.1.5 does.

        Returns:
            0/1 mask of delta's shape and dtype.
        """
        ...


class SummandFunction(Protocol):
    """The same mask in the form that the one-pass kernels apply."""

    def __call__(
        self, pair: TensorPair, values: SourceValues, mask_key: int, tables: MagnitudeTables
    ) -> Summand:
        """Computes a source's summand, before it is rescaled.

        Args:
            pair: The source's tensor, not empty, and the base's.
            values: The source's own parameter values: weight, density in (0, 1) and the sparsifier's others.
            mask_key: The source's signed 64-bit mask key.
            tables: Cached magnitudes.

        Returns:
            The summand, with the source's weight.
        """
        ...


class MaskNumbersFunction(Protocol):
    """The same masks of all rows of a table at once, as arrays."""

    def __call__(
        self,
        numbers: LaunchNumbers,
        rows: DifferenceRows,
        values: Mapping[str, Array],
        keys: MaskKeys | None,
        is_masked: Array,
    ) -> Array:
        """Writes the numbers of the masks.

        Args:
            numbers: Written, by the conventions of `launch_numbers`; what is written where nothing is masked
                is ignored, as are weights and scales.
            rows: The task vectors.
            values: Parameter -> [rows, sources] float64 of a parameter of each model.
            keys: Of random masks; None for a sparsifier that is not randomized.
            is_masked: [rows, sources] bool: the density is in (0, 1) and the tensor is not empty.

        Returns:
            [rows, sources] float64: the norm of what is kept, in units, where a table has it, else NaN.
        """
        ...


@dataclass(frozen=True, slots=True)
class MaskNumbers:
    """How a sparsifier's masks are written for all rows of a table at once.

    Attributes:
        kind: The kind of mask.
        write: Writes their numbers.
        is_bounded: Whether bands may have an upper bound.
    """

    kind: MaskKind
    write: MaskNumbersFunction
    is_bounded: bool = False


@dataclass(frozen=True, slots=True)
class Sparsifier:
    """A rule that drops entries of task vectors: TIES, DARE, breadcrumbs and DELLA have one each.

    A new one is declared beside its method; where no `MaskKind` expresses its mask, it also needs a branch in
    the kernels (`fused/torch_kernels.masked`, and `mask` in `fused/one_pass.c` or a backend that says it does
    not fit).

    Attributes:
        mask: The entries it keeps, as a 0/1 mask of a whole tensor.
        summand: The same for the one-pass kernels.
        randomized: Whether the mask depends on the mask key.
        uses_top_table: Whether `MagnitudeTables.prepare` is worth calling: it asks for elements of largest
            magnitude.
        bytes_per_element: Memory that `summand` holds for each element of a source, e.g. for ranks.
        masks: What `summand` says, for all tensors of a model at once; None: merged tensor by tensor.
    """

    mask: MaskFunction
    summand: SummandFunction
    randomized: bool = False
    uses_top_table: bool = False
    bytes_per_element: int = 0
    masks: MaskNumbers | None = None


@dataclass(frozen=True, slots=True)
class TaskVectorSum:
    """A method that is a sum of (sparsified) task vectors, which `fused.merge_tensor` merges in one pass.

    Attributes:
        sparsifier: Which entries of x - base stay; None for all of them.
        elect_sign: Sum only what has the sign of the sum.
        without_base: Sum the models themselves.
    """

    sparsifier: Sparsifier | None = None
    elect_sign: bool = False
    without_base: bool = False


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter of a merge method.

    Attributes:
        name: As recipes and search files spell it.
        low: Lower bound of a search, included.
        high: Upper bound of a search, included.
        default: Its value where a recipe gives none.
        per: Whether each model has a value of its own, or the merge has one.
        hard_low: Below this the method is undefined.
        hard_high: Above this the method is undefined.
        flag: The parameter is a switch (1.0 or 0.0) and is never searched.
        required: mergekit has no default for it.
        digits: Decimals of a searched value.
        searched: Whether a search varies it although the search file does not name it.
        start: Where a search starts that the search file gives no start: a number, or `EQUAL_SHARE`; None for
            the default.
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
    searched: bool = False
    start: float | Literal["1 / number of parents"] | None = None

    def check(self, value: float, where: str) -> float:
        """Checks that the method is defined at a value.

        Args:
            value: The value.
            where: Where it was given, for the message.

        Returns:
            The value itself.

        Raises:
            RecipeError: The method is not defined there.
        """
        if self.flag and value not in (0, 1):
            raise RecipeError(f"{self.name} is a switch: true or false, got {value:g} ({where})")
        if math.isfinite(value) and self.hard_low <= value <= self.hard_high:
            return value
        raise RecipeError(
            f"{self.name} must be in [{self.hard_low:g}, {self.hard_high:g}], got {value:g} ({where})"
        )

    def start_for(self, parents: int) -> float:
        """Where a search starts that gives the parameter no start.

        Args:
            parents: Number of models merged, at least 1, the base not counted.

        Returns:
            The declared start.
        """
        if self.start is None:
            return self.default
        return 1.0 / parents if isinstance(self.start, str) else self.start


def switch(name: str, default: bool) -> Param:
    """Declares a parameter of the merge that is on (1.0) or off (0.0).

    Args:
        name: As recipes and search files spell it.
        default: Whether it is on where a recipe does not say.

    Returns:
        The parameter.
    """
    return Param(name, 0.0, 1.0, float(default), per="merge", hard_low=0.0, hard_high=1.0, flag=True)


@dataclass(frozen=True, slots=True)
class Method:
    """A merge method; one defined in a module of `evomerge.methods` is in `METHODS` without more.

        AVERAGE = Method(
            name="average",
            kernel=average,
            params=(),
            needs_base=False,
            paper="arXiv 2203.05482",
            summary="mean of the models",
        )

    Attributes:
        name: As recipes and search files spell it.
        kernel: Merges one tensor, in any float type.
        params: Its parameters.
        needs_base: It cannot do without a base model.
        paper: Where it was published.
        summary: A line for the documentation.
        randomized: Its result depends on the mask keys.
        takes_base: It merges differences from a base if there is one.
        task_vector_sum: For sums of task vectors; merges in float32 then run in one pass over the parents.
        coefficients: For methods whose result is a combination of whole tensors.
        base_is_origin: Those tensors are the differences from the base, to which the result is added; else
            the base is the first of them.
        models: Allowed number of sources, the base not counted, as (least, most).
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

    def searched_models(self, base: str, parents: tuple[str, ...]) -> tuple[str, ...]:
        """Which models a search merges by this method.

        Args:
            base: Name of the base.
            parents: Names of the others.

        Returns:
            The parents; with the base before them where the method has no base and would else have a single
            model, of which nothing can be mixed.
        """
        alone = not self.needs_base and len(parents) == 1 and self.models[1] > 1
        return (base, *parents) if alone else parents

    def param(self, name: str) -> Param | None:
        """Looks a parameter up.

        Args:
            name: Its name.

        Returns:
            The declared parameter of that name, or None.
        """
        return next((p for p in self.params if p.name == name), None)
