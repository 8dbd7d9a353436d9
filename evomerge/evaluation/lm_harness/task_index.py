"""lm-eval's index of its own 14,000 task files, kept in the user's cache folder by lm-eval's version.

Reading the files takes seconds. A file that is not this user's alone, of another version or place, or not of
the expected form is as good as none.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind, TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml

from evomerge import _cache_folder
from evomerge.evaluation.lm_harness.sandbox import TREE

log = logging.getLogger(__name__)
_FORMAT = 1  # raised when what the file holds changes
_LARGEST_FILE = 1 << 26  # bytes of a stored index; 14,691 names take 18 MB
Index = dict[str, Entry]


def manager_of_everything(tree: Path, folders: Sequence[Path]) -> TaskManager:
    """Makes a manager of lm-eval's own tasks and those of folders, which come before its own.

    Args:
        tree: The folder of lm-eval's own tasks.
        folders: Folders of task YAML files.

    Returns:
        lm-eval's manager, as if it had read all files itself.
    """
    manager = TaskManager(include_path=[str(folder) for folder in folders], include_defaults=False)
    index: Index = {**(own_index() if tree == TREE else TaskIndex.build([tree])), **manager.task_index}
    of_kind: dict[Kind, list[str]] = defaultdict(list)
    for name, entry in index.items():
        of_kind[entry.kind].append(name)
    # the manager reads all files where it is made, and takes no index
    manager._index = index
    manager._all_tasks = sorted(index)
    manager._all_subtasks = sorted([*of_kind[Kind.TASK], *of_kind[Kind.PY_TASK]])
    manager._all_groups = sorted(of_kind[Kind.GROUP])
    manager._all_tags = sorted(of_kind[Kind.TAG])
    return manager


def own_index() -> Index:
    """Reads the index of lm-eval's own tasks, from the cache folder where it is there.

    Returns:
        Name of a task, group or tag -> lm-eval's entry.
    """
    file = _file()
    index = None if file is None else _read(file)
    if index is None:
        log.info("reading lm-eval's own task tree")
        index = TaskIndex.build([TREE])
        if file is not None:
            _write(file, index)
    return index


def _file() -> Path | None:
    folder, is_trusted = _cache_folder.ours()
    return folder / f"lm-eval-{version('lm_eval')}-index.json" if is_trusted else None


def _stamp() -> list[Any]:
    """What tells one installation from another."""
    return [_FORMAT, str(TREE), TREE.stat().st_mtime_ns]


def _read(file: Path) -> Index | None:
    data = _cache_folder.read_json(file, _LARGEST_FILE)
    try:
        if data is None or data["tree"] != _stamp():
            return None
        return {name: _entry(name, *fields) for name, fields in data["entries"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        log.debug("no index from %s: %s", file, error)
        return None


def _entry(name: str, kind: str, place: str | None, config: Any, tags: Sequence[str]) -> Entry:
    path = None if place is None else TREE / place
    if config is None and path is not None:
        config = load_yaml(path, resolve_func=False)
    return Entry(name, Kind[kind], path, config, set(tags))


def _write(file: Path, index: Mapping[str, Entry]) -> None:
    entries: dict[str, list[Any]] = {}
    for name, entry in index.items():
        place = None if entry.yaml_path is None else Path(entry.yaml_path).relative_to(TREE).as_posix()
        entries[name] = [entry.kind.name, place, _plain(entry.cfg), sorted(entry.tags)]
    _cache_folder.write_json(file, {"tree": _stamp(), "entries": entries})


def _plain(config: Any) -> Any:
    """A task's settings; None where JSON does not give them back, so that they are read from their file."""
    try:
        return config if json.loads(json.dumps(config)) == config else None
    except (TypeError, ValueError):
        return None
