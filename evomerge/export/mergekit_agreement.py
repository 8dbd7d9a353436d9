"""Whether a merged folder is what mergekit makes of the same recipe, and if not, why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from evomerge import _yaml
from evomerge.checkpoints import Checkpoint
from evomerge.export.recipe_file import merge_recipe_file
from evomerge.merging import mergekit_check
from evomerge.merging.mergekit_check import Comparison
from evomerge.methods import METHODS


@dataclass(frozen=True, slots=True)
class Agreement:
    """A folder compared with mergekit's of the same recipe.

    Attributes:
        folder: The folder as it is.
        same_arithmetic: A merge with mergekit's types and operations, made where the folder differs and has
            other ones; None where none was made.
        randomized: Names of the recipe's methods that draw masks, which mergekit draws otherwise.
    """

    folder: Comparison
    same_arithmetic: Comparison | None = None
    randomized: tuple[str, ...] = ()

    @property
    def agrees(self) -> bool:
        """Whether evomerge does what mergekit does, apart from where it rounds."""
        return self.folder.agrees or (self.same_arithmetic is not None and self.same_arithmetic.agrees)

    @property
    def explanation(self) -> str:
        """Why the folder differs, '' where it does not."""
        if self.folder.agrees:
            return ""
        if self.same_arithmetic is not None and self.same_arithmetic.agrees:
            return (
                f"with mergekit's types and operations (--policy mergekit): {self.same_arithmetic}; the "
                "folder is computed in float32 and rounded once, and differs by mergekit's roundings alone"
            )
        if self.randomized:
            names = ", ".join(self.randomized)
            return f"{names} draws random masks, which mergekit draws otherwise: its model is another one"
        if self.same_arithmetic is not None:
            return f"with mergekit's types and operations (--policy mergekit): {self.same_arithmetic}"
        return ""


def compare_with_mergekit(
    recipe: Path, directory: Path, environment: Path, policy: str = "float32", memory: int | None = None
) -> Agreement:
    """Merges a recipe with mergekit, and with mergekit's arithmetic where that is needed, and compares.

    Args:
        recipe: A mergekit YAML.
        directory: Folder that it was merged to.
        environment: A virtual environment with mergekit 0.1.5.
        policy: Arithmetic that the folder was merged with.
        memory: Bytes that merging may hold; None for no limit.

    Returns:
        What was found.

    Raises:
        SetupError: There is no mergekit, or it fails on the recipe.
    """
    with mergekit_check.merged_by_mergekit(recipe, directory, environment) as theirs:
        folder = mergekit_check.compare(Checkpoint(directory), Checkpoint(theirs))
        same = None
        if not folder.agrees and not folder.only and policy != "mergekit":
            ours = theirs.with_name("same-arithmetic")
            merge_recipe_file(recipe, ours, policy="mergekit", memory=memory)
            same = mergekit_check.compare(Checkpoint(ours), Checkpoint(theirs))
        return Agreement(folder, same, _randomized(recipe))


def _randomized(recipe: Path) -> tuple[str, ...]:
    documents = [document.data for document in _yaml.read_all(recipe)]
    names = {str(data.get("merge_method")) for data in documents if isinstance(data, dict)}
    return tuple(sorted(name for name in names if name in METHODS and METHODS[name].randomized))
