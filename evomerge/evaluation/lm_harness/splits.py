"""Which documents of a task become items, by `evaluation.splits`; which choices a task refuses, and why.

Whatever is refused, `refusal` says it, and names the choices that would not be refused next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

from evomerge.errors import TaskError
from evomerge.evaluation.records import ROLES, Role

Splits = Literal["declared", "hash", "hash-train", "validation"]
"""How a task's documents become items; see `TaskSpec.splits`."""
_OFFERS: dict[Splits, str] = {
    "declared": "splits: declared, which takes its training, validation and test items as they are",
    "hash-train": "splits: hash-train, which deals its training items",
    "validation": "splits: validation, which searches on its validation items and keeps its test items",
    "hash": "splits: hash, which deals the items that lm-eval scores",
}
_DEALT: dict[Splits, str] = {"hash-train": "training_split", "validation": "validation_split"}
"""Splits of a task whose documents are dealt by hash -> lm-eval's setting that names them."""


def split_documents(task: Any, splits: Splits) -> tuple[list[Any] | None, dict[Role, list[Any]]]:
    """Reads a task's documents. `refusal` has been asked before.

    Args:
        task: lm-eval's task.
        splits: Which documents, see `TaskSpec.splits`.

    Returns:
        (documents to be dealt by hash to the roles that have none of their own, None for none; documents of
        roles).
    """
    if splits == "hash":
        return list(task.eval_docs), {}
    if splits == "hash-train":
        return list(task.training_docs()), {}
    if splits == "validation":
        return list(_validation(task)), {"test": list(task.test_docs())}
    declared: dict[Role, list[Any]] = {
        "search": list(task.training_docs()),
        "validation": list(task.validation_docs()),
        "test": list(task.test_docs()),
    }
    return None, {role: declared[role] for role in ROLES}


def dealt_setting(splits: Splits) -> str | None:
    """Names the setting of the split whose documents are dealt by hash.

    Args:
        splits: See `TaskSpec.splits`.

    Returns:
        'training_split' or 'validation_split'; None for the split that lm-eval scores.
    """
    return _DEALT.get(splits)


def refusal(task: Any, name: str, splits: Splits, *, is_benchmark: bool) -> str | None:
    """Says why a task cannot be split so, and how it could.

    Args:
        task: lm-eval's task.
        name: Its name.
        splits: See `TaskSpec.splits`.
        is_benchmark: Whether its own test items must not be searched on: it is lm-eval's, and the user has
            not allowed it.

    Returns:
        A sentence; None where nothing is refused.
    """
    reason = _reason(task, splits, is_benchmark)
    if reason is None:
        return None
    return f"task '{name}' {reason}; {advice(task, splits, is_benchmark=is_benchmark)}"


def advice(task: Any, splits: Splits, *, is_benchmark: bool) -> str:
    """Names the choices of splits that are not refused.

    Args:
        task: lm-eval's task.
        splits: The choice that is refused.
        is_benchmark: See `refusal`.

    Returns:
        A phrase.
    """
    others: list[Splits] = [other for other in _OFFERS if other != splits]
    offers = [_OFFERS[other] for other in others if _reason(task, other, is_benchmark) is None]
    text = f"write {', or '.join(offers)}" if offers else "take another task for the search"
    if is_benchmark:
        text += "; or accept a search on its own test items, whose score then means nothing, with "
        text += "splits: hash and evaluation.allow_benchmark_test: true"
    return text


def check(task: Any, name: str, splits: Splits, *, is_benchmark: bool) -> None:
    """Checks that a task can be split so.

    Args:
        task: lm-eval's task.
        name: Its name.
        splits: See `TaskSpec.splits`.
        is_benchmark: See `refusal`.

    Raises:
        TaskError: It cannot.
    """
    sentence = refusal(task, name, splits, is_benchmark=is_benchmark)
    if sentence is not None:
        raise TaskError(sentence)


def _reason(task: Any, splits: Splits, is_benchmark: bool) -> str | None:
    """What speaks against a choice; None for nothing."""
    if splits == "hash":
        if not is_benchmark:
            return None
        split = "test" if task.has_test_docs() else "validation"
        return (
            f"is lm-eval's: with splits: hash the search would optimise on the benchmark's own {split} "
            "items, and its score there would mean nothing any more"
        )
    needed: dict[Splits, dict[Role, Callable[[], Any]]] = {
        "hash-train": {"search": lambda: _training(task)},
        "validation": {"validation": lambda: _validation(task), "test": lambda: _test(task)},
        "declared": {
            "search": lambda: _training(task),
            "validation": lambda: task.has_validation_docs() and task.validation_docs(),
            "test": lambda: _test(task),
        },
    }
    missing = [role for role, read in needed[splits].items() if not read()]
    if not missing:
        return None
    kinds = ["training" if role == "search" else role for role in missing]
    return f"has no {' and no '.join(kinds)} documents, which splits: {splits} needs"


def _training(task: Any) -> Any:
    return task.has_training_docs() and task.training_docs()


def _test(task: Any) -> Any:
    return task.has_test_docs() and task.test_docs()


def _validation(task: Any) -> Any:
    """Validation documents, also of a data set whose task does not declare them, as lm-eval's mmlu."""
    if task.has_validation_docs():
        return task.validation_docs()
    dataset = getattr(task, "dataset", None)
    if not task.has_test_docs() or not isinstance(dataset, dict) or "validation" not in dataset:
        return None
    if task.config.fewshot_split == "validation" or task.config.test_split == "validation":
        return None
    process = task.config.process_docs
    return dataset["validation"] if process is None else process(dataset["validation"])


SPLITS: tuple[Splits, ...] = get_args(Splits)
