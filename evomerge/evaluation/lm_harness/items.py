"""Which documents are the items of which role.

Assigned by a hash of their content or declared, each in one role and once.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from evomerge.errors import TaskError
from evomerge.evaluation.contamination import NGRAM
from evomerge.evaluation.records import ROLES, Role, role_of_hash

_PRECEDENCE: tuple[Role, ...] = ("test", "validation", "search")
"""Which role keeps an item of several roles: what is tested was not searched."""
_SEARCHED = 0.6  # of the items that search and validation share
_NAMED = 3  # items that a sentence names


@dataclass(frozen=True, slots=True)
class ItemRules:
    """Which documents may become items.

    Attributes:
        duplicates: 'refuse' raises for an item in two declared splits, 'drop' keeps it in the later role only
            (test, then validation).
        allow_benchmark_test: Allows a task of lm-eval's own tree to be assigned by hash, so that the search
            optimises on the benchmark's own test items.
        training_texts: Files that items are compared with.
        overlap_ngram: Words in a row that an item and a training text must share to overlap.
        overlap: 'warn' names the items that overlap, 'drop' also leaves them out.
    """

    duplicates: Literal["refuse", "drop"] = "refuse"
    allow_benchmark_test: bool = False
    training_texts: tuple[Path, ...] = ()
    overlap_ngram: int = NGRAM
    overlap: Literal["warn", "drop"] = "warn"


@dataclass(frozen=True, slots=True)
class TaskDocument:
    """A document of a task with its requests.

    Attributes:
        item: Its id.
        content: Hash of its rendered question, choices and answer.
        number: Its index in its split, as lm-eval counts.
        text: Question and right answer, for people and for comparison with training texts.
        requests: lm-eval's `Instance` objects, in order.
    """

    item: str
    content: str
    number: int
    text: str
    requests: list[Any]

    @property
    def opening(self) -> str:
        """The first words, quoted."""
        words = self.text.split()
        return f"'{' '.join(words[:8])}{' …' if len(words) > 8 else ''}'"


def item_id(doc: Any) -> str:
    """Computes a document's id.

    Args:
        doc: A document, JSON or what `str` makes of it.

    Returns:
        16 hexadecimal digits of the SHA-256 of its canonical JSON.
    """
    return hashlib.sha256(json.dumps(doc, sort_keys=True, default=str).encode()).hexdigest()[:16]


def assign_roles(
    name: str,
    dealt: Sequence[TaskDocument] | None,
    declared: Mapping[Role, Sequence[TaskDocument]],
    chosen: Mapping[Role, Sequence[int | str]],
) -> dict[Role, list[TaskDocument]]:
    """Assigns documents to roles.

    Args:
        name: Name of the task, for errors.
        dealt: Documents that are assigned by hash to the roles without documents of their own: 6, 2 and 2
            tenths; where the test has documents, those with the smallest ids to the search, 6 tenths, and the
            others to validation, so that a few documents leave neither empty. None for none.
        declared: Documents of roles.
        chosen: Role -> numbers or ids of exactly its documents, in place of the declared or hashed ones.

    Returns:
        The documents of each role.

    Raises:
        TaskError: A choice is empty, unknown, or in two roles.
    """
    pools = {role: declared.get(role, dealt or ()) for role in ROLES}
    by_choice = {role: _choose(name, role, pools[role], chosen[role]) for role in ROLES if role in chosen}
    taken: dict[str, Role] = {}
    for role, rows in by_choice.items():
        for row in rows if role not in declared else ():
            if taken.setdefault(row.item, role) != role:
                raise TaskError(
                    f"task '{name}': item {row.item} is listed for {taken[row.item]} and for {role}; "
                    "list it once"
                )

    of_hash = _dealt_to_two(dealt or (), taken) if declared else role_of_hash
    assigned: dict[Role, list[TaskDocument]] = {}
    for role in ROLES:
        if role in by_choice:
            assigned[role] = by_choice[role]
        elif role in declared:
            assigned[role] = list(declared[role])
        else:
            assigned[role] = [r for r in pools[role] if r.item not in taken and of_hash(r.item) == role]
    return assigned


def _dealt_to_two(documents: Sequence[TaskDocument], taken: Mapping[str, Role]) -> Callable[[str], Role]:
    """Item -> search or validation, by the order of ids, which are hashes."""
    items = sorted({document.item for document in documents} - set(taken))
    searched = set(items[: min(len(items) - 1, math.ceil(_SEARCHED * len(items)))])

    def role(item: str) -> Role:
        return "search" if item in searched else "validation"

    return role


def remove_duplicates(
    name: str, roles: Mapping[Role, Sequence[TaskDocument]], *, refuse: bool
) -> tuple[dict[Role, list[TaskDocument]], list[str]]:
    """Removes items that occur twice: the same document, or documents that ask the same and expect the same.

    Args:
        name: Name of the task.
        roles: The documents of each role. Of duplicates within a role the first stays; of duplicates in
            several roles the one of the test, else of validation.
        refuse: Whether duplicates in several roles are an error.

    Returns:
        (the documents of each role, warnings about what was removed).

    Raises:
        TaskError: An item is in several roles and `refuse` is set.
    """
    first: dict[str, tuple[Role, TaskDocument]] = {}
    unique: dict[Role, list[TaskDocument]] = {}
    within: dict[Role, list[str]] = {role: [] for role in ROLES}
    across: list[str] = []
    for role in _PRECEDENCE:
        unique[role] = []
        for row in roles[role]:
            other = first.get(row.item) or first.get(row.content)
            if other is None:
                first[row.item] = first[row.content] = (role, row)
                unique[role].append(row)
            elif other[0] == role:
                within[role].append(f"{row.opening} (documents {other[1].number} and {row.number})")
            else:
                across.append(f"{row.opening} ({role} {row.number} and {other[0]} {other[1].number})")
    if across and refuse:
        raise TaskError(
            f"task '{name}' has {_count(across)} in more than one split: {_some(across)}; correct its data, "
            "or write evaluation.duplicates: drop to keep each in the later split only"
        )
    warnings = [
        f"task '{name}': {_count(repeated)} of {role} repeated, scored once: {_some(repeated)}"
        for role, repeated in within.items()
        if repeated
    ]
    if across:
        warnings.append(
            f"task '{name}': {_count(across)} in more than one role, kept in the later one only: "
            f"{_some(across)}"
        )
    return {role: unique[role] for role in ROLES}, warnings


def limited(documents: Sequence[TaskDocument], most: int | None) -> list[TaskDocument]:
    """Limits the number of documents.

    Args:
        documents: The documents.
        most: How many at most; None for all.

    Returns:
        Those with the smallest ids, in the order of the documents, as lm-eval batches them.
    """
    if most is None:
        return list(documents)
    chosen = {document.item for document in sorted(documents, key=lambda document: document.item)[:most]}
    return [document for document in documents if document.item in chosen]


def describe(documents: Sequence[TaskDocument]) -> str:
    """Names a few documents.

    Args:
        documents: The documents.

    Returns:
        Their openings and numbers, for a sentence.
    """
    return _some([f"{document.opening} (document {document.number})" for document in documents])


def _choose(
    name: str, role: Role, documents: Sequence[TaskDocument], wanted: Sequence[int | str]
) -> list[TaskDocument]:
    if not wanted:
        raise TaskError(
            f"task '{name}': the list of items for {role} is empty; list some, or leave it out to use all"
        )
    numbers = {document.number: document for document in documents}
    ids = {document.item: document for document in reversed(documents)}
    unknown = [str(w) for w in wanted if (w not in numbers if isinstance(w, int) else w not in ids)]
    if unknown:
        some = ", ".join(unknown[:_NAMED])
        if len(unknown) > _NAMED:
            some += f" and {len(unknown) - _NAMED} more"
        raise TaskError(
            f"task '{name}' has no item {some} for {role}; list document numbers (0 to {len(documents) - 1}) "
            "or item ids of 16 hexadecimal digits"
        )
    chosen = {(numbers[w] if isinstance(w, int) else ids[w]).number for w in wanted}
    return [document for document in documents if document.number in chosen]


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} item{'s' if len(names) > 1 else ''}"


def _some(names: Sequence[str]) -> str:
    text = "; ".join(names[:_NAMED])
    return f"{text}; and {len(names) - _NAMED} more" if len(names) > _NAMED else text
