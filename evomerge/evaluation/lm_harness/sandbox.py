"""What task files may not do: render templates outside a sandbox, fetch code, run what models write. Their code is recorded by hash.

A task's `!function` is Python with the user's rights, and no sandbox holds it: who may name a folder with such tasks is
decided by `evomerge.launch.tasks`. Knows nothing of models or items.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval.api.metrics
import lm_eval.api.task
import lm_eval.tasks as lm_tasks
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment
from lm_eval import utils as lm_utils
from lm_eval.api.registry import metric_registry
from lm_eval.tasks import _yaml_loader

from evomerge.errors import TaskError

log = logging.getLogger(__name__)
TREE = Path(lm_tasks.__file__).resolve().parent  # lm-eval's own tasks: public benchmarks
_RUNS = {
    "exec",
    "eval",
    "code_eval",
}  # functions, and the metric of Hugging Face's evaluate that runs programs
_SHELLS = {("os", name) for name in ("system", "popen")} | {
    ("subprocess", name)
    for name in ("run", "Popen", "call", "check_call", "check_output", "getoutput", "getstatusoutput")
}


def harden() -> None:
    """Makes lm-eval of this process read YAML without Python objects, render templates in a sandbox, and fetch no metric's code."""
    if not isinstance(lm_utils.env, ImmutableSandboxedEnvironment):
        plain = (
            lm_utils.env
        )  # as in transformers' chat templates: no underscored attributes, nothing given is changed
        sandbox = ImmutableSandboxedEnvironment(
            loader=plain.loader, undefined=plain.undefined, keep_trailing_newline=plain.keep_trailing_newline
        )
        sandbox.filters |= plain.filters
        # a task's templates are compiled anew for every document and every call; compiled once, they render the same text
        sandbox.from_string = functools.lru_cache(maxsize=4096)(sandbox.from_string)  # type: ignore[method-assign, assignment]
        lm_utils.env = sandbox
    _yaml_loader._Base = getattr(
        yaml, "CSafeLoader", yaml.SafeLoader
    )  # where libyaml is missing, lm-eval would take FullLoader
    lm_eval.api.task.get_metric = _metric


def _metric(name: str, hf_evaluate_metric: bool = False) -> Callable[..., Any]:
    """lm-eval's own metric of that name, or a function that refuses: others are programs that `evaluate` fetches from the hub."""
    if name in metric_registry and not hf_evaluate_metric:
        found: Callable[..., Any] = metric_registry.get(name)
        return found
    return _Refused(name)


class _Refused:
    """A metric that may be declared and never computed."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        raise TaskError(
            f"metric '{self.__name__}' is a program that the evaluate library would fetch and run; use a metric of lm-eval's own"
        )


def check_task(name: str, task: Any) -> None:
    """Raises TaskError for a task, as built, whose scores would come from code that was fetched or that models write."""
    if getattr(task, "UNSAFE_CODE", False) or getattr(task.config, "unsafe_code", False):
        raise TaskError(_executes(name))
    fetched = [m for m, call in getattr(task, "_metric_fn_list", {}).items() if isinstance(call, _Refused)]
    if fetched and task.OUTPUT_TYPE == "generate_until":  # others compute theirs without the function
        raise TaskError(
            f"task '{name}' is scored by '{fetched[0]}', a program that the evaluate library would fetch and run; "
            "evomerge runs no fetched code, so take another task"
        )


def check_entry(name: str, index: Mapping[str, Any]) -> None:
    """Raises TaskError for a task, or a group or tag with one, that executes what models write: before any of its code is imported.

    index: lm-eval's, name -> entry. A task says so itself (`unsafe_code`), or its code in lm-eval's tree shows it: not all say so.
    """
    for own, config, folder in _leaves(name, index, ()):
        if config.get("unsafe_code"):
            raise TaskError(_executes(own))
        for place in sorted({path.parent for path in _functions(config)} | ({folder} if folder else set())):
            if place.is_relative_to(TREE) and place != TREE and (found := _runs(place)):
                raise TaskError(f"{_executes(own)} ({found})")


def _executes(name: str) -> str:
    return f"task '{name}' executes code that models write; evomerge does not run it"


def _leaves(
    name: str, index: Mapping[str, Any], above: tuple[str, ...]
) -> Iterator[tuple[str, Mapping[str, Any], Path | None]]:
    """(name, its YAML with functions unresolved, its folder) of every task that a name stands for. above: the groups it is in."""
    entry = index.get(name)
    if entry is None or name in above:
        return
    config = entry.cfg or {}
    folder = Path(entry.yaml_path).resolve().parent if entry.yaml_path is not None else None
    members = (
        sorted(entry.tags)
        if entry.kind.name == "TAG"
        else config.get("task")
        if isinstance(config.get("task"), list)
        else None
    )
    if members is None:
        yield name, config, folder
        return
    yield from _members(name, members, index, (*above, name), folder)


def _members(
    group: str, members: Sequence[Any], index: Mapping[str, Any], above: tuple[str, ...], folder: Path | None
) -> Iterator[tuple[str, Mapping[str, Any], Path | None]]:
    for member in members:
        if isinstance(member, dict):
            yield (
                f"{group}::{member.get('task', member.get('group'))}",
                {k: v for k, v in member.items() if k != "task"},
                folder,
            )
            if isinstance(member.get("task"), list):
                yield from _members(group, member["task"], index, above, folder)
        own = (
            member
            if isinstance(member, str)
            else member.get("task", member.get("group"))
            if isinstance(member, dict)
            else None
        )
        if isinstance(own, str):
            yield from _leaves(own, index, above)


def _functions(value: Any) -> Iterator[Path]:
    """Files that the `!function` texts of a YAML name, in so far as they lie in lm-eval's tree."""
    if isinstance(value, str) and value.startswith(str(TREE)):
        yield Path(value.rpartition(".")[0])
    elif isinstance(value, dict | list):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _functions(child)


@functools.lru_cache(maxsize=256)
def _runs(folder: Path) -> str | None:
    """Where a folder's Python runs text as a program or starts one; None if nowhere, as far as its calls say."""
    for file in sorted(folder.glob("*.py")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of their syntax
            tree = ast.parse(file.read_bytes())
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            call = node.func
            named = isinstance(call, ast.Name) and call.id in _RUNS
            shell = (
                isinstance(call, ast.Attribute)
                and isinstance(call.value, ast.Name)
                and (call.value.id, call.attr) in _SHELLS
            )
            if named or shell or any(isinstance(a, ast.Constant) and a.value in _RUNS for a in node.args):
                return f"{file.relative_to(TREE)}, line {node.lineno}"
    return None


# ---- what code a task is made of -----------------------------------------------------------------------------------------


def code_hash(task: Any, include: Sequence[Path]) -> str | None:
    """SHA-256 of the Python that a task's functions and class come from; None for a task that is made of settings and data.

    Of an included folder that is all its Python, since functions import what lies beside them; elsewhere the module's folder.
    """
    config = vars(task.config) if hasattr(task, "config") else {}
    own: list[Callable[..., Any]] = [] if type(task).__module__.startswith("lm_eval.api.") else [type(task)]
    found: set[tuple[str, str]] = set()
    for file in {file for call in (*own, *_callables(config)) if (file := _file(call)) is not None}:
        root = next((folder.resolve() for folder in include if file.is_relative_to(folder.resolve())), None)
        where = root or file.parent
        beside = where.rglob("*.py") if root else where.glob("*.py")
        kept = {
            path
            for path in beside
            if not any(part.startswith((".", "__pycache__")) for part in path.relative_to(where).parts)
        }
        found |= {
            (path.relative_to(where).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest())
            for path in kept | {file}
        }
    return hashlib.sha256(repr(sorted(found)).encode()).hexdigest() if found else None


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


def _file(call: Callable[..., Any]) -> Path | None:
    """The source file of a function or class; None for what is built in or part of lm-eval's own machinery."""
    plain = inspect.unwrap(call.func if isinstance(call, functools.partial) else call)
    code = getattr(plain, "__code__", None)
    name = (
        code.co_filename
        if code is not None
        else getattr(sys.modules.get(getattr(plain, "__module__", "")), "__file__", None)
    )
    file = Path(name).resolve() if name else None
    machinery = TREE.parent
    if (
        file is None
        or not file.is_file()
        or (file.is_relative_to(machinery) and not file.is_relative_to(TREE))
    ):
        return None
    return file
