"""The process that holds parents, on the CPU: shared by workers, kept when one dies, gone without traces.

What a card would add, CUDA IPC handles in the place of descriptors, cannot be run here. Processes are forked
from the test's, which has imported torch already; one test starts a holder as workers do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.checkpoints import Checkpoint
from evomerge.merging.memory_plan import RESERVE, MemoryRequest, parent_size, plan_memory
from evomerge.merging.parent_placement import placed
from evomerge.workers import held_parents
from evomerge.workers.held_parents import attach
from evomerge.workers.parent_holder import HoldRequest, hold, started_at
from evomerge.workers.process_devices import VARIABLE

NAMES = ("base", "math", "code")


def request_of(tiny: dict[str, Path], streamed: bool = False, owner: int | None = None) -> HoldRequest:
    """All parents on two 'cards' of the CPU; streamed: of memory that holds half of them."""
    paths = {name: tiny[name] for name in NAMES if name in tiny}
    sizes = {name: parent_size(Checkpoint(path)) for name, path in paths.items()}
    size = next(iter(sizes.values()))
    cards = [RESERVE + size.total * (2 if streamed else 9)] * 2
    plan = plan_memory(MemoryRequest(sizes, size), cards, 1 << 40)
    assert bool(plan.streamed) is streamed
    references = {name: str(path) for name, path in paths.items()}
    return HoldRequest(references, plan, ("cpu", "cpu"), owner or os.getpid(), linger=3.0)


def holders(of: int) -> list[int]:
    """Processes that hold parents for this owner."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            name, _, rest = (folder / "stat").read_text().partition("(")[2].rpartition(")")
            is_program = b"evomerge.workers.parent_holder" in b"".join(words[3:4])
            is_started = is_program and words[5:6] == [str(of).encode()]
            if rest.split()[0] != "Z" and (name == f"eh{of}" or is_started):
                found.append(int(folder.name))
    return found


def forked(work: Callable[[], None], keep: int) -> int:
    """Runs something in a forked process, which has one descriptor beside its streams, number 3."""
    pid = os.fork()
    if pid:
        threading.Thread(target=os.waitpid, args=(pid, 0), daemon=True).start()
        return pid
    try:
        os.dup2(keep, 3)
        os.closerange(4, 4096)
        work()
    finally:
        os._exit(0)


def fork_holder(listener: socket.socket, request: HoldRequest) -> None:
    def work() -> None:
        Path("/proc/self/comm").write_text(f"eh{request.owner}")
        hold(socket.socket(fileno=3), request)

    forked(work, listener.fileno())


def until(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """What a condition gives as soon as that is something; fails after some seconds."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


class Worker:
    """A process that attaches: says so, and waits until the holder is lost, or ends."""

    def __init__(self, request: HoldRequest, *, waits: bool) -> None:
        reading, writing = os.pipe()
        self._lines = os.fdopen(reading)

        def work() -> None:
            parents = {name: Checkpoint(Path(path)) for name, path in request.references.items()}
            held = attach(parents, request)
            os.write(3, b"attached\n" if held else b"alone\n")
            if held and waits:
                held.lost.wait()
                os.write(3, b"lost\n")
            elif held:
                held.take_leave()

        self.pid = forked(work, writing)
        os.close(writing)

    def line(self) -> str:
        return self._lines.readline().strip()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Worker]]:
    """Starts workers, whose holder is forked too."""
    monkeypatch.setattr(held_parents, "_start", fork_holder)
    started: list[Worker] = []

    def start(request: HoldRequest, *, waits: bool = True) -> Worker:
        started.append(Worker(request, waits=waits))
        return started[-1]

    yield start
    for one in started:
        one.kill()


@pytest.mark.parametrize("streamed", [False, True])
def test_what_is_attached_are_the_tensors_of_the_files(
    tiny: dict[str, Path], streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if streamed:
        monkeypatch.setattr(held_parents, "_start", fork_holder)
    request = request_of(tiny, streamed)
    parents = {name: Checkpoint(Path(path)) for name, path in request.references.items()}
    held = attach(parents, request)
    assert held is not None
    for name, parent in placed(parents, held.arenas).items():
        own = parents[name]
        assert all(torch.equal(parent.tensor(key), own.tensor(key)) for key in own.tensors)
    (pid,) = holders(os.getpid())
    os.kill(pid, signal.SIGKILL)
    assert held.lost.wait(10)
    monkeypatch.setattr(held_parents, "_start", fork_holder)
    again = attach(parents, request)  # another is started
    assert again is not None
    assert holders(os.getpid()) != [pid]
    os.kill(*holders(os.getpid()), signal.SIGKILL)
    assert again.lost.wait(10)


def test_workers_share_and_one_that_is_killed_attaches_again_without_reading(
    tiny: dict[str, Path], worker: Callable[..., Worker]
) -> None:
    request = dataclasses.replace(request_of(tiny), linger=30.0)
    one, two = worker(request), worker(request)
    assert [one.line(), two.line()] == ["attached"] * 2
    (pid,) = holders(os.getpid())
    began = started_at(pid)
    read = int(Path(f"/proc/{pid}/io").read_text().split()[1])
    one.kill()
    two.kill()
    third = worker(request)
    assert third.line() == "attached"
    assert holders(os.getpid()) == [pid]
    assert started_at(pid) == began
    assert int(Path(f"/proc/{pid}/io").read_text().split()[1]) - read < 10_000  # nothing of a model
    os.kill(pid, signal.SIGKILL)
    assert third.line() == "lost"


def test_it_ends_when_its_last_worker_takes_leave_and_leaves_nothing(
    tiny: dict[str, Path], worker: Callable[..., Worker]
) -> None:
    before = set(Path("/dev/shm").iterdir())
    request = dataclasses.replace(request_of(tiny), linger=1000.0)
    assert worker(request, waits=False).line() == "attached"
    until(lambda: not holders(os.getpid()))
    assert set(Path("/dev/shm").iterdir()) <= before


def test_it_ends_with_its_owner_and_without_workers(
    tiny: dict[str, Path], worker: Callable[..., Worker]
) -> None:
    owner = subprocess.Popen(["sleep", "1000"])
    request = dataclasses.replace(request_of(tiny, owner=owner.pid), linger=1000.0)
    assert worker(request).line() == "attached"
    assert len(holders(owner.pid)) == 1
    owner.kill()
    owner.wait()
    until(lambda: not holders(owner.pid))
    lingering = worker(dataclasses.replace(request_of(tiny), linger=0.5))
    assert lingering.line() == "attached"
    lingering.kill()  # takes no leave
    until(lambda: not holders(os.getpid()))


def test_a_holder_that_cannot_load_leaves_it_to_the_workers(
    tiny: dict[str, Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_parents, "_start", fork_holder)
    request = request_of(tiny)
    parents = {name: Checkpoint(Path(path)) for name, path in request.references.items()}
    broken = dataclasses.replace(request, references=dict.fromkeys(parents, "nowhere/at/all"))
    assert attach(parents, broken) is None
    assert "parents are loaded by each worker: ConnectionRefusedError: " in caplog.text
    until(lambda: not holders(os.getpid()))


def test_other_cards_files_or_owners_have_other_holders(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of(tiny)
    parents = {name: Checkpoint(Path(path)) for name, path in request.references.items()}
    names = {held_parents._name(parents, request)}
    names.add(held_parents._name(parents, dataclasses.replace(request, owner=1)))
    names.add(held_parents._name(parents, request_of(tiny, streamed=True)))
    monkeypatch.setenv(VARIABLE, "7")
    names.add(held_parents._name(parents, request))
    some = dict(list(parents.items())[:1])
    names.add(held_parents._name(some, request))
    assert len(names) == 5
