"""The workers of a pool: who is ready, who is idle, what each did, and how its memory grew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import dataclass

from evomerge.workers.failure_policy import DeviceQuarantine


@dataclass(frozen=True, slots=True)
class WorkerSlot:
    """A worker process that can take jobs.

    Attributes:
        number: its own, never used again.
        name: of its place in the pool, kept when the process is replaced.
        failure_domain: what it shares with others that fail by the same cause, such as a GPU or a CPU-only
            node.
        host: name of its machine.
        pid: its process.
        device: 'cpu' or 'cuda:' and the numbers of its GPUs.
    """

    number: int
    name: str
    failure_domain: str
    host: str = ""
    pid: int = 0
    device: str = "cpu"


@dataclass(slots=True)
class WorkerUsage:
    """What a place in the pool did.

    Attributes:
        busy: seconds spent on jobs.
        alive: seconds with a worker ready.
        jobs: results it gave.
    """

    busy: float = 0.0
    alive: float = 0.0
    jobs: int = 0


class WorkerTable:
    """Workers that are ready. Those in a quarantined failure domain are never idle, so they get no jobs.

    Attributes:
        usage: worker's name -> what it did, without what it is at.
    """

    def __init__(self, quarantine: DeviceQuarantine) -> None:
        """An empty table.

        Args:
            quarantine: says which failure domains get no jobs.
        """
        self.usage: dict[str, WorkerUsage] = {}
        self._quarantine = quarantine
        self._workers: dict[int, WorkerSlot] = {}
        self._idle: dict[int, WorkerSlot] = {}
        self._per_domain: Counter[str] = Counter()  # workers that may be given jobs
        self._first_memory: dict[int, int] = {}  # after the first job, in bytes
        self._joined_at: dict[int, float] = {}
        self._resting: dict[int, float] = {}  # until when, in unix seconds

    def join(self, worker: WorkerSlot, now: float) -> None:
        """Adds a worker.

        Args:
            worker: ready and idle.
            now: unix seconds.
        """
        self._workers[worker.number] = worker
        self._joined_at[worker.number] = now
        self.usage.setdefault(worker.name, WorkerUsage())
        if worker.failure_domain not in self._quarantine.domains:
            self._idle[worker.number] = worker
            self._per_domain[worker.failure_domain] += 1

    def remove(self, number: int, now: float) -> WorkerSlot | None:
        """Removes a worker.

        Args:
            number: of the worker.
            now: unix seconds.

        Returns:
            The worker; None where it is not in the table.
        """
        worker = self._workers.pop(number, None)
        if worker is None:
            return None
        self._idle.pop(number, None)
        self._resting.pop(number, None)
        self._first_memory.pop(number, None)
        self.usage[worker.name].alive += now - self._joined_at.pop(number)
        domain = worker.failure_domain
        if domain not in self._quarantine.domains:
            self._per_domain[domain] -= 1
            if not self._per_domain[domain]:
                del self._per_domain[domain]
        return worker

    def idle(self) -> list[WorkerSlot]:
        """Workers that may be given a job, in the order they became idle."""
        return list(self._idle.values())

    def set_busy(self, worker: WorkerSlot) -> None:
        """Takes a worker out of the idle ones.

        Args:
            worker: idle.
        """
        del self._idle[worker.number]

    def set_idle(self, worker: WorkerSlot) -> None:
        """Makes a worker idle, unless its failure domain is quarantined.

        Args:
            worker: in the table.
        """
        if worker.failure_domain not in self._quarantine.domains:
            self._idle[worker.number] = worker

    def rest(self, worker: WorkerSlot, until: float) -> None:
        """Lets a worker rest after an error of its machine, before it is idle again.

        Args:
            worker: in the table, neither idle nor at a job.
            until: unix seconds.
        """
        self._resting[worker.number] = until

    def end_rests(self, now: float) -> None:
        """Makes those idle whose rest is over.

        Args:
            now: unix seconds.
        """
        for number in [n for n, until in self._resting.items() if until <= now]:
            del self._resting[number]
            self.set_idle(self._workers[number])

    def next_idle(self, now: float) -> float | None:
        """Seconds until the first rest is over; None where nobody rests.

        Args:
            now: unix seconds.

        Returns:
            Seconds; negative where it is over.
        """
        return min((until - now for until in self._resting.values()), default=None)

    def first_memory(self, worker: WorkerSlot, memory: int) -> int:
        """What a worker held after its first job.

        Args:
            worker: in the table.
            memory: bytes that it holds now; 0 where unknown.

        Returns:
            Bytes; `memory` itself where the first is unknown.
        """
        return self._first_memory.setdefault(worker.number, memory) or memory

    def usage_at(self, now: float) -> dict[str, WorkerUsage]:
        """What each worker did so far, jobs that are running not included in `busy`.

        Args:
            now: unix seconds.

        Returns:
            Worker's name -> a copy of its usage, sorted by name.
        """
        usage = {name: WorkerUsage(u.busy, u.alive, u.jobs) for name, u in sorted(self.usage.items())}
        for number, worker in self._workers.items():
            usage[worker.name].alive += now - self._joined_at[number]
        return usage

    @property
    def any_usable(self) -> bool:
        """Whether there is a worker outside quarantine."""
        return bool(self._per_domain)

    def has_other_domain(self, domains: set[str]) -> bool:
        """Whether a worker outside quarantine is in another failure domain.

        Args:
            domains: failure domains.

        Returns:
            True where there is one; looks at no more than one beyond them.
        """
        return _has_other(self._per_domain, domains)

    def has_other_worker(self, numbers: set[int]) -> bool:
        """Whether there is another worker outside quarantine.

        Args:
            numbers: of workers.

        Returns:
            True where there is one.
        """
        quarantined = self._quarantine.domains
        usable = (n for n, worker in self._workers.items() if worker.failure_domain not in quarantined)
        return _has_other(usable, numbers)

    def quarantine(self, domain: str) -> None:
        """Gives the workers of a failure domain no more jobs.

        Args:
            domain: now in quarantine.
        """
        self._per_domain.pop(domain, None)
        self._idle = {n: worker for n, worker in self._idle.items() if worker.failure_domain != domain}

    def release_all(self, busy: Container[int]) -> None:
        """Puts all workers back in use after the quarantine, while no worker was usable.

        Args:
            busy: numbers of the workers that are at a job.
        """
        for number, worker in self._workers.items():
            self._per_domain[worker.failure_domain] += 1
            if number not in busy and number not in self._resting:
                self._idle[number] = worker


def _has_other(there: Iterable[str] | Iterable[int], known: set[str] | set[int]) -> bool:
    """Whether one is not among the known."""
    return any(name not in known for name in there)
