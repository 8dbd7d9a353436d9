"""The place of each disk tensor among the parameters of a model: a whole one, a slice, or converted.

transformers' own loading rules say which disk tensors feed which parameter; what its conversion operations do
with them is not read but observed (`observed_rearrangement`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evomerge.checkpoints.refusals import REFUSALS
from evomerge.checkpoints.safetensors_headers import TensorInfo
from evomerge.errors import CheckpointError
from evomerge.merging.observed_rearrangement import Rearrange, Shape, SourceSlice, observe


@dataclass(frozen=True, slots=True)
class Slice:
    """A strided part of one parameter.

    Attributes:
        parameter: Its name in the model.
        shape: Shape of the disk tensor.
        strides: In elements of the contiguous parameter; empty for a whole one.
        offset: Its first element there.
    """

    parameter: str
    shape: Shape
    strides: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Converted:
    """One disk tensor that transformers itself turns into whole parameters: transposed, permuted, split.

    Attributes:
        parameter: Name in the model of the first of them.
        shape: Shape of the disk tensor.
        rearrange: What transformers does with it.
    """

    parameter: str
    shape: Shape
    rearrange: Rearrange


@dataclass(frozen=True, slots=True)
class Places:
    """Where the tensors of a folder belong in a model.

    Attributes:
        places: Name on disk -> place.
        fed: Names of the parameters that they make.
        unplaced: (name on disk, the name in the model that it would have) of what feeds nothing.
    """

    places: Mapping[str, Slice | Converted]
    fed: tuple[str, ...]
    unplaced: tuple[tuple[str, str], ...]


def place_tensors(model: nn.Module, disk: Mapping[str, TensorInfo]) -> Places:
    """Plans where every disk tensor of a model lands.

    Args:
        model: A model of transformers; it may be an empty one, on the device 'meta'.
        disk: Name on disk -> header facts.

    Returns:
        The places.

    Raises:
        CheckpointError: Tensors do not fit the parameters that they feed, or make one that is more than a
            rearrangement of them; names the tensors.
    """
    groups, unplaced = _groups(model, disk)
    places: dict[str, Slice | Converted] = {}
    fed = _Planner(model, state_of(model), disk).plan(groups, places)
    return Places(places, tuple(fed), tuple(unplaced))


@dataclass(slots=True)
class _Group:
    """Disk tensors that one rule turns into one or more parameters.

    rule: transformers' converter, None for a mere renaming; members: (name on disk, pattern of the rule that
    it matched), in the loader's order.
    """

    rule: Any
    members: list[tuple[str, str | None]]

    @property
    def names(self) -> list[str]:
        """Names on disk."""
        return [name for name, _ in self.members]


def _groups(
    model: nn.Module, disk: Mapping[str, TensorInfo]
) -> tuple[dict[str, _Group], list[tuple[str, str]]]:
    """What feeds each parameter, by the loader's own steps.

    (name in memory -> group, (name on disk, name that it would have) of what feeds nothing).
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    parameters, prefix = state_of(model), getattr(model, "base_model_prefix", "")
    groups: dict[str, _Group] = {}
    unplaced: list[tuple[str, str]] = []
    for name in sorted(disk, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
        if (
            key not in parameters and name in parameters
        ):  # a name as in memory, which a rule took for an older one
            key, pattern = rename_source_key(name, [], [], prefix, parameters)
        if key not in parameters:
            unplaced.append((name, key))
            continue
        rule = None if pattern is None else by_pattern[pattern]
        group = groups.setdefault(key, _Group(rule, []))
        if group.members and (rule is None or group.rule is not rule):
            raise CheckpointError(
                f"'{group.members[0][0]}' and '{name}' on disk both become '{key}' of "
                f"{type(model).__name__}; remove one"
            )
        group.members.append((name, pattern))
    return groups, unplaced


class _Planner:
    """Turns groups into places; alike groups (the same layer again) are observed once."""

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, Tensor], disk: Mapping[str, TensorInfo]
    ) -> None:
        self._model, self._parameters, self._disk = model, parameters, disk
        self._observed: dict[Any, list[SourceSlice] | None] = {}

    def plan(self, groups: Mapping[str, _Group], places: dict[str, Slice | Converted]) -> list[str]:
        """Fills `places` (name on disk -> place); the names in memory that are fed."""
        fed: list[str] = []
        for key, group in groups.items():
            names = group.names
            shapes = [self._disk[name].shape for name in names]
            if group.rule is None:
                self._check_shape(key, shapes[0], names)
                places[names[0]] = Slice(key, shapes[0], (), 0)
                fed.append(key)
                continue
            rearrange = _rearrange(group, key, self._model)
            targets = self._converted_shapes(rearrange, key, shapes, names)
            for target, shape in targets.items():
                self._check_shape(target, shape, names)
            fed += targets
            if len(names) == 1:
                places[names[0]] = Converted(key, shapes[0], rearrange)
            else:
                places.update(zip(names, self._slices(group, rearrange, shapes, targets), strict=True))
        return fed

    def _converted_shapes(
        self, rearrange: Rearrange, key: str, shapes: Sequence[Shape], names: Sequence[str]
    ) -> dict[str, Shape]:
        """Name in memory -> shape of what transformers makes of tensors of these shapes."""
        try:
            converted = rearrange([torch.empty(shape, device="meta") for shape in shapes])
        except REFUSALS as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"transformers cannot make '{key}' of {some(names)}: {reason}; is a tensor missing or "
                "misshapen?"
            ) from None
        return {target: tuple(value.shape) for target, value in converted.items()}

    def _slices(
        self, group: _Group, rearrange: Rearrange, shapes: Sequence[Shape], targets: Mapping[str, Shape]
    ) -> list[Slice]:
        """The part of a parameter that each member of a group is."""
        names = list(targets)
        patterns = tuple(pattern for _, pattern in group.members)
        alike = (id(group.rule), patterns, tuple(shapes), tuple(targets.values()))
        if alike not in self._observed:
            try:
                self._observed[alike] = observe(rearrange, shapes, names)
            except REFUSALS:  # such as arithmetic that integers do not have
                self._observed[alike] = None
        parts = self._observed[alike]
        if parts is None or not all(self._parameters[name].is_contiguous() for name in names):
            raise CheckpointError(
                f"'{names[0]}' of {type(self._model).__name__} is not a plain rearrangement of "
                f"{some(group.names)}; this architecture cannot be merged yet"
            )
        return [
            Slice(names[part.target], shape, part.strides, part.offset)
            for shape, part in zip(shapes, parts, strict=True)
        ]

    def _check_shape(self, target: str, shape: Shape, names: Sequence[str]) -> None:
        parameter = self._parameters.get(target)
        if parameter is None:
            raise CheckpointError(
                f"{type(self._model).__name__} has no parameter '{target}' for {some(names)}"
            )
        if tuple(parameter.shape) != shape:
            raise CheckpointError(
                f"'{target}' is {list(parameter.shape)} in memory, {some(names)} on disk give "
                f"{list(shape)}; do model and folder agree?"
            )


def _rearrange(group: _Group, key: str, model: nn.Module) -> Rearrange:
    """The conversion by transformers of a group's tensors, in the order of its members, as a function."""
    config: Any = model.config

    def run(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        rule = copy.deepcopy(group.rule)
        for (name, pattern), tensor in zip(group.members, tensors, strict=True):
            rule.add_tensor(key, name, pattern, tensor)
        result = rule.convert(key, model=model, config=config)
        converted = (
            result[0] if isinstance(result, tuple) else result
        )  # transformers 5.0 returns its errors too
        return {target: value[0] if isinstance(value, list) else value for target, value in converted.items()}

    return run


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model that it saves.

    Args:
        model: The model.

    Returns:
        Name in memory -> parameter or persistent buffer; both names of a tied one.
    """
    return dict(model.state_dict(keep_vars=True))


def some(names: Sequence[str], most: int = 3) -> str:
    """The first names, quoted, and how many more there are.

    Args:
        names: The names.
        most: How many are shown.

    Returns:
        Text for a message.
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"'{name}'" for name in names[:most]) + more
