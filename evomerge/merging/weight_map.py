"""Where a disk tensor lands in a live transformers model. Knows nothing of recipes and holds no table of architectures.

Names on disk and in memory differ: prefixes come and go, a language tower is renamed, experts are fused into one
parameter. transformers' own loading rules say which disk tensors feed which parameter; what its conversion operations
do with them is not read but observed, on numbered elements, so that each tensor can be copied straight into its slice.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from evomerge.checkpoints.safetensors_headers import TensorInfo
from evomerge.errors import CheckpointError

Shape = tuple[int, ...]
_Part = tuple[
    int, tuple[int, ...], int
]  # number of the target; strides and offset in its contiguous elements
Rearrange = Callable[[Sequence[Tensor]], dict[str, Tensor]]
_REFUSALS = (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError, NotImplementedError)
_DIGIT = 31  # bits of an element's number that one int32 pass carries


@dataclass(frozen=True, slots=True)
class _Slice:
    """A strided part of one parameter. strides, offset: in elements of the contiguous parameter."""

    slot: str
    shape: Shape
    strides: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class _Converted:
    """One disk tensor that transformers itself turns into whole parameters: transposed, permuted, split."""

    slot: str
    shape: Shape
    rearrange: Rearrange


class WeightMap:
    """A live model that takes tensors by their names on disk; parameter objects stay the same.

    ignored: disk tensors that transformers ignores too when it loads the model, such as rotary buffers.
    """

    def __init__(self, model: nn.Module, disk: Mapping[str, TensorInfo]) -> None:
        """model: a transformers model loaded from a folder with the tensors `disk`, already on its device.

        A parameter tied in memory of which disk holds both names is untied, as transformers does when their values
        differ: merged tensors of two names differ in general. Raises CheckpointError, naming the tensors, if a parameter
        is fed by none, a disk tensor has no place, or a fused parameter is more than a rearrangement of disk tensors.
        """
        self.model = model
        groups, unplaced = _groups(model, disk)
        slots = _slots(model)
        self._places: dict[str, _Slice | _Converted] = {}
        fed = _Planner(model, slots, disk).plan(groups, self._places)
        _untie(model, slots, fed)
        dropped, optional, owned = _unexpected(model), _optional(model), {id(slots[key]) for key in fed}
        self.ignored = tuple(name for name, key in unplaced if _matches(key, dropped))
        unknown = [name for name, key in unplaced if not _matches(key, dropped)]
        missing = [
            key for key, slot in slots.items() if id(slot) not in owned and not _matches(key, optional)
        ]
        kind = type(model).__name__
        if unknown:
            raise CheckpointError(
                f"{kind} has no place for {_some(unknown)}; transformers would drop them when it loads the model"
            )
        if missing:
            raise CheckpointError(
                f"no tensor on disk feeds {_some(missing)} of {kind}; is the checkpoint of another architecture?"
            )
        self._slots = _slots(model)

    def put(self, name: str, tensor: Tensor) -> None:
        """Copies a disk tensor into its place, cast to the parameter's type. Raises CheckpointError for a name or shape not planned."""
        with torch.no_grad():
            for slot, value in self._pairs(name, tensor):
                slot.copy_(value)

    def slot(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """The parameter itself, if a disk tensor is all of it, in the same order and in this type: it may be written in place."""
        place = self._places.get(name)
        slot = self._slots[place.slot].detach() if isinstance(place, _Slice) else None
        whole = isinstance(place, _Slice) and slot is not None and place.shape == tuple(slot.shape)
        return slot if slot is not None and whole and slot.dtype == dtype and slot.is_contiguous() else None

    def verify(self, read: Callable[[str], Tensor]) -> None:
        """Checks the plan against transformers' own loading, bit for bit; for a model just loaded. Reads every tensor once.

        read: name on disk -> its tensor, such as Checkpoint.tensor. Raises CheckpointError naming the first tensor that is elsewhere.
        """
        with torch.no_grad():
            for name in self._places:
                for slot, value in self._pairs(name, read(name)):
                    if not torch.equal(slot, value.to(slot.device, slot.dtype)):
                        raise CheckpointError(
                            f"'{name}' on disk is not what {type(self.model).__name__} holds in its place; report this architecture"
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
        slot = self._slots[place.slot].detach()
        if isinstance(place, _Converted):
            for key, value in place.rearrange([tensor.to(slot.dtype)]).items():
                yield self._slots[key].detach(), value
        elif place.shape == tuple(slot.shape):
            yield slot, tensor
        else:
            yield slot.as_strided(place.shape, place.strides, slot.storage_offset() + place.offset), tensor


@dataclass(slots=True)
class _Group:
    """Disk tensors that one rule turns into one or more parameters. rule: transformers' converter, None for a mere renaming."""

    rule: Any
    members: list[
        tuple[str, str | None]
    ]  # (name on disk, pattern of the rule that it matched), in the loader's order


def _groups(
    model: nn.Module, disk: Mapping[str, TensorInfo]
) -> tuple[dict[str, _Group], list[tuple[str, str]]]:
    """name in memory -> what feeds it, and (name on disk, name it would have) of what feeds nothing: the loader's own steps."""
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
    slots, prefix = _slots(model), getattr(model, "base_model_prefix", "")
    groups: dict[str, _Group] = {}
    unplaced: list[tuple[str, str]] = []
    for name in sorted(disk, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, prefix, slots)
        if key not in slots and name in slots:  # a name as in memory, which a rule took for an older one
            key, pattern = rename_source_key(name, [], [], prefix, slots)
        if key not in slots:
            unplaced.append((name, key))
            continue
        rule = None if pattern is None else by_pattern[pattern]
        group = groups.setdefault(key, _Group(rule, []))
        if group.members and (rule is None or group.rule is not rule):
            raise CheckpointError(
                f"'{group.members[0][0]}' and '{name}' on disk both become '{key}' of {type(model).__name__}; remove one"
            )
        group.members.append((name, pattern))
    return groups, unplaced


class _Planner:
    """Turns groups into places; alike groups (the same layer again) are observed once."""

    def __init__(self, model: nn.Module, slots: Mapping[str, Tensor], disk: Mapping[str, TensorInfo]) -> None:
        self._model, self._slots, self._disk = model, slots, disk
        self._seen: dict[Any, list[_Part] | None] = {}

    def plan(self, groups: Mapping[str, _Group], places: dict[str, _Slice | _Converted]) -> list[str]:
        """Fills `places` (name on disk -> place); the names in memory that are fed."""
        fed: list[str] = []
        for key, group in groups.items():
            names = [name for name, _ in group.members]
            shapes = [self._disk[name].shape for name in names]
            if group.rule is None:
                self._same_shape(key, shapes[0], names)
                places[names[0]] = _Slice(key, shapes[0], (), 0)
                fed.append(key)
                continue
            rearrange = _rearrange(group, key, self._model)
            try:
                found = rearrange([torch.empty(shape, device="meta") for shape in shapes])
            except _REFUSALS as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise CheckpointError(
                    f"transformers cannot make '{key}' of {_some(names)}: {reason}; is a tensor missing or misshapen?"
                ) from None
            for target, value in found.items():
                self._same_shape(target, tuple(value.shape), names)
            fed += found
            if len(names) == 1:
                places[names[0]] = _Converted(key, shapes[0], rearrange)
                continue
            for name, place in zip(names, self._slices(group, rearrange, found, shapes, names), strict=True):
                places[name] = place
        return fed

    def _slices(
        self,
        group: _Group,
        rearrange: Rearrange,
        found: Mapping[str, Tensor],
        shapes: Sequence[Shape],
        names: Sequence[str],
    ) -> Iterator[_Slice]:
        targets = list(found)
        alike = (
            id(group.rule),
            tuple(p for _, p in group.members),
            tuple(shapes),
            tuple(tuple(v.shape) for v in found.values()),
        )
        if alike not in self._seen:
            try:
                self._seen[alike] = _observe(rearrange, shapes, targets)
            except _REFUSALS:  # such as arithmetic that integers do not have
                self._seen[alike] = None
        parts = self._seen[alike]
        if parts is None or not all(self._slots[target].is_contiguous() for target in targets):
            kind = type(self._model).__name__
            raise CheckpointError(
                f"'{targets[0]}' of {kind} is not a plain rearrangement of {_some(names)}; this architecture cannot be merged yet"
            )
        for shape, (number, strides, offset) in zip(shapes, parts, strict=True):
            yield _Slice(targets[number], shape, strides, offset)

    def _same_shape(self, target: str, shape: Shape, names: Sequence[str]) -> None:
        slot = self._slots.get(target)
        if slot is None:
            raise CheckpointError(
                f"{type(self._model).__name__} has no parameter '{target}' for {_some(names)}"
            )
        if tuple(slot.shape) != shape:
            raise CheckpointError(
                f"'{target}' is {list(slot.shape)} in memory, {_some(names)} on disk give {list(shape)}; do model and folder agree?"
            )


def _rearrange(group: _Group, key: str, model: nn.Module) -> Rearrange:
    """transformers' conversion of a group's tensors, in the order of its members, as a function."""
    config: Any = model.config

    def run(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        rule = copy.deepcopy(group.rule)
        for (name, pattern), tensor in zip(group.members, tensors, strict=True):
            rule.add_tensor(key, name, pattern, tensor)
        found = rule.convert(key, model=model, config=config)
        found = found[0] if isinstance(found, tuple) else found  # transformers 5.0 returns its errors too
        return {target: value[0] if isinstance(value, list) else value for target, value in found.items()}

    return run


def _observe(rearrange: Rearrange, shapes: Sequence[Shape], targets: Sequence[str]) -> list[_Part] | None:
    """Each source's part of the contiguous targets; None unless the rearrangement is one by strides.

    Marks on the corner and the first step along each axis of every source give the strides. Then every element is
    numbered, and every number is looked for where the strides say it went: the answer is proved, not sampled. Needs
    up to three int32 copies of one group at a time, such as the gate_up projections of one layer's experts.
    """
    marks: list[
        list[int]
    ] = []  # of each source: flat index of its corner, then of one step along each axis; 0: no such step
    for shape in shapes:
        steps = torch.empty(shape, device="meta").stride()
        marks.append([0] + [step if size > 1 else 0 for size, step in zip(shape, steps, strict=True)])
    *first, count = accumulate((len(flats) for flats in marks), initial=1)
    if count >= 2**15 or any(0 in shape for shape in shapes):
        return None
    seen = _found(rearrange([_marked(*source) for source in zip(shapes, marks, first, strict=True)]), targets)
    learned = []
    for flats, start in zip(marks, first, strict=True):
        if start not in seen:
            return None
        number, corner = seen[start]
        ends = [
            seen.get(mark, (number, corner)) if flat else (number, corner)
            for mark, flat in enumerate(flats[1:], start + 1)
        ]
        learned.append((number, tuple(at - corner for _, at in ends), corner))
    return learned if _proved(rearrange, shapes, targets, learned) else None


def _marked(shape: Shape, flats: Sequence[int], start: int) -> Tensor:
    """Zeros [shape] with start, start + 1, ... at the flat indices; the first wins where two are equal."""
    source = torch.zeros(shape, dtype=torch.int16)
    for number, flat in reversed(list(enumerate(flats, start))):
        source.view(-1)[flat] = number
    return source


def _found(values: Mapping[str, Tensor], targets: Sequence[str]) -> dict[int, tuple[int, int]]:
    """mark -> (target number, flat position there)."""
    seen: dict[int, tuple[int, int]] = {}
    for number, target in enumerate(targets):
        flat = values[target].reshape(-1)
        for at in flat.nonzero().view(-1).tolist():
            seen[int(flat[at])] = (number, at)
    return seen


def _proved(
    rearrange: Rearrange, shapes: Sequence[Shape], targets: Sequence[str], learned: Sequence[_Part]
) -> bool:
    """Whether every element of every source lies where the strides say, and nothing else lies in the targets."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    starts, total = [0, *accumulate(sizes)], sum(sizes)

    def numbered(source: int, shift: int) -> Tensor:
        start, end = starts[source], starts[source + 1]
        if total <= 2**_DIGIT:
            digits = torch.arange(start, end, dtype=torch.int32)
        else:
            digits = ((torch.arange(start, end) >> shift) & (2**_DIGIT - 1)).to(torch.int32)
        return digits.view(shapes[source])

    for shift in range(0, total.bit_length(), _DIGIT):
        found = rearrange([numbered(k, shift) for k in range(len(sizes))])
        values = [found[target].contiguous() for target in targets]
        if sum(value.numel() for value in values) != total:
            return False
        for k, (shape, (number, strides, offset)) in enumerate(zip(shapes, learned, strict=True)):
            last = offset + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
            if min(strides, default=0) < 0 or last >= values[number].numel():
                return False
            if not torch.equal(values[number].as_strided(shape, strides, offset), numbered(k, shift)):
                return False
    return True


def _slots(model: nn.Module) -> dict[str, Tensor]:
    """Name in memory -> parameter or persistent buffer; both names of a tied one."""
    return dict(model.state_dict(keep_vars=True))


def _untie(model: nn.Module, slots: Mapping[str, Tensor], fed: Sequence[str]) -> None:
    """Gives a parameter of its own to every name but the first that disk feeds and that shares one."""
    first: dict[int, str] = {}
    named = set(fed)
    for key, slot in slots.items():
        if key in named and first.setdefault(id(slot), key) != key:
            module, _, leaf = key.rpartition(".")
            setattr(
                model.get_submodule(module),
                leaf,
                nn.Parameter(slot.detach().clone(), requires_grad=slot.requires_grad),
            )
            getattr(model, "all_tied_weights_keys", {}).pop(key, None)


def _unexpected(model: nn.Module) -> list[str]:
    """Patterns of the disk tensors that transformers drops without a word."""
    patterns = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    buffers = [name for name, _ in model.named_buffers()]
    saved, prefix = _slots(model), getattr(model, "base_model_prefix", "") + "."
    computed = [
        name.removeprefix(prefix) for name in buffers if name not in saved
    ]  # by the model itself, such as causal masks
    patterns += [rf"^({re.escape(prefix)})?{re.escape(name)}$" for name in computed]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.append(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.append(r"(^|\.)position_ids$")
    return patterns


def _optional(model: nn.Module) -> list[str]:
    """Patterns of the parameters that a checkpoint may lack."""
    return list(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _some(names: Sequence[str], most: int = 3) -> str:
    """The first names, quoted, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"'{name}'" for name in names[:most]) + more
