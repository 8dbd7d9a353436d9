"""Wishes -> the files of a new search: the search file, its schema for editors, the job of a cluster."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evomerge import _yaml
from evomerge.checkpoints.reference import split_reference
from evomerge.config import json_schema, loading
from evomerge.errors import ConfigError, SetupError, unwritable
from evomerge.evaluation.lm_harness.proposed_splits import propose_splits
from evomerge.launch.new_search.draft import Draft
from evomerge.launch.new_search.job_files import JobFile, job_text
from evomerge.launch.new_search.proposal import propose
from evomerge.launch.new_search.survey import Survey, survey_models
from evomerge.launch.new_search.wishes import Wishes

SCHEMA = "evomerge.schema.json"
"""Name of the schema beside a search file."""


@dataclass(frozen=True, slots=True)
class NewSearch:
    """A new search file.

    Attributes:
        file: Where it is, or is to be.
        text: Its YAML.
        study: Name of its study.
        survey: The models; None where they were not read.
        draft: The file before it became text.
        notes: What a converted file said and this one does not hold.
    """

    file: Path
    text: str
    study: str
    survey: Survey | None
    draft: Draft
    notes: tuple[str, ...]


def write_search(
    wishes: Wishes,
    file: Path,
    *,
    jobs: Sequence[JobFile] = (),
    unread: bool = False,
    overwrite: bool = False,
    show: Callable[[str], None] = lambda text: None,
) -> tuple[NewSearch, list[Path]]:
    """Writes a new search file, the schema beside it and the jobs that run it.

    Args:
        wishes: What is asked for.
        file: Where.
        jobs: Jobs of clusters to write.
        unread: Whether the models are left alone, which may not be here yet.
        overwrite: Whether files of these names may be there.
        show: Called with what is being done, before it is.

    Returns:
        (the search, the files that were written, the search file first).

    Raises:
        SetupError: A file is there already, or cannot be written.
        ConfigError: The wishes make no valid search.
        CheckpointError: A model cannot be opened, or does not fit the base.
        TaskError: A task is unknown.
    """
    for path in (file, *(job.path(file) for job in jobs)):
        if path.exists() and not overwrite:
            raise SetupError(f"{path} exists; add --force to write it anew, or give another name")
    search = propose_search(wishes, file, unread=unread, show=show)
    files = {file: search.text}
    for job in jobs:
        files[job.path(file)] = job_text(job, file, search.study)
    files[file.with_name(SCHEMA)] = json.dumps(json_schema.schema(), indent=1, ensure_ascii=False) + "\n"
    for path, text in files.items():
        _write(path, text, executable=path.suffix in (".sh", ".slurm"))
    return search, list(files)


def propose_search(
    wishes: Wishes, file: Path, *, unread: bool = False, show: Callable[[str], None] = lambda text: None
) -> NewSearch:
    """Proposes a search and checks that it is a search file; writes nothing.

    Args:
        wishes: What is asked for.
        file: Where it is to be written; local paths are written from its folder.
        unread: Whether the models are left alone, which may not be here yet.
        show: Called with what is being done, before it is.

    Returns:
        The search.

    Raises:
        ConfigError: The wishes make no valid search.
        CheckpointError: A model cannot be opened, or does not fit the base.
        TaskError: A task is unknown.
    """
    if not wishes.tasks:
        raise ConfigError("a search needs a task; give --task NAME, several times for several")
    survey = None
    if not unread:
        show(f"reading the headers of {len(wishes.models)} models")
        survey = survey_models(wishes.models, wishes.base)
    show("reading the tasks")
    include = [Path(folder).expanduser() for folder in wishes.include]
    splits = propose_splits([task.task for task in wishes.tasks], include)
    placed = _with_places(wishes, file.absolute().parent)
    draft = propose(placed, survey, splits)
    draft = replace(draft, head=[f"yaml-language-server: $schema={SCHEMA}", *draft.head])
    text = draft.text()
    settings = loading.check(_yaml.parse(text, str(file)))
    return NewSearch(file, text, settings.study, survey, draft, wishes.notes)


def _write(file: Path, text: str, *, executable: bool) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        if executable:
            file.chmod(0o755)
    except OSError as error:
        raise unwritable(file, error) from None


def _with_places(wishes: Wishes, folder: Path) -> Wishes:
    """The wishes with local paths written from the folder of the search file."""
    models = {name: _reference_from(reference, folder) for name, reference in wishes.models.items()}
    include = [_path_from(path, folder) for path in wishes.include]
    blocks = dict(wishes.blocks)
    if "hand_recipes" in blocks:
        blocks["hand_recipes"] = {
            label: _path_from(path, folder) for label, path in blocks["hand_recipes"].items()
        }
    return replace(wishes, models=models, include=include, blocks=blocks)


def _reference_from(reference: str, folder: Path) -> str:
    parts = split_reference(reference)
    model, adapter = _path_from(parts.model, folder), parts.adapter
    model = f"{model}@{parts.revision}" if parts.revision else model
    if adapter is None:
        return model
    adapter = _path_from(adapter, folder)
    return f"{model}+{adapter}" + (f"@{parts.adapter_revision}" if parts.adapter_revision else "")


def _path_from(path: str, folder: Path) -> str:
    """A local path, relative where it lies below the folder; anything else as it is."""
    place = Path(path).expanduser()
    if not place.exists():
        return path
    absolute = Path(os.path.abspath(place))
    return str(absolute.relative_to(folder)) if absolute.is_relative_to(folder) else str(absolute)
