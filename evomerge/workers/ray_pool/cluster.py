"""A Ray cluster: joining one or starting one on this machine, what it has, and how many workers fit where.

A cluster that is started here listens on 127.0.0.1 alone, asks for a token, and has no dashboard.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import secrets
import signal
import socket
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._private.utils import read_ray_address
from ray.job_config import JobConfig

from evomerge.errors import SetupError
from evomerge.workers.safe_path import safe_path

log = logging.getLogger(__name__)
_OBJECT_STORE_BYTES = 100 * 2**20  # no weights go through it
_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_PASSED_PREFIXES = ("EVOMERGE_", "CUBLAS_")  # of variables that decide what a worker computes
_OFFLINE = (
    "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "TRANSFORMERS_OFFLINE",
)  # they keep a worker off the network
_SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")
_FIND_SECONDS = 5.0  # until an address counts as one where no cluster answers
_REACH_SECONDS = 2.0  # until a node counts as gone
_ROUNDING = 1e-9  # of shares of a CPU or GPU


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster, and what it offers in all.

    Attributes:
        id: Ray's name for it.
        host: its host name.
        address: its IP address.
        cpus: CPUs in all.
        gpus: GPUs in all.
        port: that Ray's own process there listens on, 0 where it is not known.
    """

    id: str
    host: str
    address: str
    cpus: float
    gpus: float
    port: int = 0

    def room(self, cpus: float, gpus: float) -> int:
        """How many workers fit, where nothing else runs.

        Args:
            cpus: of each worker.
            gpus: of each worker; below 1 a share of one.

        Returns:
            The number of workers.
        """
        fits = [int(self.cpus / cpus + _ROUNDING)] if cpus else []
        if gpus >= 1:
            fits.append(int(self.gpus / gpus + _ROUNDING))
        elif gpus > 0:  # a share is a share of one GPU
            fits.append(int(1 / gpus + _ROUNDING) * int(self.gpus))
        return min(fits)


def join(address: str | None) -> bool:
    """Connects this process to a cluster. Nothing is done where it is connected already.

    The process's signal handlers stay what they were.

    Args:
        address: 'local' starts a cluster; 'auto' joins the one of $RAY_ADDRESS or that `ray start` began on
            this machine; None does so too, and starts one where there is none; else HOST:PORT of one.

    Returns:
        Whether one was started for this process, which then ends it.

    Raises:
        SetupError: where no cluster answers, or Ray cannot be started.
    """
    if ray.is_initialized():
        return False
    existing = None if address == "local" else find(address) if address is None else required(address)
    with _handlers_kept():
        if existing is not None:
            _init(address=existing)
            return False
        _ensure_token()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # by default Ray gives its workers a lower priority than whatever else runs here
        os.environ.setdefault("RAY_worker_niceness", "0")
        with _loopback():
            _init(
                address="local",
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                object_store_memory=_OBJECT_STORE_BYTES,
            )
    if any(node.address != "127.0.0.1" for node in nodes()):
        log.warning(
            "this version of Ray does not keep to 127.0.0.1: its ports are open to the network, "
            "with a token from Ray 2.60 on"
        )
    return True


def find(address: str | None) -> str | None:
    """Where a cluster answers. Ray itself would try for minutes.

    Args:
        address: HOST:PORT; None or 'auto' for that of $RAY_ADDRESS or of `ray start` on this machine.

    Returns:
        HOST:PORT; None where no cluster was requested by name and none is there.

    Raises:
        SetupError: for an address that is none, or where no cluster answers there.
    """
    named = address if address not in (None, "auto") else os.environ.get("RAY_ADDRESS") or None
    if named == "auto":
        named = None
    candidate: str | None = named or read_ray_address()
    if not candidate:
        return None
    host, _, port = candidate.rpartition(":")
    if not re.fullmatch(r"[0-9]{1,9}", port) or not host or "/" in host:
        raise SetupError(f"the address of a Ray cluster is HOST:PORT, got '{candidate}'")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_FIND_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:  # UnicodeError: no name of a host
        if named is None:
            return None  # what `ray start` left behind
        raise SetupError(f"no Ray cluster answers at {candidate}: {_first_line(error)}") from None
    return candidate


def required(address: str) -> str:
    """Where a cluster answers that has to be there.

    Args:
        address: HOST:PORT, or 'auto', see `find`.

    Returns:
        HOST:PORT.

    Raises:
        SetupError: for an address that is none, or where no cluster answers.
    """
    found = find(address)
    if found is None:
        raise SetupError(
            f"no Ray cluster is found for '{address}': $RAY_ADDRESS names none and `ray start` began none on "
            "this machine; write --ray local to start one here, or --ray HOST:PORT"
        )
    return found


def nodes() -> list[Node]:
    """The nodes that are alive, in a fixed order."""
    alive = []
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["Alive"]:
            resources = node["Resources"]
            alive.append(
                Node(
                    node["NodeID"],
                    node["NodeManagerHostname"],
                    node["NodeManagerAddress"],
                    resources.get("CPU", 0.0),
                    resources.get("GPU", 0.0),
                    int(node.get("NodeManagerPort") or 0),
                )
            )
    return sorted(alive, key=lambda node: node.id)


def answers(node: Node) -> bool:
    """Whether something listens where Ray's own process of a node does.

    Ray itself calls a node dead only seconds after it is gone.

    Args:
        node: of the cluster.

    Returns:
        True also where its port is not known.
    """
    if not node.port:
        return True
    try:
        socket.create_connection((node.address, node.port), timeout=_REACH_SECONDS).close()
    except OSError:
        return False
    return True


def places(
    there: Sequence[Node], cpus: float, gpus: float, workers: int | None, taken: Mapping[str, int]
) -> list[Node]:
    """The node of each worker to add, on the emptiest first.

    Args:
        there: nodes that are alive.
        cpus: of each worker.
        gpus: of each worker.
        workers: how many in all; None for as many as fit.
        taken: a node's id -> workers that are there already.

    Returns:
        A node for each worker to add.
    """
    counts = {node.id: taken.get(node.id, 0) for node in there}
    wanted = math.inf if workers is None else workers
    added: list[Node] = []
    while sum(counts.values()) < wanted:
        free = [node for node in there if counts[node.id] < node.room(cpus, gpus)]
        if not free:
            break
        added.append(min(free, key=lambda node: (counts[node.id], node.id)))
        counts[added[-1].id] += 1
    return added


def check(cpus: float, gpus: float, workers: int | None) -> None:
    """Checks that the cluster can give what is requested: Ray itself would wait for it in silence.

    Args:
        cpus: of each worker.
        gpus: of each worker.
        workers: how many; None for at least one.

    Raises:
        SetupError: where it never can.
    """
    if cpus < 0 or gpus < 0 or not cpus + gpus:
        raise SetupError(f"a worker needs a share of a CPU or a GPU, got cpus {cpus:g} and gpus {gpus:g}")
    if gpus > 1 and gpus != int(gpus):
        raise SetupError(
            f"gpus must be a whole number or a share of one, got {gpus:g}; "
            f"take {int(gpus)} or {int(gpus) + 1}"
        )
    alive = nodes()
    room = sum(node.room(cpus, gpus) for node in alive)
    if room < (workers or 1):
        has = "; ".join(f"{node.host}: {node.cpus:g} CPUs, {node.gpus:g} GPUs" for node in alive) or "no node"
        raise SetupError(
            f"the cluster has room for {room} workers of {cpus:g} CPUs and {gpus:g} GPUs each, "
            f"{workers or 'at least 1'} requested; it has {has}. Ask for fewer or for less, or add nodes"
        )


def environment() -> dict[str, str]:
    """The variables of this process that workers on other machines need too; never a secret."""
    passed = {
        name: value
        for name, value in sorted(os.environ.items())
        if (name.startswith(_PASSED_PREFIXES) or name in _OFFLINE) and not any(s in name for s in _SECRET)
    }
    return passed | {"TOKENIZERS_PARALLELISM": "false"}


class _NoFolders(list[str]):
    """Where Ray would note the working directory, for its workers to import from before all else."""

    def extend(self, values: Iterable[str], /) -> None:
        """Takes nothing: an actor is given the driver's own path when it opens its worker."""


def _init(**options: Any) -> None:
    job = JobConfig()
    job._py_driver_sys_path = _NoFolders()
    try:
        with safe_path():
            ray.init(log_to_driver=False, logging_level=logging.ERROR, job_config=job, **options)
    except Exception as error:  # a slow start is a bare Exception of Ray's
        ray.shutdown()  # what it has started of itself
        raise SetupError(
            f"Ray cannot be started or joined: {_first_line(error)}; try again, on a machine less busy if it "
            "timed out"
        ) from None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _ensure_token() -> None:
    """Makes a token that only this user can read, where there is none: Ray makes its file by the umask."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        if not file.exists():
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            draft = file.with_name(f"{file.name}.{os.getpid()}")
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as opened:
                opened.write(secrets.token_hex(32))
            with contextlib.suppress(FileExistsError):  # another driver was first: its token serves both
                os.link(draft, file)
            draft.unlink()
        if stat.S_IMODE(file.stat().st_mode) & 0o077:
            file.chmod(0o600)
    except OSError as error:
        raise SetupError(
            f"Ray's token cannot be kept in {file}: {error.strerror}; "
            "set RAY_AUTH_TOKEN_PATH to a file of yours"
        ) from None


@contextlib.contextmanager
def _loopback() -> Iterator[None]:
    """Has Ray bind to 127.0.0.1.

    On Linux it binds to every interface, whatever address it is given, unless told that no cluster is
    possible.
    """
    variable = os.environ.get(_LOOPBACK)
    constant = getattr(ray_constants, "ENABLE_RAY_CLUSTER", None)
    os.environ[_LOOPBACK] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = constant
        del os.environ[_LOOPBACK]
        if variable is not None:
            os.environ[_LOOPBACK] = variable


@contextlib.contextmanager
def _handlers_kept() -> Iterator[None]:
    """Gives the process its signal handlers back after Ray has set its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)
