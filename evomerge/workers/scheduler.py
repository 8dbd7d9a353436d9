"""Which worker does which job next, and what a failure means: the scheduling that the Ray pool and the simulation share.

A state machine: it is told what happened and when, and says what to do. It knows nothing of Ray and of processes, and has
no clock of its own. What an event costs does not grow with the jobs but by the logarithm of the queue.

A worker that dies, hangs or gives an error of its machine's is not the candidate's fault until others did so too: three
deaths, two time-outs, the same error at two workers. Other errors are results. The first result of a job is its result.
"""

from __future__ import annotations

import heapq
import logging
from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from evomerge.evaluation import Attempt, Evaluation
from evomerge.workers.failure_policy import Limits, breaks_device, is_machines, kind
from evomerge.workers.pool import Job

log = logging.getLogger(__name__)
_RECENT = 255  # finished jobs that the running median is taken over


@dataclass(frozen=True, slots=True)
class WorkerSlot:
    """A worker process that can take jobs. number: its own, never used again; name: of its place in the pool, kept when the process
    is replaced; place: what it shares with others that fail by the same cause, such as a GPU or a CPU-only node."""

    number: int
    name: str
    place: str
    host: str = ""
    pid: int = 0
    device: str = "cpu"


@dataclass(slots=True)
class Use:
    """What a place in the pool did. busy: seconds spent on jobs; alive: seconds with a worker ready; jobs: results it gave."""

    busy: float = 0.0
    alive: float = 0.0
    jobs: int = 0


@dataclass(slots=True, eq=False)
class _Task:
    """A job until its result is settled, and as long as a late one may come."""

    job: Job
    begun: int = 0
    deaths: int = 0
    hangs: int = 0
    away: list[tuple[int, str, str]] = field(
        default_factory=list
    )  # (worker, place, cause) of each try that failed
    kinds: set[str] = field(default_factory=set)  # errors of the machine's that it met
    settled: bool = False
    answer: Evaluation | None = None  # that a worker gave, not one made up here


@dataclass(frozen=True, slots=True, eq=False)
class Try:
    """A job at a worker. started: unix seconds; nth: of its job, from 1."""

    number: int
    seat: WorkerSlot
    task: _Task
    started: float
    nth: int

    @property
    def job(self) -> Job:
        """What is tried."""
        return self.task.job


class Scheduler:
    """The queue, the workers, and who does what. Every `now` is in unix seconds and never less than the one before."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.expected = 1  # how many workers there should be, as the pool sees it
        self.results: deque[tuple[Job, Evaluation]] = deque()
        self.ended: list[Attempt] = []
        self.aside: set[str] = set()  # places that get no jobs any more
        self.worn: list[tuple[WorkerSlot, str]] = []  # workers to be replaced, and why; no longer seated here
        self._fresh: list[tuple[int, float, int, _Task]] = []  # heap, by turn, the longest first
        self._again: list[_Task] = []  # tried before, and first in line
        self._unsettled: dict[int, _Task] = {}  # by the job's slot
        self._seats: dict[int, WorkerSlot] = {}
        self._idle: dict[int, WorkerSlot] = {}
        self._running: dict[int, Try] = {}  # by worker
        self._tries: dict[int, Try] = {}  # of which an answer may still come
        self._places: Counter[str] = Counter()  # workers that may be given jobs
        self._memory: dict[int, int] = {}
        self._joined: dict[int, float] = {}
        self._use: dict[str, Use] = {}
        self._setbacks: Counter[str] = Counter()  # by the worker's name, in a row
        self._blame: Counter[str] = Counter()  # by place
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []
        self._count = self._row = self._unopened = 0
        self._first_cause = ""
        self._ever = self._draining = False
        self._alone: float | None = None

    # ---- jobs --------------------------------------------------------------------------------------------------------

    @property
    def out(self) -> int:
        """Jobs whose results will still be taken."""
        return len(self._unsettled) + len(self.results)

    @property
    def waiting(self) -> int:
        """Jobs that no worker is at."""
        return len(self._fresh) + len(self._again)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Takes jobs into the queue. Raises ValueError for a slot that is out already."""
        self._draining = False
        for job in jobs:
            if job.slot in self._unsettled:
                raise ValueError(f"slot {job.slot} is out already; a job needs a number of its own")
            task = self._unsettled[job.slot] = _Task(job)
            self._count += 1
            heapq.heappush(self._fresh, (job.turn, -job.cost, self._count, task))

    def drain(self) -> None:
        """Forgets what is not in flight; until more is submitted, what fails in flight is forgotten too."""
        for task in [*(task for *_, task in self._fresh), *self._again]:
            self._close(task)
        self._fresh, self._again, self._draining = [], [], True

    def assign(self, now: float) -> list[Try]:
        """Gives idle workers what they may do, by turns, the longest jobs first, those tried before ahead of them."""
        given = []
        for seat in list(self._idle.values()) if self.waiting else ():
            task = self._next(seat)
            if task is not None:
                task.begun += 1
                self._count += 1
                found = Try(self._count, seat, task, now, task.begun)
                self._running[seat.number] = self._tries[found.number] = found
                del self._idle[seat.number]
                given.append(found)
            if not self.waiting:
                break
        return given

    def _next(self, seat: WorkerSlot) -> _Task | None:
        for i, task in enumerate(self._again):
            if self._may(task, seat):
                return self._again.pop(i)
        return heapq.heappop(self._fresh)[3] if self._fresh else None

    def _may(self, task: _Task, seat: WorkerSlot) -> bool:
        """Whether no better worker is there for a job tried before: on another device, else another worker."""
        places, numbers = {place for _, place, _ in task.away}, {number for number, _, _ in task.away}
        if seat.place not in places or _other(self._places, places):
            return seat.place not in places
        usable = (n for n, s in self._seats.items() if s.place not in self.aside)
        return seat.number not in numbers or not _other(usable, numbers)

    # ---- workers -----------------------------------------------------------------------------------------------------

    def join(self, seat: WorkerSlot, now: float) -> None:
        """A worker is ready."""
        self._seats[seat.number], self._joined[seat.number] = seat, now
        self._use.setdefault(seat.name, Use())
        self._ever, self._unopened = True, 0
        if seat.place not in self.aside:
            self._idle[seat.number] = seat
            self._places[seat.place] += 1

    def leave(self, number: int, cause: str, error: str, now: float, text: str = "") -> None:
        """A worker is gone, or about to be; what it was at is tried elsewhere. cause: an Attempt's, or 'closed' for an idle one that
        nobody blames; text: its log's last lines. An answer may still come until `gone` is told of the try."""
        seat = self._unseat(number, now)
        if seat is None:
            return
        found = self._running.pop(number, None)
        if found is not None:
            self._use[seat.name].busy += now - found.started
            self._failed(found, cause, error, now - found.started, text)
        elif cause not in ("closed", "lost"):
            self._setback(seat.name, error)

    def unopened(self, name: str, place: str, error: str) -> None:
        """A worker could not be started; place: empty where it did not get as far as having one."""
        self._setback(name, error)
        self._unopened += 1
        if place and self._ever:
            self._strike(place)

    def backoff(self, name: str) -> float:
        """Seconds to wait before a worker of this name is started again."""
        failed = self._setbacks[name]
        return (
            min(self.limits.longest_backoff, self.limits.backoff * 2.0 ** min(failed - 1, 30))
            if failed
            else 0.0
        )

    @property
    def broken(self) -> str | None:
        """Why it makes no sense to go on; None while it does."""
        limits = self.limits
        if not self._ever and self._unopened >= max(limits.openings, self.expected):
            return f"no worker could be started, {self._unopened} tries; the first failed because: {self._first_cause}"
        if self._row >= max(limits.breaker, 3 * self.expected):
            return f"{self._row} failures of workers in a row and no candidate scored between them; the first because: {self._first_cause}"
        return None

    def overdue(self, now: float) -> list[WorkerSlot]:
        """Workers whose job takes too long, which count as gone from now on: kill them. To be asked about once a second."""
        late = [t for t in self._running.values() if now - t.started > self.limit(t.job.cost)]
        for found in late:
            taken = f"no result after {now - found.started:.0f} s, the limit is {self.limit(found.job.cost):.0f} s"
            log.warning("worker %s hangs: %s", found.seat.name, taken)
            self.leave(found.seat.number, "hung", taken, now)
        self._lift(now)
        return [t.seat for t in late]

    def limit(self, cost: float) -> float:
        """Seconds that a job may take."""
        if not self._sorted:
            return self.limits.first
        return max(self.limits.floor, self.limits.factor * self._sorted[len(self._sorted) // 2] * cost)

    def use(self, now: float) -> dict[str, Use]:
        """Worker's name -> what it did so far, a job in flight included."""
        found = {name: Use(u.busy, u.alive, u.jobs) for name, u in sorted(self._use.items())}
        for number, seat in self._seats.items():
            found[seat.name].alive += now - self._joined[number]
        for running in self._running.values():
            found[running.seat.name].busy += now - running.started
        return found

    # ---- what came of a try ------------------------------------------------------------------------------------------

    def finished(
        self, number: int, found: Evaluation, now: float, seconds: float, memory: int = 0, text: str = ""
    ) -> None:
        """A try gave an evaluation. number: the try's; seconds: that the worker spent; memory: that it holds now, 0 where unknown."""
        done = self._tries.pop(number, None)
        if done is None:
            return
        task, seat = done.task, done.seat
        if self._running.get(seat.number) is done:
            del self._running[seat.number]
            self._use[seat.name].busy += seconds
            self._free(seat, found, now, memory)
        if task.settled:
            self._late(done, found, seconds, text)
            return
        error = found.error if found.error and is_machines(found.error) else None
        if error is not None and kind(error) not in task.kinds:
            task.kinds.add(kind(error))
            self._failed(done, "failed", error, seconds, text)
            return
        self._note(done, "failed" if found.error else "done", found.error, seconds, text)
        if error is None:
            self._worked(done, found, seconds)
        if task in self._again:
            self._again.remove(task)
        self._settle(task, found, given=True)

    def gone(self, number: int) -> None:
        """No answer will come of a try any more."""
        self._tries.pop(number, None)

    def _failed(self, found: Try, cause: str, error: str, seconds: float, text: str) -> None:
        """A try that says nothing of its candidate yet; the job is queued again unless that was once too often."""
        task, seat = found.task, found.seat
        self._note(found, cause, error, seconds, text)
        if cause != "lost":
            self._setback(seat.name, error)
        if task.settled or (seat.number, seat.place, "hung") in task.away:
            return  # a worker that had been given up; the job is somewhere else
        task.away.append((seat.number, seat.place, cause))
        task.deaths += cause in ("died", "memory")
        task.hangs += cause == "hung"
        verdict = self._verdict(task)
        if verdict is not None:
            self._settle(task, Evaluation(task.job.recipe.id, (), {}, {}, error=verdict), given=False)
        elif self._draining:
            self._close(task)
        else:
            self._again.append(task)

    def _verdict(self, task: _Task) -> str | None:
        limits = self.limits
        if task.deaths >= limits.poison:
            return f"poison: {task.deaths} worker processes died while it was evaluated"
        if task.hangs >= limits.hangs:
            count = "twice" if task.hangs == 2 else f"{task.hangs} times"
            return f"timed out {count}; the limit is {limits.factor:g} times the median, and at least {limits.floor:g} s"
        if task.begun >= limits.tries:
            causes = ", ".join(
                f"{n} {cause}" for cause, n in sorted(Counter(cause for _, _, cause in task.away).items())
            )
            return f"no result after {task.begun} attempts: {causes}"
        return None

    def _worked(self, done: Try, found: Evaluation, seconds: float) -> None:
        """A worker did its part: failures in a row end, and where the job had failed is to blame."""
        seat, task = done.seat, done.task
        self._row = 0
        self._setbacks.pop(seat.name, None)
        self._blame.pop(seat.place, None)
        self._use[seat.name].jobs += 1
        if found.error is None and task.job.cost > 0:
            self._learn(seconds / task.job.cost)
        for place in sorted({p for _, p, cause in task.away if cause != "lost" and p != seat.place}):
            self._strike(place)

    def _learn(self, pace: float) -> None:
        self._recent.append(pace)
        insort(self._sorted, pace)
        if len(self._recent) > _RECENT:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]

    def _late(self, done: Try, found: Evaluation, seconds: float, text: str) -> None:
        answer = done.task.answer
        self._note(done, "late", found.error, seconds, text)
        if answer is not None and (answer.items, answer.metrics, answer.error) != (
            found.items,
            found.metrics,
            found.error,
        ):
            log.warning(
                "recipe %s was scored twice, and differently: scores are not deterministic (workers of %s)",
                found.recipe_id,
                done.seat.host,
            )

    def _settle(self, task: _Task, found: Evaluation, given: bool) -> None:
        task.answer = found if given else None
        self.results.append((task.job, found))
        self._close(task)

    def _close(self, task: _Task) -> None:
        task.settled = True
        del self._unsettled[task.job.slot]

    def _note(self, found: Try, cause: str, error: str | None, seconds: float, text: str) -> None:
        seat, recipe = found.seat, found.job.recipe.id
        self.ended.append(
            Attempt(
                recipe,
                found.nth,
                cause,
                error,
                seat.name,
                seat.host,
                seat.pid,
                seat.device,
                found.started,
                seconds,
                text,
            )
        )

    # ---- failures of workers and devices -----------------------------------------------------------------------------

    def _free(self, seat: WorkerSlot, found: Evaluation, now: float, memory: int) -> None:
        """A worker has done its job: it is idle, or it is to be replaced."""
        first = self._memory.setdefault(seat.number, memory) or memory
        if found.error is not None and breaks_device(found.error):
            self._wear(seat, "its device's context is dead after an error", now)
        elif memory - first > (first + (1 << 30) if self.limits.memory is None else self.limits.memory):
            self._wear(seat, f"its memory grew from {first >> 20} to {memory >> 20} MiB", now)
        elif seat.place not in self.aside:
            self._idle[seat.number] = seat

    def _wear(self, seat: WorkerSlot, why: str, now: float) -> None:
        log.warning("worker %s is replaced: %s", seat.name, why)
        self._unseat(seat.number, now)
        self.worn.append((seat, why))

    def _unseat(self, number: int, now: float) -> WorkerSlot | None:
        seat = self._seats.pop(number, None)
        if seat is None:
            return None
        self._idle.pop(number, None)
        self._memory.pop(number, None)
        self._use[seat.name].alive += now - self._joined.pop(number)
        if seat.place not in self.aside:
            self._unplace(seat)
        return seat

    def _unplace(self, seat: WorkerSlot) -> None:
        self._places[seat.place] -= 1
        if not self._places[seat.place]:
            del self._places[seat.place]

    def _setback(self, name: str, error: str) -> None:
        if not self._row:
            self._first_cause = error
        self._row += 1
        self._setbacks[name] += 1

    def _strike(self, place: str) -> None:
        """A failure that is the place's: what failed there was done elsewhere, or others can start where it cannot."""
        self._blame[place] += 1
        if (
            self._blame[place] < self.limits.strikes
            or place in self.aside
            or not _other(self._places, {place})
        ):
            return
        log.warning(
            "%s is put aside after %d failures in a row of what others could do", place, self._blame[place]
        )
        self.aside.add(place)
        self._places.pop(place, None)
        self._idle = {n: s for n, s in self._idle.items() if s.place != place}

    def _lift(self, now: float) -> None:
        """Takes devices back into use where for some time there has been no other."""
        if self._places or not self.aside:
            self._alone = None
        elif self._alone is None:
            self._alone = now
        elif now - self._alone > self.limits.alone:
            log.warning("no other device is left: %s back in use", ", ".join(sorted(self.aside)))
            self.aside.clear()
            self._blame.clear()
            for number, seat in self._seats.items():
                self._places[seat.place] += 1
                if number not in self._running:
                    self._idle[number] = seat


def _other(there: Iterable[str] | Iterable[int], known: set[str] | set[int]) -> bool:
    """Whether there is one that is not known; looks at no more than one beyond them."""
    return any(name not in known for name in there)
