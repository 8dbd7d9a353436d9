"""Where a search stands: candidates of its budget, the best with its error, pace, time left, cost.

Kept up to date trial by trial while a search runs, or made of a stored study at once.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from evomerge.evaluation import Objective
from evomerge.evaluation.estimates import objective_estimate, paired
from evomerge.store import Scored, Store, StudyFacts, Trial
from evomerge.store.score_check import stored_objective

BUDGETED = ("sampled", "injected", "learned")
"""Origins of the trials that a budget counts: candidates of optimizers and steps of learned stages."""
_RECENT = 5  # generations that the pace is taken from


@dataclass(frozen=True, slots=True)
class Limits:
    """What a search may use up.

    Attributes:
        budgets: Candidates of each stage; empty where the study does not say.
        hours: Hours of the driver; None is no limit, here and below.
        gpu_hours: Hours of workers at work, times `gpus`.
        cost: `gpu_hours` times `price`.
        price: Price of a GPU hour.
        gpus: GPUs of a worker.
    """

    budgets: tuple[int, ...] = ()
    hours: float | None = None
    gpu_hours: float | None = None
    cost: float | None = None
    price: float = 0.0
    gpus: float = 1.0


def limits_of(facts: StudyFacts) -> Limits:
    """Reads what a study may use up.

    Args:
        facts: Of the study.

    Returns:
        The limits of its last run; of a study of an older version the budgets that it began with.
    """
    stored = dict(facts.limits)
    budgets = stored.pop("budgets", None)
    known = {name: value for name, value in stored.items() if name in Limits.__dataclass_fields__}
    return Limits(tuple(facts.budgets if budgets is None else budgets), **known)


@dataclass(frozen=True, slots=True)
class Standing:
    """A candidate's search score.

    Attributes:
        id: Number of the candidate.
        label: Name of a parent or hand recipe, None for other candidates.
        origin: See `evomerge.store.Trial`.
        score: The objective by the tasks' metrics on the items that it was scored on; the prediction for all
            items where a race scored it on a part of them.
        error: Its standard error; None where it is unknown.
        violation: By how much it breaks the retention constraints.
    """

    id: int
    label: str | None
    origin: str
    score: float
    error: float | None = None
    violation: float = 0.0

    def __str__(self) -> str:
        """The score with its error, such as '0.612 ± 0.021'."""
        return f"{self.score:.3f}" + ("" if self.error is None else f" ± {self.error:.3f}")


@dataclass(frozen=True, slots=True)
class Figures:
    """Where a search stands.

    Attributes:
        evaluations: Candidates that count for the budget.
        budget: How many there may be, None where the study does not say.
        generation: Of the last candidate.
        failed: Trials that failed, parents and hand recipes among them.
        best: The best trial so far by search score, parents and hand recipes among them.
        parent: The best parent.
        lead: Score of `best` less that of `parent`; None where one of them is missing or the best is it.
        lead_error: Its standard error, paired where both were scored on the same items.
        rate: Candidates an hour, from the last generations; None before the first has ended.
        eta: Seconds until the stage's budget is reached at that pace; None where it is not known.
        stage: Number of the stage, from 1; `stages`: how many there are.
        stages: See `stage`.
        gpu_hours: Hours of workers at work, times the GPUs of each.
        cost: `gpu_hours` times the price of one.
        limits: What the search may use up.
        on_gpu: Whether candidates are scored on a GPU; False also where the study does not say.
    """

    evaluations: int = 0
    budget: int | None = None
    generation: int = 0
    failed: int = 0
    best: Standing | None = None
    parent: Standing | None = None
    lead: float | None = None
    lead_error: float | None = None
    rate: float | None = None
    eta: float | None = None
    stage: int = 1
    stages: int = 1
    gpu_hours: float = 0.0
    cost: float = 0.0
    limits: Limits = field(default_factory=Limits)
    on_gpu: bool = False

    def to_json(self) -> dict[str, Any]:
        """The figures as plain data."""
        return asdict(self)


@dataclass(slots=True)
class _Ended:
    """A generation: its stage, its candidates, and when the last of them was scored."""

    stage: int
    candidates: int = 0
    end: float = 0.0


@dataclass(slots=True)
class Tally:
    """Adds up the trials of a search.

        tally = Tally.of(store)
        print(tally.figures().evaluations)

    Attributes:
        store: Of the study; evaluations of the best are read from it.
        limits: What the search may use up.
        objective: Gives errors; None where the study did not store it.
        on_gpu: See `Figures`.
    """

    store: Store
    limits: Limits
    objective: Objective | None
    on_gpu: bool = False
    _known: set[int] = field(default_factory=set)
    _by_stage: dict[int, int] = field(default_factory=dict)
    _generations: dict[int, _Ended] = field(default_factory=dict)
    _failed: int = 0
    _last: Trial | None = None
    _best: Trial | None = None
    _parent: Trial | None = None
    _scored: dict[int, Scored] = field(default_factory=dict)
    _standings: dict[int, Standing] = field(default_factory=dict)

    @classmethod
    def of(cls, store: Store, trials: Sequence[Trial] | None = None) -> Tally:
        """Adds up what a store holds.

        Args:
            store: An open study, or one that has not begun.
            trials: All its trials, where they have been read already.

        Returns:
            The tally of all its trials.
        """
        study = store.study()
        facts = StudyFacts() if study is None else study.facts
        on_gpu = not str(facts.scoring.get("device", "cpu")).startswith("cpu")
        tally = cls(store, limits_of(facts), stored_objective(facts), on_gpu)
        times = store.usage.times()
        for trial in store.trials() if trials is None else trials:
            tally.add(trial, times.get(trial.id, 0.0))
        return tally

    def __contains__(self, trial_id: int) -> bool:
        return trial_id in self._known

    def add(self, trial: Trial, time: float) -> bool:
        """Adds a trial.

        Args:
            trial: As stored; one that is known changes nothing.
            time: When it was scored, in Unix seconds.

        Returns:
            Whether it is the best so far.
        """
        if trial.id in self._known:
            return False
        self._known.add(trial.id)
        self._failed += trial.error is not None
        if trial.origin in BUDGETED:
            self._by_stage[trial.stage] = self._by_stage.get(trial.stage, 0) + 1
        if trial.origin != "mean":
            ended = self._generations.setdefault(trial.generation, _Ended(trial.stage))
            ended.candidates += 1
            ended.end = max(ended.end, time)
            if self._last is None or trial.generation >= self._last.generation:
                self._last = trial
        if trial.origin == "parent" and _is_better(trial, self._parent):
            self._parent = trial
        if not _is_better(trial, self._best):
            return False
        self._best = trial
        return True

    def figures(self) -> Figures:
        """Where the search stands by now."""
        best, parent = self._standing(self._best), self._standing(self._parent)
        lead, lead_error = self._lead(best, parent)
        stage = 0 if self._last is None else self._last.stage
        budgets = self.limits.budgets
        seconds = self._seconds_each(stage)
        left = budgets[stage] - self._by_stage.get(stage, 0) if stage < len(budgets) else None
        gpu_hours = self.store.activity.busy_seconds() / 3600 * self.limits.gpus
        return Figures(
            evaluations=sum(self._by_stage.values()),
            budget=sum(budgets) if budgets else None,
            generation=0 if self._last is None else self._last.generation,
            failed=self._failed,
            best=best,
            parent=parent,
            lead=lead,
            lead_error=lead_error,
            rate=3600 / seconds if seconds else None,
            eta=max(0, left) * seconds if seconds is not None and left is not None else None,
            stage=stage + 1,
            stages=max(1, len(budgets)),
            gpu_hours=gpu_hours,
            cost=gpu_hours * self.limits.price,
            limits=self.limits,
            on_gpu=self.on_gpu,
        )

    def _seconds_each(self, stage: int) -> float | None:
        """Median seconds of a candidate in the last generations of a stage, from the end of the one before.

        The median leaves out the pause between two runs of a study. The last generation may not have ended.
        """
        ended = sorted(self._generations.items())
        ends = sorted((of.end, of.candidates, of.stage, number) for number, of in ended if of.end)
        newest = ended[-1][0] if ended else 0
        paces = [
            (end - before) / candidates
            for (before, *_), (end, candidates, of_stage, number) in itertools.pairwise(ends)
            if of_stage == stage and 0 < number < newest and end > before
        ]
        return statistics.median(paces[-_RECENT:]) if paces else None

    def _standing(self, trial: Trial | None) -> Standing | None:
        if trial is None or trial.reported is None:
            return None
        if trial.id in self._standings:
            return self._standings[trial.id]
        shown, estimate = rank(trial)[1], None
        if self.objective is not None:
            estimate = objective_estimate(self.objective, self._evaluated(trial).evaluation, trial.reported)
        error = None if estimate is None else estimate.error
        standing = Standing(trial.id, trial.label, trial.origin, shown, error, trial.violation)
        self._standings[trial.id] = standing
        return standing

    def _lead(self, best: Standing | None, parent: Standing | None) -> tuple[float | None, float | None]:
        """(lead of the best over the best parent, its standard error)."""
        if best is None or parent is None or best.id == parent.id:
            return None, None
        lead = best.score - parent.score
        if best.error is None or parent.error is None or self.objective is None:
            return lead, None
        one, other = (self._evaluated(t).evaluation for t in (self._best, self._parent) if t is not None)
        same = {(i.task, i.item) for i in one.items} == {(i.task, i.item) for i in other.items}
        if same and self.objective.is_mean_of_items:
            return lead, paired(one.items, other.items, self.objective.shares()).error
        return lead, math.hypot(best.error, parent.error)

    def _evaluated(self, trial: Trial) -> Scored:
        """The evaluation of the best or of the best parent, read once."""
        if trial.id not in self._scored:
            kept = {t.id for t in (self._best, self._parent) if t is not None}
            self._scored = {number: scored for number, scored in self._scored.items() if number in kept}
            self._scored[trial.id] = self.store.scored(trial)
        return self._scored[trial.id]


def study_figures(store: Store) -> Figures:
    """Sums up where a stored study stands.

    Args:
        store: An open study.

    Returns:
        Its figures.
    """
    return Tally.of(store).figures()


def rank(trial: Trial) -> tuple[float, float, float, int]:
    """What orders trials as the best so far, which need not be the one that wins on validation.

    By the objective as it is reported, so that the number that is shown as the best never falls; then by what
    the search ranks by. A candidate that a race scored on a part of the items counts by its prediction.

    Args:
        trial: That was scored.

    Returns:
        A key; the highest is best. One that breaks the retention constraints comes after all that do not.
    """
    score = trial.score or 0.0
    shown = score if trial.whole is not None or trial.reported is None else trial.reported
    return -trial.violation, shown, score, -trial.id


def _is_better(trial: Trial, other: Trial | None) -> bool:
    """Whether a trial ranks before another as the best so far; one that a race dropped does not."""
    if trial.score is None or trial.dropped is not None:
        return False
    return other is None or rank(trial) > rank(other)
