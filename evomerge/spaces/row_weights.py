"""One weight for each row of a tensor and parent: the finest space of a learned stage.

With a number for each row of every matrix this is fine-tuning, within the span of the parents: it fits skills
that a merge by tensors does not, and forgets what no item asks for. A recipe holds every number
(`evomerge.recipes.PerRow`), so that the parents and the recipe give the model again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from evomerge.recipes import Mix, PerRow, Recipe, params
from evomerge.spaces.base import finite_genes
from evomerge.spaces.tensor_weights import (
    WEIGHT,
    TensorWeight,
    TensorWeightSpace,
    snapped_weight,
    snapped_weights,
)


@dataclass(frozen=True, slots=True)
class RowWeight:
    """The weight of one parent in one row of a tensor. name: 'weight of math in model.norm.weight, row 3'."""

    name: str


@dataclass(frozen=True)
class RowWeightSpace:
    """Weights of a plain sum of task vectors, row by row.

    Attributes:
        coarse: The same with one weight for each tensor and parent.
        rows: Of each axis of `coarse` its rows, 1 for a vector, which has one weight.
    """

    coarse: TensorWeightSpace
    rows: tuple[int, ...]

    @cached_property
    def axes(self) -> tuple[RowWeight, ...]:
        """One for each gene, tensor after tensor."""
        return tuple(
            RowWeight(axis.name if count == 1 else f"{axis.name}, row {row}")
            for axis, count in zip(self.coarse.axes, self.rows, strict=True)
            for row in range(count)
        )

    @property
    def start(self) -> tuple[float, ...]:
        """The start's weight for every gene."""
        return (self.coarse.start_weight,) * sum(self.rows)

    def decode(self, genome: Sequence[float]) -> Recipe:
        """See `SearchSpace.decode`."""
        genes = snapped_weights(self.coarse.method, finite_genes(genome, sum(self.rows)))
        values: dict[tuple[int | None, bool, str], list[tuple[str, tuple[float, ...]]]] = {}
        for axis, place in self._places:
            key = (axis.layer, axis.is_head, axis.source)
            values.setdefault(key, []).append((axis.text, tuple(genes[place])))
        for cases in values.values():  # longer texts first: the first that fits decides
            cases.sort(key=lambda case: (-len(case[0]), case[0]))
        plain = self.coarse.decode(self.coarse.start)

        def mix(of: Mix, layer: int | None, *, is_head: bool) -> Mix:
            given = dict(of.params)
            weights = given[WEIGHT]
            assert isinstance(weights, tuple)
            rest = snapped_weight(self.coarse.method, self.coarse.start_weight)
            found = [values.get((layer, is_head, model), []) for model in self.coarse.models]
            by_row = tuple(
                PerRow(tuple(cases), rest) if cases else weight
                for cases, weight in zip(found, weights, strict=True)
            )
            return replace(of, params=params({**given, WEIGHT: by_row}))

        layers = tuple(mix(of, layer, is_head=False) for layer, of in enumerate(plain.layers))
        embeddings = mix(plain.embeddings, None, is_head=False)
        return replace(plain, layers=layers, embeddings=embeddings, head=mix(plain.head, None, is_head=True))

    def encode(self, recipe: Recipe) -> tuple[float, ...] | None:
        """The genome of a recipe of the space, or of one that has a weight for each tensor.

        Args:
            recipe: Any recipe.

        Returns:
            [len(axes)] weights; None for a recipe of another kind.
        """
        if not recipe.row_numbers:
            by_tensor = self.coarse.encode(recipe)
            if by_tensor is None:
                return None
            return tuple(w for w, count in zip(by_tensor, self.rows, strict=True) for _ in range(count))
        if self.coarse.encode(_without_rows(recipe)) is None:
            return None
        genome: list[float] = []
        for axis, place in self._places:
            mix = recipe.head if axis.is_head else recipe.embeddings
            if axis.layer is not None:
                mix = recipe.layers[axis.layer]
            weights = dict(mix.params)[WEIGHT]
            setting = (
                weights[self.coarse.models.index(axis.source)] if isinstance(weights, tuple) else weights
            )
            found = setting.at(axis.tensor) if isinstance(setting, PerRow) else ()
            if len(found) != place.stop - place.start:
                return None
            genome += found
        return tuple(genome)

    def pull_rows(
        self,
        partials: Mapping[tuple[str, str, str], float],
        rows: Mapping[tuple[str, str, str], Sequence[float]],
    ) -> tuple[float, ...]:
        """Turns derivatives by coefficients and by those of rows into those by genes, as `pull` does.

        Args:
            partials: (output tensor, parameter, source model) -> derivative.
            rows: The same of weights of rows -> derivative by that of each row.

        Returns:
            [len(axes)] derivatives.
        """
        gradient = [0.0] * sum(self.rows)
        for axis, place in self._places:
            key = (axis.tensor, WEIGHT, axis.source)
            if key in rows:
                gradient[place] = rows[key]
            elif place.stop - place.start == 1:
                gradient[place] = [partials.get(key, 0.0)]
        return tuple(gradient)

    @cached_property
    def _places(self) -> list[tuple[TensorWeight, slice]]:
        """Each axis of `coarse` with its genes."""
        found: list[tuple[TensorWeight, slice]] = []
        first = 0
        for axis, count in zip(self.coarse.axes, self.rows, strict=True):
            found.append((axis, slice(first, first + count)))
            first += count
        return found


def _without_rows(recipe: Recipe) -> Recipe:
    """The recipe with one value in place of each setting by row."""

    def plain(mix: Mix) -> Mix:
        given = {
            name: tuple(s.rest if isinstance(s, PerRow) else s for s in value)
            if isinstance(value, tuple)
            else value
            for name, value in mix.params
        }
        return replace(mix, params=params(given))

    return replace(
        recipe,
        layers=tuple(map(plain, recipe.layers)),
        embeddings=plain(recipe.embeddings),
        head=plain(recipe.head),
    )
