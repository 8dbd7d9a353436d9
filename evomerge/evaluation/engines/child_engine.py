"""A text engine in a process of its own: with another environment, and not the worker's end when it dies."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from torch import Tensor

import evomerge
from evomerge.evaluation.engines.engine import (
    EngineError,
    EngineModel,
    EngineSettings,
    Progress,
    Pushed,
    layer_of,
)
from evomerge.evaluation.engines.shared_weights import SharedWeights

_OPENING_SECONDS = 1800.0  # an engine of a large model captures graphs
_ANSWER_SECONDS = 600.0  # one push, or one step
_ENDING_SECONDS = 10.0
_LOG_LINES = 12  # that an error shows
_STARTER = "from evomerge.evaluation.engines.child_process import main; main()"
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_NOT_INHERITED = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


class ChildEngine:
    """The worker's end of an engine's process. Satisfies `engine.TextEngine`.

    Attributes:
        pid: The process.
    """

    def __init__(
        self,
        factory: str,
        model: EngineModel,
        settings: EngineSettings,
        *,
        answer_seconds: float = _ANSWER_SECONDS,
        import_path: Sequence[str] = (),
    ) -> None:
        """Starts the process and waits until its engine is open.

        Args:
            factory: 'module:name' of an `EngineFactory`.
            model: What it opens.
            settings: How.
            answer_seconds: An engine that takes longer for a push or a step has hung.
            import_path: Folders that the process imports from beside its environment.

        Raises:
            EngineError: It cannot be opened; with the last lines that it wrote.
            OSError: There is no such interpreter.
        """
        self._answer_seconds = answer_seconds
        self._folder = tempfile.TemporaryDirectory(prefix="evomerge-engine-")
        self._weights: SharedWeights | None = None
        self._pushed: Pushed | None = None
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = self._started(theirs.fileno(), settings, import_path)
        self.pid = self._process.pid
        self._connection = Connection(ours.detach())
        try:
            self._connection.send((factory, model, settings))
            self._facts: Mapping[str, str] = self._answer(_OPENING_SECONDS)
        except (EngineError, OSError) as error:
            lines = self._last_lines()
            self.close()
            raise EngineError(f"{error}{lines}") from None

    def _started(
        self, descriptor: int, settings: EngineSettings, import_path: Sequence[str]
    ) -> subprocess.Popen[bytes]:
        """Starts the process, which imports evomerge from here, and nothing else of this environment."""
        folder = Path(self._folder.name)
        (folder / "evomerge").symlink_to(Path(evomerge.__file__).resolve().parent)
        environment = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
        environment["PYTHONPATH"] = os.pathsep.join((str(folder), *import_path))
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
        environment |= dict.fromkeys(_THREADS, str(settings.threads))
        with (folder / "log").open("wb") as log:
            return subprocess.Popen(
                [settings.python or sys.executable, "-P", "-c", _STARTER, str(descriptor), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(descriptor,),
                env=environment,
                start_new_session=True,
            )

    def facts(self) -> Mapping[str, str]:
        """See `TextEngine.facts`."""
        return self._facts

    def push(self, tensors: Mapping[str, Tensor]) -> Pushed:
        """See `TextEngine.push`.

        The tensors pass through memory that both processes share, which tells which of them changed: the
        engine is given the decoder layers of those alone, and nothing where all are as they were.
        """
        if self._weights is None:
            self._weights = SharedWeights.for_tensors(tensors)
            self._call("attach", self._weights.path, self._weights.size)
        changed = {layer_of(place.name) for place in self._weights.write(tensors)}
        names = [name for name in tensors if layer_of(name) in changed]
        if not names and self._pushed is not None:
            return replace(self._pushed, tensors=0, bytes=0)
        self._pushed = self._call("push", self._weights.places(names))
        assert self._pushed is not None
        return self._pushed

    def start(self, prompts: Sequence[Sequence[int]], limits: Sequence[int], end_ids: Sequence[int]) -> None:
        """See `TextEngine.start`."""
        self._call("start", prompts, limits, end_ids)

    def step(self) -> list[Progress]:
        """See `TextEngine.step`."""
        made: list[Progress] = self._call("step")
        return made

    def abort(self, rows: Sequence[int]) -> None:
        """See `TextEngine.abort`."""
        self._call("abort", rows)

    def close(self) -> None:
        """See `TextEngine.close`. Processes that the engine started are ended too."""
        with contextlib.suppress(OSError):
            self._connection.close()
        if self._process.poll() is None:
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_ENDING_SECONDS)
        if self._weights is not None:
            self._weights.close()
            self._weights = None
        self._folder.cleanup()

    def _call(self, name: str, *arguments: Any) -> Any:
        try:
            self._connection.send((name, arguments))
            return self._answer(self._answer_seconds)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise self._death() from None

    def _answer(self, seconds: float) -> Any:
        """The engine's answer to what was sent last."""
        if not self._connection.poll(seconds):
            raise TimeoutError(f"the engine's process {self.pid} has not answered for {seconds:g} s")
        try:
            answer = self._connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._death() from None
        if answer[0] == "failed":
            _, kind, text = answer
            raise EngineError(text if kind == "EngineError" else f"{kind}: {text}")
        return answer[1]

    def _death(self) -> OSError:
        """How the process ended: by a signal from outside, which no candidate causes, or by itself."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_ENDING_SECONDS)
        code = self._process.returncode
        if code in (-signal.SIGKILL, -signal.SIGTERM):
            return ConnectionResetError(f"the engine's process was ended by {signal.Signals(-code).name}")
        how = "closed its connection" if code is None else f"ended with exit code {code}"
        return OSError(f"the engine's process {how}{self._last_lines()}")

    def _last_lines(self) -> str:
        """The end of what the process wrote; empty where it wrote nothing."""
        file = Path(self._folder.name) / "log"
        if not file.is_file():
            return ""
        lines = file.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-_LOG_LINES:]
        return "; it wrote: " + " | ".join(line.strip() for line in lines) if lines else ""
