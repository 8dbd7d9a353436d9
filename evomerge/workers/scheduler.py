"""Which worker does which job next: the scheduling that all pools and the simulation of a cluster share.

A state machine: it is told what happened and when, and returns what to do. It knows nothing of Ray and of
processes, and has no clock of its own. What an event costs does not grow with the number of jobs but with the
logarithm of the queue. What a failure means is decided in `failure_policy`. The first result of a job is its
result.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence

from evomerge.errors import MachineFault, SetupError
from evomerge.evaluation import Attempt, Evaluation
from evomerge.workers.failure_policy import DeviceQuarantine, FailedTry, Limits, PoolHealth, WorkerFailures
from evomerge.workers.job_queue import JobQueue, QueuedJob
from evomerge.workers.machine_errors import breaks_device, error_kind, is_machine_error
from evomerge.workers.placement import Placement
from evomerge.workers.pool import Job
from evomerge.workers.time_limits import JobTimeLimit
from evomerge.workers.tries import Look, Try, late
from evomerge.workers.worker_table import WorkerSlot, WorkerTable, WorkerUsage

log = logging.getLogger(__name__)
_GIB = 1 << 30
_LAST_WORD = 2.0  # seconds in which a worker's word that it scores has come


class Scheduler:
    """The queue, the workers, and who does what.

    Every `now` is in unix seconds and never less than the one before.

        scheduler.join(worker, now)
        scheduler.submit(jobs)
        for execution in scheduler.assign(now):
            ...  # evaluate execution.job at execution.worker, then
            scheduler.finished(execution.number, evaluation, now, seconds)
        job, evaluation = scheduler.results.popleft()

    Attributes:
        limits: when to give up on a job, a worker, a device, the pool.
        expected_workers: how many workers there should be, as the pool sees it.
        results: jobs with their evaluations that the pool has not taken yet.
        attempts: executions that ended and that the pool has not taken yet.
        retired: workers to be replaced, and why; the scheduler no longer uses them.
    """

    def __init__(self, limits: Limits | None = None, *, in_order: bool = False) -> None:
        """Begins without jobs and workers.

        Args:
            limits: when to give up on a job, a worker, a device, the pool; None for the defaults.
            in_order: jobs begin in the order they came, whatever their turn and cost.
        """
        self.limits = limits or Limits()
        self.expected_workers = 1
        self.results: deque[tuple[Job, Evaluation]] = deque()
        self.attempts: list[Attempt] = []
        self.retired: list[tuple[WorkerSlot, str]] = []
        self._queue = JobQueue(in_order=in_order)
        self._quarantine = DeviceQuarantine(self.limits)
        self._workers = WorkerTable(self._quarantine)
        self._placement = Placement(self._queue, self._workers, self.limits)
        self._failures = WorkerFailures(self.limits)
        self._time_limit = JobTimeLimit(self.limits)
        self._running: dict[int, Try] = {}  # by the worker's number
        self._open_tries: dict[int, Try] = {}  # by number, those of which an answer may still come
        self._num_tries = 0
        self._num_done = 0  # jobs that a worker gave a result of
        self._ill: set[int] = set()  # slots of those that failed by machine errors since
        self._draining = False
        self._draining_since: float | None = None  # as far as `overdue` has seen it

    # ---- jobs ----------------------------------------------------------------------------------------------

    @property
    def out(self) -> int:
        """Jobs whose results will still be taken."""
        return self._queue.unsettled + len(self.results)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Takes jobs into the queue.

        Args:
            jobs: each with a slot of its own.

        Raises:
            ValueError: for a slot that is out already.
        """
        self._draining = False
        self._queue.add(jobs)

    def drain(self) -> None:
        """Forgets what is not in flight; until more is submitted, what fails in flight is forgotten too.

        So is, some seconds later, what a worker still prepares.
        """
        self._queue.drop_waiting()
        self._draining = True
        self._draining_since = None

    def assign(self, now: float, *, prepares: bool = False) -> list[Try]:
        """Gives idle workers their next jobs: by turn, the longest first, those tried before ahead of them.

        A suspect, which one failure more would decide, runs with nothing beside it on its machine.

        Args:
            now: unix seconds.
            prepares: whether the pool tells by `scoring_began` when a worker has prepared a job.

        Returns:
            The executions that begin.
        """
        self._workers.end_rests(now)
        begun: list[Try] = []
        for worker, queued, is_alone in self._placement.pairs(self._running, self._num_tries):
            queued.failures.begun += 1
            self._num_tries += 1
            nth = queued.failures.begun
            execution = Try(self._num_tries, worker, queued, now, nth, is_alone, prepares)
            self._running[worker.number] = execution
            self._open_tries[execution.number] = execution
            self._workers.set_busy(worker)
            begun.append(execution)
        return begun

    # ---- workers -------------------------------------------------------------------------------------------

    def join(self, worker: WorkerSlot, now: float) -> None:
        """A worker is ready.

        Args:
            worker: with a number that was never used.
            now: unix seconds.
        """
        self._workers.join(worker, now)
        self._failures.started()

    def leave(self, number: int, cause: str, error: str, now: float, log_lines: str = "") -> None:
        """A worker is gone, or about to be; its job is tried elsewhere.

        Its answer may still come until `forget` is called.

        Args:
            number: of the worker.
            cause: of its job's attempt, see `Attempt`; 'closed' for an idle worker that nobody blames.
            error: one line.
            now: unix seconds.
            log_lines: last lines of the worker's log.
        """
        worker = self._workers.remove(number, now)
        if worker is None:
            return
        execution = self._running.pop(number, None)
        if execution is not None:
            seconds = now - execution.started
            self._workers.usage[worker.name].busy += seconds
            self._try_failed(execution, cause, error, seconds, log_lines)
        elif cause not in ("closed", "lost"):
            self._failures.failed(worker.name, error)

    def start_failed(self, name: str, failure_domain: str, error: str) -> None:
        """A worker could not be started.

        Args:
            name: of the worker.
            failure_domain: empty where it did not get as far as having one.
            error: one line.
        """
        self._failures.start_failed(name, error)
        if failure_domain and self._failures.any_started:
            self._device_failed(failure_domain)

    def backoff(self, name: str) -> float:
        """The pause before a worker is started again.

        Args:
            name: of the worker.

        Returns:
            Seconds.
        """
        return self._failures.backoff(name)

    @property
    def broken(self) -> str | None:
        """Why it makes no sense to go on; None while it does."""
        return self._failures.reason_to_stop(self.expected_workers)

    def raise_if_hopeless(self) -> None:
        """Ends what makes no sense to go on with.

        Raises:
            MachineFault: where the machine fails whatever it is given: the search pauses.
            SetupError: where workers fail again and again and nothing is ever done.
        """
        if reason := self._failures.reason_to_pause(self.expected_workers):
            raise MachineFault(reason)
        if reason := self.broken:
            raise (MachineFault if self._failures.is_machines else SetupError)(reason)

    def next_idle(self, now: float) -> float | None:
        """Seconds until a worker that rests after an error of its machine is idle again.

        Args:
            now: unix seconds.

        Returns:
            Seconds; None where nobody rests.
        """
        return self._workers.next_idle(now)

    @property
    def quarantined(self) -> set[str]:
        """Failure domains that get no jobs any more."""
        return self._quarantine.domains

    def overdue(self, now: float, look: Look | None = None) -> list[WorkerSlot]:
        """Workers whose job takes too long, which count as gone from now on; to be called once a second.

        Args:
            now: unix seconds.
            look: says what the processes of workers do; None where nobody can say.

        Returns:
            The workers, for the pool to kill.
        """
        ended = []
        for execution, cause, error in late(self._running.values(), self._limit, self.limits, now, look):
            worker = execution.worker
            log.warning("worker %s %s: %s", worker.name, "hangs" if cause == "hung" else "froze", error)
            self.leave(worker.number, cause, error, now)
            ended.append(worker)
        self._drop_prepared(now)
        if self._quarantine.release(now, any_in_use=self._workers.any_usable):
            self._workers.release_all(self._running)
        return ended

    def _drop_prepared(self, now: float) -> None:
        """While draining, forgets what is not scored yet: to merge, probe and compile may take minutes."""
        if not self._draining:
            return
        self._draining_since = now if self._draining_since is None else self._draining_since
        if now - self._draining_since >= _LAST_WORD:
            for execution in self._running.values():
                if execution.prepares and not execution.queued.settled:
                    self._queue.settle(execution.queued)

    def _limit(self, execution: Try) -> float:
        return self.limits.opening if execution.prepares else self.time_limit(execution.job.cost)

    def time_limit(self, cost: float) -> float:
        """Seconds that a job may take.

        Args:
            cost: of the job.

        Returns:
            Seconds.
        """
        return self._time_limit.seconds(cost)

    def is_running(self, execution: Try) -> bool:
        """Whether a worker is still at an execution.

        Args:
            execution: that was assigned.

        Returns:
            False where it ended, or its worker is gone.
        """
        return self._running.get(execution.worker.number) is execution

    def usage(self, now: float) -> dict[str, WorkerUsage]:
        """What each worker did so far, a job in flight included.

        Args:
            now: unix seconds.

        Returns:
            Worker's name -> its usage.
        """
        usage = self._workers.usage_at(now)
        for execution in self._running.values():
            usage[execution.worker.name].busy += now - execution.started
        return usage

    # ---- answers -------------------------------------------------------------------------------------------

    def finished(
        self,
        number: int,
        evaluation: Evaluation,
        now: float,
        seconds: float,
        memory: int = 0,
        log_lines: str = "",
        scoring: float | None = None,
    ) -> None:
        """An execution gave an evaluation.

        Args:
            number: of the execution; one that was forgotten is ignored.
            evaluation: what the worker returned.
            now: unix seconds.
            seconds: that the worker spent.
            memory: bytes that the worker holds now, 0 where unknown.
            log_lines: last lines of the worker's log.
            scoring: of the seconds, those that the time limit is learnt from; None for all.
        """
        execution = self._open_tries.pop(number, None)
        if execution is None:
            return
        worker = execution.worker
        runs = self.is_running(execution)
        if runs:
            del self._running[worker.number]
            self._workers.usage[worker.name].busy += seconds
        self._take_answer(execution, evaluation, seconds, log_lines, scoring)
        if runs:
            self._release_worker(worker, evaluation, now, memory)

    def scoring_began(self, number: int, now: float) -> None:
        """A worker has built a candidate, probed and compiled, and begins to score: its clock begins.

        Args:
            number: of the execution; one that was forgotten is ignored.
            now: unix seconds.
        """
        if number in self._open_tries:
            self._open_tries[number].scoring_began(now)

    def _take_answer(
        self, execution: Try, evaluation: Evaluation, seconds: float, log_lines: str, scoring: float | None
    ) -> None:
        """Makes an evaluation the job's result, unless it says nothing of the candidate."""
        queued, error = execution.queued, evaluation.error
        if queued.settled:
            self._late_answer(execution, evaluation, seconds, log_lines)
            return
        health = PoolHealth(
            execution.worker.failure_domain,
            self._num_done,
            has_other_jobs=self._queue.unsettled > 1,
            others_fail=bool(self._ill - {queued.job.slot}),
        )
        if error is not None and queued.failures.is_machines(error, self.limits, health):
            self._try_failed(execution, "failed", error, seconds, log_lines)
            return
        self._record(execution, "failed" if error else "done", error, seconds, log_lines)
        if not error or not is_machine_error(error):
            self._worker_succeeded(execution, evaluation, seconds if scoring is None else scoring)
        queued.answer = evaluation
        self._settle(queued, evaluation)

    def forget(self, number: int) -> None:
        """No answer will come of an execution any more.

        Args:
            number: of the execution.
        """
        self._open_tries.pop(number, None)

    def _try_failed(self, execution: Try, cause: str, error: str, seconds: float, log_lines: str) -> None:
        """An execution that decides nothing yet; the job is queued again, or this was once too often."""
        queued, worker = execution.queued, execution.worker
        self._record(execution, cause, error, seconds, log_lines)
        if cause in ("failed", "frozen"):
            self._failures.machine_failed(worker.name, error)
            self._ill.add(queued.job.slot)
        elif cause != "lost":
            self._failures.failed(worker.name, error)
        if queued.settled or queued.failures.has_hung(worker.number, worker.failure_domain):
            return  # the worker was given up on; the job is somewhere else
        kind = error_kind(error) if cause == "failed" else ""
        queued.failures.failed.append(
            FailedTry(worker.number, worker.failure_domain, cause, kind, self._num_done)
        )
        queued.after = self._num_tries if cause == "failed" else -1
        verdict = queued.failures.verdict(self.limits)
        if verdict is not None:
            self._settle(queued, Evaluation(queued.job.recipe.id, (), {}, {}, error=verdict))
        elif self._draining:
            self._queue.settle(queued)
        else:
            self._queue.retry(queued)

    def _worker_succeeded(self, execution: Try, evaluation: Evaluation, seconds: float) -> None:
        """A worker did its part: its failures in a row end; devices where the job failed are to blame."""
        worker, queued = execution.worker, execution.queued
        self._num_done += 1
        self._ill.clear()
        self._failures.succeeded(worker.name)
        self._quarantine.succeeded(worker.failure_domain)
        self._workers.usage[worker.name].jobs += 1
        if evaluation.error is None and queued.job.cost > 0:
            self._time_limit.learn(seconds / queued.job.cost)
        blamed = {f.failure_domain for f in queued.failures.failed if f.cause != "lost"}
        for domain in sorted(blamed - {worker.failure_domain}):
            self._device_failed(domain)

    def _device_failed(self, domain: str) -> None:
        """A failure that is the device's."""
        has_other = self._workers.has_other_domain({domain})
        if self._quarantine.failed(domain, has_other=has_other):
            self._workers.quarantine(domain)

    def _late_answer(self, execution: Try, evaluation: Evaluation, seconds: float, log_lines: str) -> None:
        """A second result of a job: it must be the first one again."""
        answer = execution.queued.answer
        self._record(execution, "late", evaluation.error, seconds, log_lines)
        if answer is None:
            return
        first = (answer.items, answer.metrics, answer.error)
        if first != (evaluation.items, evaluation.metrics, evaluation.error):
            log.warning(
                "recipe %s was scored twice, and differently: scores are not deterministic (workers of %s)",
                evaluation.recipe_id,
                execution.worker.host,
            )

    def _settle(self, queued: QueuedJob, evaluation: Evaluation) -> None:
        self.results.append((queued.job, evaluation))
        self._queue.settle(queued)

    def _record(self, execution: Try, cause: str, error: str | None, seconds: float, log_lines: str) -> None:
        self.attempts.append(execution.attempt(cause, error, seconds, log_lines))

    def _release_worker(self, worker: WorkerSlot, evaluation: Evaluation, now: float, memory: int) -> None:
        """A worker has done its job: it is idle, rests after a machine error, or is to be replaced."""
        first = self._workers.first_memory(worker, memory)
        allowed = first + _GIB if self.limits.memory is None else self.limits.memory
        if evaluation.error is not None and breaks_device(evaluation.error):
            self._retire(worker, "its device's context is dead after an error", now)
        elif memory - first > allowed:
            self._retire(worker, f"its memory grew from {first >> 20} to {memory >> 20} MiB", now)
        elif evaluation.error is not None and is_machine_error(evaluation.error):
            self._workers.rest(worker, now + self._failures.backoff(worker.name))
        else:
            self._workers.set_idle(worker)

    def _retire(self, worker: WorkerSlot, reason: str, now: float) -> None:
        log.warning("worker %s is replaced: %s", worker.name, reason)
        self._workers.remove(worker.number, now)
        self.retired.append((worker, reason))
