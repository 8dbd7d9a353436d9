"""Which choice of splits fits the tasks of a new search, from their YAML; reads no data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.tasks._yaml_loader import load_yaml

from evomerge.errors import TaskError, suggest
from evomerge.evaluation.lm_harness import sandbox
from evomerge.evaluation.lm_harness.sandbox import TREE
from evomerge.evaluation.lm_harness.splits import Splits
from evomerge.evaluation.lm_harness.task_catalogue import TaskCatalogue

_KEYS = ("training_split", "validation_split", "test_split")


def propose_splits(tasks: Sequence[str], include: Sequence[Path] = ()) -> tuple[Splits, str]:
    """Chooses how the items of a search's tasks are assigned to roles.

    Args:
        tasks: Names of tasks, groups or tags.
        include: Folders of task files besides the shipped one.

    Returns:
        (the choice, a sentence that gives the reason; where every choice is refused, it says so).

    Raises:
        TaskError: A name is unknown, or a folder is missing.
    """
    catalogue = TaskCatalogue(include, allow_code=True)
    configs: dict[str, Mapping[str, Any]] = {}
    benchmarks = []
    for name in tasks:
        manager = catalogue.local if name in catalogue.local.all_tasks else catalogue.everything()
        if name not in manager.all_tasks:
            raise TaskError(f"unknown task '{name}'. {suggest(name, manager.all_tasks)}")
        members = sandbox.task_names(name, manager.task_index)
        for member in members:
            configs[member] = _config(manager.task_index[member])
        if manager is not catalogue.local and any(_is_own(manager.task_index[m]) for m in members):
            benchmarks.append(name)
    return _choose(list(configs.values()), benchmarks)


def _choose(configs: Sequence[Mapping[str, Any]], benchmarks: Sequence[str]) -> tuple[Splits, str]:
    has = {key: all(config.get(key) for config in configs) for key in _KEYS}
    if all(has.values()) and not benchmarks:
        return "declared", "the tasks have training, validation and test items of their own"
    if not benchmarks:
        return "hash", "the items of each task are dealt by a hash: 60 % search, 20 % validation, 20 % test"
    named = f"{', '.join(benchmarks[:3])}{' and others' if len(benchmarks) > 3 else ''}"
    if has["training_split"]:
        return (
            "hash-train",
            f"{named}: lm-eval's benchmarks; their training items are dealt, none of the test",
        )
    if has["validation_split"] and has["test_split"]:
        return "validation", f"{named}: lm-eval's benchmarks; the search takes their validation items"
    return "hash", (
        f"{named}: lm-eval's benchmarks, and not all tasks have training items, or validation and test "
        "items: the search would see what the benchmark is tested on and is refused unless "
        "allow_benchmark_test: true is written here; better are tasks with items of their own"
    )


def _is_own(entry: Any) -> bool:
    """Whether a task file is lm-eval's own."""
    return entry.yaml_path is None or Path(entry.yaml_path).is_relative_to(TREE)


def _config(entry: Any) -> Mapping[str, Any]:
    """The YAML of a task, with what it includes."""
    if entry.cfg and any(key in entry.cfg for key in _KEYS):
        return dict(entry.cfg)
    return dict(load_yaml(entry.yaml_path)) if entry.yaml_path is not None else dict(entry.cfg or {})
