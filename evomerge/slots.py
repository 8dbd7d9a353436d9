"""Who evaluates what next, when workers die, hang, come and go: a state machine over a clock that is given. Knows nothing of Ray.

Events come in (`placed`, `opened`, `done`, `lost`), commands go out. A seat is room for one worker; a worker is one process,
and what is lost is never started again but replaced. Each worker is first placed somewhere by the cluster, then opened, and
has at most one call in flight.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

from evomerge.errors import SetupError

log = logging.getLogger(__name__)
Kind = Literal["died", "node", "time", "raised"]
"""How a worker was lost: its process ended; its node is out of reach; it took too long; it raised, or its device failed."""
_FEW = 3  # durations before their median says something
_QUIET = 5.0  # seconds of idleness after which a worker is asked whether it lives
_SILENCE = 60.0  # seconds that it may take to say so
_SAME_ON = 2  # workers that a time-out or an error must be seen on to be the candidate's
_DEVICE = re.compile(r"^(AcceleratorError|OutOfMemoryError|MemoryError)\b|CUDA error|CUDA out of memory|CUBLAS_STATUS|CUDNN_STATUS|NCCL error")


@dataclass(frozen=True, slots=True)
class Limits:
    """When to give up on a candidate or a worker; times in seconds.

    strikes: workers that are lost with a candidate before it is to blame; opens: times in a row that a worker may fail to
    open, and strikes of a place. A candidate may take max(floor, factor x running median), and `first` until three are
    known; a worker may take `opening` to open. growth: bytes of memory that a worker may add after its first evaluation.
    A seat waits pause x 2^(failures - 1), at most `longest`, before its next worker. empty: how long a run waits where
    the cluster has room for no worker at all.
    """

    strikes: int = 3
    opens: int = 3
    floor: float = 600.0
    factor: float = 4.0
    first: float = 7200.0
    opening: float = 3600.0
    growth: int = 16 << 30
    pause: float = 1.0
    longest: float = 60.0
    empty: float = 600.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker's process is. gpus: the devices it may use; log: what it writes to, on its host."""

    host: str
    pid: int
    node: str
    gpus: tuple[str, ...] = ()
    log: str = ""

    @property
    def key(self) -> str:
        """What can be broken: the devices, or the node where there are none."""
        return f"{self.node}/{','.join(self.gpus)}"


@dataclass(frozen=True, slots=True)
class Task:
    """A candidate to evaluate. size: items it is scored on."""

    id: str
    size: int


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at a candidate, numbered from 1. cause: why it came to nothing; None for one that gave an evaluation."""

    candidate: str
    number: int
    cause: str | None
    host: str
    pid: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Fault:
    """A worker that was lost while it evaluated a candidate. place: the key of where it was."""

    kind: Kind
    cause: str
    place: str


@dataclass(frozen=True, slots=True)
class Command:
    """start a process for a worker and ask where it is; greet: ask again; open it; evaluate a job; end its process."""

    kind: Literal["start", "greet", "open", "evaluate", "end"]
    worker: int
    job: int = -1


# ---- the rules -------------------------------------------------------------------------------------------------------


def capacity(nodes: Iterable[Mapping[str, float]], need: Mapping[str, float]) -> int:
    """How many workers of that need the nodes have room for, none of them split over nodes."""
    wanted = {name: amount for name, amount in need.items() if amount > 0}
    return sum(min(math.floor(node.get(name, 0.0) / amount + 1e-6) for name, amount in wanted.items()) for node in nodes)


def back_off(failures: int, limits: Limits) -> float:
    """Seconds to wait after that many failures in a row."""
    return min(limits.longest, limits.pause * 2.0 ** min(failures - 1, 60)) if failures else 0.0


def time_limit(durations: Sequence[tuple[float, int]], size: int, limits: Limits) -> float:
    """Seconds that a candidate on `size` items may take, by the (seconds, items) of those before it.

    More items may take longer in proportion; fewer get the time of all, since making a candidate live costs what it costs.
    """
    if len(durations) < _FEW:
        return max(limits.floor, limits.first)
    return max(limits.floor, limits.factor * median(seconds * max(1.0, size / max(1, own)) for seconds, own in durations))


def alike(one: str, other: str) -> bool:
    """Whether two causes are the same but for numbers and addresses."""
    first, second = (re.sub(r"0x[0-9a-fA-F]+|\d+(\.\d+)?", "#", text) for text in (one, other))
    return first == second


def device_failed(error: str) -> bool:
    """Whether a candidate's error is one after which the process cannot be trusted: a CUDA context is dead after an error."""
    return _DEVICE.search(error) is not None


def verdict(faults: Sequence[Fault], limits: Limits) -> str | None:
    """Why a candidate fails for good; None if it is tried on another worker."""
    raised = [fault.cause for fault in faults if fault.kind == "raised"]
    for i, cause in enumerate(raised):
        if any(alike(cause, other) for other in raised[:i]):
            return cause
    late = [fault.cause for fault in faults if fault.kind == "time"]
    if len(late) >= _SAME_ON:
        return f"time-out: {late[-1]}, on {len(late)} workers"
    blamed = [fault for fault in faults if fault.kind != "node"]
    if len(blamed) < limits.strikes and len(faults) < 3 * limits.strikes:  # a node that leaves is hardly a candidate's doing
        return None
    causes = "; ".join(dict.fromkeys(fault.cause for fault in faults))
    return f"poison: {len(faults)} workers were lost while it was evaluated: {causes}"


def pick(waiting: Sequence[int], struck: Mapping[int, set[str]], place: str, others: set[str]) -> int | None:
    """The first waiting job for a worker at `place`: not one that lost a worker here while another place could try it."""
    return next((job for job in waiting if place not in (own := struck.get(job, set())) or others <= own), None)


# ---- the machine -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Seat:
    """failures: of its workers in a row; closed: those that did not open; rests: no worker is started before."""

    failures: int = 0
    closed: int = 0
    rests: float = -math.inf


@dataclass(slots=True)
class _Worker:
    """since: of its state; job: None in flight for a caller who left; first: memory after its first evaluation."""

    seat: _Seat
    state: Literal["placing", "opening", "idle", "greeting", "busy", "aside"]
    since: float
    place: Place = field(default_factory=lambda: Place("", 0, ""))
    job: int | None = None
    size: int = 0
    first: int | None = None

    @property
    def open(self) -> bool:
        return self.state in ("idle", "greeting", "busy")


class Slots:
    """Decides for one pool; all times are seconds of the caller's clock."""

    def __init__(self, limits: Limits, wanted: int | None = None) -> None:
        """wanted: workers at most; None for all that there is room for."""
        self.attempts: list[Attempt] = []
        self._limits, self._wanted = limits, wanted
        self._seats: list[_Seat] = []
        self._workers: dict[int, _Worker] = {}
        self._started = 0
        self._tasks: Sequence[Task] = ()
        self._waiting: list[int] = []
        self._faults: dict[int, list[Fault]] = {}
        self._failed: list[tuple[int, str]] = []
        self._todo: list[Command] = []
        self._durations: deque[tuple[float, int]] = deque(maxlen=64)
        self._blame: Counter[str] = Counter()  # key of a place -> its strikes since its last success
        self._cause = ""
        self._empty: float | None = None

    def begin(self, tasks: Sequence[Task]) -> None:
        """Takes up jobs, numbered as they stand; the largest are evaluated first."""
        self._tasks, self._faults, self._failed, self._empty = tasks, {}, [], None
        self._waiting = sorted(range(len(tasks)), key=lambda job: -tasks[job].size)

    def end(self) -> None:
        """Forgets the jobs; what is in flight is let finish, and its result dropped."""
        self._waiting, self._failed = [], []
        for worker in self._workers.values():
            worker.job = None

    @property
    def open(self) -> int:
        """Workers that are open."""
        return sum(worker.open for worker in self._workers.values())

    @property
    def placing(self) -> int:
        """Workers that the cluster has not placed yet."""
        return sum(worker.state == "placing" for worker in self._workers.values())

    def settled(self) -> list[tuple[int, str]]:
        """(job, error) of the jobs that failed for good since it was last asked."""
        found, self._failed = self._failed, []
        return found

    def commands(self, now: float, room: int) -> list[Command]:
        """What is to be done now. room: workers that fit the cluster. Raises SetupError if no worker can be opened or placed."""
        self._expire(now)
        self._fill(now, room)
        self._assign(now)
        found, self._todo = self._todo, []
        return found

    # ---- events

    def placed(self, number: int, now: float, place: Place) -> None:
        """A worker said where it is."""
        worker = self._workers[number]
        if worker.state == "greeting":
            worker.state, worker.since = "idle", now
            return
        worker.place = place
        elsewhere = any(w.open and w.place.key != place.key for w in self._workers.values())
        if elsewhere and self._blame[place.key] >= self._limits.opens:
            log.warning("%s is set aside, since %d workers were lost there: %s", self._said(place), self._blame[place.key], self._cause)
            worker.state, worker.since = "aside", now  # it holds the devices, so that no worker is placed on them again
        else:
            self._open(number, now)

    def opened(self, number: int, now: float) -> None:
        """A worker is ready to evaluate."""
        worker = self._workers[number]
        worker.state, worker.since, worker.seat.closed = "idle", now, 0

    def done(self, number: int, now: float, seconds: float, memory: int, error: str | None) -> int | None:
        """A worker gave an evaluation: the job that it settles; None if it is dropped or its candidate is tried again.

        seconds: that it took; memory: bytes that the process holds now; error: of the evaluation.
        """
        worker = self._workers[number]
        job, place = worker.job, worker.place
        if error is not None and device_failed(error):
            self._fault(number, now, "raised", error)
            return None
        worker.state, worker.since, worker.job, worker.seat.failures = "idle", now, None, 0
        self._blame[place.key] = 0
        if error is None:
            self._durations.append((seconds, worker.size))
        if worker.first is None:
            worker.first = memory
        elif memory - worker.first > self._limits.growth:
            log.info("%s is replaced: it grew by %d MiB", self._said(place), (memory - worker.first) >> 20)
            self._end(number, now, failed=False)
        if job is None:
            return None
        faults = self._faults.get(job, [])
        self._blame.update({f.place for f in faults if f.kind != "node"} - {place.key})  # the candidate was not to blame
        self.attempts.append(Attempt(self._tasks[job].id, len(faults) + 1, None, place.host, place.pid, seconds))
        return job

    def lost(self, number: int, now: float, kind: Kind, cause: str) -> None:
        """A worker is gone, or is to go."""
        worker = self._workers[number]
        if worker.state == "busy":
            self._fault(number, now, kind, cause)
            return
        if worker.state in ("placing", "opening") and kind != "node":
            worker.seat.closed += 1
            self._cause = cause
            self._blame[worker.place.key] += 1
            log.warning("%s could not be opened: %s", self._said(worker.place), cause)
        self._end(number, now, failed=not worker.open)

    # ---- steps

    def _expire(self, now: float) -> None:
        limits: dict[int, float] = {}
        for number, worker in list(self._workers.items()):
            waited = now - worker.since
            if worker.state == "busy" and waited > self._limits.floor:
                if worker.size not in limits:
                    limits[worker.size] = time_limit(self._durations, worker.size, self._limits)
                if waited > limits[worker.size]:
                    self.lost(number, now, "time", f"it took longer than {limits[worker.size]:.0f} s")
            elif worker.state == "opening" and waited > self._limits.opening:
                self.lost(number, now, "time", f"it took longer than {self._limits.opening:.0f} s to open")
            elif worker.state == "greeting" and waited > _SILENCE:
                self.lost(number, now, "node", "it gave no answer")

    def _fill(self, now: float, room: int) -> None:
        """Starts workers where there is room, and takes back those that there is no room for any more."""
        target = room if self._wanted is None else min(self._wanted, room)
        self._check(now, target)
        for number in [n for n, w in self._workers.items() if w.state == "placing"][::-1][: max(0, len(self._workers) - target)]:
            self._end(number, now, failed=False)
        self._seats += [_Seat() for _ in range(target - len(self._seats))]
        taken = {id(worker.seat) for worker in self._workers.values()}
        stuck = self.open == 0
        for seat in self._seats:
            if len(self._workers) >= target:
                break
            if id(seat) in taken or now < seat.rests or (stuck and seat.closed >= self._limits.opens):
                continue
            self._started += 1
            self._workers[self._started] = _Worker(seat, "placing", now)
            self._todo.append(Command("start", self._started))
        if self._workers and all(worker.state == "aside" for worker in self._workers.values()):
            self._open(next(iter(self._workers)), now)  # a bad place is better than none

    def _check(self, now: float, target: int) -> None:
        """Raises SetupError where waiting is of no use."""
        tries = min((seat.closed for seat in self._seats), default=0)
        if target and not self._workers and tries >= self._limits.opens:
            raise SetupError(f"no worker could be opened, {tries} times in a row; the last time because: {self._cause}")
        if target or self._workers:
            self._empty = None
        elif self._empty is None:
            self._empty = now
        elif now - self._empty > self._limits.empty:
            raise SetupError(f"the cluster has had no room for a worker for {now - self._empty:.0f} s; add nodes, and run again with --resume")

    def _assign(self, now: float) -> None:
        places = {worker.place.key for worker in self._workers.values() if worker.open}
        struck = {job: {f.place for f in faults if f.kind != "node"} for job, faults in self._faults.items()}
        for number, worker in self._workers.items():
            if not self._waiting:
                break
            if worker.state != "idle":
                continue
            if now - worker.since > _QUIET:  # its process may have gone, and no candidate should be blamed for that
                worker.state, worker.since = "greeting", now
                self._todo.append(Command("greet", number))
                continue
            job = pick(self._waiting, struck, worker.place.key, places - {worker.place.key})
            if job is not None:
                self._waiting.remove(job)
                worker.state, worker.since, worker.job, worker.size = "busy", now, job, self._tasks[job].size
                self._todo.append(Command("evaluate", number, job))

    def _open(self, number: int, now: float) -> None:
        worker = self._workers[number]
        worker.state, worker.since = "opening", now
        self._todo.append(Command("open", number))

    def _fault(self, number: int, now: float, kind: Kind, cause: str) -> None:
        """A worker is lost with the candidate that it evaluates."""
        worker = self._workers[number]
        job, place = worker.job, worker.place
        self._cause = cause
        self._end(number, now, failed=kind != "node")
        if job is None:
            return
        faults = self._faults.setdefault(job, [])
        faults.append(Fault(kind, cause, place.key))
        self.attempts.append(Attempt(self._tasks[job].id, len(faults), cause, place.host, place.pid, now - worker.since))
        log.warning("%s was lost with candidate %s: %s", self._said(place), self._tasks[job].id, cause)
        error = verdict(faults, self._limits)
        if error is None:
            self._waiting.insert(0, job)
        else:
            self._failed.append((job, error))

    def _end(self, number: int, now: float, *, failed: bool) -> None:
        seat = self._workers.pop(number).seat
        self._todo.append(Command("end", number))
        if failed:
            seat.failures += 1
            seat.rests = now + back_off(seat.failures, self._limits)

    @staticmethod
    def _said(place: Place) -> str:
        gpus = f" with GPU {', '.join(place.gpus)}" if place.gpus else ""
        return f"the worker on {place.host}{gpus} (process {place.pid})" if place.pid else "a worker"
