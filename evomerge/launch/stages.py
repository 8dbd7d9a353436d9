"""Configuration -> the stages of a search: spaces of weights and of routes, their optimizers, and what a route must pass first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from evomerge.checkpoints import Parent
from evomerge.config import Config
from evomerge.launch.route_stages import hand_baselines, open_route_stage
from evomerge.launch.weight_stages import open_weight_stage, open_weight_stage_on_route
from evomerge.search import Stage
from evomerge.spaces import Baseline, WeightSpace, baselines


def stages(
    settings: Config,
    space: WeightSpace,
    parents: Mapping[str, Parent],
    diagonal: bool,
    budgets: Sequence[int],
    num_workers: int = 1,
) -> list[Stage]:
    """The stages of a configuration. diagonal: of the first weight search; budgets: evaluations of each stage as the study
    began, which say whether later ones learn a full covariance; crew: workers it began with."""
    found = []
    for number, (stage, asked, begun) in enumerate(
        zip(settings.stages, settings.budgets, budgets, strict=True)
    ):
        if stage.stage == "routes":
            opener = open_route_stage(settings, stage, parents, begun, number, num_workers)
        elif number == 0:
            opener = open_weight_stage(settings, stage, space, diagonal, num_workers)
        else:
            opener = open_weight_stage_on_route(settings, stage, begun, num_workers)
        found.append(Stage(stage.stage, asked, opener))
    return found


def references(settings: Config, space: WeightSpace, parents: Mapping[str, Parent]) -> list[Baseline]:
    """What a search is compared with from the start: parents; hand recipes where weights are searched; routes by hand where they come first."""
    found = baselines(space)
    if "weights" not in settings.kinds:
        found = [b for b in found if b.origin == "parent"]
    return found + (hand_baselines(settings, parents, None) if settings.kinds[0] == "routes" else [])
