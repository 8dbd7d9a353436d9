"""Turns evaluations into rows of the store: what ranks a candidate, what is reported, its violation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from evomerge.evaluation import Evaluation, Items, Objective
from evomerge.recipes import Recipe
from evomerge.search.racing import RaceResult
from evomerge.store import NewEvaluation, NewTrial, Store, Trial


@dataclass(frozen=True, slots=True)
class Candidate:
    """A recipe to be tried, and where it comes from.

    Attributes:
        origin: 'parent', 'hand', 'sampled', 'injected' or 'mean', see `evomerge.store.Trial`.
        recipe: What is built and scored.
        label: Name of a parent or hand recipe, else None.
        genome: What the recipe was decoded from; None for a recipe that no optimizer asked for.
        parents: Ids of the trials recombined into it.
        island: That asked for it, from 0.
        trial_id: Id that its trial gets; None for the next free one.
    """

    origin: str
    recipe: Recipe
    label: str | None = None
    genome: tuple[float, ...] | None = None
    parents: tuple[int, ...] = ()
    island: int = 0
    trial_id: int | None = None


@dataclass(frozen=True, slots=True)
class _Scores:
    """score: ranks it; reported: the objective by the tasks' metrics; task_values: its Pareto point."""

    score: float | None = None
    reported: float | None = None
    task_values: tuple[float, ...] | None = None


class TrialRecorder:
    """Writes evaluations on search items and trials to a store.

    Attributes:
        store: That is written to.
        objective: By which evaluations are scored.
        stage: Number of the search's stage that trials are stored under, from 0.
    """

    def __init__(self, store: Store, objective: Objective) -> None:
        """Makes a recorder for stage 0.

        Args:
            store: Open for writing.
            objective: By which evaluations are scored.
        """
        self.store = store
        self.objective = objective
        self.stage = 0

    def stored_trial(self, generation: int, slot: int) -> Trial | None:
        """The trial at a place, if the store has it already.

        Args:
            generation: Its number.
            slot: Its place in the generation.

        Returns:
            The trial, or None.
        """
        return self.store.trial_at(generation, slot)

    def record_evaluation(self, recipe: Recipe, items: Items, evaluation: Evaluation) -> None:
        """Stores an evaluation whose trial comes later.

        Args:
            recipe: That was scored.
            items: Search items it was scored on.
            evaluation: Its result.
        """
        scores = self._scores(evaluation)
        self.store.add_evaluation(
            NewEvaluation(
                recipe, "search", items, evaluation, scores.score, scores.reported, scores.task_values
            )
        )

    def record_trial(
        self,
        generation: int,
        slot: int,
        candidate: Candidate,
        items: Items,
        evaluation: Evaluation,
        floors: Mapping[str, float],
    ) -> Trial:
        """Stores the trial of a candidate that was scored on all items of its generation.

        Args:
            generation: Its number.
            slot: Place of the candidate in it.
            candidate: What was tried.
            items: The generation's items.
            evaluation: Of the candidate on these items.
            floors: Task -> value that the retention constraint requires on these items.

        Returns:
            The trial as stored.
        """
        trial = self._new_trial(generation, slot, candidate, items, evaluation)
        if trial.score is not None:
            trial = replace(trial, violation=self.objective.violation(evaluation.metrics, floors))
        return self.store.add_trial(trial)

    def record_raced_trial(
        self, generation: int, slot: int, candidate: Candidate, result: RaceResult, item_count: int
    ) -> Trial:
        """Stores the trial of a candidate that ran in a race, perhaps on a part of the items.

        Args:
            generation: Its number.
            slot: Place of the candidate in it.
            candidate: What was tried.
            result: How it fared. Where a score on all items is predicted, that score ranks it and it has no
                place on the Pareto front.
            item_count: How many items the generation is raced on.

        Returns:
            The trial as stored.
        """
        trial = self._new_trial(generation, slot, candidate, result.items, result.evaluation)
        if result.predicted is not None and trial.score is not None:
            score = result.predicted - self.objective.size_penalty(result.evaluation.costs)
            trial = replace(trial, score=score, task_values=None, whole=item_count)
        return self.store.add_trial(replace(trial, dropped=result.dropped))

    def record_learned_trial(
        self, generation: int, candidate: Candidate, items: Items, evaluation: Evaluation
    ) -> Trial:
        """Stores the trial of a step of gradient descent, which has no score.

        Args:
            generation: Its number.
            candidate: Where the descent was.
            items: The step's items.
            evaluation: With its slopes, or its error.

        Returns:
            The trial as stored.
        """
        trial = self._new_trial(generation, 0, candidate, items, evaluation, _Scores())
        return self.store.add_trial(replace(trial, purpose="gradient"))

    def _new_trial(
        self,
        generation: int,
        slot: int,
        candidate: Candidate,
        items: Items,
        evaluation: Evaluation,
        scores: _Scores | None = None,
    ) -> NewTrial:
        """The row of a candidate that was evaluated on items. scores: None for those of the evaluation."""
        scores = scores or self._scores(evaluation)
        return NewTrial(
            generation=generation,
            slot=slot,
            origin=candidate.origin,
            label=candidate.label,
            genome=candidate.genome,
            parents=candidate.parents,
            recipe=candidate.recipe,
            items=items,
            evaluation=evaluation,
            score=scores.score,
            reported=scores.reported,
            task_values=scores.task_values,
            stage=self.stage,
            island=candidate.island,
            trial_id=candidate.trial_id,
        )

    def _scores(self, evaluation: Evaluation) -> _Scores:
        """The scores of an evaluation on search items; all None if it failed or has no finite score."""
        reported = self.objective.reported_score(evaluation)
        if reported is None:
            return _Scores()
        penalty = self.objective.size_penalty(evaluation.costs)
        score = self.objective.search_score(evaluation.metrics) - penalty
        if not math.isfinite(score):
            return _Scores()
        return _Scores(score, reported, self.objective.task_values(evaluation.metrics))
