"""What a search is made of: its stages, and what each needs to run. Nothing runs here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from evomerge.errors import ConfigError
from evomerge.evaluation import Items, Objective, Role
from evomerge.optimizers import Optimizer
from evomerge.optimizers.descent import Leash
from evomerge.recipes import Recipe
from evomerge.search import racing
from evomerge.spaces import Baseline
from evomerge.spaces.base import SearchSpace
from evomerge.store import Trial


@dataclass(frozen=True, slots=True)
class Start:
    """What the stages before a stage found.

    Attributes:
        recipe: The best so far.
        label: Its name, if it is a parent or a hand recipe.
    """

    recipe: Recipe
    label: str | None


@dataclass(frozen=True, slots=True)
class Opening:
    """A stage ready to run.

    Attributes:
        space: Decodes the optimizer's genomes.
        optimizer: Makes an optimizer from its starting genome and the number of its island, from 0.
        hand: Recipes scored before the stage, in a generation of their own; those of a first stage are the
            plan's
            baselines.
        at_best: Whether to start at the best known recipe that the space can hold, else at `space.start`.
        begin: Genome to start at, in place of what `at_best` says; None for that.
        late: Share of the stage's generations, in [0, 1], after which candidates may become finalists. Where
            a
            distribution converges, early candidates owe a high score to selection bias.
        relaxation: What is descended before the optimizer starts; None for nothing.
    """

    space: SearchSpace
    optimizer: Callable[[Sequence[float], int], Optimizer]
    hand: Sequence[Baseline] = ()
    at_best: bool = False
    begin: tuple[float, ...] | None = None
    late: float = 0.75
    relaxation: Relaxation | None = None


class DifferentiableSpace(SearchSpace, Protocol):
    """A search space whose genes are coefficients of a merge."""

    def pull(self, partials: Mapping[tuple[str, str, str], float]) -> Sequence[float]:
        """Turns derivatives by coefficients into those by genes, the transpose of `decode`.

        Args:
            partials: (output tensor, parameter, source model) -> derivative.

        Returns:
            [len(axes)] derivatives.
        """


@runtime_checkable
class RowSpace(SearchSpace, Protocol):
    """A differentiable space whose genes are weights of rows."""

    def pull_rows(
        self,
        partials: Mapping[tuple[str, str, str], float],
        rows: Mapping[tuple[str, str, str], Sequence[float]],
    ) -> Sequence[float]:
        """Turns derivatives by coefficients and by weights of rows into those by genes.

        Args:
            partials: (output tensor, parameter, source model) -> derivative.
            rows: The same -> derivative by the weight of each row.

        Returns:
            [len(axes)] derivatives.
        """


@dataclass(frozen=True, slots=True)
class RetainedTexts:
    """Texts on which a learned stage keeps the next-token distributions of a teacher.

    Attributes:
        texts: Id -> text.
        weight: Of their mean Kullback-Leibler divergence in the loss of a step.
        items: How many of them a step takes.
        teacher: Whose distributions; None for the stage's start.
    """

    texts: Mapping[str, str]
    weight: float
    items: int
    teacher: Recipe | None = None


@dataclass(frozen=True, slots=True)
class EarlyStopping:
    """When a learned stage ends before its last step.

    Attributes:
        every: Steps between two checks, each the tasks' own metrics on all validation items.
        patience: Checks in a row that may fail to improve on the best one; None for no end before the last
            step, so that checks only add candidates to the election.
    """

    every: int
    patience: int | None = None


@dataclass(frozen=True, slots=True)
class LearnedOpening:
    """A learned stage ready to run.

    Attributes:
        space: Decodes genomes and pulls gradients back to them.
        steps: Steps of gradient descent.
        rate: Size of the first step of each gene, see `evomerge.optimizers.descent`.
        items: Items of each task that a step is scored on.
        shard: Items of a step that one worker takes at once.
        surrogate: What is climbed, see `evomerge.evaluation.surrogates`.
        labels: Task or group -> whose answers stand for the right ones, see `evomerge.search.labels`.
        summary: What it has a weight for, in words.
        hand: Recipes scored before the stage; none.
        annealed: (step from 0, genome) -> the space of that step, with its derivatives at the genome; None
            where it is `space` at every step.
        name: What steps and progress are called.
        leash: What holds the genome near the stage's start.
        retained: Texts on which a teacher's distributions are kept; None for none.
        stopping: When it ends early; None for never.
    """

    space: DifferentiableSpace | RowSpace
    steps: int
    rate: float
    items: int
    shard: int
    surrogate: Literal["logprob", "probability", "margin"] = "logprob"
    labels: Mapping[str, str] = field(default_factory=dict)
    summary: str = ""
    hand: Sequence[Baseline] = ()
    leash: Leash = field(default_factory=Leash)
    retained: RetainedTexts | None = None
    stopping: EarlyStopping | None = None
    annealed: Callable[[int, Sequence[float]], DifferentiableSpace] | None = None
    name: str = "learned"

    def space_at(self, step: int, genome: Sequence[float]) -> DifferentiableSpace | RowSpace:
        """The space of a step.

        Args:
            step: From 0.
            genome: Where it is.

        Returns:
            What decodes the genome, and pulls gradients back to it.
        """
        return self.space if self.annealed is None else self.annealed(step, genome)


@dataclass(frozen=True, slots=True)
class Relaxation:
    """A discrete space made continuous, descended, and rounded to a candidate that evolution goes on from.

    Attributes:
        opening: What is descended, from the start of its space.
        rounded: Genome of its end -> the recipe that it stands for.
        label: Of that candidate.
    """

    opening: LearnedOpening
    rounded: Callable[[Sequence[float]], Recipe]
    label: str


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of a search.

    Attributes:
        name: A name of `evomerge.config.stage_kinds.STAGES`.
        evaluations: Its budget; it ends with the generation that reaches it.
        open: Makes the stage from what the stages before found; a first stage starts from the best parent or
            hand
            recipe on the search items.
    """

    name: str
    evaluations: int
    open: Callable[[Start], Opening | LearnedOpening]


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a search, as shown to a user.

    Attributes:
        stage: 'parents and hand recipes', 'search', 'validation', 'test' or a label like these.
        done: Candidates of it that are scored.
        total: Candidates that it will have.
        best: Its best objective so far; None where unknown.
        note: A line to be printed, or ''.
        generation: The generation that `note` sums up; None for a note about anything else.
        trial: The candidate that was stored just now; None for other progress.
    """

    stage: str
    done: int
    total: int
    best: float | None = None
    note: str = ""
    generation: int | None = None
    trial: Trial | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """A search ready to run.

    Attributes:
        stages: At least one, in the order in which they run.
        baselines: Parents and hand recipes, which are generation 0.
        objective: What is maximized.
        items: Role -> task -> ids of all its items.
        per_generation: Items of each task that a generation is scored on, or task -> items.
        finalists: Candidates of each stage that are validated, the means of its distributions not counted
            twice.
        seed: Keys the windows of items.
        soup: Makes the average of some parents, for a greedy soup among the hand recipes; None for no soup.
        race: How candidates are dropped early; None scores every candidate on all items of its generation.
        islands: Searches side by side in each stage, which share its budget.
        pipelined: Whether a generation is asked before the results of the one before it are all there.

    Raises:
        ConfigError: No stage, a race with an objective that cannot be raced, or a race in a pipelined search.
    """

    stages: Sequence[Stage]
    baselines: Sequence[Baseline]
    objective: Objective
    items: Mapping[Role, Items]
    per_generation: int | Mapping[str, int]
    finalists: int
    seed: int
    soup: Callable[[Sequence[str]], Baseline] | None = None
    race: racing.Race | None = None
    islands: int = 1
    pipelined: bool = False

    def __post_init__(self) -> None:
        if not self.stages:
            raise ConfigError("a search needs at least one stage: weights or routes")
        if self.race is not None:
            racing.check(self.objective)
        if self.race is not None and self.pipelined:
            raise ConfigError(
                "a search is raced or pipelined, not both; leave out search.race or search.pipelined"
            )


def one_stage(
    space: SearchSpace,
    optimizer: Callable[[Sequence[float]], Optimizer],
    evaluations: int,
    at_best: bool = False,
    name: str = "weights",
) -> tuple[Stage]:
    """A search of a single stage, which does not depend on which parent is best.

    Args:
        space: Of the stage.
        optimizer: Makes an optimizer from its starting genome; all islands get the same one.
        evaluations: Budget.
        at_best: See `Opening.at_best`.
        name: See `Stage.name`.

    Returns:
        The stages of a `Plan`.
    """
    return (
        Stage(
            name,
            evaluations,
            lambda start: Opening(space, lambda genome, island: optimizer(genome), at_best=at_best),
        ),
    )


STAGE_SEED_STEP = 1_000_003
"""Difference between the optimizer seeds of two consecutive stages."""
ISLAND_SEED_STEP = 15_485_863
"""Difference between the optimizer seeds of two consecutive islands."""
