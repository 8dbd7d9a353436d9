"""A learned stage: steps of gradient descent on a genome, each a generation of one trial.

A step's items are cut into fixed shards, each scored with its slopes by whatever worker is free and stored as
it comes; they are added in their order in float64, so that rows do not depend on the number of workers.
Resume is replay: the optimizer's state is computed again from stored slopes. A step's trial has no score,
since a metric is not differentiable: its loss and the tasks' soft metrics are stored, and the finalists are
scored as any candidate is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from evomerge.errors import FailureBudget
from evomerge.evaluation import FORWARDS_OF_A_SLOPE, Evaluation, GradientRequest, Items, Slopes, soft_means
from evomerge.optimizers import Array
from evomerge.optimizers.descent import Descent
from evomerge.recipes import Recipe
from evomerge.search.generation_runner import GenerationRunner
from evomerge.search.item_windows import ItemWindows
from evomerge.search.labels import LabelledItems, Labeller
from evomerge.search.learned_retention import Checks, Retained, retained_texts
from evomerge.search.plan import (
    STAGE_SEED_STEP,
    DifferentiableSpace,
    LearnedOpening,
    Progress,
    RowSpace,
)
from evomerge.search.trial_recorder import Candidate
from evomerge.store import NewEvaluation, Trial
from evomerge.workers import Job

_MOST_FAILURES = 3  # steps in a row that may fail
_MARKS = (0.25, 0.5, 0.75)  # of the steps: where earlier genomes are kept for validation


@dataclass(frozen=True, slots=True)
class Descended:
    """A learned stage that is over.

    Attributes:
        last: Number of its last generation.
        finalists: Candidates for validation: the genome after the last step first, then earlier ones.
    """

    last: int
    finalists: tuple[Candidate, ...]


class LearnedSearch:
    """Runs the steps of a learned stage.

    Example:
        search = LearnedSearch(opening, runner, show, budget_ended=lambda generation: False)
        descended = search.run(genome, first_generation=1, parents=(0,))
    """

    def __init__(
        self,
        opening: LearnedOpening,
        runner: GenerationRunner,
        show: Callable[[Progress], None],
        budget_ended: Callable[[int], bool],
    ) -> None:
        """Makes a learned stage that has taken no step.

        Args:
            opening: What is learned.
            runner: Evaluates jobs and holds the store.
            show: Called with the progress after each step.
            budget_ended: Given a generation, says whether a budget ends the stage after it.
        """
        self.opening = opening
        self.runner = runner
        self._show = show
        self._budget_ended = budget_ended
        self._labeller = Labeller(runner, opening.labels, show)
        shares = {task: abs(share) for task, share in runner.plan.objective.shares().items()}
        kept = {task: shares.get(task, 0.0) for task in self._labeller.kept(runner.plan.items["search"])}
        whole = math.fsum(kept.values())
        self._shares = shares if len(kept) >= len(shares) else {t: s / whole for t, s in kept.items()}
        self._retained: Retained | None = None

    def run(self, start: Sequence[float], first_generation: int, parents: tuple[int, ...]) -> Descended:
        """Takes the steps that the store does not hold yet.

        Args:
            start: Genome to begin at.
            first_generation: Number of the stage's first generation.
            parents: Ids of the trials that the start comes from.

        Returns:
            Its end and its finalists.

        Raises:
            FailureBudget: Several steps in a row failed.
            Paused: A stop was requested.
            StudyError: The replay differs from the store.
        """
        opening = self.opening
        windows, labels = self._labelled()
        descent = Descent(start, rate=opening.rate, steps=opening.steps, leash=opening.leash)
        self._retained = retained_texts(opening, start, self.runner.plan.seed)
        checks = Checks(opening.stopping, self.runner)
        kept: list[Candidate] = []
        failures, number = 0, first_generation
        for step in range(opening.steps):
            number = first_generation + step
            candidate = self._candidate(descent, parents, f"{opening.name}, step {step + 1}", step)
            if step in {round(mark * opening.steps) for mark in _MARKS}:
                kept.append(candidate)
            trial, slopes = self._step(number, candidate, step + 1, windows.items(step + 1), labels)
            parents = (trial.id,)
            failures = failures + 1 if slopes is None else 0
            if failures >= _MOST_FAILURES:
                raise FailureBudget(
                    f"{failures} steps of the learned stage failed; the last because: {trial.error}"
                )
            descent.tell(None if slopes is None else self._gradient(step, candidate, slopes))
            note = _note(step, trial, slopes)
            self._show(Progress(opening.name, step + 1, opening.steps, None, note, number, trial))
            if checks.is_due(step + 1):
                after = f"{opening.name}, after step {step + 1}"
                checks.make(step + 1, self._candidate(descent, parents, after, step))
            if checks.ended or self._budget_ended(number):
                break
        if checks.ended:
            self._show(Progress(opening.name, opening.steps, opening.steps, None, checks.note()))
        end = self._candidate(descent, parents, "end of the learned stage", opening.steps - 1)
        best = [checks.best] if checks.best and checks.best.recipe.id != end.recipe.id else []
        return Descended(number, (end, *best, *reversed(kept)))

    def _gradient(self, step: int, candidate: Candidate, slopes: Slopes) -> Sequence[float]:
        """The derivatives by genes where the step was."""
        genome = candidate.genome or ()
        return _pulled(self.opening.space_at(step, genome), slopes)

    def _candidate(self, descent: Descent, parents: tuple[int, ...], label: str, step: int) -> Candidate:
        """The candidate of the genome that the descent asks for."""
        genome = tuple(float(gene) for gene in descent.ask())
        recipe = self.opening.space_at(step, genome).decode(genome)
        return Candidate("learned", recipe, label=label, genome=genome, parents=parents)

    def _labelled(self) -> tuple[ItemWindows, LabelledItems]:
        """The items of each step, and the labels of all of them."""
        plan, opening = self.runner.plan, self.opening
        # a later stage has windows of its own, or it would read an earlier one's derivatives of another loss
        seed = plan.seed + STAGE_SEED_STEP * self.runner.recorder.stage
        windows = ItemWindows(self._labeller.kept(plan.items["search"]), opening.items, seed)
        labels = self._labeller.label(self._labeller.used(windows, opening.steps))
        if not labels.labels:
            return windows, labels
        self._show(Progress("labels", 1, 1, None, labels.summary()))
        return ItemWindows(labels.items, opening.items, seed), labels

    def _step(
        self, number: int, candidate: Candidate, step: int, items: Items, labels: LabelledItems
    ) -> tuple[Trial, Slopes | None]:
        """The step's trial, and its slopes; None where the candidate failed."""
        replayed = self.runner.replayed_trials(number, [candidate])
        weights = {task: self._shares.get(task, 0.0) / len(ids) for task, ids in items.items() if ids}
        request = GradientRequest(weights, self.opening.surrogate)
        shards = [(shard, replace(request, labels=labels.of(shard))) for shard in self._shards(items)]
        if self._retained is not None:
            texts, of_teacher = self._retained.request(step)
            shards += [(shard, of_teacher) for shard in self._shards(texts)]
            items = {**items, **texts}
        evaluations = self._evaluations(candidate.recipe, shards)
        whole = _union(evaluations, items)
        trial = replayed.get(0)
        if trial is None:
            stored = whole
            if whole.slopes is not None:  # the derivatives of rows are many, and stored with the shards
                stored = replace(whole, slopes=replace(whole.slopes, rows={}))
            trial = self.runner.recorder.record_learned_trial(number, candidate, items, stored)
        return trial, whole.slopes

    def _shards(self, items: Items) -> list[Items]:
        """The items of a step in fixed parts, tasks in turns."""
        turns: list[tuple[str, str]] = []
        for place in range(max(map(len, items.values()))):
            turns += [(task, ids[place]) for task, ids in items.items() if place < len(ids)]
        size = self.opening.shard
        return [_by_task(turns[first : first + size]) for first in range(0, len(turns), size)]

    def _evaluations(
        self, recipe: Recipe, shards: Sequence[tuple[Items, GradientRequest]]
    ) -> list[Evaluation]:
        """The evaluation of each shard, in their order; what the store holds is not made again."""
        store = self.runner.store
        found: dict[int, Evaluation] = {}
        jobs: list[Job] = []
        for slot, (shard, request) in enumerate(shards):
            stored = store.evaluation(recipe.id, "gradient", shard)
            if stored is not None:
                found[slot] = stored.evaluation
                continue
            cost = FORWARDS_OF_A_SLOPE * len(recipe.layers) * sum(map(len, shard.values()))
            jobs.append(Job(slot, recipe, shard, float(cost), gradient=request))
        for job, evaluation in self.runner.evaluate(jobs):
            store.add_evaluation(NewEvaluation(recipe, "gradient", job.items, evaluation, None))
            found[job.slot] = evaluation
        return [found[slot] for slot in range(len(shards))]


def _union(evaluations: Sequence[Evaluation], items: Items) -> Evaluation:
    """Evaluations of shards as one on their items: slopes add up in the order of the shards, in float64."""
    recipe_id = evaluations[0].recipe_id
    seconds: dict[str, float] = {}
    for evaluation in evaluations:
        for name, value in evaluation.seconds.items():
            seconds[name] = seconds.get(name, 0.0) + value
    failed = next((e for e in evaluations if e.error is not None), None)
    if failed is not None:
        return Evaluation(recipe_id, (), {}, seconds, failed.error)
    partials: dict[tuple[str, str, str], float] = {}
    rows: dict[tuple[str, str, str], Array] = {}
    losses: list[float] = []
    for evaluation in evaluations:
        assert evaluation.slopes is not None
        losses.append(evaluation.slopes.loss)
        for key, value in evaluation.slopes.partials.items():
            partials[key] = partials.get(key, 0.0) + value
        for key, values in evaluation.slopes.rows.items():
            own = np.asarray(values, dtype=np.float64)
            rows[key] = rows[key] + own if key in rows else own
    known = {(s.task, s.item): s for e in evaluations for s in e.items}
    scores = tuple(known[task, item] for task, ids in items.items() for item in ids)
    summed = {key: tuple(float(value) for value in values) for key, values in rows.items()}
    slopes = Slopes(math.fsum(losses), partials, summed)
    return Evaluation(recipe_id, scores, soft_means(scores), seconds, slopes=slopes)


def _by_task(pairs: Sequence[tuple[str, str]]) -> Mapping[str, tuple[str, ...]]:
    tasks: dict[str, list[str]] = {}
    for task, item in pairs:
        tasks.setdefault(task, []).append(item)
    return {task: tuple(ids) for task, ids in tasks.items()}


def _pulled(space: DifferentiableSpace | RowSpace, slopes: Slopes) -> Sequence[float]:
    """The gradient by a space's genes."""
    if isinstance(space, RowSpace):
        return space.pull_rows(slopes.partials, slopes.rows)
    return space.pull(slopes.partials)


def _note(step: int, trial: Trial, slopes: Slopes | None) -> str:
    """A line about a step."""
    if slopes is None:
        return f"step {step + 1} failed: {trial.error}"
    return f"step {step + 1}: loss {slopes.loss:.4f}"
