"""A worker's end of the process that holds the parents of its card: finds it or starts it, takes the memory.

Whoever can bind the name of the socket starts the holder; all others connect. The name has no file, and ends
with the holder.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import logging
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from evomerge.checkpoints import Parent
from evomerge.checkpoints.checkpoint import file_stamps
from evomerge.merging.arena import Arena
from evomerge.merging.parent_placement import HOST, ParentArenas, pin
from evomerge.workers import parent_holder
from evomerge.workers.parent_holder import HoldRequest, Shared, SharedTensor
from evomerge.workers.process_devices import VARIABLE
from evomerge.workers.safe_path import variables

log = logging.getLogger(__name__)
_TRIES = 20  # to find a holder or to start one
_PAUSE = 0.1  # seconds between them
_BACKLOG = 128
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop()); "
    "from evomerge.workers.parent_holder import main; main()"
)


@dataclass(eq=False)
class HeldParents:
    """Parents in the memory of another process, as long as that lives.

    Attributes:
        arenas: Name -> destination -> arena.
        lost: Set when the holder has ended: memory of a card is then not to be read any more.
        connection: To the holder; None for none.
    """

    arenas: Mapping[str, ParentArenas]
    lost: threading.Event = field(default_factory=threading.Event)
    connection: socket.socket | None = None

    def take_leave(self) -> None:
        """Tells the holder that this process ends by itself: the last that does so ends the holder."""
        if self.connection is not None:
            with contextlib.suppress(OSError):
                self.connection.sendall(parent_holder.TAKE_LEAVE)


def attach(parents: Mapping[str, Parent], request: HoldRequest) -> HeldParents | None:
    """Takes the parents from the holder of this worker's cards, which is started where there is none.

    Args:
        parents: Name -> parent, opened from the request's references.
        request: What is held.

    Returns:
        The parents; None where that cannot be had: the worker then loads them by itself.
    """
    try:
        holder, shared = _received(_name(parents, request), request)
        arenas = {
            name: {
                where: Arena(layout, {t.dtype: _rebuilt(t, where, request) for t in tensors})
                for where, (layout, tensors) in of.items()
            }
            for name, of in shared.items()
        }
    except (OSError, RuntimeError, AttributeError) as error:  # AttributeError: no such sockets on this system
        log.warning("parents are loaded by each worker: %s: %s", type(error).__name__, error)
        return None
    held = HeldParents(arenas, connection=holder)
    threading.Thread(target=_watch, args=(holder, held.lost), daemon=True).start()
    atexit.register(held.take_leave)
    return held


def _name(parents: Mapping[str, Parent], request: HoldRequest) -> bytes:
    """Name of the socket: equal for workers of equal cards, files, plans and owner."""
    files = sorted({file for parent in parents.values() for file in parent.files})
    key = repr(
        (
            os.getuid(),
            request.owner,
            parent_holder.started_at(request.owner),
            os.environ.get(VARIABLE),
            request.devices,
            sorted(request.references.items()),
            sorted((str(file), stamp) for file, stamp in file_stamps(files).items()),
            [(card.layers, card.size) for card in request.plan.cards],
            sorted((name, sorted(map(str, pieces))) for name, pieces in request.plan.streamed.items()),
        )
    )
    return b"\0evomerge-" + hashlib.sha256(key.encode()).hexdigest()[:32].encode()


def _received(name: bytes, request: HoldRequest) -> tuple[socket.socket, Shared]:
    """A connection to the holder of that name, and what it hands over. Raises OSError."""
    for is_last in (False, True):
        holder = _connected(name, request)
        try:
            if parent_holder.peer_user(holder) != os.getuid():
                raise ConnectionRefusedError("the holder is another user's")
            shared = parent_holder.receive(holder)
            if isinstance(shared, str):
                raise ConnectionRefusedError(shared)
            return holder, shared
        except OSError as error:
            holder.close()
            if is_last or not isinstance(error, ConnectionResetError):  # one that was about to end
                raise
    raise AssertionError("unreachable")


def _connected(name: bytes, request: HoldRequest) -> socket.socket:
    """A connection to the holder of that name. Raises OSError where there is none and none can be started."""
    for _ in range(_TRIES):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(name)
            return connection
        except ConnectionRefusedError:
            connection.close()
        with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as listener:
            try:
                listener.bind(name)
            except OSError:  # another worker is about to start it
                time.sleep(_PAUSE)
                continue
            listener.listen(_BACKLOG)
            _start(listener, request)
    raise ConnectionRefusedError("no process that holds the parents could be reached")


def _start(listener: socket.socket, request: HoldRequest) -> None:
    """Starts a holder on a socket that takes connections already."""
    command = [
        sys.executable,
        "-P",
        "-c",
        _PROGRAM,
        str(listener.fileno()),
        str(request.owner),
        json.dumps(sys.path),
    ]
    own = {"PYTHONSAFEPATH": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}
    with variables(own):
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
            start_new_session=True,
            cwd="/",
        )
    assert process.stdin is not None
    with process.stdin:
        process.stdin.write(pickle.dumps(request))
    threading.Thread(target=process.wait, daemon=True).start()  # so that it is gone when it has ended


def _rebuilt(tensor: SharedTensor, where: int, request: HoldRequest) -> Tensor:
    """The tensor over the holder's memory."""
    if not isinstance(tensor.handle, int):
        make, arguments = tensor.handle
        rebuilt: Tensor = make(*arguments)
        return rebuilt
    try:
        flat = parent_holder.mapped(tensor.handle, tensor.dtype, tensor.length)
    finally:
        os.close(tensor.handle)
    if where == HOST and any(device.startswith("cuda") for device in request.devices):
        pin(flat)
    return flat


def _watch(holder: socket.socket, lost: threading.Event) -> None:
    with contextlib.suppress(OSError, ValueError):
        while holder.recv(1):
            pass
    lost.set()
