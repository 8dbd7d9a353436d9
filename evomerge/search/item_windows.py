"""Which items each generation is scored on: consecutive windows of a seeded shuffle of the search items."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evomerge.evaluation import Items
from evomerge.store import Trial


@dataclass(frozen=True, slots=True)
class _Window:
    """epoch: how often the task's items have been gone through; index: of the window within the epoch."""

    epoch: int
    index: int
    size: int


@dataclass(frozen=True, slots=True)
class ItemWindows:
    """Items of every generation, from the seed alone: windows that are disjoint within an epoch.

    An epoch goes through a task's items once, in an order of its own; items that no longer fill a window are
    left out of it. Generation 0 (parents and hand recipes) and generation 1 share a window, so that they are
    comparable.

    Attributes:
        pool: Task -> ids of all its search items.
        size: Items of each task in a window, or task -> items; a task with fewer items gives all of them.
        seed: Seed of the study, which keys the shuffles.
    """

    pool: Items
    size: int | Mapping[str, int]
    seed: int

    def items(self, generation: int) -> Items:
        """The items that every candidate of a generation is scored on.

        Args:
            generation: Its number, at least 0.

        Returns:
            Task -> item ids.
        """
        return {task: self._ids(task, generation) for task in self.pool}

    def epochs(self, trial: Trial, last: int) -> dict[str, int]:
        """How often the items of each task had been gone through before those of a trial were taken.

        Args:
            trial: A stored trial.
            last: The last generation; the mean of its distribution is scored on the items of the generation
                after it.

        Returns:
            Task -> number of complete epochs.
        """
        generation = trial.generation
        if trial.origin == "mean" and generation == last:
            generation = last + 1
        return {task: self._window(task, generation).epoch for task in self.pool}

    def _window(self, task: str, generation: int) -> _Window:
        requested = self.size if isinstance(self.size, int) else self.size[task]
        size = min(requested, len(self.pool[task]))
        windows_per_epoch = len(self.pool[task]) // size
        epoch, index = divmod(max(0, generation - 1), windows_per_epoch)
        return _Window(epoch, index, size)

    def _ids(self, task: str, generation: int) -> tuple[str, ...]:
        window = self._window(task, generation)
        order = _shuffled(self.pool[task], f"{self.seed}/{task}/{window.epoch}")
        first = window.index * window.size
        return tuple(order[first : first + window.size])


def _shuffled(ids: Sequence[str], key: str) -> list[str]:
    """The ids in an order that depends on them and the key alone."""
    return sorted(ids, key=lambda item: hashlib.sha256(f"{key}/{item}".encode()).digest())
