"""An intermediate merge: a merged model as a parent of another merge."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from torch import Tensor

from evomerge.checkpoints.layout import layout_of
from evomerge.checkpoints.safetensors_headers import TensorInfo
from evomerge.errors import CheckpointError, RecipeError
from evomerge.recipes import Recipe

if TYPE_CHECKING:
    from evomerge.merging.merge import Merge


class MergedParent:
    """A parent whose tensors are merged when they are read, and are not kept.

    Attributes:
        path: Folder of the base, whose tokenizer the merge has.
        files: Weight files of all models that the merge reads.
        config: config.json of the merged model.
        tensors: Tensor name -> planned header facts.
        layout: The tensor names, divided into parts and layers.
    """

    def __init__(self, merge: Merge) -> None:
        """Makes a parent of a planned merge.

        Args:
            merge: The merge, planned over its own parents, of a recipe that `check_intermediate` accepts.
        """
        recipe = merge.recipe
        donor = merge.parents[recipe.base]
        self._merge = merge
        self._steps = {step.name: step for step in merge.steps}
        self.path = donor.path
        self.config = merge.config
        self.tensors: dict[str, TensorInfo] = {name: step.info for name, step in self._steps.items()}
        self.files = tuple(dict.fromkeys(file for name in recipe.reads for file in merge.parents[name].files))
        self.layout = layout_of(
            self.tensors,
            donor.layout.stack,
            len(recipe.layers),
            donor.layout.towers,
            f"the stage merged on {self.path}",
        )

    def tensor(self, name: str) -> Tensor:
        """See `Parent.tensor`.

        Returns:
            The tensor, merged when it is asked for.
        """
        if name not in self._steps:
            raise CheckpointError(f"the stage merged on {self.path} has no tensor '{name}'")
        return self._merge.tensor(self._steps[name])

    def content_hash(self) -> str:
        """SHA-256 over the recipe and its parents' content."""
        recipe = self._merge.recipe
        parts = [recipe.canonical(), *(self._merge.parents[name].content_hash() for name in recipe.reads)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def check_intermediate(name: str, recipe: Recipe) -> None:
    """Checks that a recipe can be an intermediate merge.

    Args:
        name: Name of the stage in the recipe around it, for messages.
        recipe: The stage's recipe.

    Raises:
        RecipeError: The stage has a tokenizer or chat template of its own.
    """
    if recipe.tokenizer is not None or recipe.chat_template is not None:
        raise RecipeError(
            f"stage '{name}' has a tokenizer or chat template of its own; merge it to a folder first, or "
            "give it to the last stage"
        )
