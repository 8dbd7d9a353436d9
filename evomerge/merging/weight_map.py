"""Where a disk tensor lands in a live transformers model, for any architecture.

Names on disk and in memory differ: prefixes come and go, a language tower is renamed, experts are fused into
one parameter. transformers' own loading rules say which disk tensors feed which parameter; what its
conversion operations do with them is not read but observed (`observed_rearrangement`), so that each tensor
can be copied straight into its slice.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evomerge.checkpoints.safetensors_headers import TensorInfo
from evomerge.errors import CheckpointError
from evomerge.merging.arena import move_into_arenas
from evomerge.merging.observed_rearrangement import Rearrange, Shape, SourceSlice, observe
from evomerge.merging.refusals import REFUSALS


@dataclass(frozen=True, slots=True)
class _Slice:
    """A strided part of one parameter. strides, offset: in elements of the contiguous parameter."""

    parameter: str
    shape: Shape
    strides: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class _Converted:
    """One disk tensor that transformers itself turns into whole parameters: transposed, permuted, split."""

    parameter: str
    shape: Shape
    rearrange: Rearrange


class WeightMap:
    """A live model that takes tensors by their names on disk; parameter objects stay the same.

        weights = WeightMap(model, checkpoint.tensors)
        weights.put(name, tensor)

    Attributes:
        model: The model.
        ignored: Disk tensors that transformers ignores too when it loads the model, such as rotary buffers.
        is_arena: Whether what disk feeds lies in arenas, see `use_arena`.
    """

    def __init__(self, model: nn.Module, disk: Mapping[str, TensorInfo]) -> None:
        """Plans where every disk tensor lands.

        A parameter tied in memory of which disk holds both names is untied, as transformers does when their
        values differ: merged tensors of two names differ in general.

        Args:
            model: A transformers model loaded from a folder with the tensors `disk`, already on its device.
            disk: Name on disk -> header facts.

        Raises:
            CheckpointError: A parameter is fed by no disk tensor, a disk tensor has no place, or a fused
                parameter is more than a rearrangement of disk tensors; names the tensors.
        """
        self.model = model
        self.is_arena = False
        groups, unplaced = _groups(model, disk)
        parameters = _state(model)
        self._places: dict[str, _Slice | _Converted] = {}
        fed = _Planner(model, parameters, disk).plan(groups, self._places)
        _untie(model, parameters, fed)
        dropped = _dropped_patterns(model)
        self.ignored = tuple(name for name, key in unplaced if _matches(key, dropped))
        unknown = [name for name, key in unplaced if not _matches(key, dropped)]
        kind = type(model).__name__
        if unknown:
            raise CheckpointError(
                f"{kind} has no place for {_some(unknown)}; transformers would drop them when it loads the "
                "model"
            )
        optional = list(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())
        owned = {id(parameters[key]) for key in fed}
        missing = [
            key
            for key, parameter in parameters.items()
            if id(parameter) not in owned and not _matches(key, optional)
        ]
        if missing:
            raise CheckpointError(
                f"no tensor on disk feeds {_some(missing)} of {kind}; is the checkpoint of another "
                "architecture?"
            )
        self._parameters = _state(model)
        self._fed: dict[int, list[str]] = {}
        for name, place in self._places.items():
            self._fed.setdefault(id(self._parameters[place.parameter]), []).append(name)

    def put(self, name: str, tensor: Tensor) -> None:
        """Copies a disk tensor into its place, cast to the parameter's type.

        Args:
            name: Its name on disk.
            tensor: Its values.

        Raises:
            CheckpointError: The name or the shape was not planned.
        """
        with torch.no_grad():
            for part, value in self._pairs(name, tensor):
                part.copy_(value)

    def run(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """The elements of a parameter that a disk tensor is, so that it may be written in place.

        Args:
            name: Name on disk.
            dtype: The type that it is written in.

        Returns:
            A contiguous view in the tensor's shape and order: the parameter, or a part such as one of fused
            experts; None where its elements have another type or order, or do not follow each other.
        """
        place = self._places.get(name)
        if not isinstance(place, _Slice):
            return None
        parameter = self._parameters[place.parameter].detach()
        if parameter.dtype != dtype or not parameter.is_contiguous():
            return None
        part = self._part(place, parameter)
        return part if part.is_contiguous() else None

    def use_arena(self) -> None:
        """Moves what disk feeds into arenas; parameter objects stay. Meanwhile the model is held twice."""
        move_into_arenas([self._parameters[place.parameter] for place in self._places.values()])
        self.is_arena = True

    def is_padded(self, name: str) -> bool:
        """Whether nothing but zeros follows a disk tensor up to a multiple of 64 elements.

        Args:
            name: Name on disk.

        Returns:
            True for a whole parameter of an arena.
        """
        return self.is_arena and self.is_whole(name)

    def is_whole(self, name: str) -> bool:
        """Whether a disk tensor is all of a parameter, in its order.

        Args:
            name: Name on disk.

        Returns:
            True if it is.
        """
        place = self._places.get(name)
        return isinstance(place, _Slice) and place.shape == tuple(self._parameters[place.parameter].shape)

    def fed_by(self, parameter: Tensor) -> list[str]:
        """The disk tensors that a parameter is made of, one after the other.

        Args:
            parameter: A parameter of the model.

        Returns:
            Their names; none for a parameter that no disk tensor feeds.
        """
        return list(self._fed.get(id(parameter), ()))

    def gradient(self, name: str, gradient: Tensor) -> Tensor:
        """The part of a parameter's gradient that belongs to a disk tensor.

        Args:
            name: Name on disk.
            gradient: Of the whole parameter.

        Returns:
            The gradient by the disk tensor, of its shape.

        Raises:
            CheckpointError: The tensor is split over several parameters.
        """
        place = self._places[name]
        if isinstance(place, _Slice):
            if place.shape == tuple(gradient.shape):
                return gradient
            return gradient.contiguous().as_strided(place.shape, place.strides, place.offset)
        with torch.enable_grad():
            probe = torch.zeros(place.shape, dtype=gradient.dtype, device=gradient.device, requires_grad=True)
            converted = place.rearrange([probe])
        if set(converted) != {place.parameter}:
            raise CheckpointError(
                f"'{name}' is split over several parameters of {type(self.model).__name__}; "
                "a learned stage cannot take its gradient apart yet"
            )
        (back,) = torch.autograd.grad(converted[place.parameter], probe, gradient)
        return back

    def verify(self, read: Callable[[str], Tensor]) -> None:
        """Checks the plan against transformers' own loading, bit for bit. Reads every tensor once.

        Args:
            read: Name on disk -> its tensor, such as `Checkpoint.tensor`, of the folder that the model was
                just loaded from.

        Raises:
            CheckpointError: A tensor is elsewhere; names the first.
        """
        with torch.no_grad():
            for name in self._places:
                for part, value in self._pairs(name, read(name)):
                    if not torch.equal(part, value.to(part.device, part.dtype)):
                        raise CheckpointError(
                            f"'{name}' on disk is not what {type(self.model).__name__} holds in its place; "
                            "report this architecture"
                        )

    def _pairs(self, name: str, tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(part of a parameter, what belongs there) for one disk tensor."""
        place = self._places.get(name)
        if place is None:
            if name in self.ignored:
                return
            raise CheckpointError(f"{type(self.model).__name__} has no place for '{name}'")
        if tuple(tensor.shape) != place.shape:
            raise CheckpointError(
                f"'{name}' is {list(tensor.shape)}, its place in memory takes {list(place.shape)}"
            )
        parameter = self._parameters[place.parameter].detach()
        if isinstance(place, _Converted):
            for key, value in place.rearrange([tensor.to(parameter.dtype)]).items():
                yield self._parameters[key].detach(), value
        else:
            yield self._part(place, parameter), tensor

    @staticmethod
    def _part(place: _Slice, parameter: Tensor) -> Tensor:
        """The part of a parameter that a place is."""
        if place.shape == tuple(parameter.shape):
            return parameter
        offset = parameter.storage_offset() + place.offset
        return parameter.as_strided(place.shape, place.strides, offset)


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
    parameters, prefix = _state(model), getattr(model, "base_model_prefix", "")
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

    def plan(self, groups: Mapping[str, _Group], places: dict[str, _Slice | _Converted]) -> list[str]:
        """Fills `places` (name on disk -> place); the names in memory that are fed."""
        fed: list[str] = []
        for key, group in groups.items():
            names = group.names
            shapes = [self._disk[name].shape for name in names]
            if group.rule is None:
                self._check_shape(key, shapes[0], names)
                places[names[0]] = _Slice(key, shapes[0], (), 0)
                fed.append(key)
                continue
            rearrange = _rearrange(group, key, self._model)
            targets = self._converted_shapes(rearrange, key, shapes, names)
            for target, shape in targets.items():
                self._check_shape(target, shape, names)
            fed += targets
            if len(names) == 1:
                places[names[0]] = _Converted(key, shapes[0], rearrange)
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
                f"transformers cannot make '{key}' of {_some(names)}: {reason}; is a tensor missing or "
                "misshapen?"
            ) from None
        return {target: tuple(value.shape) for target, value in converted.items()}

    def _slices(
        self, group: _Group, rearrange: Rearrange, shapes: Sequence[Shape], targets: Mapping[str, Shape]
    ) -> list[_Slice]:
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
                f"{_some(group.names)}; this architecture cannot be merged yet"
            )
        return [
            _Slice(names[part.target], shape, part.strides, part.offset)
            for shape, part in zip(shapes, parts, strict=True)
        ]

    def _check_shape(self, target: str, shape: Shape, names: Sequence[str]) -> None:
        parameter = self._parameters.get(target)
        if parameter is None:
            raise CheckpointError(
                f"{type(self._model).__name__} has no parameter '{target}' for {_some(names)}"
            )
        if tuple(parameter.shape) != shape:
            raise CheckpointError(
                f"'{target}' is {list(parameter.shape)} in memory, {_some(names)} on disk give "
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


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Name in memory -> parameter or persistent buffer; both names of a tied one."""
    return dict(model.state_dict(keep_vars=True))


def _untie(model: nn.Module, parameters: Mapping[str, Tensor], fed: Sequence[str]) -> None:
    """Gives a parameter of its own to every name but the first that disk feeds and that shares one."""
    first: dict[int, str] = {}
    named = set(fed)
    for key, parameter in parameters.items():
        if key in named and first.setdefault(id(parameter), key) != key:
            module, _, leaf = key.rpartition(".")
            own = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            setattr(model.get_submodule(module), leaf, own)
            getattr(model, "all_tied_weights_keys", {}).pop(key, None)


def _dropped_patterns(model: nn.Module) -> list[str]:
    """Patterns of the disk tensors that transformers drops without a word."""
    patterns = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    buffers = [name for name, _ in model.named_buffers()]
    saved, prefix = _state(model), getattr(model, "base_model_prefix", "") + "."
    # buffers that the model computes itself, such as causal masks
    computed = [name.removeprefix(prefix) for name in buffers if name not in saved]
    patterns += [rf"^({re.escape(prefix)})?{re.escape(name)}$" for name in computed]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.append(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.append(r"(^|\.)position_ids$")
    return patterns


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _some(names: Sequence[str], most: int = 3) -> str:
    """The first names, quoted, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"'{name}'" for name in names[:most]) + more
