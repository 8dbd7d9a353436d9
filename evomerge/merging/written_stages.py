"""Intermediate merges that are written to disk first: those with a tokenizer or chat template of their own.

Others are merged as they are read, see `evomerge.merging.merged_parent`. These have files that the merges
after them read, so they become folders, as in mergekit-multi, and are removed again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from evomerge.checkpoints import Checkpoint, Parent
from evomerge.errors import unwritable
from evomerge.merging import checkpoint_writer
from evomerge.merging.atomic_folder import check_new
from evomerge.recipes import Recipe


def has_own_files(stage: Recipe) -> bool:
    """Whether an intermediate merge has other files than its base.

    Args:
        stage: The stage's recipe.

    Returns:
        True for one with a tokenizer or a chat template.
    """
    return stage.tokenizer is not None or stage.chat_template is not None


@contextmanager
def written_stages(
    recipe: Recipe, parents: Mapping[str, Parent], directory: Path, memory: int | None = None
) -> Iterator[tuple[Recipe, dict[str, Parent]]]:
    """Writes the stages of a recipe that have files of their own, for as long as the context is open.

    Args:
        recipe: The recipe.
        parents: Name -> parent, for every model that it reads.
        directory: Folder that the result goes to; the stages are written beside it.
        memory: Bytes that merging may hold besides the parents' mapped files, None for any number.

    Yields:
        (the recipe without those stages, the parents with them).

    Raises:
        SetupError: The folder exists, the disk is too full, or a tensor needs more memory.
        RecipeError: No method accepts a stage.
        CheckpointError: Parents of a stage do not fit together.
        CandidateError: A value of a stage is not finite.
    """
    opened = dict(parents)
    if not any(has_own_files(stage) for _, stage in recipe.stages):
        yield recipe, opened
        return
    check_new(directory)
    merged_when_read: list[tuple[str, Recipe]] = []
    with _folder_beside(directory) as scratch:
        for number, (name, stage) in enumerate(recipe.stages):
            if not has_own_files(stage):
                merged_when_read.append((name, stage))
                continue
            folder = Path(scratch) / str(number)
            whole = replace(stage, stages=tuple(merged_when_read))
            checkpoint_writer.write(whole, opened, folder, memory=memory)
            opened[name] = Checkpoint(folder)
        yield replace(recipe, stages=tuple(merged_when_read)), opened


def _folder_beside(directory: Path) -> tempfile.TemporaryDirectory[str]:
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-stages-")
    except OSError as error:
        raise unwritable(directory, error) from None
