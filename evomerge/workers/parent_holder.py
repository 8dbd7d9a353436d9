"""The process beside the workers of a card that holds the parents, so that nobody reads them a second time.

It loads the parents by the plan, and hands each worker that connects the memory: CUDA IPC handles for a card,
a file descriptor of anonymous memory for the host. It ends with its owner, the process that started the
workers; when its last worker has taken leave; and when none has been there for some time. It leaves nothing
behind: no file, no shared memory. CUDA IPC was never run on a card; the rest runs on a CPU the same way.
"""

from __future__ import annotations

import mmap
import os
import pickle
import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evomerge.checkpoints import open_parent
from evomerge.errors import EvomergeError
from evomerge.merging.arena import Arena, ArenaLayout, arena_layout_of_headers
from evomerge.merging.memory_plan import MemoryPlan
from evomerge.merging.parent_loading import fill_arenas
from evomerge.merging.parent_placement import HOST, check_free, destinations

TAKE_LEAVE = b"q"  # what a worker says that ends by itself
_WATCH_SECONDS = 0.5  # between two looks at the owner
_LENGTH = struct.Struct("!Q")
_MOST_DESCRIPTORS = 200  # of one message


@dataclass(frozen=True, slots=True)
class HoldRequest:
    """What a holder is to hold.

    Attributes:
        references: Name -> reference of each parent, see `evomerge.checkpoints.open_parent`.
        plan: Where its tensors lie.
        devices: torch's names of the plan's cards, in the environment of the holder.
        owner: Process whose end is the holder's.
        linger: Seconds without any worker after which it ends.
    """

    references: Mapping[str, str]
    plan: MemoryPlan
    devices: tuple[str, ...]
    owner: int
    linger: float = 60.0


@dataclass(frozen=True, slots=True)
class SharedTensor:
    """A flat tensor as it is handed to another process.

    Attributes:
        dtype: Its type.
        length: Elements.
        handle: For a card what rebuilds it (a function and its arguments); None for memory of the host, whose
            descriptor comes beside the message.
    """

    dtype: torch.dtype
    length: int
    handle: Any = None


Shared = dict[str, dict[int, tuple[ArenaLayout, list[SharedTensor]]]]
"""Parent -> destination -> layout and allocations, in the order of the layout's lengths."""


def main() -> None:
    """The program of the process: `argv[1]` is its socket, `argv[2]` its owner; stdin has the request."""
    hold(socket.socket(fileno=int(sys.argv[1])), pickle.load(sys.stdin.buffer))


def hold(listener: socket.socket, request: HoldRequest) -> None:
    """Holds parents until nobody needs them.

    Args:
        listener: A socket that takes connections.
        request: What is held.
    """
    threading.Thread(target=_end_with, args=(request.owner,), daemon=True).start()
    holder = _Holder(listener, request)
    holder.load()
    holder.serve()


class _Holder:
    def __init__(self, listener: socket.socket, request: HoldRequest) -> None:
        self._listener, self._request = listener, request
        self._arenas: dict[str, dict[int, Arena]] = {}
        self._descriptors: dict[int, int] = {}  # address of host memory -> its descriptor
        self._error = ""

    def load(self) -> None:
        """Loads the parents; an error is told to every worker that connects."""
        try:
            parents = {name: open_parent(text) for name, text in self._request.references.items()}
            plan, devices = self._request.plan, self._request.devices
            places = {name: destinations(parent, name, plan) for name, parent in parents.items()}
            check_free(parents, places, devices)
            for name, parent in parents.items():
                self._arenas[name] = {
                    where: self._allocate(
                        arena_layout_of_headers({n: parent.tensors[n] for n in names}), where
                    )
                    for where, names in places[name].items()
                }
            for name, parent in parents.items():
                fill_arenas(name, parent, list(self._arenas[name].values()))
        except (EvomergeError, OSError, RuntimeError) as error:
            self._arenas = {}
            self._error = f"{type(error).__name__}: {error}"

    def _allocate(self, layout: ArenaLayout, where: int) -> Arena:
        device = "cpu" if where == HOST else self._request.devices[where]
        flats = {}
        for dtype, length in layout.lengths.items():
            if device == "cpu":
                descriptor = os.memfd_create("evomerge-parents")
                os.ftruncate(descriptor, max(1, length * dtype.itemsize))
                flats[dtype] = mapped(descriptor, dtype, length)
                self._descriptors[flats[dtype].data_ptr()] = descriptor
            else:
                flats[dtype] = torch.zeros(length, dtype=dtype, device=device)
        return Arena(layout, flats)

    def serve(self) -> None:
        """Answers workers until none is left."""
        selector = selectors.DefaultSelector()
        selector.register(self._listener, selectors.EVENT_READ)
        workers: set[socket.socket] = set()
        alone_since, may_end = time.monotonic(), False
        while workers or not (may_end or time.monotonic() - alone_since > self._request.linger):
            for key, _ in selector.select(_WATCH_SECONDS):
                if key.fileobj is self._listener:
                    worker, _ = self._listener.accept()
                    if self._hand_over(worker):
                        workers.add(worker)
                        selector.register(worker, selectors.EVENT_READ)
                    continue
                worker = key.fileobj  # type: ignore[assignment]
                may_end = _has_taken_leave(worker)
                selector.unregister(worker)
                workers.discard(worker)
                worker.close()
                alone_since = time.monotonic()
            if self._error and not workers:
                return

    def _hand_over(self, worker: socket.socket) -> bool:
        """Gives a worker the memory; whether it is there to have it."""
        try:
            if peer_user(worker) != os.getuid():
                worker.close()
                return False
            shared, descriptors = self._shared()
            data = pickle.dumps(self._error or shared)
            worker.sendall(_LENGTH.pack(len(data)) + data)
            for start in range(0, len(descriptors), _MOST_DESCRIPTORS):
                socket.send_fds(worker, [b"f"], descriptors[start : start + _MOST_DESCRIPTORS])
        except OSError:
            worker.close()
            return False
        return True

    def _shared(self) -> tuple[Shared, list[int]]:
        descriptors: list[int] = []
        shared: Shared = {}
        for name, arenas in self._arenas.items():
            for where, arena in arenas.items():
                tensors = []
                for dtype, length in arena.layout.lengths.items():
                    flat = arena.allocations[dtype]
                    descriptor = self._descriptors.get(flat.data_ptr())
                    handle = None
                    if descriptor is None:
                        handle = _ipc_handle(flat)
                    else:
                        descriptors.append(descriptor)
                    tensors.append(SharedTensor(dtype, length, handle))
                shared.setdefault(name, {})[where] = (arena.layout, tensors)
        return shared, descriptors


# ---- both ends ---------------------------------------------------------------------------------------------


def mapped(descriptor: int, dtype: torch.dtype, length: int) -> Tensor:
    """Memory behind a descriptor as a flat tensor, which keeps it mapped.

    Args:
        descriptor: Of anonymous memory.
        dtype: Type of its elements.
        length: Their number.

    Returns:
        [length] tensor.
    """
    if not length:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(mmap.mmap(descriptor, length * dtype.itemsize), dtype=dtype, count=length)


def receive(holder: socket.socket) -> Shared | str:
    """Takes what a holder hands over; waits until it has loaded.

    Args:
        holder: The connection.

    Returns:
        The memory, with `handle` a descriptor for memory of the host; a text where the holder failed.

    Raises:
        OSError: The holder is gone.
    """
    (size,) = _LENGTH.unpack(_exactly(holder, _LENGTH.size))
    shared: Shared | str = pickle.loads(_exactly(holder, size))
    if isinstance(shared, str):
        return shared
    tensors = [tensor for of in shared.values() for _, found in of.values() for tensor in found]
    missing = sum(tensor.handle is None for tensor in tensors)
    descriptors: list[int] = []
    while len(descriptors) < missing:
        data, received, _, _ = socket.recv_fds(holder, 1, _MOST_DESCRIPTORS)
        if not data:
            raise ConnectionResetError("the holder of the parents is gone")
        descriptors += received
    rest = iter(descriptors)
    return {
        name: {
            where: (layout, [_with_descriptor(tensor, rest) for tensor in found])
            for where, (layout, found) in of.items()
        }
        for name, of in shared.items()
    }


def peer_user(connection: socket.socket) -> int:
    """The user of the process at the other end.

    Args:
        connection: Of this machine.

    Returns:
        Its user id.
    """
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", data)[1])


def started_at(pid: int) -> str:
    """When a process was started, by which it differs from later ones of its number.

    Args:
        pid: The process.

    Returns:
        The system's number; empty where the process is gone.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _with_descriptor(tensor: SharedTensor, descriptors: Any) -> SharedTensor:
    if tensor.handle is not None:
        return tensor
    return SharedTensor(tensor.dtype, tensor.length, next(descriptors))


def _exactly(connection: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        data = connection.recv(min(size - len(parts), 1 << 20))
        if not data:
            raise ConnectionResetError("the holder of the parents is gone")
        parts += data
    return bytes(parts)


def _has_taken_leave(worker: socket.socket) -> bool:
    try:
        return worker.recv(1) == TAKE_LEAVE
    except OSError:
        return False


def _ipc_handle(flat: Tensor) -> Any:
    """What makes a tensor of a card in another process; torch keeps the memory until that is gone."""
    from torch.multiprocessing.reductions import reduce_tensor

    return reduce_tensor(flat)  # type: ignore[no-untyped-call]


def _end_with(owner: int) -> None:
    """Ends this process when its owner has ended."""
    began = started_at(owner)
    while began and started_at(owner) == began:
        time.sleep(_WATCH_SECONDS)
    os._exit(0)
