"""The life of the actors of a pool: placed on a node, opened, given jobs, held, ended, started again.

One actor for each worker. It is *empty* until it is started; *placing* until Ray has found room for it;
*opening* while its worker is made; then *ready*. On a quarantined device it is *held*: it keeps Ray from
giving the device to another.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray import cloudpickle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from evomerge.workers.pool import Scorer
from evomerge.workers.process_activity import ProcessActivity, activity
from evomerge.workers.ray_pool import cluster
from evomerge.workers.ray_pool.actor import Actor, ActorLocation, kill_process
from evomerge.workers.ray_pool.cluster import Node
from evomerge.workers.scheduler import Scheduler
from evomerge.workers.time_limits import Watched
from evomerge.workers.tries import Try
from evomerge.workers.worker_table import WorkerSlot

log = logging.getLogger(__name__)
_LOOK_SECONDS = 5.0  # that nodes have to say what processes do


@dataclass(frozen=True, slots=True)
class ActorSize:
    """What each actor takes of its node.

    Attributes:
        cpus: CPUs, in shares too.
        gpus: GPUs; below 1 a share of one.
    """

    cpus: float
    gpus: float


@dataclass(slots=True, eq=False)
class ActorRecord:
    """An actor, or the place for one on a node.

    Attributes:
        name: of the worker, kept when its process is replaced.
        node: where it runs.
        state: where it is in its life, see the module.
        due: unix seconds from which on an empty one may be started.
        actor: Ray's handle; None for an empty one.
        location: where Ray placed it; None before that.
        worker: the scheduler's record of it; None unless it is ready.
        since: unix seconds of its state.
        watched: the clock of its opening.
    """

    name: str
    node: Node
    state: Literal["empty", "placing", "opening", "ready", "held"] = "empty"
    due: float = 0.0
    actor: Any = None
    location: ActorLocation | None = None
    worker: WorkerSlot | None = None
    since: float = 0.0
    watched: Watched = field(default_factory=lambda: Watched(0.0))

    @property
    def failure_domain(self) -> str:
        """What it shares with others that fail by the same cause; empty before Ray placed it."""
        if self.location is None:
            return ""
        return f"{self.node.host} {self.node.id[:8]} {self.location.device}"


@dataclass(frozen=True, slots=True, eq=False)
class PendingCall:
    """A call to an actor that has not returned.

    Attributes:
        record: of the actor when it was called; another actor may be there by now.
        actor: Ray's handle of the one that was called.
        execution: of a job; None for a call that places or opens the actor.
        prepares: whether the call prepares the job, after which another scores it.
    """

    record: ActorRecord
    actor: Any
    execution: Try | None = None
    prepares: bool = False


class ActorFleet:
    """The actors of a pool, and the calls to them that have not returned.

    Attributes:
        records: one for each worker that there should be.
        ready: number of a worker -> its actor's record.
        calls: Ray's reference of a result -> the call.
    """

    def __init__(
        self, make: Callable[[], Scorer], scheduler: Scheduler, size: ActorSize, workers: int | None
    ) -> None:
        """A fleet without actors.

        Args:
            make: opens a worker, called once in each process; it must be picklable.
            scheduler: is told who is ready and who could not be started.
            size: of each actor.
            workers: how many; None for as many as fit.
        """
        self.records: list[ActorRecord] = []
        self.ready: dict[int, ActorRecord] = {}
        self.calls: dict[Any, PendingCall] = {}
        self._make: bytes = cloudpickle.dumps(make)  # type: ignore[no-untyped-call]
        self._scheduler = scheduler
        self._size = size
        self._workers = workers
        self._numbers = itertools.count(1)
        self._driver_node: str = ray.get_runtime_context().get_node_id()

    # ---- which actors there are ----------------------------------------------------------------------------

    def plan(self, now: float) -> None:
        """Drops actors on nodes that are gone, and finds room for those that are lacking.

        Args:
            now: unix seconds.
        """
        nodes = cluster.nodes()
        alive = {node.id for node in nodes}
        for record in [r for r in self.records if r.node.id not in alive]:
            log.warning("node %s is gone, and worker %s with it", record.node.host, record.name)
            if record.worker is not None:
                self._scheduler.leave(record.worker.number, "lost", f"node {record.node.host} is gone", now)
            self.end(record, now)
            self.records.remove(record)
        taken = Counter(record.node.id for record in self.records)
        names = {record.name for record in self.records}
        free_names = (name for name in (f"w{i}" for i in itertools.count()) if name not in names)
        for node in cluster.places(nodes, self._size.cpus, self._size.gpus, self._workers, taken):
            self.records.append(ActorRecord(next(free_names), node))
        self._scheduler.expected_workers = max(1, len(self.records))

    def start_due(self, now: float) -> None:
        """Starts an actor wherever one is lacking and its pause is over.

        Args:
            now: unix seconds.
        """
        for record in self.records:
            if record.state != "empty" or record.due > now:
                continue
            options = actor_options(self._size, record.node)
            record.actor = ray.remote(Actor).options(**options).remote()
            record.state = "placing"
            record.since = now
            self.calls[record.actor.where.remote()] = PendingCall(record, record.actor)

    def next_start(self, now: float) -> float | None:
        """Seconds until an actor is due to be started; None where none is lacking.

        Args:
            now: unix seconds.

        Returns:
            Seconds; negative where it is overdue.
        """
        return min((r.due - now for r in self.records if r.state == "empty"), default=None)

    # ---- from state to state -------------------------------------------------------------------------------

    def placed(self, record: ActorRecord, location: ActorLocation | None, now: float) -> None:
        """Ray has placed an actor: its worker is opened, unless its device is quarantined.

        Args:
            record: of the actor.
            location: where it is.
            now: unix seconds.
        """
        record.location = location
        record.since = now
        if record.failure_domain in self._scheduler.quarantined:
            record.state = "held"
            return
        record.state = "opening"
        record.watched = Watched(now)
        call = record.actor.open.remote(self._make, sys.path, cluster.environment())
        self.calls[call] = PendingCall(record, record.actor)

    def opened(self, record: ActorRecord, now: float) -> None:
        """An actor's worker is open: it gets jobs from now on.

        Args:
            record: of the actor.
            now: unix seconds.
        """
        location = record.location
        assert location is not None
        record.worker = WorkerSlot(
            next(self._numbers),
            record.name,
            record.failure_domain,
            location.host,
            location.pid,
            location.device,
        )
        record.state = "ready"
        self.ready[record.worker.number] = record
        self._scheduler.join(record.worker, now)

    def start_failed(self, call: PendingCall, error: str, now: float) -> None:
        """An actor could not be placed or opened.

        Args:
            call: that failed.
            error: one line.
            now: unix seconds.
        """
        record = call.record
        if call.actor is not record.actor:
            return
        log.warning("worker %s on %s could not be opened: %s", record.name, record.node.host, error)
        self._scheduler.start_failed(record.name, record.failure_domain, error)
        self.end(record, now)

    def check_states(self, now: float) -> None:
        """Ends actors whose job or start takes too long, and opens those whose quarantine is over.

        Args:
            now: unix seconds.
        """
        for worker in self._scheduler.overdue(now, self):
            self.end(self.ready[worker.number], now, may_be_frozen=True)
        limits = self._scheduler.limits
        for record in self.records:
            if record.state == "opening" and self._opens_too_long(record, now):
                error = f"a worker was not open after {limits.opening:g} s"
                self._scheduler.start_failed(record.name, record.failure_domain, error)
                self.end(record, now, may_be_frozen=True)
            elif record.state == "held" and record.failure_domain not in self._scheduler.quarantined:
                self.placed(record, record.location, now)

    def _opens_too_long(self, record: ActorRecord, now: float) -> bool:
        limits, location = self._scheduler.limits, record.location
        if now - record.watched.since <= limits.opening or location is None:
            return False
        seen = self._activities({0: (record.node, location.pid)}).get(0)
        return record.watched.verdict(limits.opening, limits, now, seen) is not None

    def at(self, workers: Sequence[WorkerSlot]) -> Mapping[int, ProcessActivity]:
        """What the processes of workers do, as far as their nodes say within some seconds. See `Look`.

        Args:
            workers: that are ready.

        Returns:
            Worker's number -> what its process does.
        """
        return self._activities({w.number: (self.ready[w.number].node, w.pid) for w in workers})

    def is_stopped(self, worker: WorkerSlot) -> bool:
        """Whether somebody stopped a process of the driver's node. See `Look`.

        Args:
            worker: that is ready.

        Returns:
            False for processes of other nodes.
        """
        if not self.is_on_driver_node(self.ready[worker.number]):
            return False
        seen = activity(worker.pid)
        return seen is not None and seen.is_stopped

    def _activities(self, processes: Mapping[int, tuple[Node, int]]) -> dict[int, ProcessActivity]:
        seen: dict[int, ProcessActivity | None] = {}
        calls: dict[Any, int] = {}
        for number, (node, pid) in processes.items():
            if node.id == self._driver_node:
                seen[number] = activity(pid)
            else:
                calls[ray.remote(activity).options(**_beside_workers(node)).remote(pid)] = number
        if calls:
            returned, _ = ray.wait(list(calls), num_returns=len(calls), timeout=_LOOK_SECONDS)
            for call in returned:
                with contextlib.suppress(RayError):  # the node is gone, which the next plan sees
                    seen[calls[call]] = ray.get(call)
        return {number: found for number, found in seen.items() if found is not None}

    def replace_retired(self, now: float) -> None:
        """Ends the actors of workers that the scheduler retired.

        Args:
            now: unix seconds.
        """
        while self._scheduler.retired:
            worker, _ = self._scheduler.retired.pop()
            self.end(self.ready[worker.number], now)

    def end(self, record: ActorRecord, now: float, *, may_be_frozen: bool = False) -> None:
        """Ends an actor's process; another is started in its place after a pause.

        Args:
            record: of the actor.
            now: unix seconds.
            may_be_frozen: whether the process may not react to Ray's own request.
        """
        self._kill(record)
        if may_be_frozen and record.location is not None:
            self._kill_process(record.node, record.location.pid)
        if record.worker is not None:
            del self.ready[record.worker.number]
        record.state = "empty"
        record.actor = None
        record.location = None
        record.worker = None
        record.due = now + self._scheduler.backoff(record.name)

    def close(self) -> None:
        """Ends all actors for good."""
        if ray.is_initialized():
            for record in self.records:
                self._kill(record)
        self.records = []
        self.calls = {}
        self.ready = {}

    def is_on_driver_node(self, record: ActorRecord) -> bool:
        """Whether an actor is on the machine of this process.

        Args:
            record: of the actor.

        Returns:
            True where its files and processes are at hand.
        """
        return record.node.id == self._driver_node

    def all_placing_for(self, seconds: float, now: float) -> bool:
        """Whether no actor has been placed for some time.

        Args:
            seconds: the time.
            now: unix seconds.

        Returns:
            True where none is ready, and each waits for longer than that.
        """
        return not self.ready and all(r.state == "placing" and now - r.since > seconds for r in self.records)

    def _kill(self, record: ActorRecord) -> None:
        if record.actor is not None:
            ray.kill(record.actor, no_restart=True)

    def _kill_process(self, node: Node, pid: int) -> None:
        if node.id == self._driver_node:
            kill_process(pid)
            return
        ray.remote(kill_process).options(**_beside_workers(node)).remote(pid)


def actor_options(size: ActorSize, node: Node) -> dict[str, Any]:
    """What Ray is asked for an actor.

    Ray gives an actor all that it asks for at once and on one node, so that several GPUs are always of one
    machine; a placement group of one bundle would ask for the same.

    Args:
        size: of the actor.
        node: where it is to run.

    Returns:
        Options of `ray.remote`.
    """
    return {
        "num_cpus": size.cpus,
        "num_gpus": size.gpus,
        "max_restarts": 0,
        "max_task_retries": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node.id, soft=False),
    }


def _beside_workers(node: Node) -> dict[str, Any]:
    """Options of a task that takes nothing of a node that workers need."""
    return {
        "num_cpus": 0,
        "max_retries": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node.id, soft=False),
    }
