"""Where a disk tensor lands in a live transformers model, for any architecture.

Names on disk and in memory differ: prefixes come and go, a language tower is renamed, experts are fused into
one parameter. `weight_places` says where each tensor belongs, so that it can be copied straight into its
slice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from evomerge.checkpoints.safetensors_headers import TensorInfo
from evomerge.errors import CheckpointError
from evomerge.merging.arena import move_into_arenas
from evomerge.merging.weight_places import Converted, Slice, place_tensors, some, state_of


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
        parameters = state_of(model)
        planned = place_tensors(model, disk)
        self._places: dict[str, Slice | Converted] = dict(planned.places)
        _untie(model, parameters, planned.fed)
        dropped = _dropped_patterns(model)
        self.ignored = tuple(name for name, key in planned.unplaced if _matches(key, dropped))
        unknown = [name for name, key in planned.unplaced if not _matches(key, dropped)]
        kind = type(model).__name__
        if unknown:
            raise CheckpointError(
                f"{kind} has no place for {some(unknown)}; transformers would drop them when it loads the "
                "model"
            )
        optional = list(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())
        owned = {id(parameters[key]) for key in planned.fed}
        missing = [
            key
            for key, parameter in parameters.items()
            if id(parameter) not in owned and not _matches(key, optional)
        ]
        if missing:
            raise CheckpointError(
                f"no tensor on disk feeds {some(missing)} of {kind}; is the checkpoint of another "
                "architecture?"
            )
        self._parameters = state_of(model)
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
        if not isinstance(place, Slice):
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
        return isinstance(place, Slice) and place.shape == tuple(self._parameters[place.parameter].shape)

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
        if isinstance(place, Slice):
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
        if isinstance(place, Converted):
            for key, value in place.rearrange([tensor.to(parameter.dtype)]).items():
                yield self._parameters[key].detach(), value
        else:
            yield self._part(place, parameter), tensor

    @staticmethod
    def _part(place: Slice, parameter: Tensor) -> Tensor:
        """The part of a parameter that a place is."""
        if place.shape == tuple(parameter.shape):
            return parameter
        offset = parameter.storage_offset() + place.offset
        return parameter.as_strided(place.shape, place.strides, offset)


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
    saved, prefix = state_of(model), getattr(model, "base_model_prefix", "") + "."
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
