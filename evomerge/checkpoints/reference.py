"""Model references: a path or repository, a revision, an adapter -> an opened parent."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.checkpoints.gguf import is_gguf
from evomerge.checkpoints.hub import locate
from evomerge.checkpoints.lora import AdaptedCheckpoint
from evomerge.errors import ConfigError


class ModelReference(NamedTuple):
    """The parts of 'model[@revision][+adapter[@revision]]'.

    Attributes:
        model: Folder, GGUF file or repository of the model.
        revision: Its revision, None if none is named.
        adapter: Folder or repository of a LoRA adapter, None if none is named.
        adapter_revision: The adapter's revision, None if none is named.
    """

    model: str
    revision: str | None
    adapter: str | None
    adapter_revision: str | None


def split_reference(reference: str) -> ModelReference:
    """Parses 'model[@revision][+adapter[@revision]]'.

    A folder or GGUF file that exists wins over '+' and '@' in its name.

    Args:
        reference: The text of a search file or a command line.

    Returns:
        Its parts.

    Raises:
        ConfigError: A part is empty, or more than one '+' could be the one before the adapter.
    """
    if "+" not in reference or _is_here(reference):
        readings = [ModelReference(*_split_revision(reference), None, None)]
    else:
        cuts = [position for position, character in enumerate(reference) if character == "+"]
        readings = [
            ModelReference(*_split_revision(reference[:cut]), *_split_revision(reference[cut + 1 :]))
            for cut in cuts
        ]
    if len(readings) > 1:  # a '+' inside a folder's name: the cut that leaves the most folders
        folders = [_is_here(reading.model) + _is_here(reading.adapter or "") for reading in readings]
        most = max(folders)
        readings = [
            reading for reading, count in zip(readings, folders, strict=True) if count == most and count > 0
        ]
    if len(readings) != 1 or "" in readings[0]:
        raise ConfigError(
            f"{reference[:200]!r} is no model reference; write model or model+adapter, each a folder or "
            "repository[@revision]"
        )
    return readings[0]


def open_parent(reference: str) -> Checkpoint | AdaptedCheckpoint:
    """Opens the parent that a reference names, and fetches repositories that are not in the cache.

    Args:
        reference: 'model[@revision][+adapter[@revision]]', each a folder or a Hugging Face repository.

    Returns:
        The checkpoint, or the checkpoint with the adapter folded in.

    Raises:
        CheckpointError: A model cannot be found, fetched or read.
        ConfigError: The reference cannot be parsed.
    """
    parts = split_reference(reference)
    base = Checkpoint(locate(parts.model, parts.revision))
    if parts.adapter is None:
        return base
    return AdaptedCheckpoint(base, locate(parts.adapter, parts.adapter_revision))


def _split_revision(reference: str) -> tuple[str, str | None]:
    """(model, revision) of 'repository[@revision]'; a path has no revision, and keeps its '@'."""
    name, at, revision = reference.rpartition("@")
    if not at or reference.startswith(("/", ".", "~")) or _is_here(reference):
        return reference, None
    return name, revision


def _is_here(text: str) -> bool:
    try:
        path = Path(text).expanduser()
        return bool(text) and (path.is_dir() or is_gguf(path))
    except (OSError, RuntimeError, ValueError):
        return False
