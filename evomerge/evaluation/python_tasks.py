"""A user's Python function as a task: `(model, tokenizer) -> {item: score}`. It runs in this process with the user's rights.

Its items are learnt from one call on the base at the start and dealt to the roles by a hash of their ids. A function
with a third argument is given the ids to score, None for all. It must not change the model. Knows nothing of lm-eval.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evomerge.errors import CandidateError, TaskError
from evomerge.evaluation.records import ROLES, Items, ItemScore, Role, role_of_hash


@dataclass(frozen=True, slots=True)
class PythonSpec:
    """A function to score by. function: 'module:function', the module installed or in the working directory."""

    name: str
    function: str
    higher_is_better: bool = True


@dataclass(frozen=True, slots=True)
class _Function:
    """sha256: of its module's source. known: every item it scored for the base. items: those of each role."""

    spec: PythonSpec
    call: Callable[..., Any]
    takes_items: bool
    sha256: str
    known: frozenset[str]
    items: Mapping[Role, tuple[str, ...]]


class PythonTasks:
    """Scores models by Python functions. Satisfies `evomerge.evaluation.task_set.TaskSet`."""

    def __init__(
        self,
        specs: Sequence[PythonSpec],
        tokenizer: Any,
        base: nn.Module,
        *,
        limits: Mapping[Role, int] | None = None,
    ) -> None:
        """Imports the functions and calls each once on the base. limits: role -> most items of each, chosen by their hash.

        Raises TaskError for a function that cannot be had, raises, gives no scores by item, or too few items for three roles.
        """
        self.tokenizer = tokenizer
        self._functions = {spec.name: _learn(spec, base, tokenizer, limits or {}) for spec in specs}

    def items(self, role: Role) -> Items:
        """Task name -> item ids of a role, sorted."""
        return {name: function.items[role] for name, function in self._functions.items()}

    def score(self, model: nn.Module, items: Items) -> tuple[tuple[ItemScore, ...], dict[str, float]]:
        """Per-item scores and their mean for each task. Raises CandidateError for items that are missing, unknown, or no finite number."""
        scores: list[ItemScore] = []
        metrics: dict[str, float] = {}
        for name, ids in items.items():
            if not ids:
                continue
            function = self._functions[name]
            found = _call(function.call, function.takes_items, model, self.tokenizer, tuple(ids))
            if not isinstance(found, Mapping):
                raise CandidateError(
                    f"python task '{name}' gave {type(found).__name__}; it must give a mapping of items to scores"
                )
            if strange := [i for i in found if i not in (ids if function.takes_items else function.known)]:
                raise CandidateError(
                    f"python task '{name}' scored {len(strange)} items that it was not asked for, the first {strange[0]!r}"
                )
            if missing := [i for i in ids if i not in found]:
                raise CandidateError(
                    f"python task '{name}' gave no score for {len(missing)} of {len(ids)} items, the first '{missing[0]}'"
                )
            values = [_number(found[item]) for item in ids]
            if poor := [i for i, value in zip(ids, values, strict=True) if not math.isfinite(value)]:
                raise CandidateError(
                    f"python task '{name}' gave {found[poor[0]]!r} for item '{poor[0]}'; a score is a finite number"
                )
            scores += [ItemScore(name, item, value) for item, value in zip(ids, values, strict=True)]
            metrics[name] = math.fsum(values) / len(values)
        return tuple(scores), metrics

    def sign(self, task: str) -> int:
        """+1 if higher scores are better, else -1."""
        return 1 if self._functions[task].spec.higher_is_better else -1

    def metric(self, task: str) -> str:
        """What the task's number is: the mean of the function's scores."""
        return f"mean of {self._functions[task].spec.function}"

    def soft_metrics(self, task: str) -> tuple[str, ...]:
        """None: a function gives one score."""
        return ()

    def is_mean(self, task: str) -> bool:
        """True: the metric is the mean of the items' scores."""
        return True

    def subtasks(self, task: str) -> tuple[tuple[str, float], ...]:
        """The task itself, with the whole share."""
        return ((task, 1.0),)

    def warnings(self, model: nn.Module | None = None) -> tuple[str, ...]:
        """None."""
        return ()

    def fingerprint(self) -> dict[str, str]:
        """Task name -> SHA-256 of the module's source, the function's name and every item of every role: what resume compares."""
        return {
            name: hashlib.sha256(
                repr((f.spec, f.sha256, [f.items[role] for role in ROLES])).encode()
            ).hexdigest()
            for name, f in self._functions.items()
        }

    def backends(self, model: nn.Module) -> dict[str, str]:
        """Task name -> the function that answers it, and the SHA-256 of its module's source file."""
        return {
            name: f"python: {function.spec.function}, sha256 {function.sha256}"
            for name, function in self._functions.items()
        }

    def optimizations(self, model: nn.Module, items: Items) -> dict[str, Any]:
        """None: a function asks the model as it likes."""
        return {}

    def samples(self, model: nn.Module, items: Items) -> list[Any]:
        """None: a function shows no prompts."""
        return []

    def examples(self, count: int) -> list[tuple[str, str]]:
        """None: a function shows no prompts."""
        return []


def _learn(spec: PythonSpec, base: nn.Module, tokenizer: Any, limits: Mapping[Role, int]) -> _Function:
    call, source = _function(spec)
    named = [
        p
        for p in inspect.signature(call).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    try:
        found = _call(call, len(named) > 2, base, tokenizer, None)
    except Exception as error:  # a user's function can raise anything
        raise TaskError(
            f"python task '{spec.name}' fails for the base: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(found, Mapping) or not all(
        isinstance(item, str) and math.isfinite(_number(value)) for item, value in found.items()
    ):
        raise TaskError(
            f"python task '{spec.name}' must give a finite number for each item, items named by strings; got {str(found)[:80]}"
        )
    items: dict[Role, tuple[str, ...]] = {}
    for role in ROLES:
        own = sorted(
            (digest, item)
            for item in found
            if role_of_hash(digest := hashlib.sha256(item.encode()).hexdigest()) == role
        )
        items[role] = tuple(sorted(item for _, item in own[: limits.get(role)]))
        if not items[role]:
            raise TaskError(
                f"python task '{spec.name}' scores {len(found)} items, and none of them falls to {role}; let it score more"
            )
    return _Function(spec, call, len(named) > 2, hashlib.sha256(source).hexdigest(), frozenset(found), items)


def _call(
    call: Callable[..., Any],
    takes_items: bool,
    model: nn.Module,
    tokenizer: Any,
    items: tuple[str, ...] | None,
) -> Any:
    with torch.no_grad():
        return call(model, tokenizer, items) if takes_items else call(model, tokenizer)


def _function(spec: PythonSpec) -> tuple[Callable[..., Any], bytes]:
    """(the function, its module's source)."""
    module_name, _, name = spec.function.partition(":")
    sys.path.append(here := os.getcwd())  # last: what is installed is not hidden by what lies about
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module's own code can raise anything
        raise TaskError(
            f"python task '{spec.name}': module '{module_name}' cannot be imported: {type(error).__name__}: {error}"
        ) from error
    finally:
        sys.path.remove(here)
    call = getattr(module, name, None)
    file = inspect.getsourcefile(module)
    if not callable(call) or file is None:
        raise TaskError(
            f"python task '{spec.name}': {module_name} holds no function '{name}' written in Python"
        )
    return call, Path(file).read_bytes()


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
