"""The pool over plain Ray actors: one process for each worker, one call in flight.

Ray retries nothing, and no weights are in its object store. Which worker does which job, and what a failure
means, is decided in `evomerge.workers.scheduler`; actors are started and ended in `actor_fleet`. Here jobs
are handed out and answers taken.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from evomerge.errors import EvomergeError
from evomerge.evaluation import Evaluation
from evomerge.workers.failure_policy import Limits
from evomerge.workers.pool import Job, JobReport, PoolSettings, Scorer
from evomerge.workers.ray_pool import cluster, ray_errors
from evomerge.workers.ray_pool.actor import last_lines
from evomerge.workers.ray_pool.actor_fleet import ActorFleet, ActorSize, PendingCall
from evomerge.workers.scheduled_pool import CHECK_SECONDS, ScheduledPool
from evomerge.workers.scheduler import Scheduler
from evomerge.workers.worker_table import WorkerUsage

log = logging.getLogger(__name__)
_PLACING_SECONDS = 60.0  # without any worker until a warning says why
_UNATTENDED_SECONDS = 0.05  # that workers may be left alone while the caller takes results
_MOST_NAMES = 8  # of workers that are shown for a node


class RayPool(ScheduledPool):
    """Workers on a Ray cluster. Satisfies `evomerge.workers.pool.Pool`.

    A context manager that ends its workers; they also end when this process is killed.

        with RayPool(functools.partial(open_worker, settings), address="auto") as pool:
            pool.submit(jobs)
    """

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
        """Joins or starts a cluster and begins to start workers.

        Args:
            make: opens a worker, called once in each process; it must be picklable.
            address: of the cluster, see `cluster.join`.
            workers: how many; None for as many as fit, now and whenever nodes come.
            gpus: of each worker; below 1 several share one, None is one where a node has GPUs.
            cpus: of each worker.
            limits: when to give up on a job, a worker, a device; None for the defaults.
            replan: seconds between two looks at which nodes there are.

        Raises:
            SetupError: where the cluster cannot be had or has too little.
        """
        super().__init__(Scheduler(limits))
        self._replan_seconds = replan
        self._planned_at = self._checked_at = self._stepped_at = self._warn_after = 0.0
        self._closed = False
        self._fleet: ActorFleet | None = None
        self._owns_cluster = cluster.join(address)
        try:
            if gpus is None:
                gpus = float(any(node.gpus for node in cluster.nodes()))
            self._size = ActorSize(cpus, gpus)
            cluster.check(cpus, gpus, workers)
            self._fleet = ActorFleet(make, self._scheduler, self._size, workers)
            self._plan(self._now())
            self._fleet.start_due(self._now())
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_settings(cls, settings: PoolSettings) -> RayPool:
        """The pool from the settings that all pools share.

        Args:
            settings: all but `scorer` are used.

        Returns:
            The pool.
        """
        return cls(
            settings.required_make(),
            address=settings.address,
            workers=settings.workers,
            gpus=settings.gpus,
            cpus=settings.cpus,
            limits=settings.limits,
        )

    def __enter__(self) -> RayPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- the protocol --------------------------------------------------------------------------------------

    def submit(self, jobs: Sequence[Job]) -> None:
        """Hands over jobs; idle workers begin at once. See `Pool.submit`."""
        self._scheduler.submit(jobs)
        self._hand_out(self._now())

    def result(self, timeout: float | None = None) -> tuple[Job, Evaluation] | None:
        """The next job that is finished. See `Pool.result`.

        Raises:
            MachineFault: where the machines fail at every job.
            SetupError: where workers fail again and again and nothing is ever done.
        """
        if self._scheduler.results and time.monotonic() - self._stepped_at > _UNATTENDED_SECONDS:
            self._step(0.0)
        return super().result(timeout)

    def close(self) -> None:
        """Kills the workers, and ends the cluster if it was started here."""
        if self._closed:
            return
        self._closed = True
        if self._fleet is not None:
            self._fleet.close()
        if self._owns_cluster and ray.is_initialized():
            ray.shutdown()

    # ---- reports -------------------------------------------------------------------------------------------

    @property
    def ready(self) -> int:
        """Workers that can be given jobs, or are at one."""
        return len(self._actors.ready)

    def describe(self) -> str:
        """Where workers are placed, a line for each node."""
        size = self._size
        each = f"{size.cpus:g} CPUs" + (f" and {size.gpus:g} GPUs" if size.gpus else "")
        which = "a cluster of its own on this machine" if self._owns_cluster else "joined"
        lines = [f"Ray {ray.__version__}, {which}; workers of {each} each"]
        for node in cluster.nodes():
            names = [record.name for record in self._actors.records if record.node.id == node.id]
            shown = names if len(names) <= _MOST_NAMES else [names[0], "...", names[-1]]
            has = f"{node.cpus:g} CPUs, {node.gpus:g} GPUs"
            line = f"  {node.host} ({node.address}): {has}: {len(names)} workers {', '.join(shown)}"
            lines.append(line.rstrip())
        return "\n".join(lines)

    def usage(self) -> dict[str, WorkerUsage]:
        """Worker's name -> seconds busy and alive, and jobs done."""
        return self._scheduler.usage(self._now())

    # ---- one turn of the event loop ------------------------------------------------------------------------

    @property
    def _actors(self) -> ActorFleet:
        assert self._fleet is not None
        return self._fleet

    def _step(self, timeout: float) -> None:
        """Waits until something happens, at most `timeout` seconds, and reacts to it."""
        now = self._now()
        if now - self._planned_at >= self._replan_seconds:
            self._plan(now)
        if now - self._checked_at >= CHECK_SECONDS:
            self._check(now)
        self._actors.start_due(now)
        self._hand_out(now)
        next_start = self._actors.next_start(now)
        if next_start is not None:
            timeout = min(timeout, next_start)
        for reference in self._wait(max(0.0, timeout)):
            self._answer(reference)
        self._actors.replace_retired(self._now())
        self._hand_out(self._now())
        self._stepped_at = time.monotonic()

    def _wait(self, timeout: float) -> list[Any]:
        """References of the calls that returned, after at most `timeout` seconds."""
        calls = list(self._actors.calls)
        if not calls:
            time.sleep(timeout)
            return []
        returned, _ = ray.wait(calls, num_returns=1, timeout=timeout)
        if returned:  # all that are there: waiting for many calls costs as much as for one
            returned, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
        return returned

    def _plan(self, now: float) -> None:
        self._planned_at = now
        self._actors.plan(now)

    def _check(self, now: float) -> None:
        """Ends what takes too long; warns where no worker can be placed."""
        self._checked_at = now
        self._actors.check_states(now)
        if now > self._warn_after and self._actors.all_placing_for(_PLACING_SECONDS, now):
            self._warn_after = now + _PLACING_SECONDS
            log.warning(
                "no worker could be placed for %g s: what they need is in use, "
                "or the cluster has no node for them",
                _PLACING_SECONDS,
            )

    def _hand_out(self, now: float) -> None:
        """Calls idle workers with the jobs that they may do."""
        for execution in self._scheduler.assign(now, prepares=True):
            record, job = self._actors.ready[execution.worker.number], execution.job
            first = record.actor.prepare.remote(job)
            self._actors.calls[first] = PendingCall(record, record.actor, execution, prepares=True)
            second = record.actor.evaluate.remote(job)  # begins when the first has ended
            self._actors.calls[second] = PendingCall(record, record.actor, execution)

    def _answer(self, reference: Any) -> None:
        """Takes what a call returned or raised."""
        call, now = self._actors.calls.pop(reference), self._now()
        try:
            value = ray.get(reference)
        except RayTaskError as error:  # raised by the function that was called
            cause = getattr(error, "cause", None)
            if call.execution is not None and isinstance(cause, EvomergeError):
                raise cause from None  # no candidate is to blame
            if call.execution is None:
                self._actors.start_failed(call, ray_errors.message(error), now)
            else:
                report = _failed_report(call, ray_errors.message(error), now)
                self._finished(call.execution.number, report, now)
            return
        except RayError as error:  # the process is gone
            self._process_gone(call, error, now)
            return
        if call.execution is not None and call.prepares:
            self._scheduler.scoring_began(call.execution.number, now)
        elif call.execution is not None:
            self._finished(call.execution.number, value, now)
        elif call.actor is not call.record.actor:
            return  # another actor has taken its place
        elif call.record.state == "placing":
            self._actors.placed(call.record, value, now)
        else:
            self._actors.opened(call.record, now)

    def _process_gone(self, call: PendingCall, error: RayError, now: float) -> None:
        """A worker's process is gone: its job is tried elsewhere, and another process is started."""
        record = call.record
        if call.actor is record.actor and record in self._actors.records:
            cause, message = ray_errors.cause_of_death(error, record.node), ray_errors.message(error)
            worker, location = record.worker, record.location
            if worker is None:
                self._actors.start_failed(call, message, now)
            else:
                at_hand = location is not None and self._actors.is_on_driver_node(record)
                log_lines = last_lines(location.errors) if at_hand and location is not None else ""
                log.warning(
                    "worker %s (pid %d on %s) is gone: %s", record.name, worker.pid, worker.host, message
                )
                self._scheduler.leave(worker.number, cause, message, now, log_lines)
                self._actors.end(record, now)
            if cause == "lost":
                self._planned_at = 0.0  # look at the nodes before anything is started there
        if call.execution is not None:
            self._scheduler.forget(call.execution.number)


def _failed_report(call: PendingCall, error: str, now: float) -> JobReport:
    """What a worker that does not catch its errors gave."""
    assert call.execution is not None
    evaluation = Evaluation(call.execution.job.recipe.id, (), {}, {}, error=error)
    return JobReport(evaluation, now - call.execution.started, 0.0, 0)
