"""What a search is made of: its stages, and what each needs to run. Runs nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from evomerge.errors import ConfigError
from evomerge.evaluation import Items, Objective, Role
from evomerge.optimizers import Optimizer
from evomerge.recipes import Recipe
from evomerge.search import racing
from evomerge.spaces import Baseline
from evomerge.spaces.base import SearchSpace


@dataclass(frozen=True, slots=True)
class Start:
    """What the stages before a stage came to. label: of a parent or hand recipe."""

    recipe: Recipe
    label: str | None


@dataclass(frozen=True, slots=True)
class Opening:
    """A stage ready to run. optimizer: makes one from its starting genome, for the island of that number; hand: recipes scored
    before it; at_best: start at the best known recipe that the space can hold; late: the share of its generations after which candidates may become
    finalists, 0 for all: where a distribution converges the early ones were lucky."""

    space: SearchSpace
    optimizer: Callable[[Sequence[float], int], Optimizer]
    hand: Sequence[Baseline] = ()
    at_best: bool = False
    late: float = 0.75


@dataclass(frozen=True, slots=True)
class Stage:
    """name: 'weights' or 'routes'; evaluations: its budget; open: makes it from what the stages before came to (of a first
    stage: the best parent or recipe by hand, on the search items)."""

    name: str
    evaluations: int
    open: Callable[[Start], Opening]


@dataclass(frozen=True, slots=True)
class Progress:
    """What a user may be shown. stage: 'parents and hand recipes', 'search', 'validation' or 'test'.

    best: the stage's best objective so far; note: a line worth printing, or ''.
    """

    stage: str
    done: int
    total: int
    best: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """A search ready to run. items: all items of each role; per_generation: items of each task a generation is scored on, or
    task -> items; soup: makes the average of some parents, for a greedy soup among the hand recipes. race: None scores every
    candidate on all items of its generation. islands: searches side by side in each stage, that share its budget. pipelined:
    a generation is asked before the results of the one before it are all there. Raises ConfigError for a race with an objective
    that cannot be raced, or with a pipelined search."""

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
    """A search of a single stage, whatever the parents are worth."""
    return (
        Stage(
            name,
            evaluations,
            lambda start: Opening(space, lambda genome, island: optimizer(genome), at_best=at_best),
        ),
    )


STAGE_SEED_STEP, ISLAND_SEED_STEP = 1_000_003, 15_485_863  # between the seeds of optimizers
