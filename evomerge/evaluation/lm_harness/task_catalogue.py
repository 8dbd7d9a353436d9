"""lm-eval tasks found by name.

Those shipped and included, and lm-eval's own tree, which is read only when it is needed.
"""

from __future__ import annotations

import contextlib
import glob
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from evomerge import _resources
from evomerge.checkpoints.hub_access import work_offline_where_needed
from evomerge.errors import TaskError, suggest
from evomerge.evaluation.lm_harness import sandbox
from evomerge.evaluation.lm_harness.lm_eval_patches import code_metric_in_children, harden
from evomerge.evaluation.lm_harness.sandbox import TREE
from evomerge.evaluation.lm_harness.task_index import manager_of_everything

log = logging.getLogger(__name__)
_BUILDERS = ("json", "csv", "parquet", "text", "arrow")  # of datasets, which read files


class TaskCatalogue:
    """Tasks by name.

    Attributes:
        folders: The shipped folder of tasks and the included ones.
        local: lm-eval's manager of the tasks in these folders.
    """

    def __init__(self, include: Sequence[Path], *, allow_code: bool = False) -> None:
        """Reads the shipped and included tasks.

        Args:
            include: Folders of task YAML files besides the shipped ones.
            allow_code: Whether tasks may have what models write executed, in child processes.

        Raises:
            TaskError: A folder does not exist.
        """
        harden()
        self.folders = [_resources.evaluators(), *include]
        for folder in self.folders:
            if not folder.is_dir():
                raise TaskError(f"there is no task folder '{folder}'")
        self._allow_code = allow_code
        _be_silent()
        paths = [str(folder) for folder in self.folders]
        self.local = _with_shipped_data(TaskManager(include_path=paths, include_defaults=False))
        self._all: TaskManager | None = None

    def everything(self) -> TaskManager:
        """lm-eval's manager of these and its own tasks. Reading its tree takes seconds the first time."""
        if self._all is None:
            self._all = _with_shipped_data(manager_of_everything(TREE, self.folders))
        return self._all

    def build(self, name: str) -> tuple[dict[str, Any], Any | None, bool]:
        """Builds a task, or all tasks of a group or tag.

        Args:
            name: Name of the task, group or tag.

        Returns:
            (tasks by name, lm-eval's group of that name or None, whether it is a tag).

        Raises:
            TaskError: The name is unknown, or a task executes what models write.
        """
        manager = self.local if name in self.local.all_tasks else self.everything()
        if name not in manager.all_tasks:
            raise TaskError(f"unknown task '{name}'. {suggest(name, manager.all_tasks)}")
        has_members = name not in manager.all_subtasks
        try:
            built = self._load(name, manager)
        except TaskError:
            raise
        except Exception:  # a group of the user's may hold tasks of lm-eval's
            if manager is not self.local or not has_members:
                raise
            built = self._load(name, self.everything())
        is_tag = has_members and name in manager.all_tags
        return dict(built["tasks"]), built.get("groups", {}).get(name), is_tag

    def _load(self, name: str, manager: TaskManager) -> Any:
        """What lm-eval builds of a name, once its entries are checked."""
        executes = sandbox.check_entry(name, manager.task_index, allow_code=self._allow_code)
        with code_metric_in_children() if executes else contextlib.nullcontext():
            self._find_data(name, manager)
            if self._needs_hub(name, manager):
                work_offline_where_needed()
            return manager.load([name])

    def _find_data(self, name: str, manager: TaskManager) -> None:
        """Finds the data files of included tasks beside their YAML, else in the working directory."""
        for task_name in sandbox.task_names(name, manager.task_index):
            entry = manager.task_index[task_name]
            if entry.yaml_path is None:
                continue
            place = Path(entry.yaml_path).resolve().parent
            if any(place.is_relative_to(folder.resolve()) for folder in self.folders[1:]):
                _place_data_files(entry, [place, Path.cwd()])

    def _needs_hub(self, name: str, manager: TaskManager) -> bool:
        """Whether a task of a name may read a data set of the Hub."""
        entries = [manager.task_index[member] for member in sandbox.task_names(name, manager.task_index)]
        return any(_is_of_hub(entry) for entry in entries)

    def is_benchmark(self, task: Any, requested_as: str) -> bool:
        """Returns whether a task comes from lm-eval's own tree, and not from a folder of ours or the user's.

        Args:
            task: lm-eval's task.
            requested_as: The name by which it, or its group, was built.

        Returns:
            True if it does.
        """
        source = (getattr(task.config, "metadata", None) or {}).get("config_source", "inline")
        if source == "inline":  # shipped, of a group's own making, or written in Python
            if requested_as in self.local.all_tasks:
                return False
            index = self.everything().task_index
            entry = index.get(task.task_name) or index[requested_as]
            source = str(entry.yaml_path)
        path = Path(source).resolve()
        if not path.is_relative_to(TREE):
            return False
        return not any(path.is_relative_to(folder.resolve()) for folder in self.folders)


def _is_of_hub(entry: Any) -> bool:
    """Whether an entry's data set is, as far as its YAML says, no file of this machine."""
    config = entry.cfg or (load_yaml(entry.yaml_path) if entry.yaml_path is not None else {})
    path = config.get("dataset_path")
    return not isinstance(path, str) or (path not in _BUILDERS and not Path(path).exists())


def _be_silent() -> None:
    """Keeps log lines and bars of lm-eval and datasets out of what is printed."""
    for library in ("lm_eval", "datasets"):
        logger = logging.getLogger(library)
        logger.setLevel(max(logger.level, logging.ERROR))
    datasets.disable_progress_bars()  # its variable is read once, and others may have imported it before


def _with_shipped_data(manager: TaskManager) -> TaskManager:
    """A manager that finds the shipped tasks' data files, named from the repository's root, from anywhere."""
    for entry in manager.task_index.values():
        if entry.yaml_path is not None and Path(entry.yaml_path).is_relative_to(_resources.evaluators()):
            _place_data_files(entry, [_resources.root()])
    return manager


def _place_data_files(entry: Any, folders: Sequence[Path]) -> None:
    """Has an entry's relative data files found in the first of some folders that holds them."""
    config = load_yaml(entry.yaml_path)
    settings = config.get("dataset_kwargs")
    files = settings.get("data_files") if isinstance(settings, dict) else None
    if files:
        config["dataset_kwargs"] = {**settings, "data_files": placed(files, folders, entry.name)}
        entry.yaml_path, entry.cfg = None, config


def placed(files: Any, folders: Sequence[Path], task: str) -> Any:
    """Makes paths of data files absolute.

    Args:
        files: A path or pattern, several of them, or split -> those, as `datasets` takes them.
        folders: Where a relative path may begin, the first that has it counts.
        task: Name of the task, for errors.

    Returns:
        The same with absolute paths; addresses with a scheme stay.

    Raises:
        TaskError: A relative path is in none of the folders.
    """
    if isinstance(files, dict):
        return {split: placed(own, folders, task) for split, own in files.items()}
    if isinstance(files, list | tuple):
        return [placed(own, folders, task) for own in files]
    text = str(files)
    if "://" in text or "::" in text or Path(text).is_absolute():
        return files
    for folder in folders:
        if (folder / text).exists() or (glob.has_magic(text) and any(folder.glob(text))):
            return str(folder / text)
    tried = " nor in ".join(str(folder) for folder in folders)
    raise TaskError(
        f"task '{task}': its data file '{text}' is not in {tried}; write the path from the task's YAML file, "
        "or a full path"
    )
