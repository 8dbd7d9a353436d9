"""Which documents are the items of which role: dealt by a hash of their content or declared, each in one role and once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from evomerge.errors import TaskError
from evomerge.evaluation.contamination import NGRAM
from evomerge.evaluation.records import ROLES, Role, role_of_hash

Splits = Literal["declared", "hash", "hash-train"]
_KEEPS: tuple[Role, ...] = (
    "test",
    "validation",
    "search",
)  # who keeps an item of several roles: what is tested was not searched
_NAMED = 3  # items that a sentence names


@dataclass(frozen=True, slots=True)
class ItemRules:
    """Which documents may become items.

    duplicates: 'refuse' raises for an item in two declared splits, 'drop' keeps it in the later role only (test, then
    validation). allow_benchmark_test: lets a task of lm-eval's own tree be dealt by hash, so that the search optimises
    on the benchmark's own test items. training_texts: files that items are compared with; overlap: 'warn' names the
    items that share `overlap_ngram` words in a row with them, 'drop' also leaves them out.
    """

    duplicates: Literal["refuse", "drop"] = "refuse"
    allow_benchmark_test: bool = False
    training_texts: tuple[Path, ...] = ()
    overlap_ngram: int = NGRAM
    overlap: Literal["warn", "drop"] = "warn"


@dataclass(frozen=True, slots=True)
class Asked:
    """A document and what is asked about it.

    item: its id; content: hash of its rendered question, choices and answer; number: its place in its split, as lm-eval
    counts; text: question and right answer, for people and for comparison with training texts.
    """

    item: str
    content: str
    number: int
    text: str
    requests: list[Any]

    @property
    def opening(self) -> str:
        """The first words, quoted."""
        found = self.text.split()
        return f"'{' '.join(found[:8])}{' …' if len(found) > 8 else ''}'"


def item_id(doc: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of a document's canonical JSON."""
    return hashlib.sha256(json.dumps(doc, sort_keys=True, default=str).encode()).hexdigest()[:16]


def documents(task: Any, name: str, splits: Splits) -> dict[Role, list[Any]] | list[Any]:
    """The documents of each role as the task declares them, or those of one split, to be dealt. Raises TaskError for a role without."""
    if splits == "hash":
        return list(task.eval_docs)
    if splits == "hash-train":
        if not task.has_training_docs():
            raise TaskError(
                f"task '{name}' has no training documents to deal; use splits: hash or another task"
            )
        return list(task.training_docs())
    found = {
        "search": task.has_training_docs() and task.training_docs(),
        "validation": task.has_validation_docs() and task.validation_docs(),
        "test": task.has_test_docs() and task.test_docs(),
    }
    missing = [role for role, docs in found.items() if not docs]
    if missing:
        raise TaskError(f"task '{name}' declares no documents for {', '.join(missing)}; use splits: hash")
    return {role: list(found[role]) for role in ROLES}


def deal(
    name: str,
    asked: Mapping[Role, Sequence[Asked]] | Sequence[Asked],
    chosen: Mapping[Role, Sequence[int | str]],
) -> dict[Role, list[Asked]]:
    """The documents of each role. chosen: role -> numbers or ids of exactly its documents, in place of the split's or the dealt ones.

    Raises TaskError for a choice that is empty, unknown, or in two roles.
    """
    if isinstance(asked, Mapping):
        return {
            role: _choose(name, role, asked[role], chosen[role]) if role in chosen else list(asked[role])
            for role in ROLES
        }
    own = {role: _choose(name, role, asked, chosen[role]) for role in ROLES if role in chosen}
    taken: dict[str, Role] = {}
    for role, rows in own.items():
        for row in rows:
            if taken.setdefault(row.item, role) != role:
                raise TaskError(
                    f"task '{name}': item {row.item} is listed for {taken[row.item]} and for {role}; list it once"
                )
    return {
        role: own[role]
        if role in own
        else [row for row in asked if row.item not in taken and role_of_hash(row.item) == role]
        for role in ROLES
    }


def without_twins(
    name: str, roles: Mapping[Role, Sequence[Asked]], *, refuse: bool
) -> tuple[dict[Role, list[Asked]], list[str]]:
    """(roles in which no item occurs twice, what was found). Twins are the same document, or ask the same and expect the same.

    Of twins in a role the first stays; of twins in several roles the one of the test, else of validation. refuse: raise
    TaskError for the latter.
    """
    first: dict[str, tuple[Role, Asked]] = {}
    kept: dict[Role, list[Asked]] = {}
    within: dict[Role, list[str]] = {role: [] for role in ROLES}
    across: list[str] = []
    for role in _KEEPS:
        kept[role] = []
        for row in roles[role]:
            there = first.get(row.item) or first.get(row.content)
            if there is None:
                first[row.item] = first[row.content] = (role, row)
                kept[role].append(row)
            elif there[0] == role:
                within[role].append(f"{row.opening} (documents {there[1].number} and {row.number})")
            else:
                across.append(f"{row.opening} ({role} {row.number} and {there[0]} {there[1].number})")
    if across and refuse:
        raise TaskError(
            f"task '{name}' has {_count(across)} in more than one split: {_some(across)}; correct its data, "
            "or write evaluation.duplicates: drop to keep each in the later split only"
        )
    findings = [
        f"task '{name}': {_count(found)} of {role} repeated, scored once: {_some(found)}"
        for role, found in within.items()
        if found
    ]
    if across:
        findings.append(
            f"task '{name}': {_count(across)} in more than one role, kept in the later one only: {_some(across)}"
        )
    return {role: kept[role] for role in ROLES}, findings


def limited(rows: Sequence[Asked], most: int | None) -> list[Asked]:
    """At most so many of the rows, those with the smallest ids, in the order of the documents, as lm-eval batches them."""
    among = {row.item for row in (rows if most is None else sorted(rows, key=lambda row: row.item)[:most])}
    return [row for row in rows if row.item in among]


def named(rows: Sequence[Asked]) -> str:
    """A few of the rows, for a sentence."""
    return _some([f"{row.opening} (document {row.number})" for row in rows])


def _choose(name: str, role: Role, rows: Sequence[Asked], wanted: Sequence[int | str]) -> list[Asked]:
    if not wanted:
        raise TaskError(
            f"task '{name}': the list of items for {role} is empty; list some, or leave it out to use all"
        )
    numbers = {row.number: row for row in rows}
    ids = {row.item: row for row in reversed(rows)}
    unknown = [str(w) for w in wanted if (w not in numbers if isinstance(w, int) else w not in ids)]
    if unknown:
        some = ", ".join(unknown[:_NAMED]) + (
            f" and {len(unknown) - _NAMED} more" if len(unknown) > _NAMED else ""
        )
        raise TaskError(
            f"task '{name}' has no item {some} for {role}; list document numbers (0 to {len(rows) - 1}) or item ids of 16 hexadecimal digits"
        )
    found = {(numbers[w] if isinstance(w, int) else ids[w]).number for w in wanted}
    return [row for row in rows if row.number in found]


def _count(found: Sequence[str]) -> str:
    return f"{len(found)} item{'s' if len(found) > 1 else ''}"


def _some(found: Sequence[str]) -> str:
    return "; ".join(found[:_NAMED]) + (f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else "")
