"""The spaces of a learned stage: which numbers are learned, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from evomerge.checkpoints import COMPONENTS, Parent, equal_tensors
from evomerge.errors import ConfigError
from evomerge.launch.weight_space import searchable
from evomerge.merging.merge import Merge
from evomerge.methods.row_sums import takes_rows
from evomerge.search.plan import DifferentiableSpace, RowSpace
from evomerge.spaces import Range, WeightSpace
from evomerge.spaces.cell_weights import Cell, CellWeightSpace, cells_of
from evomerge.spaces.row_weights import RowWeightSpace
from evomerge.spaces.tensor_weights import MOST_WEIGHT, WEIGHT, TensorWeight, TensorWeightSpace

MOST_ROWS = 200_000
"""Most weights of rows: a step stores 7 bytes of recipe, 20 of genome and 5 a shard for each of them."""
ITEMS_FOR_TENSORS = 32
"""Search items of each task from which on one weight for each tensor is the default; with fewer it overfits
(measured on the demo's models)."""


def genome_for(fewest_items: int | None) -> str:
    """What a learned stage has a weight for where its search file does not say.

    Args:
        fewest_items: Search items of the task that has the fewest; None where nobody knows.

    Returns:
        A key of `GENOMES`.
    """
    return "space" if fewest_items is not None and fewest_items < ITEMS_FOR_TENSORS else "tensor"


def make_tensor_space(space: WeightSpace, parents: Mapping[str, Parent]) -> TensorWeightSpace:
    """The space of one weight for each tensor and parent, of the method and models of a space of weights.

    Args:
        space: The search's space of weights.
        parents: Its models, open.

    Returns:
        The space, without the tensors in which a parent equals the base.

    Raises:
        ConfigError: A parent names its tensors so differently that a filter by name would not find them.
    """
    merge = Merge(space.decode(space.start), parents)
    base = parents[space.base]
    equal = {model: set(equal_tensors(base, parents[model])) for model in space.models}
    axes: list[TensorWeight] = []
    for step in merge.steps:
        if step.mix is None or not step.info.dtype.startswith(("F", "BF")):
            continue
        place = base.layout.place(step.name)
        text = step.name
        if place.layer is not None:
            text = place.suffix
        for (model, _), name in zip(step.mix.sources, step.inputs, strict=True):
            if space.method.needs_base and step.name in equal[model]:
                continue
            if text not in name:
                raise ConfigError(
                    f"'{model}' calls '{step.name}' of the base '{name}'; a learned stage names tensors by "
                    "their names in the base; take genome: space, or search weights instead"
                )
            axes.append(TensorWeight(step.name, text, place.layer, place.part == "head", model))
    fixed = {name: bounds.start for name, bounds in space.ranges.items() if name != WEIGHT}
    return TensorWeightSpace(
        method=space.method,
        base=space.base,
        models=space.models,
        depth=base.layout.num_layers,
        axes=tuple(axes),
        fixed=tuple(sorted(fixed.items())),
        start_weight=_start_weight(space),
        out_dtype=space.out_dtype,
        seed=space.seed,
    )


def make_cell_space(space: WeightSpace, parents: Mapping[str, Parent]) -> CellWeightSpace:
    """The space of one weight for each layer group, component and parent, as the search's space has them.

    Args:
        space: The search's space of weights.
        parents: Its models, open.

    Returns:
        The space.

    Raises:
        ConfigError: Nothing in it changes the merge.
    """
    fixed = {name: Range(b.start, b.start, b.start) for name, b in space.ranges.items() if name != WEIGHT}
    weight = Range(-MOST_WEIGHT, MOST_WEIGHT, _start_weight(space))
    cells = replace(space, ranges=fixed | {WEIGHT: weight})
    return CellWeightSpace(cells, tensor_cells(cells, parents[space.base]))


def tensor_cells(space: WeightSpace, base: Parent) -> dict[str, tuple[Cell, ...]]:
    """Which cells of a space of weights each tensor takes its coefficients from.

    Args:
        space: The space.
        base: Its base, open.

    Returns:
        Tensor -> the cells whose mean it takes, see `cells_of`; without the tensors of other towers.
    """
    cells = {}
    for name in base.tensors:
        place = base.layout.place(name)
        if place.part != "tower":
            cells[name] = cells_of(space, place.layer, place.component, place.part)
    return cells


def make_layer_component_space(space: WeightSpace, parents: Mapping[str, Parent]) -> CellWeightSpace:
    """The space of one weight for each layer, component (attention, MLP, the rest) and parent.

    Args:
        space: The search's space of weights.
        parents: Its models, open.

    Returns:
        The space.

    Raises:
        ConfigError: Nothing in it changes the merge.
    """
    groups = (1,) * parents[space.base].layout.num_layers
    finer = replace(space, groups=groups, components=COMPONENTS, embeddings=True, head=True, searchable=False)
    return make_cell_space(searchable(finer, parents), parents)


def make_row_space(space: WeightSpace, parents: Mapping[str, Parent]) -> RowWeightSpace:
    """The space of one weight for each row of each matrix and parent.

    Args:
        space: The search's space of weights.
        parents: Its models, open.

    Returns:
        The space; a vector has one weight.

    Raises:
        ConfigError: The method has no weights for rows, or there would be too many of them.
    """
    if not takes_rows(space.method):
        raise ConfigError(
            f"genome: row needs a plain sum of task vectors, and '{space.method.name}' is none: "
            "use task_arithmetic or linear, or genome: tensor"
        )
    tensors = make_tensor_space(space, parents)
    base = parents[space.base]
    shapes = [base.tensors[axis.tensor].shape for axis in tensors.axes]
    rows = tuple(shape[0] if len(shape) > 1 else 1 for shape in shapes)
    if sum(rows) > MOST_ROWS:
        raise ConfigError(
            f"genome: row would be {sum(rows):,} weights, and at most {MOST_ROWS:,} are learned: each step "
            "stores the recipe and the derivatives of every shard; use genome: tensor, or fine-tune"
        )
    return RowWeightSpace(tensors, rows)


@dataclass(frozen=True, slots=True)
class Genome:
    """What a learned stage has a weight for.

    Attributes:
        summary: In words, after the number of weights.
        make: Makes the space from the search's space of weights and its models.
    """

    summary: str
    make: Callable[[WeightSpace, Mapping[str, Parent]], DifferentiableSpace | RowSpace]


GENOMES = {
    "tensor": Genome("one for each tensor and model", make_tensor_space),
    "layer_component": Genome("one for each layer, component and model", make_layer_component_space),
    "row": Genome(
        "one for each row of a matrix and model: fine-tuning in the span of the parents", make_row_space
    ),
    "space": Genome("one for each axis of the space", make_cell_space),
}
"""Name in the search file -> genome."""


def _start_weight(space: WeightSpace) -> float:
    """The weight of every parent where nothing better is known."""
    bounds = space.ranges.get(WEIGHT)
    param = space.method.param(WEIGHT)
    assert param is not None
    return bounds.start if bounds else param.default
