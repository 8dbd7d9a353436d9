"""How a row of a study's file becomes a value, and how parts of a value are written. Opens no file."""

from __future__ import annotations

import base64
import hashlib
import json
import sqlite3
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from evomerge.evaluation import Attempt, Evaluation, Items, ItemScore, Slopes
from evomerge.store.records import Scored, StudyRow, Trial, WorkerUse
from evomerge.store.study_facts import Outcome, StudyFacts

_DECODER = json.JSONDecoder()

TRIALS = (
    "SELECT t.id, t.generation, t.slot, t.origin, t.label, t.genome, t.parents, t.recipe, e.score, e.error, "
    "e.metrics, e.seconds, e.reported, t.dropped, t.whole, t.violation, t.stage, e.costs, t.island "
    "FROM trials t JOIN evaluations e ON e.id = t.evaluation"
)


def item_set_id(items: Items) -> str:
    """Names a set of items by its content.

    Args:
        items: Task -> item ids, in order.

    Returns:
        16 hexadecimal digits of the SHA-256 of the items as stored.
    """
    return short_hash(items_json(items))


def short_hash(text: str) -> str:
    """Hashes a text.

    Args:
        text: Any text.

    Returns:
        16 hexadecimal digits of its SHA-256.
    """
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def items_json(items: Items) -> str:
    """Writes items as they are stored.

    Args:
        items: Task -> item ids, in order.

    Returns:
        JSON: a list of [task, item ids].
    """
    return json.dumps([[task, list(ids)] for task, ids in items.items()], separators=(",", ":"))


def soft_metric_column(values: list[float | None]) -> str | None:
    """Writes a soft metric of items as it is stored.

    Args:
        values: The soft metric of each item, None where an item has none.

    Returns:
        JSON, or None, which is stored as NULL, where no item has one.
    """
    return json.dumps(values) if any(value is not None for value in values) else None


def numbers_json(numbers: Mapping[str, float]) -> str:
    """Writes named numbers as they are stored.

    Args:
        numbers: Name -> number.

    Returns:
        JSON with the names sorted.
    """
    return json.dumps(dict(numbers), sort_keys=True)


def study(row: sqlite3.Row) -> StudyRow:
    """Reads the study's row.

    Args:
        row: Of the table `study`.

    Returns:
        The study.
    """
    return StudyRow(
        name=row["name"],
        seed=row["seed"],
        config=row["config"],
        overrides=json.loads(row["overrides"]),
        facts=StudyFacts.from_json(json.loads(row["facts"])),
        state=row["state"],
        outcome=Outcome.from_json(json.loads(row["outcome"])) if row["outcome"] else None,
    )


@dataclass
class TrialReader:
    """Reads all trials of a file again and again: a row that is as it was gives the value that it gave.

    Attributes:
        known: Trial id -> its row and its value at the last reading.
    """

    known: dict[int, tuple[tuple[Any, ...], Trial]] = field(default_factory=dict)

    def read(self, found: Sequence[sqlite3.Row]) -> list[Trial]:
        """Reads the trials.

        Args:
            found: All rows of the query `TRIALS`.

        Returns:
            Their trials, in the same order.
        """
        before, self.known = self.known, {}
        for row in found:
            values = tuple(row)
            old = before.get(row["id"])
            self.known[row["id"]] = old if old is not None and old[0] == values else (values, trial(row))
        return [value for _, value in self.known.values()]


def trial(row: sqlite3.Row) -> Trial:
    """Reads a trial.

    Args:
        row: Of the query `TRIALS`.

    Returns:
        The trial.
    """
    number, generation, slot, origin, label, genome, parents, *more = row  # by name it takes twice as long
    recipe, score, error, metrics, seconds, reported, dropped, whole, violation, stage, costs, island = more
    if not str(label).isprintable() or not str(origin).isprintable():
        raise ValueError("a label has control characters")
    return Trial(
        id=number,
        generation=generation,
        slot=slot,
        origin=origin,
        label=label,
        genome=tuple(_value(genome)) if genome else None,
        parents=tuple(_value(parents)),
        recipe_id=recipe,
        score=score,
        error=error,
        metrics=_numbers(metrics),
        seconds=_numbers(seconds),
        reported=score if reported is None else reported,
        dropped=dropped,
        whole=whole,
        violation=violation or 0.0,
        stage=stage,
        costs=_numbers(costs) if costs else {},
        island=island,
    )


def scored(row: sqlite3.Row, item_set: str) -> Scored:
    """Reads an evaluation, or a point of a scan, which has no soft metrics, costs or reported score.

    Args:
        row: Of the table `evaluations` or `sensitivity`.
        item_set: The items as stored.

    Returns:
        The evaluation with its scores.
    """
    columns = set(row.keys())
    names = [(task, item) for task, ids in json.loads(item_set) for item in ids]
    values = json.loads(row["scores"])
    probabilities = _soft_metric(row, "probabilities", len(values))
    logprobs = _soft_metric(row, "logprobs", len(values))
    items = tuple(
        ItemScore(task, item, value, probability, logprob)
        for (task, item), value, probability, logprob in zip(
            names, values, probabilities, logprobs, strict=False
        )
    )
    costs = _numbers(row["costs"]) if "costs" in columns and row["costs"] else {}
    evaluation = Evaluation(
        row["recipe"],
        items,
        _numbers(row["metrics"]),
        _numbers(row["seconds"]),
        row["error"],
        costs,
        _slopes(row),
        tuple(json.loads(row["answers"])) if "answers" in columns and row["answers"] else (),
    )
    reported = row["reported"] if "reported" in columns else None
    return Scored(row["score"], evaluation, row["score"] if reported is None else reported)


def _value(text: str) -> Any:
    """A short JSON text as `json.dumps` writes it; in 60 % of the time of `json.loads`."""
    value, end = _DECODER.raw_decode(text)
    return value if end == len(text) else json.loads(text)


def _numbers(text: str) -> dict[str, float]:
    """Named numbers as `numbers_json` wrote them; raises TypeError for anything else."""
    numbers = _value(text)
    if not isinstance(numbers, dict) or not {type(x) for x in numbers.values()} <= {int, float}:
        raise TypeError("there are no numbers by name")
    return numbers


def slopes_json(slopes: Slopes | None) -> str | None:
    """Writes derivatives as a column.

    Args:
        slopes: Of an evaluation.

    Returns:
        JSON of the loss, of (tensor, parameter, source, derivative) rows and, where weights of rows were
        derived by, of (tensor, parameter, source, base64 of little-endian float32); None without slopes.
    """
    if slopes is None:
        return None
    partials = [[*key, value] for key, value in slopes.partials.items()]
    rows = [[*key, _packed(values)] for key, values in slopes.rows.items()]
    return json.dumps([slopes.loss, partials, rows] if rows else [slopes.loss, partials])


def _packed(values: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


def _unpacked(text: str) -> tuple[float, ...]:
    data = base64.b64decode(text, validate=True)
    if len(data) % 4:
        raise ValueError("derivatives by row are no float32 numbers")
    return struct.unpack(f"<{len(data) // 4}f", data)


def _slopes(row: sqlite3.Row) -> Slopes | None:
    """The derivatives of an evaluation."""
    if "slopes" not in set(row.keys()) or not row["slopes"]:
        return None
    loss, partials, *rows = json.loads(row["slopes"])
    return Slopes(
        loss,
        {(tensor, param, source): value for tensor, param, source, value in partials},
        {(tensor, param, source): _unpacked(text) for found in rows for tensor, param, source, text in found},
    )


def _soft_metric(row: sqlite3.Row, column: str, count: int) -> list[float | None]:
    """A soft metric of `count` items, None of each where it is not stored."""
    if column not in set(row.keys()) or not row[column]:
        return [None] * count
    values: list[float | None] = json.loads(row[column])
    return values


def attempt(row: sqlite3.Row) -> Attempt:
    """Reads an attempt.

    Args:
        row: Of the table `attempts`.

    Returns:
        The attempt.
    """
    return Attempt(
        row["recipe"],
        row["number"],
        row["cause"],
        row["error"],
        row["worker"],
        row["host"],
        row["pid"],
        row["device"],
        row["started"],
        row["seconds"],
        row["log"],
    )


def worker_uses(rows: Sequence[sqlite3.Row]) -> list[WorkerUse]:
    """Adds up what the workers did.

    Args:
        rows: (worker, host, device, pid, cause, count, seconds, first, last) of each process and cause.

    Returns:
        One value for each worker, by name.
    """
    totals: dict[tuple[str, str, str], _WorkerTotal] = {}
    for row in rows:
        total = totals.setdefault((row["worker"], row["host"], row["device"]), _WorkerTotal())
        total.add(row)
    return [
        total.worker_use(worker, host, device) for (worker, host, device), total in sorted(totals.items())
    ]


@dataclass(slots=True)
class _WorkerTotal:
    """What is added up of a worker. spans: process id -> (begin of the first attempt, end of the last)."""

    jobs: int = 0
    busy: float = 0.0
    failures: dict[str, int] = field(default_factory=dict)
    spans: dict[int, tuple[float, float]] = field(default_factory=dict)

    def add(self, row: sqlite3.Row) -> None:
        if row["cause"] in ("done", "failed"):  # that a candidate cannot be scored is a result too
            self.jobs += row["count"]
        else:
            self.failures[row["cause"]] = self.failures.get(row["cause"], 0) + row["count"]
        self.busy += row["seconds"]
        first, last = self.spans.get(row["pid"], (row["first"], row["last"]))
        self.spans[row["pid"]] = (min(first, row["first"]), max(last, row["last"]))

    def worker_use(self, worker: str, host: str, device: str) -> WorkerUse:
        spans = list(self.spans.values())
        return WorkerUse(
            worker=worker,
            host=host,
            device=device,
            jobs=self.jobs,
            busy=self.busy,
            span=sum(last - first for first, last in spans),
            first=min(first for first, _ in spans),
            last=max(last for _, last in spans),
            failures=dict(sorted(self.failures.items())),
        )
