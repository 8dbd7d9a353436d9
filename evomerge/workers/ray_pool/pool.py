"""The pool over plain Ray actors: one process a worker, one call in flight, no retries of Ray's, no weights in its object store.

What is done by whom, and what a failure means, is decided in `evomerge.workers.scheduler`; here processes are started, asked and killed.
"""

from __future__ import annotations

import itertools
import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import ray
from ray import cloudpickle
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from evomerge.errors import EvomergeError, SetupError
from evomerge.evaluation import Attempt, Evaluation
from evomerge.workers.failure_policy import Limits
from evomerge.workers.pool import Job, Scorer
from evomerge.workers.ray_pool import cluster
from evomerge.workers.ray_pool.actor import Actor, Report, Where, end, tail
from evomerge.workers.ray_pool.cluster import Node
from evomerge.workers.scheduler import Scheduler, Try, Use, WorkerSlot

log = logging.getLogger(__name__)
_TICK = 1.0  # seconds between two looks at what takes too long
_PATIENCE = 60.0  # seconds without any worker until it is said why
_BEHIND = 0.05  # seconds that workers may be left alone while the caller takes results


@dataclass(slots=True, eq=False)
class _Chair:
    """A place for a worker on a node. empty: to be started at `due`; placing: Ray has not placed it yet; opening: the worker is made;
    ready; held: on a device that is put aside, which it keeps from being given to another."""

    name: str
    node: Node
    state: Literal["empty", "placing", "opening", "ready", "held"] = "empty"
    due: float = 0.0
    actor: Any = None
    where: Where | None = None
    seat: WorkerSlot | None = None
    since: float = 0.0

    @property
    def place(self) -> str:
        """What it shares with others that fail by the same cause; empty before Ray placed it."""
        return f"{self.node.host} {self.node.id[:8]} {self.where.device}" if self.where else ""


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """A call that is out. actor: it went to; chair: that it sits on, or sat."""

    chair: _Chair
    actor: Any
    tried: Try | None = None


class RayPool:
    """Satisfies `evomerge.workers.pool.Pool`. A context manager that ends its workers; they also end when this process is killed."""

    def __init__(
        self,
        make: Callable[[], Scorer],
        *,
        address: str | None = None,
        workers: int | None = None,
        gpus: float | None = None,
        cpus: float = 1.0,
        limits: Limits | None = None,
        replan: float = 5.0,
    ) -> None:
        """make: opens a worker, called once in each process; it must be picklable. address: see `cluster.join`. workers: None for as
        many as fit, now and whenever nodes come. gpus, cpus: of each worker; gpus below 1 share one, None is one where a node has
        GPUs. replan: seconds between two looks at the nodes. Raises SetupError where the cluster cannot be had or has too little."""
        self._make: bytes = cloudpickle.dumps(make)  # type: ignore[no-untyped-call]
        self._workers, self._replan = workers, replan
        self._slots = Scheduler(limits)
        self._chairs: list[_Chair] = []
        self._seated: dict[int, _Chair] = {}
        self._calls: dict[Any, _Call] = {}
        self._numbers = itertools.count(1)
        self._start = time.time() - time.monotonic()
        self._planned = self._ticked = self._stepped = self._warned = 0.0
        self._closed, self._idle = False, threading.Event()
        self._own = cluster.join(address)
        try:
            self._size = (cpus, float(any(node.gpus for node in cluster.nodes())) if gpus is None else gpus)
            cluster.check(*self._size, workers)
            self._here = ray.get_runtime_context().get_node_id()
            self._plan(self._now())
            self._fill(self._now())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RayPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- the protocol ------------------------------------------------------------------------------------------------

    def submit(self, jobs: Sequence[Job]) -> None:
        """Idle workers begin at once."""
        self._slots.submit(jobs)
        self._hand_out(self._now())

    def result(self, timeout: float | None = None) -> tuple[Job, Evaluation] | None:
        """The next that is finished. Raises SetupError where workers fail again and again and nothing is ever done."""
        slots, end = self._slots, None if timeout is None else time.monotonic() + timeout
        if slots.results and time.monotonic() - self._stepped > _BEHIND:
            self._step(0.0)
        while not slots.results:
            if not slots.out:
                return None
            if slots.broken:
                raise SetupError(slots.broken)
            self._step(_TICK if end is None else min(_TICK, max(0.0, end - time.monotonic())))
            if not slots.results and end is not None and time.monotonic() >= end:
                return None
        return slots.results.popleft()

    def drain(self) -> None:
        """Drops what no worker has begun; what then fails in flight is dropped too."""
        self._slots.drain()

    @property
    def out(self) -> int:
        """How many results will still come."""
        return self._slots.out

    def attempts(self) -> list[Attempt]:
        """The tries that ended since this was last asked."""
        found, self._slots.ended = self._slots.ended, []
        return found

    def close(self) -> None:
        """Kills the workers, and ends the cluster if it was started here."""
        if self._closed:
            return
        self._closed = True
        if ray.is_initialized():
            for chair in self._chairs:
                self._kill(chair)
            if self._own:
                ray.shutdown()
        self._chairs, self._calls, self._seated = [], {}, {}

    # ---- what can be asked -------------------------------------------------------------------------------------------

    @property
    def ready(self) -> int:
        """Workers that can be given jobs, or are at one."""
        return len(self._seated)

    def describe(self) -> str:
        """Where workers are placed, a line for each node."""
        cpus, gpus = self._size
        each = f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
        lines = [
            f"Ray {ray.__version__}, {'a cluster of its own on this machine' if self._own else 'joined'}; workers of {each} each"
        ]
        for node in cluster.nodes():
            names = [chair.name for chair in self._chairs if chair.node.id == node.id]
            shown = ", ".join(names if len(names) <= 8 else [names[0], "...", names[-1]])
            lines.append(
                f"  {node.host} ({node.address}): {node.cpus:g} CPUs, {node.gpus:g} GPUs: {len(names)} workers {shown}".rstrip()
            )
        return "\n".join(lines)

    def utilisation(self) -> dict[str, Use]:
        """Worker's name -> seconds busy and alive, and jobs done."""
        return self._slots.use(self._now())

    # ---- one turn ----------------------------------------------------------------------------------------------------

    def _now(self) -> float:
        """Unix seconds that never go back."""
        return self._start + time.monotonic()

    def _step(self, timeout: float) -> None:
        """Waits until something happens, at most `timeout` seconds, and sees to it."""
        now = self._now()
        if now - self._planned >= self._replan:
            self._plan(now)
        if now - self._ticked >= _TICK:
            self._tick(now)
        self._fill(now)
        self._hand_out(now)
        waiting = [chair.due - now for chair in self._chairs if chair.state == "empty"]
        timeout = max(0.0, min([timeout, *waiting]))
        if self._calls:
            found, _ = ray.wait(list(self._calls), num_returns=1, timeout=timeout)
            if found:  # all that are there: one look at many calls costs as much as at one
                found, _ = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0)
            for ref in found:
                self._answer(ref)
        else:
            self._idle.wait(timeout)
        self._replace_worn()
        self._hand_out(self._now())
        self._stepped = time.monotonic()

    def _hand_out(self, now: float) -> None:
        for tried in self._slots.assign(now):
            chair = self._seated[tried.seat.number]
            ref = chair.actor.evaluate.remote(tried.job.recipe, tried.job.items)
            self._calls[ref] = _Call(chair, chair.actor, tried)

    def _answer(self, ref: Any) -> None:
        call, now = self._calls.pop(ref), self._now()
        try:
            value = ray.get(ref)
        except RayTaskError as error:  # raised by what was called
            if call.tried is None:
                self._unopened(call, _said(error))
                return
            value = Report(
                Evaluation(call.tried.job.recipe.id, (), {}, {}, error=_said(error)),
                now - call.tried.started,
                0,
            )
        except RayError as error:  # there is no one to answer
            self._lost(call, error, now)
            return
        if call.tried is not None:
            self._slots.finished(
                call.tried.number, value.evaluation, now, value.seconds, value.memory, value.log
            )
        elif call.actor is call.chair.actor:
            self._placed(call.chair, value, now) if call.chair.state == "placing" else self._opened(
                call.chair, now
            )

    def _tick(self, now: float) -> None:
        """Kills what takes too long."""
        self._ticked = now
        for seat in self._slots.overdue(now):
            self._vacate(self._seated[seat.number], now, force=True)
        for chair in self._chairs:
            if chair.state == "opening" and now - chair.since > self._slots.limits.opening:
                self._slots.unopened(
                    chair.name, chair.place, f"a worker was not open after {self._slots.limits.opening:g} s"
                )
                self._vacate(chair, now, force=True)
            elif chair.state == "held" and chair.place not in self._slots.aside:
                self._placed(chair, chair.where, now)
        if (
            not self._seated
            and now > self._warned
            and all(c.state == "placing" and now - c.since > _PATIENCE for c in self._chairs)
        ):
            self._warned = now + _PATIENCE
            log.warning(
                "no worker could be placed for %g s: what they need is in use, or the cluster has no node for them",
                _PATIENCE,
            )

    # ---- workers come and go -----------------------------------------------------------------------------------------

    def _plan(self, now: float) -> None:
        """Lets go of workers on nodes that are gone, and finds room for those that are lacking."""
        self._planned = now
        there = cluster.nodes()
        alive = {node.id for node in there}
        for chair in [c for c in self._chairs if c.node.id not in alive]:
            log.warning("node %s is gone, and worker %s with it", chair.node.host, chair.name)
            if chair.seat is not None:
                self._slots.leave(chair.seat.number, "lost", f"node {chair.node.host} is gone", now)
            self._vacate(chair, now)
            self._chairs.remove(chair)
        taken = Counter(chair.node.id for chair in self._chairs)
        names = {chair.name for chair in self._chairs}
        free = (name for i in itertools.count() if (name := f"w{i}") not in names)
        for node in cluster.places(there, *self._size, self._workers, taken):
            self._chairs.append(_Chair(next(free), node))
        self._slots.expected = max(1, len(self._chairs))

    def _fill(self, now: float) -> None:
        """Starts an actor wherever one is lacking and it is time."""
        cpus, gpus = self._size
        for chair in self._chairs:
            if chair.state == "empty" and chair.due <= now:
                at = NodeAffinitySchedulingStrategy(chair.node.id, soft=False)
                options = {
                    "num_cpus": cpus,
                    "num_gpus": gpus,
                    "max_restarts": 0,
                    "max_task_retries": 0,
                    "scheduling_strategy": at,
                }
                chair.actor = ray.remote(Actor).options(**options).remote()
                chair.state, chair.since = "placing", now
                self._calls[chair.actor.where.remote()] = _Call(chair, chair.actor)

    def _placed(self, chair: _Chair, where: Where | None, now: float) -> None:
        chair.where, chair.since = where, now
        chair.state = "held" if chair.place in self._slots.aside else "opening"
        if chair.state == "opening":
            self._calls[chair.actor.open.remote(self._make, sys.path, cluster.environment())] = _Call(
                chair, chair.actor
            )

    def _opened(self, chair: _Chair, now: float) -> None:
        assert chair.where is not None
        chair.seat = WorkerSlot(
            next(self._numbers),
            chair.name,
            chair.place,
            chair.where.host,
            chair.where.pid,
            chair.where.device,
        )
        chair.state = "ready"
        self._seated[chair.seat.number] = chair
        self._slots.join(chair.seat, now)

    def _unopened(self, call: _Call, error: str) -> None:
        chair = call.chair
        if call.actor is chair.actor:
            log.warning("worker %s on %s could not be opened: %s", chair.name, chair.node.host, error)
            self._slots.unopened(chair.name, chair.place, error)
            self._vacate(chair, self._now())

    def _lost(self, call: _Call, error: RayError, now: float) -> None:
        """A process is gone."""
        chair = call.chair
        if call.actor is chair.actor and chair in self._chairs:
            cause, said = self._cause(chair, error), _said(error)
            if chair.seat is not None:
                text = tail(chair.where.errors) if chair.where and chair.node.id == self._here else ""
                log.warning(
                    "worker %s (pid %d on %s) is gone: %s", chair.name, chair.seat.pid, chair.seat.host, said
                )
                self._slots.leave(chair.seat.number, cause, said, now, text)
                self._vacate(chair, now)
            else:
                self._unopened(call, said)
            if cause == "lost":
                self._planned = 0.0  # look at the nodes before anything is started there
        if call.tried is not None:
            self._slots.gone(call.tried.number)

    def _cause(self, chair: _Chair, error: RayError) -> str:
        if isinstance(error, OutOfMemoryError) or "running low on memory" in str(error):
            return "memory"
        said = str(error).lower()
        gone = (
            chair.node.id not in {node.id for node in cluster.nodes()}
            or "node died" in said
            or "node was terminated" in said
        )
        return (
            "lost"
            if gone or getattr(error, "preempted", False) or not cluster.answers(chair.node)
            else "died"
        )

    def _replace_worn(self) -> None:
        while self._slots.worn:
            seat, _ = self._slots.worn.pop()
            self._vacate(self._seated[seat.number], self._now())

    def _vacate(self, chair: _Chair, now: float, *, force: bool = False) -> None:
        """Ends the process on a chair; another is started there after a pause. force: it may be frozen."""
        self._kill(chair)
        if force and chair.where is not None:
            if chair.node.id == self._here:
                end(chair.where.pid)
            else:
                at = NodeAffinitySchedulingStrategy(chair.node.id, soft=False)
                ray.remote(end).options(num_cpus=0, max_retries=0, scheduling_strategy=at).remote(
                    chair.where.pid
                )
        if chair.seat is not None:
            del self._seated[chair.seat.number]
        chair.state, chair.actor, chair.where, chair.seat = "empty", None, None, None
        chair.due = now + self._slots.backoff(chair.name)

    def _kill(self, chair: _Chair) -> None:
        if chair.actor is not None:
            ray.kill(chair.actor, no_restart=True)


def _said(error: RayError) -> str:
    """One line of what Ray, or what was called, complains of."""
    cause = getattr(error, "cause", None) if isinstance(error, RayTaskError) else None
    if isinstance(cause, EvomergeError):
        return " ".join(str(cause).split())
    if cause is not None:
        return " ".join(f"{type(cause).__name__}: {cause}".split())
    text = " ".join(str(error).split())
    for start in ("Worker exit type: ", "The actor is dead because ", "The actor died because "):
        _, found, rest = text.partition(start)
        text = rest if found else text
    return text.partition(" Some common causes include")[0][:300]
