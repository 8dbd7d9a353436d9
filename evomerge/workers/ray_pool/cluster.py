"""A Ray cluster: joining one or starting one on this machine, what it has, and how many workers fit where.

What is started here listens on 127.0.0.1 alone, asks for a token, and has no dashboard.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import signal
import socket
import stat
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._private.utils import read_ray_address

from evomerge.errors import SetupError

log = logging.getLogger(__name__)
_STORE = 100 * 2**20  # bytes of Ray's object store: no weights go through it
_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_PASSED = (
    "EVOMERGE_",
    "CUBLAS_",
)  # variables that decide what a worker computes, and those that keep it off the network:
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
_SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster, and what it offers in all. port: that Ray's own process there listens on, 0 where it is not known."""

    id: str
    host: str
    address: str
    cpus: float
    gpus: float
    port: int = 0

    def room(self, cpus: float, gpus: float) -> int:
        """How many workers of that size fit, where nothing else runs."""
        fits = [int(self.cpus / cpus + 1e-9)] if cpus else []
        if gpus >= 1:
            fits.append(int(self.gpus / gpus + 1e-9))
        elif gpus > 0:  # a share is a share of one GPU
            fits.append(int(1 / gpus + 1e-9) * int(self.gpus))
        return min(fits)


def join(address: str | None) -> bool:
    """Connects this process to a cluster; whether one was started for it. Nothing is done where it is connected already.

    address: 'local' starts one; None or 'auto' joins the one of $RAY_ADDRESS or that `ray start` began on this machine, and
    starts one where there is none; else HOST:PORT of one. Raises SetupError. The process's signal handlers stay what they were.
    """
    if ray.is_initialized():
        return False
    there = None if address == "local" else found(address)
    with _handlers_kept():
        if there is not None:
            _init(address=there)
            return False
        _token()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault(
            "RAY_worker_niceness", "0"
        )  # by default Ray lets whatever else runs here go first
        with _loopback():
            _init(
                address="local",
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                object_store_memory=_STORE,
            )
    if any(node.address != "127.0.0.1" for node in nodes()):
        log.warning(
            "this version of Ray does not keep to 127.0.0.1: its ports are open to the network, with a token from Ray 2.60 on"
        )
    return True


def found(address: str | None) -> str | None:
    """Where a cluster answers; None where none was asked for by name and none is there. Ray itself would try for minutes."""
    named = address if address not in (None, "auto") else os.environ.get("RAY_ADDRESS") or None
    if named == "auto":
        named = None
    there: str | None = named or read_ray_address()
    if not there:
        return None
    host, _, port = there.rpartition(":")
    if not port.isdigit() or not host or "/" in host:
        raise SetupError(f"the address of a Ray cluster is HOST:PORT, got '{there}'")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5.0).close()
    except (OSError, OverflowError) as error:
        if named is None:
            return None  # what `ray start` left behind
        raise SetupError(f"no Ray cluster answers at {there}: {_line(error)}") from None
    return there


def nodes() -> list[Node]:
    """Those that are alive, in a fixed order."""
    found = []
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["Alive"]:
            has = node["Resources"]
            place = (node["NodeID"], node["NodeManagerHostname"], node["NodeManagerAddress"])
            found.append(
                Node(*place, has.get("CPU", 0.0), has.get("GPU", 0.0), int(node.get("NodeManagerPort") or 0))
            )
    return sorted(found, key=lambda node: node.id)


def answers(node: Node) -> bool:
    """Whether something listens where Ray's own process of a node does: Ray itself calls a node dead only seconds after it is gone."""
    if not node.port:
        return True
    try:
        socket.create_connection((node.address, node.port), timeout=2.0).close()
    except OSError:
        return False
    return True


def places(
    there: Sequence[Node], cpus: float, gpus: float, workers: int | None, taken: Mapping[str, int]
) -> list[Node]:
    """The node of each worker to add: as many as fit, or up to `workers`, on the emptiest first. taken: node's id -> workers there."""
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
    """Raises SetupError where the cluster can never give what is asked: Ray itself would wait for it in silence."""
    if cpus < 0 or gpus < 0 or not cpus + gpus:
        raise SetupError(f"a worker needs a share of a CPU or a GPU, got cpus {cpus:g} and gpus {gpus:g}")
    if gpus > 1 and gpus != int(gpus):
        raise SetupError(
            f"gpus must be a whole number or a share of one, got {gpus:g}; take {int(gpus)} or {int(gpus) + 1}"
        )
    there = nodes()
    room = sum(node.room(cpus, gpus) for node in there)
    if room < (workers or 1):
        has = "; ".join(f"{node.host}: {node.cpus:g} CPUs, {node.gpus:g} GPUs" for node in there) or "no node"
        raise SetupError(
            f"the cluster has room for {room} workers of {cpus:g} CPUs and {gpus:g} GPUs each, {workers or 'at least 1'} asked; it has {has}. "
            "Ask for fewer or for less, or add nodes"
        )


def environment() -> dict[str, str]:
    """The variables of this process that workers on other machines need too; never a secret."""
    found = {
        k: v
        for k, v in os.environ.items()
        if (k.startswith(_PASSED) or k in _OFFLINE) and not any(word in k for word in _SECRET)
    }
    return dict(sorted(found.items())) | {"TOKENIZERS_PARALLELISM": "false"}


def _init(**options: Any) -> None:
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except (RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        raise SetupError(f"Ray cannot be started or joined: {_line(error)}") from None


def _line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _token() -> None:
    """Sees to a token that only this user can read: Ray makes its file by the umask."""
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
            f"Ray's token cannot be kept in {file}: {error.strerror}; set RAY_AUTH_TOKEN_PATH to a file of yours"
        ) from None


@contextlib.contextmanager
def _loopback() -> Iterator[None]:
    """On Linux Ray binds to every interface, whatever address it is given, unless told that there is no cluster to be had."""
    kept, had = os.environ.get(_LOOPBACK), getattr(ray_constants, "ENABLE_RAY_CLUSTER", None)
    os.environ[_LOOPBACK] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = had
        del os.environ[_LOOPBACK]
        if kept is not None:
            os.environ[_LOOPBACK] = kept


@contextlib.contextmanager
def _handlers_kept() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            if handler is not None:
                signal.signal(number, handler)
