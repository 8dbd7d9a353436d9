"""Between a search and its pool: submits jobs, stores attempts and hours, ends on a stop or a budget.

Everything that a search asks of its pool goes through one `Dispatch`. It knows nothing of generations or
optimizers: `evomerge.search.event_loop` runs those.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from evomerge.errors import EvomergeError, Paused, Stopped
from evomerge.evaluation import Evaluation
from evomerge.store import Store, stop_request
from evomerge.workers import Job, Pool

Result = tuple[Job, Evaluation]
"""A job with its evaluation."""
_TICK = 1.0  # seconds between two checks of stop requests and clocks


class StopRequest(Enum):
    """How a search is asked to end.

    Attributes:
        NONE: It goes on.
        FINISH_IN_FLIGHT: Nothing new begins; what is in flight has the grace period to end and is stored.
        DROP: What is in flight is dropped at once.
    """

    NONE = "none"
    FINISH_IN_FLIGHT = "finish in flight"
    DROP = "drop"


@dataclass(frozen=True, slots=True)
class Budget:
    """What a search may use up, beside evaluations.

    Attributes:
        hours: Hours of the driver, summed over all its runs; None is no limit.
        gpu_hours: Hours of workers at work, times `gpus` of each; None is no limit.
        cost: `gpu_hours` times `price`; None is no limit.
        price: Price of a GPU hour, in the unit of `cost`.
        gpus: GPUs of a worker; 1 for a worker without a GPU.
    """

    hours: float | None = None
    gpu_hours: float | None = None
    cost: float | None = None
    price: float = 0.0
    gpus: float = 1.0


class Dispatch:
    """Submits jobs to one pool, yields their results and keeps one store's record of attempts and hours.

    A stop is requested with `request_stop` (a signal handler calls it) or from another process through
    `evomerge.store.stop_request`, which counts as `StopRequest.FINISH_IN_FLIGHT`.

    Example:
        dispatch = Dispatch(pool, store, grace=600.0, budget=Budget(hours=8.0))
        for job, evaluation in dispatch.results(jobs):
            ...
    """

    def __init__(
        self,
        pool: Pool,
        store: Store,
        *,
        grace: float = 600.0,
        budget: Budget | None = None,
        backup: float | None = None,
    ) -> None:
        """Makes a dispatch that has submitted nothing.

        Args:
            pool: Evaluates jobs, in any order.
            store: Takes attempts, driver time and backups.
            grace: Seconds that jobs in flight have to end after a stop was requested.
            budget: Hours and cost after which `exhausted_budget` names a cause; None is no limit.
            backup: Minutes between two copies of the store; None makes none.
        """
        self.pool = pool
        self.store = store
        self.grace = grace
        self.budget = budget or Budget()
        self.backup = backup
        self.stop = StopRequest.NONE
        self._pause: Paused = Paused("stopped by a signal; run the same command with --resume to go on")
        self._submitted = 0
        self._drain_deadline: float | None = None
        self._last_tick = time.monotonic()

    def request_stop(self) -> StopRequest:
        """Asks the search to end; a second request drops what is in flight.

        May be called from a signal handler.

        Returns:
            What is requested now.
        """
        first = self.stop is StopRequest.NONE
        self.stop = StopRequest.FINISH_IN_FLIGHT if first else StopRequest.DROP
        return self.stop

    def submit(self, jobs: Sequence[Job]) -> list[Job]:
        """Hands jobs to the pool in one call, under slots that are unique within this dispatch.

        After a stop was requested nothing is handed over; `next_result` then raises.

        Args:
            jobs: In the order of submission; their slots may repeat those of earlier calls.

        Returns:
            The jobs under their unique slots, in the same order: results come back as these.
        """
        numbered = [replace(job, slot=self._submitted + i) for i, job in enumerate(jobs)]
        self._submitted += len(jobs)
        if numbered and self.stop is StopRequest.NONE:
            self.pool.submit(numbered)
        return numbered

    def next_result(self) -> Result:
        """Waits for the pool's next result; drains the pool once a stop is requested.

        Returns:
            A job as `submit` returned it, and its evaluation.

        Raises:
            Paused: A stop was requested and nothing that may be waited for is in flight, or the machine fails
                at whatever it is given. Attempts are stored before.
        """
        while True:
            if self.stop is not StopRequest.NONE:
                self._drain()
            try:
                result = self.pool.result(_TICK)
            except EvomergeError:
                with contextlib.suppress(Paused):  # the disk may be full, which may be that very reason
                    self.record_activity()
                raise
            if result is not None:
                return result
            if self.stop is StopRequest.NONE and not self.pool.out:
                raise AssertionError("a result is waited for, and the pool has no job out")
            self.record_activity()

    def results(self, jobs: Sequence[Job]) -> Iterator[Result]:
        """Evaluates jobs and yields each as it ends.

        Args:
            jobs: With slots of the caller's own.

        Yields:
            A job as it was given and its evaluation, in the order in which the pool finishes them.

        Raises:
            Paused: As `next_result`.
        """
        by_slot = {submitted.slot: job for submitted, job in zip(self.submit(jobs), jobs, strict=True)}
        for _ in jobs:
            submitted, evaluation = self.next_result()
            yield by_slot[submitted.slot], evaluation
            self.record_activity()

    def exhausted_budget(self) -> str | None:
        """Which limit of the budget is reached, as a sentence; None while something is left of each."""
        budget = self.budget
        self.record_activity()
        hours = self.store.activity.driven_seconds() / 3600
        if budget.hours is not None and hours >= budget.hours:
            return f"the budget of {budget.hours:g} hours is used up"
        gpu_hours = self.store.activity.busy_seconds() / 3600 * budget.gpus
        if budget.gpu_hours is not None and gpu_hours >= budget.gpu_hours:
            return f"the budget of {budget.gpu_hours:g} GPU hours is used up"
        if budget.cost is not None and gpu_hours * budget.price >= budget.cost:
            spent = f"{gpu_hours:.2f} GPU hours at {budget.price:g}"
            return f"the budget of {budget.cost:g} is used up: {spent}"
        return None

    def record_activity(self) -> None:
        """Stores ended attempts; once a second also driver time and a due backup, and reads stop requests."""
        attempts = self.pool.attempts()
        if attempts:
            self.store.activity.add_attempts(attempts)
        now = time.monotonic()
        if now - self._last_tick < _TICK:
            return
        self.store.activity.add_driven_seconds(now - self._last_tick)
        self._last_tick = now
        if self.stop is StopRequest.NONE and stop_request.stop_requested(self.store.path.parent):
            self.stop = StopRequest.FINISH_IN_FLIGHT
            self._pause = Stopped("stopped by evomerge stop; resume goes on")
        if self.backup is not None:
            self.store.backup_every(self.backup)

    def _drain(self) -> None:
        """Drops what no worker has begun; raises once nothing more may be waited for."""
        if self._drain_deadline is None:
            self.pool.drain()
            self._drain_deadline = time.monotonic() + self.grace
        is_over = not self.pool.out or time.monotonic() > self._drain_deadline
        if self.stop is StopRequest.DROP or is_over:
            self.record_activity()
            raise self._pause
