"""Model references: a path or repository, a revision, an adapter -> an opened parent."""

from __future__ import annotations

from pathlib import Path

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.checkpoints.hub import locate
from evomerge.checkpoints.lora import AdaptedCheckpoint
from evomerge.errors import ConfigError


def split_reference(reference: str) -> tuple[str, str | None, str | None, str | None]:
    """(model, revision, adapter, adapter's revision) of 'path[@revision][+adapter[@revision]]'.

    A folder that exists wins over '+' and '@' in its name. Raises ConfigError for an empty part and for more than one possible '+'.
    """
    halves: list[tuple[str, str | None, str | None, str | None]] = []
    if "+" not in reference or _is_folder(reference):
        halves = [(*_revision(reference), None, None)]
    else:
        halves = [
            (*_revision(reference[:at]), *_revision(reference[at + 1 :]))
            for at, sign in enumerate(reference)
            if sign == "+"
        ]
    if len(halves) > 1:  # a '+' inside a folder's name: the cut that leaves the most folders
        folders = [_is_folder(model) + _is_folder(adapter or "") for model, _, adapter, _ in halves]
        halves = [half for half, count in zip(halves, folders, strict=True) if count == max(folders) > 0]
    if len(halves) != 1 or "" in halves[0]:
        raise ConfigError(
            f"{reference[:200]!r} is no model reference; write model or model+adapter, each a folder or repository[@revision]"
        )
    return halves[0]


def open_parent(reference: str) -> Checkpoint | AdaptedCheckpoint:
    """The parent that a reference names, folders or repositories. Raises CheckpointError, or ConfigError for the reference."""
    model, revision, adapter, adapter_revision = split_reference(reference)
    base = Checkpoint(locate(model, revision))
    return base if adapter is None else AdaptedCheckpoint(base, locate(adapter, adapter_revision))


def _revision(reference: str) -> tuple[str, str | None]:
    """(model, revision) of 'repository[@revision]'; a path has no revision, and keeps its '@'."""
    name, at, revision = reference.rpartition("@")
    if not at or reference.startswith(("/", ".", "~")) or _is_folder(reference):
        return reference, None
    return name, revision


def _is_folder(text: str) -> bool:
    try:
        return bool(text) and Path(text).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):
        return False
