"""Weights of layer groups and components as numbers to be learned by gradient.

A gene is the weight itself, where `WeightSpace` maps it through a curve, so that the derivative by a gene is
the sum of those by the weights of the tensors that share it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evomerge.recipes import Recipe
from evomerge.spaces.base import Axis, finite_genes
from evomerge.spaces.tensor_weights import WEIGHT, snapped_weight
from evomerge.spaces.weights import EMBEDDINGS, HEAD, WeightSpace

Cell = tuple[str, str | None]
"""(layer group, component), or (embeddings or head, None)."""


@dataclass(frozen=True)
class CellWeightSpace:
    """The weights of a `WeightSpace`, one for each cell and parent.

    Attributes:
        cells: The space of weights, in which the weight alone is searched.
        places: Output tensor -> the cells whose weights it takes the mean of; its own cell, or of a component
            without axes all cells of its group.
    """

    cells: WeightSpace
    places: Mapping[str, tuple[Cell, ...]]

    @property
    def axes(self) -> tuple[Axis, ...]:
        """One for each gene."""
        return self.cells.axes

    @property
    def start(self) -> tuple[float, ...]:
        """The start's weight of each axis."""
        return tuple(axis.start for axis in self.axes)

    def decode(self, genome: Sequence[float]) -> Recipe:
        """See `SearchSpace.decode`."""
        genes = finite_genes(genome, len(self.axes))
        return self.cells.with_values([snapped_weight(self.cells.method, gene) for gene in genes])

    def encode(self, recipe: Recipe) -> tuple[float, ...] | None:
        """The genome of a recipe of the same method, models, depth and other parameters.

        Args:
            recipe: Any recipe.

        Returns:
            [len(axes)] weights, of a group those of its first layer; None for a recipe of another kind.
        """
        if recipe.base != self.cells.base or recipe.stages or recipe.scales:
            return None
        return self.cells.values(recipe)

    def pull(self, partials: Mapping[tuple[str, str, str], float]) -> tuple[float, ...]:
        """Turns derivatives by coefficients of the merge into those by genes, the transpose of `decode`.

        Args:
            partials: (output tensor, parameter, source model) -> derivative.

        Returns:
            [len(axes)] derivatives.
        """
        places = {(axis.group, axis.component, axis.source): gene for gene, axis in enumerate(self.axes)}
        pulled = [0.0] * len(self.axes)
        for (tensor, param, source), slope in partials.items():
            cells = self.places.get(tensor, ())
            for group, component in cells:
                gene = places.get((group, component, source))
                if param == WEIGHT and gene is not None:
                    pulled[gene] += slope / len(cells)
        return tuple(pulled)


def axis_derivatives(
    space: WeightSpace, places: Mapping[str, tuple[Cell, ...]], partials: Mapping[tuple[str, str, str], float]
) -> list[float | None]:
    """Turns derivatives by coefficients of the merge into those by the values of a space's axes.

    Args:
        space: A space of weights.
        places: Output tensor -> the cells whose values it takes the mean of.
        partials: (output tensor, parameter, source model or '') -> derivative.

    Returns:
        One for each axis: the sum over the tensors that share it; None for a parameter without derivatives.
    """
    known = {param for _, param, _ in partials}
    axes = {
        (axis.group, axis.component, axis.param, axis.source or ""): i for i, axis in enumerate(space.axes)
    }
    found: list[float | None] = [0.0 if axis.param in known else None for axis in space.axes]
    for (tensor, param, source), slope in partials.items():
        cells = places.get(tensor, ())
        for group, component in cells:
            place = axes.get((group, component, param, source))
            if place is not None:
                found[place] = (found[place] or 0.0) + slope / len(cells)
    return found


def cells_of(space: WeightSpace, layer: int | None, component: str, part: str) -> tuple[Cell, ...]:
    """The cells whose weights a tensor takes the mean of.

    Args:
        space: A space of weights.
        layer: The tensor's layer; None outside the stack.
        component: Its component.
        part: 'embeddings', 'layer' or 'head', as the layout of a checkpoint says.

    Returns:
        Its own cell, or all cells of its group where its component has no axes; none for another part.
    """
    if layer is None:
        return ((EMBEDDINGS if part == "embeddings" else HEAD, None),)
    group = next(name for name, span in space.spans() if layer in span)
    if component in space.components:
        return ((group, component),)
    return tuple((group, each) for each in space.components)
