"""What failures mean: when a job is poison, a worker waits, a device is quarantined, a pool gives up.

A worker that dies, hangs or gives an error of its machine is not the candidate's fault until others did so
too: three deaths, two time-outs, the same error at two workers. Other errors are results. No clock, queue or
process here; times are given in unix seconds.
"""

from __future__ import annotations

import logging
import re
from bisect import bisect_left, insort
from collections import Counter, deque
from dataclasses import dataclass, field

log = logging.getLogger(__name__)

_DEVICE_ERRORS = (
    r"CUDA error|HIP error|cuDNN|CUBLAS|CUSOLVER|NCCL|device-side assert|uncorrectable ECC|AcceleratorError"
)
_DEVICE = re.compile(_DEVICE_ERRORS, re.IGNORECASE)
_MACHINE = re.compile(
    _DEVICE_ERRORS
    + r"|out of memory|^MemoryError|DefaultCPUAllocator|^OSError|^(?:BrokenPipe|Connection\w*|Timeout)Error"
    r"|\[Errno \d+\]|Input/output error|Stale file handle|No space left",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"0x[0-9a-f]+|\d+(?:\.\d+)?", re.IGNORECASE)
_RECENT_JOBS = 255  # that the running median is taken over
_LONGEST_KIND = 120  # characters of an error that are compared
_LEAST_FAILURES_PER_WORKER = 3  # in a row, before a pool gives up


@dataclass(frozen=True, slots=True)
class Limits:
    """When to give up on a job, a worker, a device, the pool. Times in seconds, sizes in bytes.

    Attributes:
        floor: a job may always take so long.
        factor: a job may take factor times the running median of seconds per cost, times its cost.
        first: a job may take so long while none has finished.
        opening: the start of a worker may take so long.
        poison: workers that die of one job before that is the job's result.
        hangs: time-outs of one job before that is its result.
        tries: executions of one job, whatever they ended by, before that is its result.
        strikes: failures in a row at a device of jobs that were then done elsewhere, before the device is
            quarantined.
        breaker: failures in a row with no job done by any worker (and at least three for each worker), before
            the pool gives up.
        openings: the same for workers that could not be started, while none ever could (and at least one for
            each).
        memory: bytes that a worker may grow by after its first job before it is replaced; None for as much as
            it had then, and a GiB.
        backoff: pause before a worker that failed is started again, doubled each time.
        longest_backoff: the longest such pause.
        alone: how long devices stay quarantined while no other is at work.
    """

    floor: float = 60.0
    factor: float = 4.0
    first: float = 14_400.0
    opening: float = 3_600.0
    poison: int = 3
    hangs: int = 2
    tries: int = 20
    strikes: int = 5
    breaker: int = 30
    openings: int = 3
    memory: float | None = None
    backoff: float = 1.0
    longest_backoff: float = 60.0
    alone: float = 120.0


def is_machine_error(error: str) -> bool:
    """Whether an error may be the fault of the machine: of its device, memory, disk or network.

    Args:
        error: of an evaluation.

    Returns:
        True for those; all others are the candidate's.
    """
    return _MACHINE.search(error) is not None


def breaks_device(error: str) -> bool:
    """Whether a process can no longer use its device after an error.

    Args:
        error: of an evaluation.

    Returns:
        True for errors of the accelerator.
    """
    return _DEVICE.search(error) is not None


def error_kind(error: str) -> str:
    """What two errors of the same kind have in common.

    Args:
        error: of an evaluation.

    Returns:
        The first 120 characters of the text without its numbers.
    """
    return _NUMBER.sub("#", error)[:_LONGEST_KIND]


@dataclass(frozen=True, slots=True)
class FailedTry:
    """An execution of a job that says nothing of its candidate yet.

    Attributes:
        worker: the number of the worker.
        failure_domain: of that worker.
        cause: 'died', 'memory', 'hung', 'lost' or 'failed'.
    """

    worker: int
    failure_domain: str
    cause: str


@dataclass(slots=True)
class JobFailures:
    """The failed executions of one job, and when they are its result.

    Attributes:
        begun: executions so far, the running one included.
        failed: those that failed, the oldest first.
        error_kinds: kinds of machine errors that it met.
    """

    begun: int = 0
    failed: list[FailedTry] = field(default_factory=list)
    error_kinds: set[str] = field(default_factory=set)

    def is_new_machine_error(self, error: str | None) -> bool:
        """Whether an error may be the machine's, which another worker's evaluation decides; it is remembered.

        Args:
            error: of an evaluation; None for success.

        Returns:
            False for success, for errors of the candidate, and for a machine error of a kind that was met
            before.
        """
        if not error or not is_machine_error(error) or error_kind(error) in self.error_kinds:
            return False
        self.error_kinds.add(error_kind(error))
        return True

    def has_hung(self, worker: int, failure_domain: str) -> bool:
        """Whether a worker was given up on at this job.

        Args:
            worker: its number.
            failure_domain: of that worker.

        Returns:
            True after a time-out there.
        """
        return FailedTry(worker, failure_domain, "hung") in self.failed

    def verdict(self, limits: Limits) -> str | None:
        """What the failures say of the job.

        Args:
            limits: how many failures are enough.

        Returns:
            The error that is the job's result; None where it is to be tried again.
        """
        causes = Counter(failure.cause for failure in self.failed)
        deaths, hangs = causes["died"] + causes["memory"], causes["hung"]
        if deaths >= limits.poison:
            return f"poison: {deaths} worker processes died while it was evaluated"
        if hangs >= limits.hangs:
            times = "twice" if hangs == 2 else f"{hangs} times"
            return (
                f"timed out {times}; the limit is {limits.factor:g} times the median, "
                f"and at least {limits.floor:g} s"
            )
        if self.begun >= limits.tries:
            counts = ", ".join(f"{count} {cause}" for cause, count in sorted(causes.items()))
            return f"no result after {self.begun} attempts: {counts}"
        return None


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


class WorkerFailures:
    """Failures of workers in a row: how long one waits for its restart, and when the pool gives up."""

    def __init__(self, limits: Limits) -> None:
        """Begins without any job, worker or failure.

        Args:
            limits: when to give up.
        """
        self.any_started = False
        self._limits = limits
        self._by_worker: Counter[str] = Counter()
        self._in_a_row = 0
        self._failed_starts = 0
        self._first_error = ""

    def failed(self, worker: str, error: str) -> None:
        """A worker failed.

        Args:
            worker: its name.
            error: one line.
        """
        if not self._in_a_row:
            self._first_error = error
        self._in_a_row += 1
        self._by_worker[worker] += 1

    def start_failed(self, worker: str, error: str) -> None:
        """A worker could not be started.

        Args:
            worker: its name.
            error: one line.
        """
        self.failed(worker, error)
        self._failed_starts += 1

    def started(self) -> None:
        """A worker is ready."""
        self.any_started = True
        self._failed_starts = 0

    def succeeded(self, worker: str) -> None:
        """A worker did a job: failures in a row end.

        Args:
            worker: its name.
        """
        self._in_a_row = 0
        self._by_worker.pop(worker, None)

    def backoff(self, worker: str) -> float:
        """The pause before a worker is started again.

        Args:
            worker: its name.

        Returns:
            Seconds; 0 where its last job was done.
        """
        failures = self._by_worker[worker]
        if not failures:
            return 0.0
        return min(self._limits.longest_backoff, self._limits.backoff * 2.0 ** min(failures - 1, 30))

    def reason_to_stop(self, expected_workers: int) -> str | None:
        """Why the pool gives up.

        Args:
            expected_workers: how many workers there should be.

        Returns:
            A sentence with the first cause; None while it makes sense to go on.
        """
        starts, failures = self._failed_starts, self._in_a_row
        if not self.any_started and starts >= max(self._limits.openings, expected_workers):
            return (
                f"no worker could be started, {starts} tries; the first failed because: {self._first_error}"
            )
        if failures >= max(self._limits.breaker, _LEAST_FAILURES_PER_WORKER * expected_workers):
            return (
                f"{failures} failures of workers in a row and no candidate scored between them; "
                f"the first because: {self._first_error}"
            )
        return None


class DeviceQuarantine:
    """Devices that fail at what others can do, and get no jobs any more.

    Attributes:
        domains: the failure domains in quarantine.
    """

    def __init__(self, limits: Limits) -> None:
        """Begins without any job, worker or failure.

        Args:
            limits: when to give up.
        """
        self.domains: set[str] = set()
        self._limits = limits
        self._failures: Counter[str] = Counter()  # in a row, by failure domain
        self._alone_since: float | None = None

    def succeeded(self, domain: str) -> None:
        """A job was done there: its failures in a row end.

        Args:
            domain: the failure domain.
        """
        self._failures.pop(domain, None)

    def failed(self, domain: str, *, has_other: bool) -> bool:
        """A failure that is the device's: the job was done elsewhere, or others can start where it cannot.

        Args:
            domain: the failure domain.
            has_other: whether another one is in use; the last one is never quarantined.

        Returns:
            Whether it is quarantined by this failure.
        """
        self._failures[domain] += 1
        failures = self._failures[domain]
        if failures < self._limits.strikes or domain in self.domains or not has_other:
            return False
        log.warning("%s is quarantined after %d failures in a row of what others could do", domain, failures)
        self.domains.add(domain)
        return True

    def release(self, now: float, *, any_in_use: bool) -> bool:
        """Ends the quarantine of all where for some time there has been no other device.

        Args:
            now: unix seconds.
            any_in_use: whether workers of other devices are there.

        Returns:
            Whether the quarantine ended now.
        """
        if any_in_use or not self.domains:
            self._alone_since = None
        elif self._alone_since is None:
            self._alone_since = now
        elif now - self._alone_since > self._limits.alone:
            log.warning("no other device is left: %s back in use", ", ".join(sorted(self.domains)))
            self.domains.clear()
            self._failures.clear()
            return True
        return False
