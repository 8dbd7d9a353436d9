"""Configuration and tasks -> the objective of a search."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from evomerge.config import Config, loading
from evomerge.errors import ConfigError, StudyError
from evomerge.evaluation import Items, Objective, Term, missing_metric_message
from evomerge.search import racing
from evomerge.store import StudyRow, TermFacts

log = logging.getLogger(__name__)


def per_generation(settings: Config, objective: Objective) -> dict[str, int]:
    """Task with items -> how many of them a generation is scored on."""
    return {leaf: settings.evaluation.items_of(t.task) for t in objective.terms for leaf, _ in t.strata}


def first_items(pool: Items, settings: Config, objective: Objective) -> dict[str, tuple[str, ...]]:
    """As many items of each task as a generation is scored on."""
    counts = per_generation(settings, objective)
    return {task: tuple(ids[: counts[task]]) for task, ids in pool.items()}


def task_terms(settings: Config, harness: Any) -> dict[str, TermFacts]:
    """What the tasks say of themselves: a fact of the study, so that its scores are compared without loading tasks."""
    return {
        t.task: TermFacts(
            harness.sign(t.task),
            harness.is_mean(t.task),
            tuple(harness.soft_metrics(t.task)),
            tuple((subtask, share) for subtask, share in harness.subtasks(t.task)),
        )
        for t in settings.tasks
    }


def make_objective(settings: Config, term_facts: Mapping[str, TermFacts], depth: int = 0) -> Objective:
    """The objective of a configuration; term_facts: `task_terms`; depth: layers that cost nothing.

    Raises ConfigError where a task lacks a soft score it is to be searched by."""
    terms, tie = [], settings.search.tie_break
    for t in settings.tasks:
        facts = term_facts[t.task]
        search = tuple(t.search.items())
        asked = [*(m for m, _ in search if m != "metric"), *((tie,) if tie not in (None, "none") else ())]
        if lacking := [m for m in asked if m not in facts.soft_metrics]:
            raise ConfigError(missing_metric_message(t.task, str(lacking[0])))
        terms.append(
            Term(
                t.task,
                t.weight,
                facts.sign,
                search,
                facts.subtasks,
                facts.mean,
            )
        )
    keep, break_ties = tuple(settings.keep.items()), "probability" if tie is None else tie
    objective = Objective(tuple(terms), settings.objective, keep, break_ties, settings.routes.penalty, depth)
    if settings.search.race is not None:
        racing.check(objective)
    return objective


def race_settings(settings: Config) -> racing.Race | None:
    given = settings.search.race
    return None if given is None else racing.Race(given.rungs, given.error)


def stored_objective(study: StudyRow) -> Objective:
    """The objective of a stored study, from its rows alone; raises StudyError for one begun before tasks were described there."""
    settings, _ = loading.stored(study.name, study.config, study.overrides)
    if not study.facts.terms:
        raise StudyError(
            f"{study.name} was begun with an evomerge that did not store what its tasks' metrics are; begin it anew to compare"
        )
    return make_objective(settings, study.facts.terms, study.facts.base_layers)
