"""The models that a merge is made of, as its card names them: repositories, folders, adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evomerge._redaction import scrub
from evomerge.checkpoints import Parent
from evomerge.checkpoints.licenses import FolderCard, cards_of, is_repository_name
from evomerge.checkpoints.reference import split_reference
from evomerge.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SourceModel:
    """A model or adapter that a merge reads.

    Attributes:
        name: What the recipe calls it; of an adapter with ' (adapter)'.
        reference: Its folder, or its repository, without secrets.
        repository: Its name on the Hub, None for a folder that is none of the Hub's cache.
        revision: The commit or revision of the repository, None where none is known.
        card: What its folder says of itself.
    """

    name: str
    reference: str
    repository: str | None
    revision: str | None
    card: FolderCard

    @property
    def shown(self) -> str:
        """The repository, or for a folder its last part: a card that is published names no place."""
        return self.repository or Path(self.reference).name or self.reference


def source_models(
    names: Sequence[str], references: Mapping[str, str], parents: Mapping[str, Parent]
) -> tuple[SourceModel, ...]:
    """Lists the models and adapters of a merge.

    Args:
        names: Models that the recipe reads.
        references: Name -> repository[@revision], folder, or either with an adapter.
        parents: The models, open; one that is missing is left out.

    Returns:
        One for each model, and one for its adapter after it.
    """
    found: list[SourceModel] = []
    for name in names:
        if name not in parents:
            continue
        cards = cards_of(parents[name])
        parts = _parts(scrub(references.get(name, name)))
        for number, card in enumerate(cards):
            reference, revision = parts[number] if number < len(parts) else (str(card.folder), None)
            repository, commit = _repository(reference, card.folder)
            label = name if number == 0 else f"{name} (adapter)"
            found.append(SourceModel(label, reference, repository, commit or revision, card))
    return tuple(found)


def base_models(models: Sequence[SourceModel]) -> tuple[str, ...]:
    """Repositories for `base_model` of a card, which takes nothing but names on the Hub.

    Args:
        models: Of a merge.

    Returns:
        The models' own repositories; of a folder, the base models that its card names.
    """
    names: dict[str, None] = {}
    for model in models:
        for name in (model.repository,) if model.repository else model.card.base_models:
            names.setdefault(name)
    return tuple(names)


def snapshot_commit(folder: Path) -> str | None:
    """Finds the commit of a folder in the Hub's cache.

    Args:
        folder: Any folder.

    Returns:
        The commit that it is a snapshot of, None for another folder.
    """
    is_snapshot = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    return folder.name if is_snapshot else None


def _parts(reference: str) -> list[tuple[str, str | None]]:
    """(model, revision) and (adapter, revision) of a reference."""
    try:
        parts = split_reference(reference)
    except ConfigError:
        return [(reference, None)]
    adapter = [(parts.adapter, parts.adapter_revision)] if parts.adapter else []
    return [(parts.model, parts.revision), *adapter]


def _repository(reference: str, folder: Path) -> tuple[str | None, str | None]:
    """(repository, commit) of a reference, or of a snapshot in the Hub's cache; None for a plain folder."""
    commit = snapshot_commit(folder)
    if commit is not None:
        name = folder.parent.parent.name.removeprefix("models--").replace("--", "/")
        return (name, commit) if is_repository_name(name) else (None, None)
    if not Path(reference).expanduser().exists() and is_repository_name(reference):
        return reference, None
    return None, None
