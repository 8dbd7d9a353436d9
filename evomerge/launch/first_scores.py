"""What the parents score before a search begins, and what in it speaks against the search.

A task that is flat over all parents (nothing is right, or all answer alike) teaches nothing, and tasks
without a common unit have no mean. Both are said before anything is stored. The scores are those of
generation 0: the search does not make them again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evomerge.config import Config
from evomerge.errors import CandidateError, ConfigError, TaskError
from evomerge.evaluation import Evaluation, Items, Objective, TaskSet
from evomerge.evaluation.flat_tasks import FlatTask, find_flat_tasks
from evomerge.launch.opening import LoadedSearch
from evomerge.search import Plan
from evomerge.search.item_windows import ItemWindows
from evomerge.search.trial_recorder import TrialRecorder
from evomerge.spaces import Baseline
from evomerge.store import Store
from evomerge.workers import Job, Pool

log = logging.getLogger(__name__)
SHARE = "a share between 0 and 1"
_ANSWERS = 8  # items whose answers are looked at
_SHOWN = 60  # characters of an answer


@dataclass(frozen=True, slots=True)
class FirstScores:
    """Scores of the parents on the items of generation 0.

    Attributes:
        parents: The parents that were scored, with their evaluations; failed ones are left out.
        items: Task -> ids of the items.
    """

    parents: tuple[tuple[Baseline, Evaluation], ...]
    items: Items

    @property
    def evaluations(self) -> dict[str, Evaluation]:
        """Model -> its evaluation."""
        return {baseline.label: evaluation for baseline, evaluation in self.parents}

    def record(self, store: Store, objective: Objective) -> None:
        """Stores the evaluations, so that generation 0 finds them.

        Args:
            store: Of the study, which is begun.
            objective: Of the study.
        """
        recorder = TrialRecorder(store, objective)
        for baseline, evaluation in self.parents:
            recorder.record_evaluation(baseline.recipe, self.items, evaluation)


def score_parents(plan: Plan, pool: Pool) -> FirstScores:
    """Scores the parents on the items of generation 0.

    Args:
        plan: Of the study.
        pool: Of its workers, with nothing out.

    Returns:
        The scores.
    """
    items = ItemWindows(plan.items["search"], plan.per_generation, plan.seed).items(0)
    parents = [baseline for baseline in plan.baselines if baseline.origin == "parent"]
    pool.submit([Job(slot, baseline.recipe, items) for slot, baseline in enumerate(parents)])
    found: dict[int, Evaluation] = {}
    while pool.out:
        result = pool.result(1.0)
        if result is not None:
            found[result[0].slot] = result[1]
    scored = [(baseline, found[slot]) for slot, baseline in enumerate(parents)]
    return FirstScores(tuple((b, e) for b, e in scored if e.error is None), items)


def check_first_scores(
    settings: Config, loaded: LoadedSearch, scores: FirstScores, *, accept_floor: bool
) -> None:
    """Checks that the parents' scores can steer a search.

    Args:
        settings: The settings of the search.
        loaded: The search, open and loaded.
        scores: Of its parents.
        accept_floor: Whether flat tasks are accepted.

    Raises:
        ConfigError: Tasks have no common unit.
        TaskError: A task is flat over all parents, which is no accident of few items and not accepted; shows
            an answer and its target.
    """
    objective, evaluations = loaded.opened.objective, scores.evaluations
    check_units(settings, loaded.opened.harness, evaluations)
    flat = find_flat_tasks(objective.terms, evaluations)
    shown = [describe_flat_task(task, scores, loaded) for task in flat]
    certain = [text for text, is_certain in shown if is_certain and not accept_floor]
    for text, _ in shown:
        if text not in certain:
            log.warning(text)
    if certain:
        raise TaskError(
            f"{'; '.join(certain)}; where all score alike a search learns nothing: correct the prompt, the "
            "filter, the token limit or the items, leave the task out, or go on with --accept-floor"
        )


def check_units(
    settings: Config, harness: TaskSet, evaluations: Mapping[str, Evaluation] | None = None
) -> None:
    """Checks that a mean or a minimum over the tasks is one of comparable numbers.

    Args:
        settings: The settings of the search.
        harness: Its tasks.
        evaluations: Model -> scores, by which the range of a metric without a known unit is judged; None
            leaves such metrics out.

    Raises:
        ConfigError: Two tasks have other units, and the weights are not written either.
    """
    weighed = all("weight" in task.model_fields_set for task in settings.tasks)
    if settings.objective == "geometric" or (settings.objective == "mean" and weighed):
        return
    first: tuple[str, str] | None = None
    for task in settings.tasks:
        unit = harness.unit(task.task)
        if unit is None and evaluations:
            unit = _unit_by_values({name for name, _ in harness.subtasks(task.task)}, evaluations)
        if unit is None:
            continue
        if first is None or first[1] == unit:
            first = first or (task.task, unit)
            continue
        remedy = "leave one of them out"
        if settings.objective == "mean":
            remedy += (
                ", or write the weight of every task, what a unit of its metric is worth, such as 1 divided "
                "by the base's value"
            )
        metrics = [harness.metric(name) for name in (first[0], task.task)]
        raise ConfigError(
            f"objective: {settings.objective} compares tasks of one unit, but task '{first[0]}' "
            f"({metrics[0]}) is {first[1]} and task '{task.task}' ({metrics[1]}) is {unit}, so that the "
            f"larger numbers would decide alone; {remedy}"
        )


def _unit_by_values(tasks: set[str], evaluations: Mapping[str, Evaluation]) -> str | None:
    values = [s.value for e in evaluations.values() for s in e.items if s.task in tasks]
    if not values:
        return None
    low, high = min(values), max(values)
    return SHARE if low >= 0 and high <= 1 else f"a number from {low:.3g} to {high:.3g}"


def describe_flat_task(flat: FlatTask, scores: FirstScores, loaded: LoadedSearch) -> tuple[str, bool]:
    """Says what was seen of a flat task, with an answer and its target side by side where there are texts.

    Args:
        flat: The task.
        scores: Of the parents.
        loaded: The search.

    Returns:
        (a phrase, whether it is no accident of few items). A filter that finds an answer nowhere is none.
    """
    samples = _samples(flat.task, scores, loaded)
    if not samples:
        return flat.sentence(), flat.is_certain
    first = samples[0]
    text = (
        f"{flat.sentence()}; '{scores.parents[-1][0].label}' answered {_quoted(first.output)} "
        f"where {_quoted(first.target)} is right"
    )
    empty = [s for s in samples if s.filtered in ("", "[invalid]")]
    if empty:
        of_all = f"{len(empty)} of {len(samples)} answers"
        text += f" (filter '{empty[0].filter}' gave {empty[0].filtered!r} for {of_all})"
    return text, flat.is_certain or len(empty) == len(samples)


def _samples(task: str, scores: FirstScores, loaded: LoadedSearch) -> list[Any]:
    """Some answers of the last parent to the first part of a task; none where its tasks are replaced."""
    if loaded.is_replaced:
        return []
    term = next(term for term in loaded.opened.objective.terms if term.task == task)
    part = term.strata[0][0]
    items = {part: scores.items[part][:_ANSWERS]}
    try:
        # cards are the other processes' by now
        scorer = loaded.scorer if loaded.scorer.is_open else loaded.opened.load(device="cpu")
        model = scorer.module(scores.parents[-1][0].recipe, items)
        return loaded.opened.harness.samples(model, items)
    except CandidateError:  # the search will say so
        return []


def _quoted(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= _SHOWN else line[:_SHOWN] + "…")
