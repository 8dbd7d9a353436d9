"""lm-eval tasks found by name.

Those shipped and included, and lm-eval's own tree, which is read only when it is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from evomerge import _resources
from evomerge.errors import TaskError, suggest
from evomerge.evaluation.lm_harness import sandbox
from evomerge.evaluation.lm_harness.lm_eval_patches import harden
from evomerge.evaluation.lm_harness.sandbox import TREE

log = logging.getLogger(__name__)


class TaskCatalogue:
    """Tasks by name.

    Attributes:
        folders: The shipped folder of tasks and the included ones.
        local: lm-eval's manager of the tasks in these folders.
    """

    def __init__(self, include: Sequence[Path]) -> None:
        """Reads the shipped and included tasks.

        Args:
            include: Folders of task YAML files besides the shipped ones.

        Raises:
            TaskError: A folder does not exist.
        """
        harden()
        self.folders = [_resources.evaluators(), *include]
        for folder in self.folders:
            if not folder.is_dir():
                raise TaskError(f"there is no task folder '{folder}'")
        logger = logging.getLogger("lm_eval")
        logger.setLevel(max(logger.level, logging.ERROR))
        self.local = _make_manager(self.folders)
        self._all: TaskManager | None = None

    def everything(self) -> TaskManager:
        """lm-eval's manager of these and its own tasks. Reading its tree takes seconds."""
        if self._all is None:
            log.info("reading lm-eval's own task tree")
            self._all = _make_manager([TREE, *self.folders])
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
        sandbox.check_entry(name, manager.task_index)
        try:
            built = manager.load([name])
        except Exception:  # a group of the user's may hold tasks of lm-eval's
            if manager is not self.local or not has_members:
                raise
            sandbox.check_entry(name, self.everything().task_index)
            built = self.everything().load([name])
        is_tag = has_members and name in manager.all_tags
        return dict(built["tasks"]), built.get("groups", {}).get(name), is_tag

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


def _make_manager(folders: Sequence[Path]) -> TaskManager:
    """A manager that finds the shipped tasks' data files, named from the repository's root, from anywhere."""
    manager = TaskManager(include_path=[str(folder) for folder in folders], include_defaults=False)
    for entry in manager.task_index.values():
        if entry.yaml_path is None or not Path(entry.yaml_path).is_relative_to(_resources.evaluators()):
            continue
        config = load_yaml(entry.yaml_path)
        files = config.get("dataset_kwargs", {}).get("data_files")
        if files:
            absolute = {split: str(_resources.root() / file) for split, file in files.items()}
            config["dataset_kwargs"] = {**config["dataset_kwargs"], "data_files": absolute}
            entry.yaml_path, entry.cfg = None, config
    return manager
