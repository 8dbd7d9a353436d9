"""The event loop of a search: submits jobs of open generations and hands results to those that wait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from evomerge.search.dispatch import Dispatch
from evomerge.search.generation import Generation
from evomerge.search.island import Island
from evomerge.workers import Job

_Key = tuple[str, tuple[tuple[str, tuple[str, ...]], ...]]
"""(recipe id, (task, item ids) pairs): what two jobs have in common that need one evaluation."""


def run(islands: Sequence[Island], dispatch: Dispatch) -> None:
    """Runs islands side by side until each has used its share of the budget.

    What several generations in flight wait for, the same recipe on the same items, is evaluated once.

    Args:
        islands: That have asked for nothing yet.
        dispatch: With nothing in flight.

    Raises:
        Paused: A stop was requested.
        FailureBudget: More than half of a generation failed.
    """
    in_flight = _JobsInFlight()
    for island in islands:
        _advance(island, in_flight, dispatch)
    while not all(island.is_finished for island in islands):
        job, evaluation = dispatch.next_result()
        for waiting in in_flight.pop(job):
            waiting.generation.add(waiting.job, evaluation)
            _advance(waiting.island, in_flight, dispatch)
        dispatch.record_activity()


def _advance(island: Island, in_flight: _JobsInFlight, dispatch: Dispatch) -> None:
    """Lets an island go on and submits, in one call, the jobs of the generations that it opened."""
    new: list[tuple[_Key, Job]] = []
    for generation in island.advance():
        items = tuple((task, tuple(ids)) for task, ids in sorted(generation.items.items()))
        for job in generation.jobs:
            key = (generation.recipe_ids[job.slot], items)
            if in_flight.add(key, _Waiting(island, generation, job)):
                new.append((key, job))
    submitted = dispatch.submit([job for _, job in new])
    for (key, _), job in zip(new, submitted, strict=True):
        in_flight.keys[job.slot] = key


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A generation that waits for a result. job: as the generation knows it."""

    island: Island
    generation: Generation
    job: Job


@dataclass(slots=True)
class _JobsInFlight:
    """Who waits for which evaluation. keys: slot of a submitted job -> what it evaluates."""

    waiting: dict[_Key, list[_Waiting]] = field(default_factory=dict)
    keys: dict[int, _Key] = field(default_factory=dict)

    def add(self, key: _Key, waiting: _Waiting) -> bool:
        """Adds a generation that waits; True if nobody waited before, so that a job must be submitted."""
        is_new = key not in self.waiting
        self.waiting.setdefault(key, []).append(waiting)
        return is_new

    def pop(self, job: Job) -> list[_Waiting]:
        """Those that wait for the result of a submitted job, in the order in which they asked."""
        return self.waiting.pop(self.keys.pop(job.slot))
