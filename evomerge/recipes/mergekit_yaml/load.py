"""All documents of a mergekit file -> one recipe: the last is the result, the others are merged before it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from evomerge._yaml import Document
from evomerge.errors import RecipeError
from evomerge.recipes.mergekit_yaml.filters import TensorNames
from evomerge.recipes.mergekit_yaml.reader import DocumentReader
from evomerge.recipes.recipe import Recipe

_PLACES = 8  # that a warning names besides the first


def load(
    documents: Document | Sequence[Document],
    num_layers: Callable[[str], int],
    dtype: Callable[[str], str] = lambda reference: "bfloat16",
    policy: str = "float32",
    *,
    tensor_names: TensorNames | None = None,
    warn: Callable[[str], None] | None = None,
) -> Recipe:
    """The recipe in a mergekit file; model names are its references as written.

        load(_yaml.read_all(Path("merge.yml")), num_layers=lambda reference: 32)

    Args:
        documents: One, or several as mergekit-multi takes them: each with a `name` is an intermediate merge
            that the others can read like a model; the one without a name, or else the last, is the result.
        num_layers: Model reference -> number of its layers.
        dtype: Model reference -> type of its tensors, for files that name none.
        policy: Of the arithmetic, see `Recipe.policy`.
        tensor_names: Model reference -> names of its tensors, to find filters that match none; None: filters
            are not compared with them.
        warn: Called with a sentence for each thing that stands in the file and changes nothing, in mergekit
            neither: unknown keys, parameters of another method, filters that match nothing.

    Returns:
        The recipe.

    Raises:
        RecipeError: With line and column, for what mergekit would reject or guess.
    """
    documents = [documents] if isinstance(documents, Document) else list(documents)
    file = _File(documents, num_layers, dtype, policy)
    recipe = file.recipe()
    if warn is not None:
        for sentence in _joined(file.ignored(tensor_names)):
            warn(sentence)
    return recipe


class _File:
    """All documents of a file: a named one is read when another names it."""

    def __init__(
        self,
        documents: Sequence[Document],
        num_layers: Callable[[str], int],
        dtype: Callable[[str], str],
        policy: str,
    ) -> None:
        self._num_layers = num_layers
        self._dtype = dtype
        self._policy = policy
        self._last, self._named = _last_and_named(documents)
        self._stages: dict[str, Recipe] = {}
        self._being_read: list[str] = []
        self._readers: list[DocumentReader] = []

    def recipe(self) -> Recipe:
        last = self._read(self._last)
        for name, document in self._named.items():
            if name not in self._stages:
                raise RecipeError(
                    f"{document.where(('name',))} stage '{name}' is read by none of the others; "
                    "remove it or use it"
                )
        return replace(last, stages=tuple(self._stages.items()))

    def ignored(self, tensor_names: TensorNames | None) -> list[tuple[str, str]]:
        """(place, sentence) of all that changes nothing; asked after `recipe`."""

        def names_of(reference: str) -> Collection[str]:
            assert tensor_names is not None
            is_stage = reference in self._named
            return names_of(self._stage(reference).base) if is_stage else tensor_names(reference)

        return [
            entry
            for reader in self._readers
            for entry in reader.ignored(names_of if tensor_names is not None else None)
        ]

    def _read(self, document: Document) -> Recipe:
        reader = DocumentReader(document, self._depth_of, self._dtype_of, self._policy)
        recipe = reader.recipe()
        self._readers.append(reader)
        return recipe

    def _stage(self, name: str) -> Recipe:
        if name in self._being_read:
            raise RecipeError(
                f"{self._named[name].where(('name',))} stage '{name}' needs itself, "
                f"by way of {' and '.join(self._being_read)}"
            )
        if name not in self._stages:
            self._being_read.append(name)
            stage = self._read(self._named[name])
            self._being_read.pop()
            self._stages[name] = stage
        return self._stages[name]

    def _depth_of(self, reference: str) -> int:
        if reference in self._named:
            return len(self._stage(reference).layers)
        return self._num_layers(reference)

    def _dtype_of(self, reference: str) -> str:
        if reference in self._named:
            return self._stage(reference).out_dtype
        return self._dtype(reference)


def _joined(ignored: Sequence[tuple[str, str]]) -> list[str]:
    """One sentence for all places of which the same is said."""
    places: dict[str, list[str]] = {}
    for place, sentence in ignored:
        places.setdefault(sentence, []).append(place)
    joined = []
    for sentence, (first, *others) in places.items():
        lines = [place.rsplit(":", 2)[-2] for place in others[:_PLACES]]
        more = f" and {len(others) - _PLACES} more" if len(others) > _PLACES else ""
        also = f" (lines {', '.join(lines)}{more} too)" if others else ""
        joined.append(f"{first} {sentence}{also}")
    return joined


def _last_and_named(documents: Sequence[Document]) -> tuple[Document, dict[str, Document]]:
    """(the document that is the result, the others by name)."""
    named: dict[str, Document] = {}
    unnamed = []
    for document in documents:
        name = document.data.get("name") if isinstance(document.data, dict) else None
        if name is None:
            unnamed.append(document)
        elif not isinstance(name, str) or not name or name in named:
            raise RecipeError(
                f"{document.where(('name',))} name must be a text that no other document has, "
                f"got {name!r:.80}"
            )
        else:
            named[name] = document
    if len(unnamed) > 1:
        raise RecipeError(
            f"{unnamed[1].where()} is the second document without a name; name all stages but the last"
        )
    if not documents:
        raise RecipeError("the file holds no document; write a mergekit recipe")
    if unnamed:
        return unnamed[0], named
    last = documents[-1]
    named.pop(last.data["name"])
    return last, named
