"""A user's Python function as a task: `(model, tokenizer) -> {item: score}`.

It runs in this process with the user's rights.

Its items are learnt from one call on the base model at the start and assigned to roles by a hash of their
ids. A function with a third argument is given the ids to score, None for all. It must not change the model.
Knows nothing of lm-eval.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evomerge.errors import CandidateError, TaskError
from evomerge.evaluation.python_losses import losses
from evomerge.evaluation.python_sources import sources_of
from evomerge.evaluation.records import (
    GOLD,
    LEFT_OUT,
    ROLES,
    GradientRequest,
    Items,
    ItemScore,
    Role,
    role_of_hash,
)
from evomerge.evaluation.task_set import no_answers


@dataclass(frozen=True, slots=True)
class PythonSpec:
    """A function to score by.

    Attributes:
        name: Name of the task.
        function: 'module:function'; the module is installed or lies in the working directory.
        higher_is_better: Direction of its scores.
        loss: 'module:function' of its loss, for learned stages; None without.
    """

    name: str
    function: str
    higher_is_better: bool = True
    loss: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class _Function:
    """A function that was imported and called on the base.

    Attributes:
        spec: What the user named.
        call: The function.
        takes_items: Whether it takes the ids to score.
        sha256: Of its module's source.
        sources: The code that the module depends on, see `python_sources.sources_of`.
        known_items: Every item that it scored for the base.
        items: The items of each role.
        loss: Its loss and how many arguments that takes; None without.
        loss_sha256: Of the loss's source; '' without.
    """

    spec: PythonSpec
    call: Callable[..., Any]
    takes_items: bool
    sha256: str
    sources: Mapping[str, str]
    known_items: frozenset[str]
    items: Mapping[Role, tuple[str, ...]]
    loss: tuple[Callable[..., Any], int] | None = None
    loss_sha256: str = ""


class PythonTasks:
    """Scores models by Python functions. Satisfies `evomerge.evaluation.task_set.TaskSet`.

    tasks = PythonTasks([PythonSpec("size", "my_scores:size")], tokenizer, base)
    tasks.score(model, tasks.items("search"))
    """

    def __init__(
        self,
        specs: Sequence[PythonSpec],
        tokenizer: Any,
        base: nn.Module,
        *,
        limits: Mapping[Role, int] | None = None,
    ) -> None:
        """Imports the functions and calls each once on the base.

        Args:
            specs: The functions.
            tokenizer: What each function gets as its second argument.
            base: Live base model, on which the items are learnt.
            limits: Role -> most items of each task, chosen by their hash; None for all.

        Raises:
            TaskError: A function cannot be imported, raises, gives no scores by item, or too few items for
                three roles.
        """
        self.tokenizer = tokenizer
        self._functions = {spec.name: _learn(spec, base, tokenizer, limits or {}) for spec in specs}

    def items(self, role: Role) -> Items:
        """See `Evaluator.items`. Ids are sorted."""
        return {name: function.items[role] for name, function in self._functions.items()}

    def score(self, model: nn.Module, items: Items) -> tuple[tuple[ItemScore, ...], dict[str, float]]:
        """Calls the functions; a task's metric is the mean of its scores.

        Args:
            model: Live model.
            items: Task -> ids of the items to score.

        Returns:
            Per-item scores, and metrics by task.

        Raises:
            CandidateError: A function gives no score for an item, scores another item, or gives no finite
                number.
        """
        scores: list[ItemScore] = []
        metrics: dict[str, float] = {}
        for name, ids in items.items():
            if not ids:
                continue
            function = self._functions[name]
            result = _call(function.call, function.takes_items, model, self.tokenizer, tuple(ids))
            values = _checked_values(function, result, ids)
            scores += [ItemScore(name, item, value) for item, value in zip(ids, values, strict=True)]
            metrics[name] = math.fsum(values) / len(values)
        return tuple(scores), metrics

    def check_losses(self, labels: Mapping[str, str]) -> tuple[str, ...]:
        """See `Differentiable.check_losses`: a task has a loss where the user gave one."""
        for name, function in self._functions.items():
            source = labels.get(name, GOLD)
            if source not in (GOLD, LEFT_OUT):
                raise TaskError(no_answers(name))
            if source == GOLD and function.loss is None:
                raise TaskError(
                    f"task '{name}' has no text with a right answer, so a learned stage has no loss for it; "
                    "give it a loss: module:function, search weights instead, or leave the task out"
                )
        return ()

    def backward(
        self, model: nn.Module, items: Items, request: GradientRequest
    ) -> tuple[tuple[ItemScore, ...], float]:
        """See `Differentiable.backward`. The value of an item is minus its loss.

        Raises:
            TaskError: A task has no loss.
            CandidateError: A loss gives no finite scalars with a gradient.
        """
        scores: list[ItemScore] = []
        whole: list[float] = []
        for name, ids in items.items():
            if not ids:
                continue
            loss = self._functions[name].loss
            if loss is None:
                raise TaskError(f"python task '{name}' has no loss; give it loss: module:function")
            call, count = loss
            with torch.set_grad_enabled(request.derivatives):
                total, values = losses(call, name, count, model, self.tokenizer, ids)
                if request.derivatives:
                    (request.weights[name] * total).backward()  # type: ignore[no-untyped-call]
            scores += [ItemScore(name, item, -value) for item, value in zip(ids, values, strict=True)]
            whole.append(request.weights[name] * math.fsum(values))
        return tuple(scores), math.fsum(whole)

    def sign(self, task: str) -> int:
        """See `TaskSet.sign`."""
        return 1 if self._functions[task].spec.higher_is_better else -1

    def metric(self, task: str) -> str:
        """See `TaskSet.metric`: the mean of the function's scores."""
        return f"mean of {self._functions[task].spec.function}"

    def filter(self, task: str) -> str | None:
        """See `TaskSet.filter`. None."""
        return None

    def unit(self, task: str) -> str | None:
        """See `TaskSet.unit`. None: only the function knows."""
        return None

    def soft_metrics(self, task: str) -> tuple[str, ...]:
        """See `TaskSet.soft_metrics`. None: a function gives one score."""
        return ()

    def is_mean(self, task: str) -> bool:
        """See `TaskSet.is_mean`. Always true."""
        return True

    def subtasks(self, task: str) -> tuple[tuple[str, float], ...]:
        """See `TaskSet.subtasks`: the task itself."""
        return ((task, 1.0),)

    def warnings(self, model: nn.Module | None = None) -> tuple[str, ...]:
        """See `TaskSet.warnings`. None."""
        return ()

    def fingerprint(self) -> dict[str, str]:
        """Task -> SHA-256 of the module's source, the function's name and every item of every role.

        What resume compares.
        """
        digests = {}
        for name, f in self._functions.items():
            parts: tuple[Any, ...] = (f.spec, f.sha256, [f.items[role] for role in ROLES])
            if f.loss is not None:
                parts = (*parts, f.spec.loss, f.loss_sha256)
            digests[name] = hashlib.sha256(repr(parts).encode()).hexdigest()
        return digests

    def sources(self) -> dict[str, dict[str, str]]:
        """See `TaskSet.sources`: all Python below the module's folder, and the packages that it imports."""
        return {name: dict(function.sources) for name, function in self._functions.items()}

    def backends(self, model: nn.Module) -> dict[str, str]:
        """See `TaskSet.backends`: the function, and the SHA-256 of its module's source file."""
        return {
            name: f"python: {function.spec.function}, sha256 {function.sha256}"
            for name, function in self._functions.items()
        }

    def optimizations(self, model: nn.Module, items: Items) -> dict[str, Any]:
        """See `TaskSet.optimizations`. None: a function calls the model in its own way."""
        return {}

    def samples(self, model: nn.Module, items: Items) -> list[Any]:
        """See `TaskSet.samples`. None: a function shows no prompts."""
        return []

    def examples(self, count: int) -> list[tuple[str, str]]:
        """See `TaskSet.examples`. None: a function shows no prompts."""
        return []


def _checked_values(function: _Function, result: Any, ids: Sequence[str]) -> list[float]:
    """The scores of the items.

    Raises CandidateError for items that are missing or unknown, or no finite number.
    """
    name = function.spec.name
    if not isinstance(result, Mapping):
        raise CandidateError(
            f"python task '{name}' gave {type(result).__name__}; it must give a mapping of items to scores"
        )
    expected = ids if function.takes_items else function.known_items
    unexpected = [item for item in result if item not in expected]
    if unexpected:
        raise CandidateError(
            f"python task '{name}' scored {len(unexpected)} items that it was not asked for, the first "
            f"{unexpected[0]!r}"
        )
    missing = [item for item in ids if item not in result]
    if missing:
        raise CandidateError(
            f"python task '{name}' gave no score for {len(missing)} of {len(ids)} items, the first "
            f"'{missing[0]}'"
        )
    values = [_to_float(result[item]) for item in ids]
    for item, value in zip(ids, values, strict=True):
        if not math.isfinite(value):
            raise CandidateError(
                f"python task '{name}' gave {result[item]!r} for item '{item}'; a score is a finite number"
            )
    return values


def _learn(spec: PythonSpec, base: nn.Module, tokenizer: Any, limits: Mapping[Role, int]) -> _Function:
    """Imports a function and learns its items from one call on the base."""
    call, file = _import_function(spec.name, spec.function)
    sources = sources_of(spec.function.partition(":")[0], file)
    takes_items = _count_arguments(call) > 2
    try:
        result = _call(call, takes_items, base, tokenizer, None)
    except Exception as error:  # a user's function can raise anything
        raise TaskError(
            f"python task '{spec.name}' fails for the base: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(result, Mapping) or not all(
        isinstance(item, str) and math.isfinite(_to_float(value)) for item, value in result.items()
    ):
        raise TaskError(
            f"python task '{spec.name}' must give a finite number for each item, items named by strings; "
            f"got {str(result)[:80]}"
        )
    items = _assign_roles(spec.name, list(result), limits)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    function = _Function(spec, call, takes_items, digest, sources, frozenset(result), items)
    if spec.loss is None:
        return function
    loss, file = _import_function(spec.name, spec.loss)
    return replace(
        function,
        loss=(loss, _checked_arguments(spec, loss)),
        loss_sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        sources={**sources, **sources_of(spec.loss.partition(":")[0], file)},
    )


def _checked_arguments(spec: PythonSpec, loss: Callable[..., Any]) -> int:
    """How many arguments a loss takes; raises TaskError for other than two or three."""
    count = _count_arguments(loss)
    if count not in (2, 3):
        raise TaskError(
            f"python task '{spec.name}': its loss {spec.loss} takes {count} arguments; it is called as "
            "loss(model, items) or loss(model, tokenizer, items)"
        )
    return count


def _count_arguments(call: Callable[..., Any]) -> int:
    """How many positional arguments a function takes."""
    kinds = [p.kind for p in inspect.signature(call).parameters.values()]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(kind in positional for kind in kinds)


def _assign_roles(name: str, ids: Sequence[str], limits: Mapping[Role, int]) -> dict[Role, tuple[str, ...]]:
    """The items of each role, by hash, those with the smallest hashes where a role is limited."""
    hashed = sorted((hashlib.sha256(item.encode()).hexdigest(), item) for item in ids)
    items: dict[Role, tuple[str, ...]] = {}
    for role in ROLES:
        of_role = [item for digest, item in hashed if role_of_hash(digest) == role]
        items[role] = tuple(sorted(of_role[: limits.get(role)]))
        if not items[role]:
            raise TaskError(
                f"python task '{name}' scores {len(ids)} items, and none of them falls to {role}; let "
                "it score more"
            )
    return items


def _call(
    call: Callable[..., Any],
    takes_items: bool,
    model: nn.Module,
    tokenizer: Any,
    items: tuple[str, ...] | None,
) -> Any:
    with torch.no_grad():
        return call(model, tokenizer, items) if takes_items else call(model, tokenizer)


def _import_function(task: str, function: str) -> tuple[Callable[..., Any], Path]:
    """(the function, its module's source file)."""
    module_name, _, name = function.partition(":")
    here = os.getcwd()
    sys.path.append(here)  # last: files in the working directory hide no installed module
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module's own code can raise anything
        raise TaskError(
            f"python task '{task}': module '{module_name}' cannot be imported: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        sys.path.remove(here)
    call = getattr(module, name, None)
    file = inspect.getsourcefile(module)
    if not callable(call) or file is None:
        raise TaskError(f"python task '{task}': {module_name} holds no function '{name}' written in Python")
    return call, Path(file)


def _to_float(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
