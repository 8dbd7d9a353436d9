"""Workers on a Ray cluster: the `Pool` protocol over plain actors. The only file that imports ray, and not before it is used.

Results come in the order of the jobs, so that a study's rows are those of one worker. An actor is a process with one worker
and one call in flight; Ray restarts and repeats nothing, `evomerge.slots` decides. Parents are opened by each worker from
its own node's disk: no weights go through Ray.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from evomerge.errors import EvomergeError, SetupError
from evomerge.evaluation import Evaluation
from evomerge.pools import Job
from evomerge.slots import Attempt, Command, Kind, Limits, Place, Slots, Task, capacity
from evomerge.worker import Worker

log = logging.getLogger(__name__)
_TICK = 0.2  # seconds between two looks at the clock
_NODES = 2.0  # seconds between two looks at the cluster
_SAID = 60.0  # seconds between two lines about waiting
_STORE = 256 << 20  # bytes of a local Ray's object store; evaluations are small
_CARRIED = ("EVOMERGE_DEVICE", "EVOMERGE_THREADS", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TOKENIZERS_PARALLELISM")


class RayPool:
    """Satisfies `evomerge.pools.Pool`. A context manager that ends its workers, and the Ray that it started."""

    def __init__(
        self,
        make: Callable[[], Worker],
        *,
        address: str = "auto",
        workers: int | None = None,
        gpus: float = 0.0,
        cpus: float = 1.0,
        limits: Limits | None = None,
    ) -> None:
        """make: opens a worker, called once in each process; it must be picklable, and every node must have what it imports.

        address: 'auto' for the cluster that this machine is part of, or else a local Ray; 'local' for a new one that listens
        on the loopback alone; or a cluster's 'host:port'. workers: None for all that fit, also as nodes join. gpus, cpus:
        of each worker. Returns once a worker is open. Raises SetupError if Ray is not there, if the cluster cannot hold
        that many workers, or if none can be opened.
        """
        need = {"GPU": float(gpus), "CPU": float(cpus)}
        _check(need, workers)
        self._make, self._need, self._workers = make, need, workers
        self._ray = _library()
        self._slots = Slots(limits or Limits(), workers)
        self._actors: dict[int, Any] = {}
        self._places: dict[int, Place] = {}
        self._flying: dict[int, Any] = {}  # worker -> its call
        self._calls: dict[Any, tuple[int, str]] = {}  # call -> (worker, what it does)
        self._nodes: list[Mapping[str, float]] = []
        self._looked, self._said = -_NODES, time.monotonic()
        self._ours, joined = _connect(self._ray, address)
        try:
            self._start(joined)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers, whatever they do, and Ray where this pool connected to it or started it."""
        for number in list(self._actors):
            self._end(number)
        if self._ours:
            self._ours = False
            self._ray.shutdown()

    def attempts(self) -> list[Attempt]:
        """Every try at a candidate until now, in the order in which they ended."""
        return list(self._slots.attempts)

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Evaluation]]:
        """Yields in the order of the jobs. Raises SetupError if no worker can be opened any more."""
        results: dict[int, Evaluation] = {}
        self._slots.begin([Task(job.recipe.id, sum(map(len, job.items.values()))) for job in jobs])
        try:
            for number, job in enumerate(jobs):
                while number not in results:
                    self._step(jobs, results)
                yield job, results.pop(number)
        finally:
            self._slots.end()

    def _start(self, joined: bool) -> None:
        room = self._room()
        if room < (self._workers or 1):
            raise SetupError(
                f"{self._workers or 1} workers of {self._wants()} each do not fit: the cluster has {self._has()}, room for {room}; "
                "ask for less, or start Ray with more"
            )
        options: dict[str, Any] = {"max_restarts": 0, "max_task_retries": 0, "num_cpus": self._need["CPU"], "num_gpus": self._need["GPU"]}
        carried = {name: os.environ[name] for name in _CARRIED if name in os.environ}
        if joined and carried:  # a node's processes have the environment that Ray was started in there
            options["runtime_env"] = {"env_vars": carried}
        self._actor = self._ray.remote(**options)(_Actor)
        self._node = self._ray.get_runtime_context().get_node_id()
        while not self._slots.open:
            self._step((), {})

    def _step(self, jobs: Sequence[Job], results: dict[int, Evaluation]) -> None:
        """Does what is to be done, then waits for the first answer, or a moment."""
        ray = self._ray
        for command in self._slots.commands(time.monotonic(), self._room()):
            self._do(command, jobs)
        for number, error in self._slots.settled():
            results[number] = Evaluation(jobs[number].recipe.id, (), {}, {}, error=error)
        if not self._calls:
            time.sleep(_TICK)
            return
        if ray.wait(list(self._calls), num_returns=1, timeout=_TICK)[0]:
            for call in ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0)[0]:
                self._answer(call, results)
        self._wait_aloud()

    def _do(self, command: Command, jobs: Sequence[Job]) -> None:
        number = command.worker
        if command.kind == "end":
            self._end(number)
            return
        if command.kind == "start":
            self._actors[number] = self._actor.remote(self._make)
        actor = self._actors[number]
        if command.kind == "evaluate":
            call = actor.evaluate.remote(jobs[command.job])
        else:
            call = actor.open.remote() if command.kind == "open" else actor.hello.remote()
        self._flying[number] = call
        self._calls[call] = (number, command.kind)

    def _answer(self, call: Any, results: dict[int, Evaluation]) -> None:
        number, kind = self._calls.pop(call)
        del self._flying[number]
        try:
            answer = self._ray.get(call)
        except self._ray.exceptions.RayError as error:
            log.debug("worker %d was lost in '%s'", number, kind, exc_info=True)
            place = self._places.get(number)
            what, cause = _cause(self._ray, error, here=place is not None and place.node == self._node)
            if kind in ("start", "open"):
                cause += _log_end(place)
            self._slots.lost(number, time.monotonic(), what, cause)
            return
        now = time.monotonic()
        if kind == "open":
            self._slots.opened(number, now)
        elif kind == "evaluate":
            evaluation, seconds, memory = answer
            job = self._slots.done(number, now, seconds, memory, evaluation.error)
            if job is not None:
                results[job] = evaluation
        else:
            self._places[number] = answer
            self._slots.placed(number, now, answer)

    def _end(self, number: int) -> None:
        actor, place = self._actors.pop(number), self._places.pop(number, None)
        self._calls.pop(self._flying.pop(number, None), None)
        self._ray.kill(actor, no_restart=True)
        if place is not None and place.node == self._node:  # Ray leaves a process that was stopped, with its memory
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(place.pid, signal.SIGKILL)

    def _room(self) -> int:
        """Workers that fit the nodes that are alive, by all that they have: others' use of it is only waited for."""
        if time.monotonic() - self._looked > _NODES:
            self._nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
            self._looked = time.monotonic()
        return capacity(self._nodes, self._need)

    def _wait_aloud(self) -> None:
        now = time.monotonic()
        if self._slots.open or not self._slots.placing:
            self._said = now
        elif now - self._said > _SAID:
            self._said = now
            log.warning("waiting for room for a worker of %s: the cluster has %s, in use by others", self._wants(), self._has())

    def _wants(self) -> str:
        return " and ".join(f"{amount:g} {name}" for name, amount in self._need.items() if amount)

    def _has(self) -> str:
        total = {name: sum(node.get(name, 0.0) for node in self._nodes) for name in self._need}
        return f"{len(self._nodes)} node{'s' * (len(self._nodes) != 1)} with " + " and ".join(f"{amount:g} {name}" for name, amount in total.items())


class _Actor:
    """In a process of the cluster: one worker."""

    def __init__(self, make: Callable[[], Worker]) -> None:
        self._make = make
        self._worker: Worker | None = None

    def hello(self) -> Place:
        """Where this process is."""
        context = _library().get_runtime_context()
        gpus = tuple(map(str, context.get_accelerator_ids().get("GPU", ())))
        try:
            written = os.readlink("/proc/self/fd/2")
        except OSError:
            written = ""
        return Place(socket.gethostname(), os.getpid(), context.get_node_id(), gpus, written)

    def open(self) -> None:
        """Opens the worker."""
        self._worker = self._make()

    def evaluate(self, job: Job) -> tuple[Evaluation, float, int]:
        """(evaluation, seconds it took, bytes of memory that the process holds)."""
        assert self._worker is not None
        started = time.perf_counter()
        evaluation = self._worker.evaluate(job.recipe, job.items)
        return evaluation, time.perf_counter() - started, _held()


def _held() -> int:
    """Bytes of memory of this process that are not a file's; 0 where the system does not say."""
    try:
        found = re.search(r"^RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) << 10 if found else 0


def _check(need: Mapping[str, float], workers: int | None) -> None:
    if workers is not None and workers < 1:
        raise SetupError(f"a pool needs at least 1 worker, got {workers}")
    if min(need.values()) < 0 or not any(need.values()):
        raise SetupError(f"a worker needs some GPU or CPU, none below 0, got {need['GPU']:g} GPU and {need['CPU']:g} CPU")
    if need["GPU"] > 1 and not need["GPU"].is_integer():
        raise SetupError(f"above one, a worker has whole GPUs, got {need['GPU']:g}")


# ---- ray, its clusters and its errors --------------------------------------------------------------------------------


def _library() -> Any:
    try:
        import ray
    except ImportError:
        raise SetupError("Ray is not installed; run: pip install 'evomerge[ray]'") from None
    return ray


def _connect(ray: Any, address: str) -> tuple[bool, bool]:
    """(whether the connection is ours to end, whether the cluster was there before)."""
    if ray.is_initialized():
        return False, True
    kept = signal.getsignal(signal.SIGTERM)
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address != "local":
            with contextlib.suppress(*([ConnectionError] if address == "auto" and "RAY_ADDRESS" not in os.environ else [])):
                ray.init(address=address, **quiet)
        joined: bool = ray.is_initialized()
        if not joined:
            _start_local(ray, quiet)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise SetupError(f"Ray at '{address}' cannot be used: {_last_line(str(error))}") from None
    finally:
        if threading.current_thread() is threading.main_thread() and kept is not None:
            signal.signal(signal.SIGTERM, kept)  # Ray puts its own there
    ray._private.worker._worker_logs_enabled = False  # it writes notes about dead workers into stdout
    return True, joined


def _start_local(ray: Any, quiet: Mapping[str, Any]) -> None:
    """Starts Ray for this process alone: on the loopback, with a token, without a dashboard."""
    _write_token()
    constants = ray._private.ray_constants
    kept, constants.ENABLE_RAY_CLUSTER = constants.ENABLE_RAY_CLUSTER, False  # what makes Ray listen on 127.0.0.1 alone
    try:
        ray.init(address="local", include_dashboard=False, object_store_memory=_STORE, **quiet)
    finally:
        constants.ENABLE_RAY_CLUSTER = kept
    hosts = {node["NodeManagerAddress"] for node in ray.nodes()}
    if hosts - {"127.0.0.1", "::1"}:
        ray.shutdown()
        raise RuntimeError(f"it would listen on {', '.join(sorted(hosts))}, open to the network; start it yourself, and give its address")


def _write_token() -> None:
    """Ray's own token, made before Ray would make it readable by all: it asks for one unless $RAY_AUTH_MODE says otherwise."""
    if os.environ.get("RAY_AUTH_MODE", "token") != "token" or "RAY_AUTH_TOKEN" in os.environ:
        return
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
            out.write(secrets.token_hex(32))
    except FileExistsError:
        if file.stat().st_mode & 0o077:
            log.warning("Ray's token %s can be read by others; run: chmod 600 %s", file, file)


def _cause(ray: Any, error: Exception, here: bool) -> tuple[Kind, str]:
    """How a worker was lost, and a sentence about it that is the same whenever it happens. here: whether it was on this node."""
    errors, text = ray.exceptions, str(error)
    if isinstance(error, errors.RayTaskError):
        cause = getattr(error, "cause", None)
        if cause is None or isinstance(cause, errors.RayError):  # an exception that could not be sent
            return "raised", _last_line(text)
        return "raised", " ".join((str(cause) if isinstance(cause, EvomergeError) else f"{type(cause).__name__}: {cause}").split())
    if isinstance(error, errors.UnserializableException):
        return "raised", _last_line(text)
    if isinstance(error, errors.OutOfMemoryError):
        return "died", "its node ran out of memory, and Ray ended the process"
    if not here and (isinstance(error, errors.ActorUnavailableError) or "node has died" in text or "node died" in text):
        return "node", "its node is out of reach"
    if "creation task" in text:
        return "raised", _last_line(text)
    return "died", "its process ended"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines() if line.strip()]
    return re.sub(r"^(\w+\.)+(?=\w+:)", "", lines[-1]) if lines else "it gave no reason"


def _log_end(place: Place | None) -> str:
    """What a worker that failed to open wrote last."""
    if place is None or not place.log:
        return ""
    file, lines = Path(place.log), []
    if place.host == socket.gethostname() and file.is_file():
        written = [line.strip() for line in file.read_text(errors="replace").splitlines()]
        lines = [line for line in written if line and not line.startswith((":job_id:", ":actor_name:"))][-3:]
    return f"; its log is {place.host}:{place.log}" + (f", which ends: {' | '.join(lines)}" if lines else "")
