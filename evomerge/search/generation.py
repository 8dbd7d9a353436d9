"""A generation in evaluation: its candidates by slot, the recipes not scored yet, the trials so far."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from evomerge.evaluation import Evaluation, Items
from evomerge.search.trial_recorder import Candidate, TrialRecorder
from evomerge.store import Trial
from evomerge.workers import Job


@dataclass(slots=True)
class Generation:
    """Candidates that are scored on the same items, some of them perhaps scored already.

    Evaluations may come in any order. Trials are stored in the order of slots, as soon as all earlier slots
    have theirs, so that a store does not depend on which worker was first; an evaluation that comes before
    those of earlier slots is stored at once, its trial with theirs. Equal recipes are evaluated once. Nothing
    here needs a pool:

        generation = runner.open(1, candidates, counter)
        for job in generation.jobs:
            generation.add(job, evaluate(job.recipe, job.items))
        trials = generation.ordered_trials

    Attributes:
        number: Of the generation in the study.
        items: Task -> ids of the items that every candidate is scored on; empty where nothing was left to
            score.
        pending: Slot -> candidate that had no trial when the generation was opened, in the order of slots.
        recipe_ids: Slot -> id of that candidate's recipe.
        jobs: One for each distinct recipe that the store had no evaluation of, with the slot of its first
            candidate.
        evaluations: Recipe id -> evaluation on `items`, as far as it is known.
        trials: Slot -> stored trial.
        recorder: Writes evaluations and trials.
        floors: Task -> value that the retention constraint requires on `items`.
        on_trial: Called with each trial that is stored.
        was_stored: Whether the store held all of it when it was opened, as in the replay of a resumed study.
    """

    number: int
    items: Items
    pending: Mapping[int, Candidate]
    recipe_ids: Mapping[int, str]
    jobs: Sequence[Job]
    evaluations: dict[str, Evaluation]
    trials: dict[int, Trial]
    recorder: TrialRecorder
    floors: Mapping[str, float]
    on_trial: Callable[[Trial], None]
    was_stored: bool = False
    _slots_without_trial: deque[int] = field(init=False)

    def __post_init__(self) -> None:
        self._slots_without_trial = deque(self.pending)

    @classmethod
    def without_jobs(
        cls, number: int, trials: dict[int, Trial], recorder: TrialRecorder, *, was_stored: bool
    ) -> Generation:
        """A generation with nothing left to evaluate.

        Args:
            number: Of the generation in the study.
            trials: Slot -> stored trial, of all its candidates.
            recorder: Of the study.
            was_stored: Whether the store held all of it.

        Returns:
            The generation.
        """
        return cls(number, {}, {}, {}, (), {}, trials, recorder, {}, lambda trial: None, was_stored)

    @property
    def is_complete(self) -> bool:
        """Whether every candidate has its trial."""
        return not self._slots_without_trial

    @property
    def ordered_trials(self) -> list[Trial]:
        """The trials in the order of slots."""
        return [self.trials[slot] for slot in sorted(self.trials)]

    def add(self, job: Job, evaluation: Evaluation) -> None:
        """Takes the evaluation of one of `jobs`; stores it, and the trials that it completes.

        Args:
            job: One of `jobs`.
            evaluation: Of its recipe on `items`; a failed one has an `error`.
        """
        recipe_id = self.recipe_ids[job.slot]
        self.evaluations[recipe_id] = evaluation
        next_slot = self._slots_without_trial[0]
        if self.recipe_ids[next_slot] != recipe_id:
            self.recorder.record_evaluation(job.recipe, self.items, evaluation)
        self.store_trials()

    def store_trials(self) -> None:
        """Stores the trials of the leading slots whose evaluations are there."""
        while self._slots_without_trial:
            slot = self._slots_without_trial[0]
            evaluation = self.evaluations.get(self.recipe_ids[slot])
            if evaluation is None:
                return
            self._slots_without_trial.popleft()
            trial = self.recorder.stored_trial(self.number, slot)
            if trial is None:
                trial = self.recorder.record_trial(
                    self.number, slot, self.pending[slot], self.items, evaluation, self.floors
                )
            self.trials[slot] = trial
            self.on_trial(trial)
