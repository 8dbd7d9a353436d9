"""Runs command lines, each in a fork of a process that has imported everything, with limits: a program.

Reads a line of JSON for each case and writes one with its exit code and what it printed.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

CPU_SECONDS, WALL_SECONDS = 10, 90  # that a case may take
_IMPORTS = (
    *("evomerge.evaluation.lm_harness.harness", "evomerge.launch.prepare", "evomerge.launch.rescoring"),
    "transformers.models.llama.modeling_llama",
)
_MEMORY = 24 << 30  # bytes of address space
_FILE = 1 << 30  # bytes of a file


def main() -> None:
    """Answers until standard input ends."""
    from evomerge.cli import main as run

    for name in _IMPORTS:
        importlib.import_module(name)

    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        wanted = json.loads(line)
        began = time.monotonic()
        out, err = (Path(wanted["folder"]).with_suffix(f".{name}") for name in ("out", "err"))
        child = os.fork()
        if child == 0:
            _become(wanted, out, err)
            _finish(run)
        code, ended = _waited(child, began)
        found = {"code": code, "ended": ended, "seconds": time.monotonic() - began}
        for name, file in (("out", out), ("err", err)):
            found[name] = file.read_bytes()[-20_000:].decode(sys.stdout.encoding, "backslashreplace")
            file.unlink()
        answers.write(json.dumps(found) + "\n")
        answers.flush()


def _become(wanted: dict[str, Any], out: Path, err: Path) -> None:
    os.setsid()
    for number, file in ((0, os.devnull), (1, out), (2, err)):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(wanted["folder"])
    for name, value in wanted["variables"].items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environb[_raw(name)] = _raw(value)
    sys.argv = ["evomerge", *(os.fsdecode(_raw(word)) for word in wanted["words"])]
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for kind, most in (
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_AS, _MEMORY),
        (resource.RLIMIT_FSIZE, _FILE),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most + 5 if kind == resource.RLIMIT_CPU else most))


def _raw(text: str) -> bytes:
    """The bytes that a terminal would hand over."""
    return text.encode("utf-8", "surrogateescape")


def _finish(run: Any) -> None:
    code: Any = 0
    try:
        run()
    except SystemExit as error:
        code = error.code
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 99
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code if isinstance(code, int) else int(code is not None))


def _waited(child: int, began: float) -> tuple[int, str]:
    """(exit code, minus the signal that ended it; 'hang' for one that had to be ended)."""
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            code = os.waitstatus_to_exitcode(status)
            return code, "hang" if code == -signal.SIGXCPU else ""
        if time.monotonic() - began > WALL_SECONDS:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -9, "hang"
        time.sleep(0.01)


if __name__ == "__main__":
    main()
