"""Evaluations of recipes on items, written to and read from the tables of a study's file.

A recipe and a set of items are stored once each, under the hash of their content.
"""

from __future__ import annotations

import json
import sqlite3
import time

from evomerge.errors import RecipeError, StudyError
from evomerge.evaluation import Items
from evomerge.recipes import Recipe
from evomerge.store import backup, integrity, pareto_front, rows
from evomerge.store.connection import StudyFile
from evomerge.store.records import NewEvaluation, NewSensitivity, Scored


def add(file: StudyFile, new: NewEvaluation) -> int:
    """Stores an evaluation, its recipe and its items, and updates the Pareto front.

    An evaluation of the same recipe, role and items that is stored already stands.

    Args:
        file: The study's file, within a transaction.
        new: The evaluation.

    Returns:
        Its row in the table `evaluations`.
    """
    _add_recipe(file, new.recipe)
    item_set = _add_items(file, new.items)
    stored = file.row(
        "SELECT id FROM evaluations WHERE recipe = ? AND role = ? AND item_set = ?",
        (new.recipe.id, new.role, item_set),
    )
    if stored is not None:
        return int(stored[0])
    evaluation = new.evaluation
    evaluation_row = file.insert(
        "evaluations",
        grows=True,
        recipe=new.recipe.id,
        role=new.role,
        item_set=item_set,
        score=new.score,
        error=evaluation.error,
        metrics=rows.numbers_json(evaluation.metrics),
        scores=json.dumps([item.value for item in evaluation.items]),
        seconds=rows.numbers_json(evaluation.seconds),
        created=time.time(),
        reported=new.reported,
        probabilities=rows.soft_metric_column([item.probability for item in evaluation.items]),
        logprobs=rows.soft_metric_column([item.logprob for item in evaluation.items]),
        costs=rows.numbers_json(evaluation.costs),
        slopes=rows.slopes_json(evaluation.slopes),
        answers=json.dumps(evaluation.answers) if evaluation.answers else None,
    )
    if new.task_values is not None and new.score is not None:
        pareto_front.add(file, evaluation_row, new.role, item_set, new.task_values)
    return evaluation_row


def add_sensitivity(file: StudyFile, point: NewSensitivity) -> None:
    """Stores a point of a sensitivity scan.

    Args:
        file: The study's file, within a transaction.
        point: A candidate evaluated with one coefficient changed.
    """
    changed = point.changed
    item_set = _add_items(file, changed.items)
    _add_recipe(file, point.centre)
    _add_recipe(file, changed.recipe)
    file.insert(
        "sensitivity",
        grows=True,
        centre=point.centre.id,
        axis=point.axis,
        value=point.value,
        recipe=changed.recipe.id,
        role=changed.role,
        item_set=item_set,
        score=changed.score,
        error=changed.evaluation.error,
        metrics=rows.numbers_json(changed.evaluation.metrics),
        scores=json.dumps([item.value for item in changed.evaluation.items]),
        seconds=rows.numbers_json(changed.evaluation.seconds),
        created=time.time(),
    )


def scored(file: StudyFile, row: sqlite3.Row) -> Scored:
    """Reads an evaluation, or a point of a sensitivity scan, and checks its digest.

    Args:
        file: The study's file.
        row: A whole row of the table `evaluations` or `sensitivity`.

    Returns:
        The evaluation with its scores.

    Raises:
        StudyError: The row is not what was stored.
    """
    if not integrity.intact(row):
        raise backup.damaged(
            file.path, f"the evaluation of {row['recipe']} on {row['role']} items is not what was stored"
        )
    items = file.row("SELECT body FROM item_sets WHERE id = ?", (row["item_set"],))
    check = file.score_check()
    with file.reading():
        if check is not None and "reported" in row.keys():  # noqa: SIM118
            raced = file.row("SELECT 1 FROM trials WHERE evaluation = ? AND whole IS NOT NULL", (row["id"],))
            found = check.contradiction(row, items[0], predicted=raced is not None)
            if found is not None:
                raise backup.damaged(
                    file.path, f"the evaluation of {row['recipe']} on {row['role']} items: {found}"
                )
        return rows.scored(row, items[0])


def recipe(file: StudyFile, recipe_id: str) -> Recipe:
    """Reads a recipe, and checks that its content is that of its id.

    Args:
        file: The study's file.
        recipe_id: Its id.

    Returns:
        The recipe.

    Raises:
        StudyError: There is none of that id, or what is stored is damaged.
    """
    row = file.row("SELECT body FROM recipes WHERE id = ?", (recipe_id,))
    if row is None:
        raise StudyError(f"{file.path} holds no recipe {recipe_id}")
    try:
        stored = Recipe.from_json(row["body"])
    except RecipeError as error:
        raise backup.damaged(file.path, f"recipe {recipe_id}: {error}") from None
    if stored.id != recipe_id:
        raise backup.damaged(file.path, f"recipe {recipe_id} is another, {stored.id}")
    return stored


def _add_recipe(file: StudyFile, recipe: Recipe) -> None:
    file.db.execute("INSERT OR IGNORE INTO recipes VALUES (?, ?)", (recipe.id, recipe.canonical()))


def _add_items(file: StudyFile, items: Items) -> str:
    """Id of the items."""
    item_set = rows.item_set_id(items)
    file.db.execute("INSERT OR IGNORE INTO item_sets VALUES (?, ?)", (item_set, rows.items_json(items)))
    return item_set
