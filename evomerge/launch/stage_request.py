"""What the opener of a stage is given: the search, the stage's entry in it, and what the study began with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from evomerge.checkpoints import Parent
from evomerge.config import Config
from evomerge.config.stage_schema import StageConfig
from evomerge.launch import pool
from evomerge.optimizers import Optimizer, OptimizerEntry, OptimizerSettings
from evomerge.search.plan import ISLAND_SEED_STEP, STAGE_SEED_STEP
from evomerge.spaces import MergeSpace


@dataclass(frozen=True, slots=True)
class StageRequest:
    """A stage to open. An opener makes of it a function from what the stages before came to to an `Opening`.

        def open_my_stage(request: StageRequest) -> Callable[[Start], Opening]:
            def open_from(start: Start) -> Opening:
                space = MySpace(start.recipe)
                return Opening(space, request.optimizers(OPTIMIZERS["cma"], OptimizerSettings(sigma=0.15)))
            return open_from

    Attributes:
        settings: The settings of the search.
        stage: The stage's own entry in them.
        parents: The models, open.
        space: The search's space of weights.
        position: Of the stage, from 0.
        seed_number: Of the stage, in the seeds of its optimizers; see `evomerge.launch.stages.number_seeds`.
        evaluations: Its budget as the study began, which must not change what it learns.
        diagonal: Whether a first search of weights learns a diagonal covariance.
        num_workers: Workers that the study began with.
        fewest_items: Items of the task that has the fewest on the search split; None where nobody asked.
    """

    settings: Config
    stage: StageConfig
    parents: Mapping[str, Parent]
    space: MergeSpace
    position: int
    seed_number: int
    evaluations: int
    diagonal: bool
    num_workers: int
    fewest_items: int | None = None

    def optimizers(
        self, entry: OptimizerEntry, optimizer_settings: OptimizerSettings
    ) -> Callable[[Sequence[float], int], Optimizer]:
        """What makes the optimizer of each island of the stage.

        Args:
            entry: The optimizer.
            optimizer_settings: What it is made with; population and seed are set here, by the search's
                settings.

        Returns:
            A function of the genome to begin at and the number of the island, from 0.
        """

        def make(start: Sequence[float], island: int) -> Optimizer:
            population = self.stage.population or pool.population(self.settings, self.num_workers, len(start))
            seed = self.settings.search.seed
            seed += STAGE_SEED_STEP * self.seed_number + ISLAND_SEED_STEP * island
            return entry.make(start, replace(optimizer_settings, population=population, seed=seed))

        return make
