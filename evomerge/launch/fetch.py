"""What a search needs of the Hugging Face Hub, in a folder that nodes without internet can read."""

from __future__ import annotations

import importlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.checkpoints.hub import snapshot
from evomerge.checkpoints.hub_access import is_offline_by_choice, work_offline_where_needed
from evomerge.checkpoints.reference import split_reference
from evomerge.config import Config
from evomerge.errors import CheckpointError, SetupError, TaskError, unwritable
from evomerge.launch.tasks import check_task_folders

ENVIRONMENT = "environment.sh"
"""Name of the file in the folder that sets the variables."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a folder holds for a search.

    Attributes:
        folder: The folder, absolute.
        models: (name of the model, repository, commit) of each that is of the Hub; of an adapter too.
        local: (name of the model, folder) of each that is a folder of this machine, which is not copied.
        tasks: Names of the tasks whose data are there.
        size: Bytes of all files in the folder.
    """

    folder: Path
    models: tuple[tuple[str, str, str], ...]
    local: tuple[tuple[str, str], ...]
    tasks: tuple[str, ...]
    size: int

    @property
    def variables(self) -> dict[str, str]:
        """What the nodes' environment needs, so that the libraries look here and nowhere else."""
        return {"HF_HOME": str(self.folder), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

    def exports(self) -> list[str]:
        """The variables as lines of a shell."""
        return [f"export {name}={shlex.quote(value)}" for name, value in self.variables.items()]


def fetch(
    settings: Config,
    folder: Path,
    *,
    allow_tasks: bool = False,
    show: Callable[[str], None] = lambda text: None,
) -> Fetched:
    """Brings the models and the tasks' data of a search into a folder; what is there already stays.

    Args:
        settings: The settings of the search.
        folder: The folder, in the form of $HF_HOME.
        allow_tasks: Whether task folders of the user's may be read, which are code.
        show: Called with what is being fetched, before it is.

    Returns:
        What is there now. The folder has a file with the environment's variables too.

    Raises:
        SetupError: Something is of the Hub, and it cannot be reached; or the folder cannot be written.
        CheckpointError: There is no such repository, or no right to it.
        TaskError: A task's data cannot be had.
        ConfigError: Task folders are not allowed.
    """
    check_task_folders(settings, allow_tasks=allow_tasks)
    folder = Path(os.path.abspath(folder.expanduser()))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _use_cache(folder)
        models = tuple(_fetch_model(*of, folder / "hub", show) for of in _repositories(settings))
        tasks = tuple(_fetch_tasks(settings, show))
        size = sum(
            file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink()
        )
        found = Fetched(folder, models, tuple(_local(settings)), tasks, size)
        (folder / ENVIRONMENT).write_text("\n".join([*found.exports(), ""]), encoding="utf-8")
    except OSError as error:
        raise unwritable(error.filename or folder, error) from None
    return found


def _use_cache(folder: Path) -> None:
    """Has the libraries keep what they download in a folder, also where they are loaded already."""
    os.environ["HF_HOME"] = str(folder)
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        os.environ.pop(name, None)
    hub: Any = importlib.import_module("huggingface_hub.constants")
    hub.HF_HOME, hub.HF_HUB_CACHE = str(folder), str(folder / "hub")
    hub.HUGGINGFACE_HUB_CACHE = hub.HF_HUB_CACHE
    data: Any = sys.modules.get("datasets.config")
    if data is not None:
        data.HF_CACHE_HOME, data.HF_DATASETS_CACHE = str(folder), folder / "datasets"


def _repositories(settings: Config) -> Iterator[tuple[str, str, str | None]]:
    """(name of the model, repository, revision) of everything that is no folder or file here."""
    for name, model in settings.models.items():
        parts = split_reference(model.reference)
        yield from ((name, r, v) for r, v in _parts(parts) if not Path(r).expanduser().exists())


def _local(settings: Config) -> Iterator[tuple[str, str]]:
    for name, model in settings.models.items():
        parts = split_reference(model.reference)
        yield from ((name, r) for r, _ in _parts(parts) if Path(r).expanduser().exists())


def _parts(parts: Any) -> list[tuple[str, str | None]]:
    adapter = [(parts.adapter, parts.adapter_revision)] if parts.adapter else []
    return [(parts.model, parts.revision), *adapter]


def _fetch_model(
    name: str, repository: str, revision: str | None, cache: Path, show: Callable[[str], None]
) -> tuple[str, str, str]:
    show(f"model {name}: {repository}{f' at {revision}' if revision else ''}")
    try:
        return name, repository, snapshot(repository, revision, cache).name
    except CheckpointError as error:
        reason = "the environment asks for the offline mode" if is_offline_by_choice() else None
        reason = reason or work_offline_where_needed()
        if reason is None:
            raise CheckpointError(f"model '{name}': {error}") from None
    raise SetupError(
        f"model '{name}': '{repository}' is not in {cache}, and the Hub cannot be reached ({reason}); run "
        "fetch on a machine with a network, with --to a folder that the nodes see or that is copied there"
    )


def _fetch_tasks(settings: Config, show: Callable[[str], None]) -> Iterator[str]:
    from evomerge.evaluation.lm_harness.load_errors import explained
    from evomerge.evaluation.lm_harness.task_catalogue import TaskCatalogue

    names = [task.task for task in settings.tasks if task.python is None]
    if not names:
        return
    catalogue = TaskCatalogue([Path(folder) for folder in settings.evaluation.include], allow_code=True)
    for name in names:
        show(f"task {name}")
        try:
            catalogue.build(name)
        except TaskError:
            raise
        except Exception as error:
            raise TaskError(explained(name, error)) from error
        yield name
