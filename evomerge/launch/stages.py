"""Configuration -> the stages of a search, and the recipes that it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from evomerge.checkpoints import Parent
from evomerge.config import Config
from evomerge.config.stage_kinds import STAGES
from evomerge.evaluation import Items
from evomerge.launch.hand_recipes import named_recipes
from evomerge.launch.route_stages import hand_baselines
from evomerge.launch.stage_request import StageRequest
from evomerge.search import LearnedOpening, Opening, Stage, Start
from evomerge.spaces import Baseline, MergeSpace, baselines, first_method
from evomerge.store import StudyFacts


def open_stages(
    settings: Config,
    space: MergeSpace,
    parents: Mapping[str, Parent],
    facts: StudyFacts,
    items: Items | None = None,
) -> list[Stage]:
    """The stages of a search, each ready to be opened from what those before it came to.

    Args:
        settings: The settings of the search.
        space: Its space of weights.
        parents: Its models, open.
        facts: What the study began with: `diagonal`, `budgets` and `num_workers` are read.
        items: Task -> ids of all its search items; None where tasks are not opened.

    Returns:
        A stage for each entry of `settings.stages`.
    """
    seed_numbers = number_seeds(settings.kinds)
    stages = []
    for position, stage in enumerate(settings.stages):
        request = StageRequest(
            settings=settings,
            stage=stage,
            parents=parents,
            space=space,
            position=position,
            seed_number=seed_numbers[position],
            evaluations=facts.budgets[position],
            diagonal=facts.diagonal,
            num_workers=facts.num_workers,
            fewest_items=min(map(len, items.values())) if items else None,
        )
        opener: Callable[[StageRequest], Callable[[Start], Opening | LearnedOpening]] = STAGES[
            stage.stage
        ].load_opener()
        stages.append(Stage(stage.stage, settings.budgets[position], opener(request)))
    return stages


def number_seeds(kinds: Sequence[str]) -> list[int]:
    """Numbers for the seeds of the stages' optimizers: their positions, with one exception.

    A second stage of weights has had the number 2 since there are stages; its searches would have other rows
    with another one. The stages after it count on from there, so that no two share a number.

    Args:
        kinds: The kinds of the stages in order.

    Returns:
        One number for each, ascending.
    """
    numbers: list[int] = []
    for position, kind in enumerate(kinds):
        number = 2 if kind == "weights" and position == 1 else position
        if numbers:
            number = max(number, numbers[-1] + 1)
        numbers.append(number)
    return numbers


def reference_recipes(settings: Config, space: MergeSpace, parents: Mapping[str, Parent]) -> list[Baseline]:
    """What a search is compared with from the start.

    Args:
        settings: The settings of the search.
        space: Its space of weights.
        parents: Its models, open.

    Returns:
        The parents; hand recipes where weights are searched; routes written by hand where routes come first;
        the hand recipes that the search file names.
    """
    references = baselines(first_method(space))
    if not settings.merges_weights:
        references = [baseline for baseline in references if baseline.origin == "parent"]
    if settings.kinds[0] == "routes":
        references = [*references, *hand_baselines(settings, parents, None)]
    return [*references, *named_recipes(settings, parents)]
