"""What task files may not do: fetch code, or run what models write. The code of tasks is recorded by hash.

A task's `!function` is Python with the user's rights, and no sandbox holds it: who may name a folder with
such tasks is decided by `evomerge.launch.tasks`. Templates are rendered in a sandbox, see `lm_eval_patches`.
Knows nothing of models or items.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks as lm_tasks

from evomerge.errors import TaskError
from evomerge.evaluation.lm_harness.lm_eval_patches import RefusedMetric

TREE = Path(lm_tasks.__file__).resolve().parent
"""lm-eval's own tasks: public benchmarks."""
_CODE_METRIC = "code_eval"
"""The metric of Hugging Face's evaluate that runs programs, see `evomerge.evaluation.code_execution`."""
_EXECUTING_NAMES = {"exec", "eval", _CODE_METRIC}
_SHELLS = {("os", name) for name in ("system", "popen")} | {
    ("subprocess", name)
    for name in ("run", "Popen", "call", "check_call", "check_output", "getoutput", "getstatusoutput")
}

_TaskEntry = tuple[str, Mapping[str, Any], Path | None]
"""(name, the task's YAML with functions unresolved, its folder)."""


def check_task(name: str, task: Any, *, allow_code: bool = False) -> None:
    """Checks a task, as built, for scores that would come from code that was fetched or that models write.

    Args:
        name: Its name, for errors.
        task: lm-eval's task.
        allow_code: Whether what models write may be executed; `check_entry` has seen how.

    Raises:
        TaskError: The task executes what models write, or its metric is a program that would be fetched.
    """
    if not allow_code and (getattr(task, "UNSAFE_CODE", False) or getattr(task.config, "unsafe_code", False)):
        raise TaskError(_executes(name))
    metrics = getattr(task, "_metric_fn_list", {})
    fetched = [metric for metric, call in metrics.items() if isinstance(call, RefusedMetric)]
    if fetched and task.OUTPUT_TYPE == "generate_until":  # others compute theirs without the function
        raise TaskError(
            f"task '{name}' is scored by '{fetched[0]}', a program that the evaluate library would "
            "fetch and run; "
            "evomerge runs no fetched code, so take another task"
        )


def check_entry(name: str, index: Mapping[str, Any], *, allow_code: bool = False) -> bool:
    """Checks a task, or a group or tag with all its tasks, before any of its code is imported.

    A task declares that it executes what models write (`unsafe_code`), or its code in lm-eval's tree shows
    it: not all declare it.

    Args:
        name: Name of a task, group or tag.
        index: lm-eval's index, name -> entry.
        allow_code: Whether what models write may be executed in child processes.

    Returns:
        Whether a task has what models write executed.

    Raises:
        TaskError: A task executes what models write, and that is not allowed or not by the metric that runs
            it in a child process.
    """
    executes = False
    for task_name, config, folder in _task_entries(name, index, ()):
        if config.get("unsafe_code"):
            executes = True
            if not allow_code:
                raise TaskError(_executes(task_name))
        folders = {file.parent for file in _function_files(config)}
        if folder:
            folders.add(folder)
        for place in sorted(folders):
            if place.is_relative_to(TREE) and place != TREE:
                if not allow_code and (line := executing_line(place)):
                    raise TaskError(f"{_executes(task_name)} ({line})")
                if line := executing_line(place, but_metric=True):
                    raise TaskError(
                        f"task '{task_name}' executes code that models write in evomerge's own process "
                        f"({line}), which --allow-code-execution does not allow; take another task"
                    )
                executes = executes or executing_line(place) is not None
    return executes


def task_names(name: str, index: Mapping[str, Any]) -> list[str]:
    """Lists the tasks of the index that a name stands for.

    Args:
        name: Name of a task, group or tag.
        index: lm-eval's index, name -> entry.

    Returns:
        Names of tasks with an entry, each once.
    """
    names = (task_name for task_name, _, _ in _task_entries(name, index, ()))
    return list(dict.fromkeys(task_name for task_name in names if task_name in index))


def _executes(name: str) -> str:
    return (
        f"task '{name}' executes code that models write; evomerge does not run it unless "
        "--allow-code-execution is given"
    )


def _task_entries(name: str, index: Mapping[str, Any], above: tuple[str, ...]) -> Iterator[_TaskEntry]:
    """Every task that a name stands for. above: the groups that it is in."""
    entry = index.get(name)
    if entry is None or name in above:
        return
    config = entry.cfg or {}
    folder = Path(entry.yaml_path).resolve().parent if entry.yaml_path is not None else None
    if entry.kind.name == "TAG":
        yield from _member_entries(name, sorted(entry.tags), index, (*above, name), folder)
    elif isinstance(config.get("task"), list):
        yield from _member_entries(name, config["task"], index, (*above, name), folder)
    else:
        yield name, config, folder


def _member_entries(
    group: str, members: Sequence[Any], index: Mapping[str, Any], above: tuple[str, ...], folder: Path | None
) -> Iterator[_TaskEntry]:
    """The tasks of a group's members: names, or mappings that change settings or hold members."""
    for member in members:
        name = member
        if isinstance(member, dict):
            name = member.get("task", member.get("group"))
            settings = {key: value for key, value in member.items() if key != "task"}
            yield f"{group}::{name}", settings, folder
            if isinstance(member.get("task"), list):
                yield from _member_entries(group, member["task"], index, above, folder)
        if isinstance(name, str):
            yield from _task_entries(name, index, above)


def _function_files(value: Any) -> Iterator[Path]:
    """Files that the `!function` texts of a YAML name, in so far as they lie in lm-eval's tree."""
    if isinstance(value, str) and value.startswith(str(TREE)):
        yield Path(value.rpartition(".")[0])
    elif isinstance(value, dict | list):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _function_files(child)


@functools.lru_cache(maxsize=256)
def executing_line(folder: Path, *, but_metric: bool = False) -> str | None:
    """Finds where a folder's Python runs text as a program or starts one.

    Args:
        folder: A folder in lm-eval's tree.
        but_metric: Whether loading the metric that runs programs does not count.

    Returns:
        'file, line'; None if nowhere, as far as its calls show.
    """
    for file in sorted(folder.glob("*.py")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of their syntax
            tree = ast.parse(file.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and _executes_text(node, but_metric):
                return f"{file.relative_to(TREE)}, line {node.lineno}"
    return None


def _executes_text(node: ast.Call, but_metric: bool) -> bool:
    """Whether a call runs text as a program or starts one."""
    call = node.func
    names = _EXECUTING_NAMES - {_CODE_METRIC} if but_metric else _EXECUTING_NAMES
    if isinstance(call, ast.Name) and call.id in names:
        return True
    starts_program = (
        isinstance(call, ast.Attribute)
        and isinstance(call.value, ast.Name)
        and (call.value.id, call.attr) in _SHELLS
    )
    return starts_program or any(isinstance(arg, ast.Constant) and arg.value in names for arg in node.args)


# ---- what code a task is made of ---------------------------------------------------------------------------


def code_hash(task: Any, include: Sequence[Path]) -> str | None:
    """Hashes the Python that a task's functions and class come from.

    Args:
        task: lm-eval's task.
        include: Included folders. Of these all Python is hashed, since functions import what lies beside
            them; elsewhere the module's folder.

    Returns:
        SHA-256 in hexadecimal; None for a task that is made of settings and data alone.
    """
    config = vars(task.config) if hasattr(task, "config") else {}
    task_class = type(task)
    sources: list[Any] = [] if task_class.__module__.startswith("lm_eval.api.") else [task_class]
    files = {file for call in (*sources, *_callables(config)) if (file := _source_file(call)) is not None}
    hashed: set[tuple[str, str]] = set()
    for file in files:
        root = next((folder.resolve() for folder in include if file.is_relative_to(folder.resolve())), None)
        folder = root or file.parent
        for path in {*_python_files(folder, recursive=root is not None), file}:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            hashed.add((path.relative_to(folder).as_posix(), digest))
    return hashlib.sha256(repr(sorted(hashed)).encode()).hexdigest() if hashed else None


def _python_files(folder: Path, *, recursive: bool) -> Iterator[Path]:
    """The Python files of a folder, without hidden ones and caches."""
    for path in folder.rglob("*.py") if recursive else folder.glob("*.py"):
        if not any(part.startswith((".", "__pycache__")) for part in path.relative_to(folder).parts):
            yield path


def _callables(value: Any) -> Iterator[Callable[..., Any]]:
    if callable(value):
        yield value
    elif isinstance(value, Mapping):
        for child in value.values():
            yield from _callables(child)
    elif isinstance(value, list | tuple):
        for child in value:
            yield from _callables(child)
    elif hasattr(value, "__dataclass_fields__"):
        yield from _callables(vars(value))


def _source_file(call: Callable[..., Any]) -> Path | None:
    """The source file of a function or class; None for built-in ones and lm-eval's own machinery."""
    function = inspect.unwrap(call.func if isinstance(call, functools.partial) else call)
    code = getattr(function, "__code__", None)
    if code is not None:
        name = code.co_filename
    else:
        module = sys.modules.get(getattr(function, "__module__", ""))
        name = getattr(module, "__file__", None)
    if not name:
        return None
    file = Path(name).resolve()
    is_machinery = file.is_relative_to(TREE.parent) and not file.is_relative_to(TREE)
    return file if file.is_file() and not is_machinery else None
