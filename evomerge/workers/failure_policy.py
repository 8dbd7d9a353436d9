"""What failures mean: when a job is poison, a worker waits, a device is quarantined, a pool gives up.

All pools share this policy. A worker that dies, hangs or gives an error that may be its machine's is not the
candidate's fault until others did so too: three deaths, two time-outs, the same error at two workers, of
which the last was alone on its machine. What only a machine can fail by, such as a full disk, is tried again
until it succeeds; the search pauses where nothing does. A process that somebody stopped is no time-out. Other
errors are results. No clock, queue or process here; times are given in unix seconds.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field

from evomerge.workers.machine_errors import error_kind, is_machine_error, is_only_machines, wants_memory

log = logging.getLogger(__name__)

_LEAST_FAILURES_PER_WORKER = 3  # in a row, before a pool gives up


@dataclass(frozen=True, slots=True)
class Limits:
    """When to give up on a job, a worker, a device, the pool. Times in seconds, sizes in bytes.

    Attributes:
        floor: a job may always take so long.
        factor: a job may take factor times the running median of seconds per cost, times its cost.
        first: a job may take so long while none has finished.
        opening: the start of a worker may take so long, and so may what a job needs before it is scored:
            merging, and once for each set of items probing and compiling.
        busy: a job whose process computes may take so many times its limit.
        look: seconds over which the processor time of a process at its limit is compared.
        poison: workers that die of one job before that is the job's result.
        hangs: time-outs of one job before that is its result.
        same: machine errors of one kind before that is the job's result, where a candidate may cause them
            and the machine did other jobs in between, or other machines gave them too.
        unproven: the same while there is no other job that could tell.
        tries: executions of one job, whatever they ended by, before that is its result.
        strikes: failures in a row at a device of jobs that were then done elsewhere, before the device is
            quarantined.
        ill: machine errors in a row with no job done by any worker (and at least three for each worker),
            before the search pauses.
        breaker: the same for all failures, before the pool gives up.
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
    busy: float = 10.0
    look: float = 10.0
    poison: int = 3
    hangs: int = 2
    same: int = 2
    unproven: int = 5
    tries: int = 20
    strikes: int = 5
    ill: int = 10
    breaker: int = 30
    openings: int = 3
    memory: float | None = None
    backoff: float = 1.0
    longest_backoff: float = 60.0
    alone: float = 120.0


@dataclass(frozen=True, slots=True)
class FailedTry:
    """An execution of a job that says nothing of its candidate yet.

    Attributes:
        worker: the number of the worker.
        failure_domain: of that worker.
        cause: 'died', 'memory', 'hung', 'frozen', 'lost' or 'failed'.
        kind: of the machine error, where it failed by one.
        successes: of all jobs by then.
    """

    worker: int
    failure_domain: str
    cause: str
    kind: str = ""
    successes: int = 0


@dataclass(frozen=True, slots=True)
class PoolHealth:
    """What speaks for a machine at which a job failed.

    Attributes:
        failure_domain: of the worker that failed.
        successes: jobs that were done so far, by all workers.
        has_other_jobs: whether there are jobs that may still speak for it.
        others_fail: whether other jobs failed by machine errors since the last that was done.
    """

    failure_domain: str
    successes: int
    has_other_jobs: bool
    others_fail: bool


@dataclass(slots=True)
class JobFailures:
    """The failed executions of one job, and when they are its result.

    Attributes:
        begun: executions so far, the running one included.
        failed: those that failed, the oldest first.
    """

    begun: int = 0
    failed: list[FailedTry] = field(default_factory=list)

    def is_machines(self, error: str | None, limits: Limits, pool: PoolHealth) -> bool:
        """Whether an error says nothing of the candidate yet, so that the job is to be tried again.

        Args:
            error: of an evaluation; None for success.
            limits: how many errors of a kind are enough.
            pool: what speaks for the machine.

        Returns:
            False for success, for errors of the candidate, and for one that a candidate may cause and that
            was met often enough while the machine did other jobs.
        """
        if not error or not is_machine_error(error):
            return False
        if is_only_machines(error):
            return True
        before = [failure for failure in self.failed if failure.kind == error_kind(error)]
        met = len(before) + 1
        domains = {failure.failure_domain for failure in before} | {pool.failure_domain}
        is_proven = (len(domains) > 1 and not pool.others_fail) or any(
            pool.successes > failure.successes for failure in before
        )
        if met >= limits.same and is_proven:
            return False
        return pool.has_other_jobs or met < max(limits.same, limits.unproven)

    def has_hung(self, worker: int, failure_domain: str) -> bool:
        """Whether a worker was given up on at this job.

        Args:
            worker: its number.
            failure_domain: of that worker.

        Returns:
            True after a time-out there.
        """
        own = (f.cause for f in self.failed if (f.worker, f.failure_domain) == (worker, failure_domain))
        return any(cause in ("hung", "frozen") for cause in own)

    def is_suspect(self, limits: Limits) -> bool:
        """Whether one failure more would be the job's result: it is then tried with nothing beside it.

        Args:
            limits: how many failures are enough.

        Returns:
            True where a death, a time-out or an error for want of memory more would decide.
        """
        causes = Counter(failure.cause for failure in self.failed)
        memory = [f.kind for f in self.failed if wants_memory(f.kind)]
        return (
            causes["died"] + causes["memory"] + 1 == max(2, limits.poison)
            or causes["hung"] + 1 == max(2, limits.hangs)
            or any(count + 1 == limits.same for count in Counter(memory).values())
        )

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
        self._ill = 0  # of them, errors of machines in a row
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

    def machine_failed(self, worker: str, error: str) -> None:
        """A worker gave an error of its machine.

        Args:
            worker: its name.
            error: one line.
        """
        self.failed(worker, error)
        self._ill += 1

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
        self._in_a_row = self._ill = 0
        self._by_worker.pop(worker, None)

    @property
    def is_machines(self) -> bool:
        """Whether the first of the failures in a row can only be the machine's."""
        return is_only_machines(self._first_error)

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

    def reason_to_pause(self, expected_workers: int) -> str | None:
        """Why it makes no sense to go on before somebody has looked at the machine.

        Args:
            expected_workers: how many workers there should be.

        Returns:
            A sentence with the first cause; None while it does.
        """
        if self._ill < max(self._limits.ill, _LEAST_FAILURES_PER_WORKER * expected_workers):
            return None
        return (
            f"{self._ill} errors of the machine in a row and no candidate scored between them, the first: "
            f"{self._first_error}; mend that and start it again, no candidate is blamed"
        )

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
