"""Values that the tables of a study's file hold, and values that are stored in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from evomerge.evaluation import Evaluation, Items, Role
from evomerge.recipes import Recipe
from evomerge.store.study_facts import Outcome, StudyFacts

Purpose = Role | Literal["rung", "look", "gradient", "labels", "surrogate"]
"""What an evaluation is for: a role of its items; a rung of a race, whose items are a part of a generation's;
a look at test items that a person asked for, which the search does not read; the gradient of a step; a
parent's answers, which stand for right ones; or what a learned stage climbs, to compare with the metrics."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One candidate as it was tried.

    Attributes:
        id: Number of the trial, from 1.
        generation: Its generation; 0 holds parents and hand recipes.
        slot: Its place in the generation, from 0.
        origin: 'parent', 'hand', 'sampled', 'injected' or 'mean'.
        label: Name of a parent or hand recipe, None for a sampled candidate.
        genome: Its genes, None where the recipe came from no genome.
        parents: Ids of the trials that were recombined into it.
        recipe_id: Id of its recipe.
        score: The objective as the search sees it, None where the candidate failed, see `error`.
        error: Why it failed, None where it did not.
        metrics: Task -> metric on the search items.
        seconds: Phase of the evaluation -> seconds.
        reported: The objective by the tasks' metrics.
        dropped: Rung, from 1, at which a race dropped it, None where none did.
        whole: Number of items that its generation was raced on, where it was scored on a part of them:
            `reported` is then of that part, and `score` the prediction for all of them.
        violation: By how much it breaks the retention constraints (`keep` of the search file), 0 where it
            meets them.
        stage: Stage of the search, from 0.
        costs: 'layers' and 'parameters' of the model, where they were recorded.
        island: Island of the stage, from 0.
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
    """The study as stored.

    Attributes:
        name: Name of the study.
        seed: Seed of the search.
        config: The search file, verbatim.
        overrides: Key of the search file -> the number that a flag replaced it by.
        facts: What the study's scores depend on beside its settings.
        state: 'running', 'paused', 'failed' or 'done'.
        outcome: What the search found, None until it is done.
    """

    name: str
    seed: int
    config: str
    overrides: dict[str, int]
    facts: StudyFacts
    state: str
    outcome: Outcome | None


@dataclass(frozen=True, slots=True)
class Scored:
    """A stored evaluation of a recipe on some items.

    Attributes:
        score: The score that ranks it, None where it has none.
        evaluation: The evaluation.
        reported: The objective by the tasks' metrics.
    """

    score: float | None
    evaluation: Evaluation
    reported: float | None = None


@dataclass(frozen=True, slots=True)
class LabelRow:
    """Answers of a parent that stand for right ones.

    Attributes:
        created: When they were made, in Unix seconds.
        evaluation: The parent's evaluation, with its answers.
    """

    created: float
    evaluation: Evaluation


@dataclass(frozen=True, slots=True)
class NewEvaluation:
    """An evaluation to store.

    Attributes:
        recipe: What was evaluated.
        role: What the evaluation is for.
        items: The items that it was evaluated on.
        evaluation: The evaluation.
        score: The score that ranks it, None where it has none.
        reported: The objective by the tasks' metrics, None where that is the score.
        task_values: Values of the tasks, higher is better, for the Pareto front of its role and items; None
            keeps it off.
    """

    recipe: Recipe
    role: Purpose
    items: Items
    evaluation: Evaluation
    score: float | None
    reported: float | None = None
    task_values: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class NewTrial:
    """A trial to store, with its evaluation on the search items.

    Attributes:
        generation: See `Trial`; so are all attributes that are not described here.
        recipe: What was tried.
        items: The search items of its generation, or those that a race scored it on.
        evaluation: Its evaluation on them.
        task_values: See `NewEvaluation`.
        trial_id: Its number; None takes the next one, and so does a number that is taken.
        purpose: What its evaluation is for: 'gradient' for a step of a learned stage.
    """

    generation: int
    slot: int
    origin: str
    label: str | None
    genome: tuple[float, ...] | None
    parents: tuple[int, ...]
    recipe: Recipe
    items: Items
    evaluation: Evaluation
    score: float | None
    reported: float | None = None
    task_values: tuple[float, ...] | None = None
    dropped: int | None = None
    whole: int | None = None
    violation: float = 0.0
    stage: int = 0
    island: int = 0
    trial_id: int | None = None
    purpose: Purpose = "search"

    @property
    def search_evaluation(self) -> NewEvaluation:
        """The trial's evaluation on the search items."""
        return NewEvaluation(
            self.recipe,
            self.purpose,
            self.items,
            self.evaluation,
            self.score,
            self.reported,
            self.task_values,
        )


@dataclass(frozen=True, slots=True)
class NewSensitivity:
    """A candidate evaluated with one coefficient changed, to store. It is no evaluation of the search.

    Attributes:
        centre: Recipe of the candidate.
        axis: Name of the coefficient.
        value: What it was changed to.
        changed: The evaluation of the changed recipe.
    """

    centre: Recipe
    axis: str
    value: float
    changed: NewEvaluation


@dataclass(frozen=True, slots=True)
class WorkerUse:
    """What a worker did. The time before its first attempt is not in its span.

    Attributes:
        worker: Name of the worker.
        host: Machine that it ran on.
        device: Device that it used.
        jobs: Attempts that ended with a result.
        busy: Seconds at work.
        span: Seconds from the begin of the first attempt to the end of the last, added up over its processes,
            so that it includes no pause of the study.
        first: Begin of the first attempt, in Unix seconds.
        last: End of the last attempt, in Unix seconds.
        failures: Cause -> number of attempts that ended without a result.
    """

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
    """A run of a study's driver.

    Attributes:
        host: Machine of the driver.
        pid: Its process id.
        started: When it began, in Unix seconds.
        seconds: How long it has driven the study.
    """

    host: str
    pid: int
    started: float
    seconds: float


@dataclass(frozen=True, slots=True)
class BudgetEnd:
    """Where a used-up budget ended an island of a stage.

    Attributes:
        generation: The last generation.
        cause: Which budget, in words.
    """

    generation: int
    cause: str
