"""Runs programs that models write, each in a child process with limits; the metric pass@k over them.

Only where the user allows it. A limit of processor time, and not of the clock, decides, so that a busy
machine changes no score. Knows nothing of models or tasks.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_PROGRAM = Path(__file__).with_name("code_child.py")
_WAIT = 60.0  # seconds of the clock after which a program that sleeps is ended
_AT_ONCE = 4  # programs that run side by side, as in the metric that tasks name
LIMITS = {
    "RLIMIT_CPU": 5,
    "RLIMIT_AS": 2 << 30,
    "RLIMIT_FSIZE": 16 << 20,
    "RLIMIT_NOFILE": 64,
    "RLIMIT_CORE": 0,
}
"""Seconds of a processor; bytes of memory and of a file; open files; no dumps."""


def run(program: str, *, wait: float = _WAIT) -> str:
    """Runs a program in a child process.

    Args:
        program: Python.
        wait: Seconds of the clock that it may take.

    Returns:
        'passed' where it ends without an exception, 'timed out', or 'failed'.
    """
    token = secrets.token_hex(16)
    request = json.dumps({"program": program, "token": token, "limits": LIMITS})
    with tempfile.TemporaryDirectory(prefix="evomerge-code-") as folder, tempfile.TemporaryFile() as answer:
        child = subprocess.Popen(
            [sys.executable, "-I", "-B", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=answer,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            child.communicate(request.encode() + b"\n", timeout=wait)
        except subprocess.TimeoutExpired:
            return "timed out"
        finally:
            _end(child)
        answer.seek(0)
        if answer.read(len(token) + 1) == token.encode():
            return "passed"
    return "timed out" if child.returncode in (-signal.SIGXCPU, -signal.SIGKILL) else "failed"


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ends a child with all processes that it started."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        child.kill()
    child.wait()


class CodeMetric:
    """The metric `code_eval` that tasks of lm-eval load: pass@k, each program in a child process.

    metric = CodeMetric()
    metric.compute(references=["assert f(1) == 2"], predictions=[["def f(x): return x + 1"]], k=[1])
    """

    def compute(
        self,
        predictions: Sequence[Sequence[str]],
        references: Sequence[str],
        k: Sequence[int] = (1, 10, 100),
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """Runs every prediction with its test.

        Args:
            predictions: Of each task, programs.
            references: Of each task, its test, which is run after the program.
            k: Numbers of tries.

        Returns:
            ('pass@k' -> mean over tasks of the chance that one of k programs passes, for those k that no task
            has fewer programs than; results of each task).
        """
        jobs = [
            (task, number, f"{program}\n{test}")
            for task, (programs, test) in enumerate(zip(predictions, references, strict=True))
            for number, program in enumerate(programs)
        ]
        with ThreadPoolExecutor(max_workers=_AT_ONCE) as pool:
            outcomes = list(pool.map(run, [program for _, _, program in jobs]))
        results: dict[int, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
        for (task, number, _program), outcome in zip(jobs, outcomes, strict=True):
            row: dict[str, Any] = {
                "task_id": task,
                "passed": outcome == "passed",
                "result": outcome,
                "completion_id": number,
            }
            results[task].append((number, row))
        counts = [(len(rows), sum(row["passed"] for _, row in rows)) for rows in results.values()]
        means = {
            f"pass@{tries}": math.fsum(_chance(total, right, tries) for total, right in counts) / len(counts)
            for tries in k
            if counts and all(total >= tries for total, _ in counts)
        }
        return means, results


def _chance(total: int, right: int, tries: int) -> float:
    """The chance that one of some tries among all programs is right, without putting back."""
    return 1.0 - math.comb(total - right, tries) / math.comb(total, tries)
