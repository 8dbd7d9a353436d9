"""What the tables hold, as values, and how a row becomes one. Opens no file."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from evomerge.evaluation import Attempt, Evaluation, Items, ItemScore, Role
from evomerge.store.study_facts import Outcome, StudyFacts

Purpose = Role | Literal["rung"]
"""What an evaluation is for: a role of its items, or a rung of a race, whose items are a part of a generation's."""

TRIALS = "SELECT t.*, e.score, e.reported, e.error, e.metrics, e.seconds, e.costs FROM trials t JOIN evaluations e ON e.id = t.evaluation"


@dataclass(frozen=True, slots=True)
class Trial:
    """One candidate as it was tried. origin: parent, hand, sampled, injected or mean; label: a hand recipe's name.

    generation 0 holds parents and hand recipes; genome is None where the recipe came from no genome. parents: ids of
    the trials recombined into it. score: the objective as the search sees it, None means it failed, see `error`;
    reported: the objective by the tasks' metrics. whole: how many items its generation was raced on, where it was scored
    on a part of them: `reported` is then of that part, and `score` what the search would have seen on all. dropped: the
    rung, from 1, at which the race dropped it. violation: by how much it breaks the search's `keep`, 0 where it keeps it.
    stage: of the search, from 0; costs: 'layers' and 'parameters' of the model, where they were recorded. island: of the
    stage, from 0.
    """

    id: int
    generation: int
    slot: int
    origin: str
    label: str | None
    genome: tuple[float, ...] | None
    parents: tuple[int, ...]
    recipe_id: str
    score: float | None
    error: str | None
    metrics: Mapping[str, float]
    seconds: Mapping[str, float]
    reported: float | None = None
    dropped: int | None = None
    whole: int | None = None
    violation: float = 0.0
    stage: int = 0
    costs: Mapping[str, float] = field(default_factory=dict)
    island: int = 0


@dataclass(frozen=True, slots=True)
class StudyRow:
    """The study as stored. config: the YAML verbatim; overrides: what flags changed in it; facts: hashes, versions
    and choices derived from them; outcome: set when done."""

    name: str
    seed: int
    config: str
    overrides: dict[str, int]
    facts: StudyFacts
    state: str
    outcome: Outcome | None


@dataclass(frozen=True, slots=True)
class Scored:
    """A stored evaluation of a recipe on some items. score: what ranked it; reported: the objective by the tasks' metrics."""

    score: float | None
    evaluation: Evaluation
    reported: float | None = None


@dataclass(frozen=True, slots=True)
class WorkerUse:
    """What a worker did. jobs: attempts that ended with a result; busy: seconds at work; span: seconds from the begin of the
    first attempt to the end of the last, added up over its processes, so that a pause of the study is in none; first, last:
    Unix seconds; failures: attempts that ended otherwise, by cause. The time before its first attempt is not in the span."""

    worker: str
    host: str
    device: str
    jobs: int
    busy: float
    span: float
    first: float
    last: float
    failures: Mapping[str, int]

    @property
    def utilisation(self) -> float:
        """Share of the span that it was at work, in [0, 1]."""
        return min(1.0, self.busy / self.span) if self.span > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Run:
    """A driver's run. started: Unix seconds; seconds: how long it has driven."""

    host: str
    pid: int
    started: float
    seconds: float


def item_set_id(items: Items) -> str:
    """16 hexadecimal digits of the SHA-256 of the item ids by task."""
    return short_hash(items_json(items))


def short_hash(text: str) -> str:
    """16 hexadecimal digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def items_json(items: Items) -> str:
    """Items as they are stored."""
    return json.dumps([[task, list(ids)] for task, ids in items.items()], separators=(",", ":"))


def column(values: list[float | None]) -> str | None:
    """A list of soft scores as stored; NULL where no item has one."""
    return json.dumps(values) if any(v is not None for v in values) else None


def numbers(value: Mapping[str, float]) -> str:
    """Named numbers as stored."""
    return json.dumps(dict(value), sort_keys=True)


def study(row: sqlite3.Row) -> StudyRow:
    """The study of its row."""
    outcome = Outcome.from_json(json.loads(row["outcome"])) if row["outcome"] else None
    return StudyRow(
        row["name"],
        row["seed"],
        row["config"],
        json.loads(row["overrides"]),
        StudyFacts.from_json(json.loads(row["facts"])),
        row["state"],
        outcome,
    )


def trial(row: sqlite3.Row) -> Trial:
    """The trial of a row of `TRIALS`."""
    return Trial(
        id=row["id"],
        generation=row["generation"],
        slot=row["slot"],
        origin=row["origin"],
        label=row["label"],
        genome=tuple(json.loads(row["genome"])) if row["genome"] else None,
        parents=tuple(json.loads(row["parents"])),
        recipe_id=row["recipe"],
        score=row["score"],
        error=row["error"],
        metrics=json.loads(row["metrics"]),
        seconds=json.loads(row["seconds"]),
        reported=row["score"] if row["reported"] is None else row["reported"],
        dropped=row["dropped"],
        whole=row["whole"],
        violation=row["violation"] or 0.0,
        stage=row["stage"],
        costs=json.loads(row["costs"]) if row["costs"] else {},
        island=row["island"],
    )


def scored(row: sqlite3.Row, item_set: str) -> Scored:
    """The evaluation, or the point of a scan, of a row. item_set: the body of its items."""
    names = [(task, item) for task, ids in json.loads(item_set) for item in ids]
    values = json.loads(row["scores"])
    stored = row.keys()  # a scan's rows hold no soft scores
    soft = [
        json.loads(row[n]) if n in stored and row[n] else [None] * len(values)
        for n in ("probabilities", "logprobs")
    ]
    items = tuple(
        ItemScore(task, item, *scores) for (task, item), *scores in zip(names, values, *soft, strict=False)
    )
    costs = json.loads(row["costs"]) if "costs" in stored and row["costs"] else {}
    evaluation = Evaluation(
        row["recipe"], items, json.loads(row["metrics"]), json.loads(row["seconds"]), row["error"], costs
    )
    reported = row["reported"] if "reported" in stored else None
    return Scored(row["score"], evaluation, row["score"] if reported is None else reported)


def attempt(row: sqlite3.Row) -> Attempt:
    """The attempt of its row."""
    names = (
        "recipe",
        "number",
        "cause",
        "error",
        "worker",
        "host",
        "pid",
        "device",
        "started",
        "seconds",
        "log",
    )
    return Attempt(*(row[name] for name in names))


def uses(rows: Sequence[sqlite3.Row]) -> list[WorkerUse]:
    """What the workers did, of rows (worker, host, device, pid, cause, count, seconds, first, last), by name."""
    whole: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        own = whole.setdefault(
            (row["worker"], row["host"], row["device"]), {"done": 0, "busy": 0.0, "failures": {}, "spans": {}}
        )
        if row["cause"] in ("done", "failed"):  # a candidate that cannot be scored is a result too
            own["done"] += row["count"]
        else:
            own["failures"][row["cause"]] = own["failures"].get(row["cause"], 0) + row["count"]
        own["busy"] += row["seconds"]
        first, last = own["spans"].get(row["pid"], (row["first"], row["last"]))
        own["spans"][row["pid"]] = (min(first, row["first"]), max(last, row["last"]))
    found = []
    for (worker, host, device), own in sorted(whole.items()):
        spans = list(own["spans"].values())
        length, first, last = sum(b - a for a, b in spans), min(a for a, _ in spans), max(b for _, b in spans)
        found.append(
            WorkerUse(
                worker,
                host,
                device,
                own["done"],
                own["busy"],
                length,
                first,
                last,
                dict(sorted(own["failures"].items())),
            )
        )
    return found
