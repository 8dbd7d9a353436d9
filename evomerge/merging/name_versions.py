"""A model whose tensors are named or joined otherwise than the base's, read under the base's names.

Versions of transformers store one architecture under several names: a prefix comes or goes, a language model
moves inside a larger one, experts lie one by one or in one tensor. Where the tensors of two folders belong in
the model that both make (`weight_places`) says which are the same.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from evomerge.checkpoints import Parent
from evomerge.checkpoints.comparison import lacking
from evomerge.checkpoints.layout import Layout, layout_of
from evomerge.checkpoints.refusals import REFUSALS
from evomerge.checkpoints.safetensors_headers import TensorInfo
from evomerge.errors import CheckpointError
from evomerge.merging.observed_rearrangement import Shape
from evomerge.merging.weight_places import Converted, Places, Slice, place_tensors, state_of
from evomerge.recipes import Recipe


class RenamedParent:
    """A parent whose tensors have the names and shapes that another folder stores them by.

    Attributes:
        path: Its folder.
        files: Its weight files.
        config: Its config.json.
        tensors: The names of the other folder, then those of its own that the other has no like of, each with
            its header facts.
        layout: Those names, divided into parts and layers.
    """

    def __init__(self, parent: Parent, base: Parent, model: nn.Module) -> None:
        """Finds what each name of the other folder stands for.

        Args:
            parent: The parent.
            base: The parent whose names it gets.
            model: An empty model of the parent's config.

        Raises:
            CheckpointError: The tensors of one of the two do not make the model.
        """
        self.path, self.files, self.config = parent.path, parent.files, parent.config
        self._parent = parent
        self._shapes = {name: tuple(tensor.shape) for name, tensor in state_of(model).items()}
        own = place_tensors(model, parent.tensors)
        wanted = _names_at_depth(base, parent.layout.num_layers)
        theirs = place_tensors(model, {name: base.tensors[like] for name, like in wanted.items()})
        feeding = _by_parameter(own)
        self._pieces: dict[str, tuple[str, ...]] = {}
        self._places: dict[str, Slice | Converted] = {}
        self._own = own.places
        self.tensors: dict[str, TensorInfo] = {}
        for name, place in theirs.places.items():
            pieces = self._pieces_of(place, feeding.get(place.parameter, ()))
            if pieces:
                self._pieces[name], self._places[name] = pieces, place
                self.tensors[name] = TensorInfo(place.shape, parent.tensors[pieces[0]].dtype, "")
        used = {piece for pieces in self._pieces.values() for piece in pieces}
        self.tensors |= {name: info for name, info in parent.tensors.items() if name not in used}
        self.layout: Layout = layout_of(
            self.tensors,
            base.layout.stack,
            parent.layout.num_layers,
            parent.layout.towers | base.layout.towers,
            str(self.path),
        )

    def tensor(self, name: str) -> Tensor:
        """See `Parent.tensor`.

        Returns:
            The tensor: one of the parent's under another name, a part of one, or put together of several.
        """
        pieces = self._pieces.get(name)
        if pieces is None:
            return self._parent.tensor(name)
        place = self._places[name]
        if len(pieces) == 1 and _are_alike(self._own[pieces[0]], place):
            return self._parent.tensor(pieces[0])
        assert isinstance(place, Slice)
        whole = self._parameter(place.parameter, pieces)
        if not place.strides:
            return whole
        return whole.as_strided(place.shape, place.strides, whole.storage_offset() + place.offset)

    def content_hash(self) -> str:
        """See `Parent.content_hash`: the parent's own."""
        return self._parent.content_hash()

    def _pieces_of(self, place: Slice | Converted, feeding: tuple[str, ...]) -> tuple[str, ...]:
        """The parent's tensors that one of the other folder is read from; none if it cannot be."""
        alike = [name for name in feeding if _are_alike(self._own[name], place)]
        if alike:
            return tuple(alike[:1])
        return () if isinstance(place, Converted) else feeding

    def _parameter(self, key: str, pieces: tuple[str, ...]) -> Tensor:
        """A parameter of the model, contiguous, put together of the parent's tensors."""
        shape = self._shapes[key]
        first = self._own[pieces[0]]
        if isinstance(first, Slice) and first.shape == shape:
            return self._parent.tensor(pieces[0]).contiguous()
        tensors = [self._parent.tensor(piece) for piece in pieces]
        whole = torch.empty(shape, dtype=tensors[0].dtype)
        for piece, tensor in zip(pieces, tensors, strict=True):
            place = self._own[piece]
            if isinstance(place, Converted):
                whole.copy_(place.rearrange([tensor])[key])
            else:
                whole.as_strided(place.shape, place.strides, place.offset).copy_(tensor)
        return whole


def with_names_of_base(recipe: Recipe, parents: Mapping[str, Parent]) -> dict[str, Parent]:
    """Gives the models of a recipe the tensor names of its base where another version's names differ.

    Args:
        recipe: The recipe.
        parents: Its models, open.

    Returns:
        Name -> parent; one that cannot be matched, or needs not, is the one given.
    """
    base = parents.get(recipe.root_base)
    if base is None:
        return dict(parents)
    return {name: parent if parent is base else _renamed(parent, base) for name, parent in parents.items()}


def _renamed(parent: Parent, base: Parent) -> Parent:
    missing = lacking(parent, base)
    if not missing:
        return parent
    try:
        model = _empty_model(parent.config)
        renamed = None if model is None else RenamedParent(parent, base, model)
    except CheckpointError:  # another architecture, which the merge says with both names
        return parent
    return renamed if renamed is not None and len(lacking(renamed, base)) < len(missing) else parent


def _names_at_depth(base: Parent, depth: int) -> dict[str, str]:
    """Name -> name of the base's tensor that it is like, in a model of `depth` layers named as the base."""
    layout = base.layout
    names = {name: name for name in base.tensors if layout.place(name).layer is None}
    for layer in range(depth):
        like = min(layer, layout.num_layers - 1)
        for suffix in layout.layer_suffixes(like):
            names[layout.layer_name(layer, suffix)] = layout.layer_name(like, suffix)
    return names


def _by_parameter(places: Places) -> dict[str, tuple[str, ...]]:
    """Parameter -> the disk tensors that it is made of."""
    feeding: dict[str, tuple[str, ...]] = {}
    for name, place in places.places.items():
        feeding[place.parameter] = (*feeding.get(place.parameter, ()), name)
    return feeding


def _are_alike(one: Slice | Converted, other: Slice | Converted) -> bool:
    """Whether two disk tensors of one parameter are the same part of it, stored alike."""
    if isinstance(one, Slice) and isinstance(other, Slice):
        return _part(one) == _part(other)
    return type(one) is type(other) and one.shape == other.shape


def _part(place: Slice) -> tuple[Shape, Shape, int]:
    return place.shape, place.strides, place.offset


def _empty_model(config: Mapping[str, Any]) -> nn.Module | None:
    """A model without weights by a config.json; None if transformers knows no such model."""
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    for kind in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
        try:
            built = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(dict(config)))
            with torch.device("meta"):
                model: nn.Module = kind.from_config(built, trust_remote_code=False)
            return model
        except (StrictDataclassError, *REFUSALS):
            continue
    return None
