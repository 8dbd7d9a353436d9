"""Stores with a row in every table, and their rows read by SQLite alone."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from evomerge.evaluation import Attempt, Evaluation, Items, ItemScore
from evomerge.recipes import Recipe
from evomerge.store import NewEvaluation, NewSensitivity, NewTrial, Store, StudyFacts
from tests.support.toy import weight_space

SPACE = weight_space()
ITEMS: Items = {"first": tuple(f"item {i}" for i in range(6)), "second": ("c",)}


def recipe(gene: float) -> Recipe:
    return SPACE.decode([gene] * len(SPACE.axes))


def evaluation(of: Recipe, items: Items = ITEMS) -> Evaluation:
    scores = tuple(ItemScore(task, item, 0.5, 0.25, -0.125) for task, ids in items.items() for item in ids)
    return Evaluation(
        of.id, scores, {"first": 0.5, "second": 0.5}, {"merge": 0.25, "score": 0.75}, costs={"layers": 3.0}
    )


def attempt(number: int = 1, **more: object) -> Attempt:
    given = {
        "recipe_id": "r",
        "number": number,
        "cause": "done",
        "error": None,
        "worker": "w0",
        "host": "h",
        "pid": 7,
        "device": "cpu",
    }
    return Attempt(**(given | {"started": 100.0, "seconds": 2.0, "log": "line"} | more))  # type: ignore[arg-type]


def add(store: Store, slot: int) -> None:
    """A trial in generation slot // 8, sharing its recipe with no other."""
    own = recipe(slot / 512)
    items = {"first": ITEMS["first"], "second": (f"of generation {slot // 8}",)}
    store.add_trial(
        NewTrial(
            generation=slot // 8,
            slot=slot % 8,
            origin="sampled",
            label=None,
            genome=(slot / 512, -1e-17),
            parents=(1, 2),
            recipe=own,
            items=items,
            evaluation=evaluation(own, items),
            score=0.5 + slot / 512,
            task_values=(0.5, slot / 512),
            reported=0.5,
        )
    )


def add_many(store: Store, until: int) -> None:
    """Trials up to a number."""
    for slot in range(store.count_trials(), until):
        add(store, slot)


def fill(store: Store, trials: int = 24) -> None:
    """A row at least in every table."""
    store.begin(
        "trial", 3, "study: trial\n" * 40, {"evaluations": 7}, StudyFacts.from_json({"axes": ["x"] * 40})
    )
    for slot in range(trials):
        add(store, slot)
    changed = NewEvaluation(recipe(0.5), "search", ITEMS, evaluation(recipe(0.5)), 0.5)
    store.add_sensitivity(NewSensitivity(recipe(0.0), "axis", 0.5, changed))
    store.activity.add_attempts([attempt(1), attempt(2, cause="died", error="it was killed")])
    store.activity.set_end(0, 0, 3, "the budget of 2 hours is used up")
    store.activity.add_driven_seconds(1.5)


def everything(file: Path) -> dict[str, list[tuple[object, ...]]]:
    """All rows of all tables, read by SQLite alone."""
    db = sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)
    try:
        tables = [
            row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
        ]
        return {table: db.execute(f"SELECT * FROM {table} ORDER BY rowid").fetchall() for table in tables}
    finally:
        db.close()
