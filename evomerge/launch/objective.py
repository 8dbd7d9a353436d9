"""Configuration and tasks -> the objective of a search, and how many items a generation is scored on."""

from __future__ import annotations

from collections.abc import Mapping

from evomerge.config import Config, loading
from evomerge.config.schema import TaskConfig
from evomerge.errors import ConfigError, StudyError
from evomerge.evaluation import Items, Objective, TaskSet, Term, missing_metric_message
from evomerge.search import racing
from evomerge.store import StudyRow, TermFacts


def per_generation(settings: Config, objective: Objective) -> dict[str, int]:
    """How many items of each task a generation is scored on.

    Args:
        settings: The settings of the search.
        objective: Its objective, which knows the subtasks of groups.

    Returns:
        Task with items -> number of items.
    """
    return {
        subtask: settings.evaluation.items_of(term.task)
        for term in objective.terms
        for subtask, _ in term.strata
    }


def first_items(pool: Items, settings: Config, objective: Objective) -> dict[str, tuple[str, ...]]:
    """As many items of each task as a generation is scored on.

    Args:
        pool: Task -> ids of all its items of a role.
        settings: The settings of the search.
        objective: Its objective.

    Returns:
        Task -> the first ids.
    """
    counts = per_generation(settings, objective)
    return {task: tuple(ids[: counts[task]]) for task, ids in pool.items()}


def task_terms(settings: Config, harness: TaskSet) -> dict[str, TermFacts]:
    """What each task's metric is: a fact of the study, so that its scores are compared without loading tasks.

    Args:
        settings: The settings of the search.
        harness: Its tasks.

    Returns:
        Task -> its facts.
    """
    return {
        t.task: TermFacts(
            harness.sign(t.task),
            harness.is_mean(t.task),
            tuple(harness.soft_metrics(t.task)),
            tuple((subtask, share) for subtask, share in harness.subtasks(t.task)),
        )
        for t in settings.tasks
    }


def make_objective(settings: Config, term_facts: Mapping[str, TermFacts], base_layers: int = 0) -> Objective:
    """The objective of a configuration.

    Args:
        settings: The settings of the search.
        term_facts: As `task_terms` gives them.
        base_layers: Layers of the base, which cost no size penalty.

    Returns:
        The objective.

    Raises:
        ConfigError: If a task lacks a soft metric that it is to be searched by, or the objective cannot be
        raced.
    """
    tie_break = settings.search.tie_break
    objective = Objective(
        tuple(_term(task, term_facts[task.task], tie_break) for task in settings.tasks),
        settings.objective,
        tuple(settings.keep.items()),
        "probability" if tie_break is None else tie_break,
        settings.routes.penalty,
        base_layers,
    )
    if settings.search.race is not None:
        racing.check(objective)
    return objective


def _term(task: TaskConfig, facts: TermFacts, tie_break: str | None) -> Term:
    needed: list[str] = [name for name in task.search if name != "metric"]
    if tie_break not in (None, "none"):
        needed.append(str(tie_break))
    for name in needed:
        if name not in facts.soft_metrics:
            raise ConfigError(missing_metric_message(task.task, name))
    return Term(task.task, task.weight, facts.sign, tuple(task.search.items()), facts.subtasks, facts.mean)


def race_settings(settings: Config) -> racing.Race | None:
    """The race of each generation.

    Args:
        settings: The settings of the search.

    Returns:
        Its rungs and error; None where every candidate is scored on all items.
    """
    race = settings.search.race
    return None if race is None else racing.Race(race.rungs, race.error)


def stored_objective(study: StudyRow) -> Objective:
    """The objective of a stored study, from its row alone.

    Args:
        study: The row.

    Returns:
        The objective that its candidates were ranked by.

    Raises:
        StudyError: If an evomerge began it that did not store what the tasks' metrics are.
    """
    settings, _ = loading.stored(study.name, study.config, study.overrides)
    if not study.facts.terms:
        raise StudyError(
            f"{study.name} was begun with an evomerge that did not store what its tasks' metrics are; "
            "begin it anew to compare"
        )
    return make_objective(settings, study.facts.terms, study.facts.base_layers)
