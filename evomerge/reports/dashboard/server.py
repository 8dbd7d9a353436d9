"""Listens for the dashboard: opens the socket, says under which address, and serves until interrupted."""

from __future__ import annotations

import gc
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from evomerge.errors import ConfigError, SetupError
from evomerge.reports.dashboard.access import Access, is_loopback, new_token
from evomerge.reports.dashboard.app import Dashboard

_GC_THRESHOLD = 50_000  # objects made between two collections: a study's values are many, and none is a cycle
_SHORTEST = 8  # characters of a token that a user chooses


@dataclass(frozen=True, slots=True)
class Listening:
    """Where and for whom to listen.

    Attributes:
        host: Name or address of this machine to listen on.
        port: The port, 0 for any that is free.
        token: What lets in; '' for a new one.
        prefix: Path that a proxy leaves before every address, '' for none.
    """

    host: str = "127.0.0.1"
    port: int = 8377
    token: str = ""
    prefix: str = ""

    def __post_init__(self) -> None:
        if self.token and (len(self.token) < _SHORTEST or not self.token.isascii()):
            raise ConfigError(
                f"a token has at least {_SHORTEST} ASCII characters; leave it out to have one made"
            )
        if self.prefix and (not self.prefix.startswith("/") or self.prefix.endswith("/")):
            raise ConfigError(
                f"--prefix is a path such as /proxy/8377, a slash before and none after; got '{self.prefix}'"
            )


def serve(root: Path, listening: Listening, say: Callable[[str], None]) -> None:
    """Serves the studies of a folder until it is interrupted.

    Args:
        root: Folder of the studies.
        listening: Where to listen.
        say: Called with each line for the user, the addresses among them.

    Raises:
        SetupError: The folder is missing, or the port cannot be had.
    """
    if not root.is_dir():
        raise SetupError(f"there is no folder {root} with studies; name one, or run a search first")
    bound = _bind(listening.host, listening.port)
    gc.set_threshold(_GC_THRESHOLD)
    import scipy.special  # noqa: F401 - slow to import: before the first page is asked for

    token = listening.token or new_token()
    is_local = is_loopback(listening.host)
    port = bound.getsockname()[1]
    name = listening.host if is_local else socket.gethostname()
    host = f"[{name}]" if ":" in name else name
    say(f"studies of {root}: http://{host}:{port}{listening.prefix}/?token={token}")
    if is_local:
        tunnel = f"ssh -N -L {port}:127.0.0.1:{port} {socket.gethostname()}"
        say(f"from another machine: {tunnel}, then the same address")
    say("the token lets stop searches; Ctrl-C ends the page, no search")
    dashboard = Dashboard(root, Access(token, is_local), listening.prefix)
    config = uvicorn.Config(
        dashboard.app(),
        log_level="warning",
        access_log=False,
        ws="none",
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    try:
        uvicorn.Server(config).run(sockets=[bound])
    except KeyboardInterrupt:  # the way to end it
        return


def _bind(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SetupError(
            f"port {port} of {host} cannot be had: {reason}; choose another with --port, 0 for any free one"
        ) from None
    bound.set_inheritable(True)
    return bound
