"""Weight files -> arenas: read in order through two buffers, by several threads, checked as they pass.

The buffers are page-locked where a card is filled, so that a copy to it runs while the other buffer is read
into. On a CPU the same code runs with plain buffers. Copies to a card were never run on one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from evomerge.checkpoints import Checkpoint, Parent
from evomerge.checkpoints.safetensors_headers import read_spans
from evomerge.checkpoints.values import check_tensor
from evomerge.errors import CheckpointError
from evomerge.merging.arena import Arena

CHUNK = 64 << 20  # bytes of a buffer
THREADS = 8  # that read at most


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A run of bytes of a file, and where its parts belong. parts: (start in the chunk, bytes to fill)."""

    file: Path
    offset: int
    length: int
    parts: tuple[tuple[int, Tensor], ...]


def fill_arenas(
    name: str, parent: Parent, arenas: Sequence[Arena], *, chunk: int = CHUNK, threads: int | None = None
) -> None:
    """Reads a parent's tensors into the arenas that have places for them.

    Args:
        name: Name of the parent, for messages.
        parent: The parent; what is no plain checkpoint is read tensor by tensor.
        arenas: Where its tensors are to lie, each in one of them.
        chunk: Bytes that are read at a time.
        threads: That read; None for as many as there are cores, at most `THREADS`.

    Raises:
        CheckpointError: A tensor holds NaN or an infinite number, or a file is shorter than its header says.
    """
    views = {tensor: view for arena in arenas for tensor, view in arena.view.items()}
    if isinstance(parent, Checkpoint):
        _read_files(parent, views, chunk, threads or min(THREADS, os.cpu_count() or 1))
    else:
        for tensor, view in views.items():
            view.copy_(parent.tensor(tensor))
    _check_values(name, views)


def _read_files(parent: Checkpoint, views: Mapping[str, Tensor], chunk: int, threads: int) -> None:
    on_card = any(view.is_cuda for view in views.values())
    buffers = [torch.empty(chunk, dtype=torch.uint8, pin_memory=on_card) for _ in range(2)]
    copied: list[torch.cuda.Event | None] = [None, None]
    with ThreadPoolExecutor(threads, thread_name_prefix="loader") as pool:
        for number, piece in enumerate(_chunks(parent, views, chunk)):
            buffer, event = buffers[number % 2], copied[number % 2]
            if event is not None:
                event.synchronize()  # what was in the buffer has left it
            _read(pool, threads, piece, buffer)
            for start, target in piece.parts:
                target.copy_(buffer[start : start + target.numel()], non_blocking=on_card)
            copied[number % 2] = _recorded(piece) if on_card else None
        for event in copied:
            if event is not None:
                event.synchronize()


def _recorded(piece: _Chunk) -> torch.cuda.Event:
    """An event after the copies of a chunk; those of a chunk go to one card, or wait for each other."""
    cards = sorted({target.device.index or 0 for _, target in piece.parts if target.is_cuda})
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    for card in cards[:-1]:
        torch.cuda.current_stream(card).synchronize()
    if cards:
        event.record(torch.cuda.current_stream(cards[-1]))
    return event


def _chunks(parent: Checkpoint, views: Mapping[str, Tensor], most: int) -> Iterator[_Chunk]:
    """The bytes of the tensors that have a place, in the order of the files, `most` at a time."""
    for file in parent.files:
        parts: list[tuple[int, Tensor]] = []
        start = stop = 0
        for name, (first, end) in read_spans(file).items():
            if name not in views or first == end:
                continue
            data = views[name].reshape(-1).view(torch.uint8)
            position = first
            while position < end:
                if parts and (position != stop or stop - start == most):
                    yield _Chunk(file, start, stop - start, tuple(parts))
                    parts = []
                if not parts:
                    start = stop = position
                size = min(end - position, most - (stop - start))
                parts.append((position - start, data[position - first : position - first + size]))
                position = stop = position + size
        if parts:
            yield _Chunk(file, start, stop - start, tuple(parts))


def _read(pool: ThreadPoolExecutor, threads: int, piece: _Chunk, buffer: Tensor) -> None:
    """Fills the beginning of a buffer with a chunk."""
    memory = memoryview(buffer.numpy())  # type: ignore[arg-type]
    share = -(-piece.length // threads)
    with piece.file.open("rb", buffering=0) as stream:
        reads = [
            pool.submit(
                _read_at,
                stream.fileno(),
                memory[start : min(start + share, piece.length)],
                piece.offset + start,
            )
            for start in range(0, piece.length, share)
        ]
        wait(reads)  # before the file is closed
        if not all(read.result() for read in reads):
            raise CheckpointError(f"{piece.file} is shorter than its header says; fetch it again")


def _read_at(file: int, memory: memoryview, offset: int) -> bool:
    """Reads bytes of an open file until the memory is full; False where the file ends before."""
    done = 0
    while done < len(memory):
        count = os.preadv(file, [memory[done:]], offset + done)
        if count == 0:
            return False
        done += count
    return True


def _check_values(name: str, views: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError for a tensor with NaN or an infinite number; waits once for each device."""
    bounds: dict[torch.device, dict[str, Tensor]] = {}
    for tensor, view in views.items():
        if view.is_floating_point() and view.numel():
            low, high = view.aminmax()
            is_finite = torch.isfinite(low) & torch.isfinite(high)
            bounds.setdefault(view.device, {})[tensor] = is_finite
    for found in bounds.values():
        flags = torch.stack(list(found.values())).tolist()
        for tensor, is_finite in zip(found, flags, strict=True):
            if not is_finite:
                check_tensor(name, tensor, views[tensor])
