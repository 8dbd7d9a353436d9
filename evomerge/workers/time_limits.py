"""How long a job may take, and whether a process at its limit hangs, was stopped, or computes.

The clock of a job begins when it is scored. A process that uses its processor does not hang: it may take
longer, up to a bound.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass
from typing import Literal

from evomerge.workers.failure_policy import Limits
from evomerge.workers.process_activity import ProcessActivity

_RECENT_JOBS = 255  # that the running median is taken over
_BUSY_SHARE = 0.05  # of a processor, from which on a process computes


@dataclass(slots=True)
class Watched:
    """Something that may take too long.

    Attributes:
        since: unix seconds from which on its limit counts.
        seen: (unix seconds, processor seconds) of the last look at its process; None before it is late.
    """

    since: float
    seen: tuple[float, float] | None = None

    def verdict(
        self, limit: float, limits: Limits, now: float, activity: ProcessActivity | None
    ) -> Literal["hung", "frozen"] | None:
        """What is to be thought of it.

        Args:
            limit: seconds that it may take.
            limits: how much longer a process may take that computes.
            now: unix seconds.
            activity: of its process; None where it is not known.

        Returns:
            'frozen' for a process that somebody stopped, 'hung' for one that does nothing, or computes
            without end; None where it is not late, or its next look will tell.
        """
        late = now - self.since
        if late <= limit:
            return None
        if activity is None or late > limits.busy * limit:
            return "hung"
        if activity.is_stopped:
            return "frozen"
        if self.seen is None:
            self.seen = (now, activity.processor_seconds)
            return None
        seconds, used = now - self.seen[0], activity.processor_seconds - self.seen[1]
        if seconds < limits.look:
            return None
        self.seen = (now, activity.processor_seconds)
        return None if used >= _BUSY_SHARE * seconds else "hung"


class JobTimeLimit:
    """How long a job may take: by the running median of seconds per cost of the last 255 jobs."""

    def __init__(self, limits: Limits) -> None:
        """Begins without any job, worker or failure.

        Args:
            limits: when to give up.
        """
        self._limits = limits
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []

    def learn(self, seconds_per_cost: float) -> None:
        """Takes a finished job into the median.

        Args:
            seconds_per_cost: its time over its cost.
        """
        self._recent.append(seconds_per_cost)
        insort(self._sorted, seconds_per_cost)
        if len(self._recent) > _RECENT_JOBS:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]

    def seconds(self, cost: float) -> float:
        """The time limit of a job.

        Args:
            cost: of the job, in the unit of all jobs.

        Returns:
            Seconds.
        """
        if not self._sorted:
            return self._limits.first
        median = self._sorted[len(self._sorted) // 2]
        return max(self._limits.floor, self._limits.factor * median * cost)
