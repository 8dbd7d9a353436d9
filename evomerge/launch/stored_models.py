"""The settings of a stored study with its models and files where they are now."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from evomerge.config import Config, loading, locations
from evomerge.store import StudyRow


def stored_settings(study: StudyRow, folder: Path, given: Sequence[str] = ()) -> Config:
    """Reads the settings of a stored study, to run or score it again.

    Args:
        study: The study's row.
        folder: Its folder.
        given: 'NAME=PATH' of models that have moved.

    Returns:
        The settings with the flags that were stored, and absolute paths.

    Raises:
        ConfigError: `given` names no model.
        CheckpointError: A model is nowhere.
    """
    settings, _ = loading.stored(study.name, study.config, study.overrides)
    settings = locations.with_models(settings, places(study, folder, given))
    stored = {key: tuple(paths) for key, paths in study.facts.files.items()}
    found = {key: locations.found_files(paths, folder) for key, paths in stored.items()}
    return locations.with_files(settings, found)


def places(study: StudyRow, folder: Path, given: Sequence[str] = ()) -> dict[str, locations.Place]:
    """Finds the models of a stored study.

    Args:
        study: The study's row.
        folder: Its folder.
        given: 'NAME=PATH' of models that have moved.

    Returns:
        Name -> (folder or repository, revision).

    Raises:
        ConfigError: `given` names no model.
        CheckpointError: A model is nowhere.
    """
    known = {name: (fact.path, fact.revision) for name, fact in study.facts.parents.items()}
    return locations.found_models(known, locations.given_models(given, known), folder)
