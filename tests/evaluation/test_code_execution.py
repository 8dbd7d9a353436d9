"""Programs that models write run in child processes with limits."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import pytest

from evomerge.evaluation import code_execution
from evomerge.evaluation.code_execution import CodeMetric, run


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("assert 1 + 1 == 2", "passed"),
        ("import math, re, collections, heapq\nassert math.gcd(4, 6) == 2", "passed"),
        ("if __name__ == '__main__':\n    print('x' * 100000)", "passed"),
        ("assert 1 + 1 == 3", "failed"),
        ("def f(:", "failed"),
        ("import sys\nsys.exit(0)", "failed"),
        ("import os\nos._exit(0)", "failed"),
        ("raise KeyboardInterrupt", "failed"),
        ("x = bytearray(3 << 30)", "failed"),
        ("open('big', 'wb').write(bytes(64 << 20))", "failed"),
        ("[open('f', 'w') and open(f'f{i}', 'w') for i in range(9)]\nassert input()", "failed"),
    ],
)
def test_a_program_passes_only_at_its_end(program: str, outcome: str) -> None:
    assert run(program) == outcome


def test_a_program_that_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_execution, "LIMITS", code_execution.LIMITS | {"RLIMIT_CPU": 1})
    assert run("while True: pass") == "timed out"
    assert run("import time\ntime.sleep(600)", wait=2.0) == "timed out"


def test_what_a_program_leaves_behind_is_ended_too(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    fork = "import os, time\npid = os.fork()\nif not pid:\n    time.sleep(600)\n"
    program = f"{fork}open({str(note)!r}, 'w').write(str(pid))"
    assert run(program) == "passed"
    pid = int(note.read_text())
    for _ in range(200):  # it is init's to reap
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("a process of the program lives on")


def test_a_program_sees_no_variables_and_not_the_working_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    program = f"import os\nassert 'HF_TOKEN' not in os.environ\nassert os.getcwd() != {os.getcwd()!r}"
    assert run(program) == "passed"


@pytest.mark.parametrize(("total", "right", "tries"), [(5, 2, 1), (5, 2, 3), (4, 0, 2), (4, 4, 2), (5, 4, 5)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_program(total: int, right: int, tries: int) -> None:
    programs = ["x = 1"] * right + ["x = 2"] * (total - right)
    means, results = CodeMetric().compute([programs], ["assert x == 1"], [tries, total + 1])
    draws = list(itertools.combinations(range(total), tries))
    share = sum(any(i < right for i in draw) for draw in draws) / len(draws)
    assert means == {f"pass@{tries}": pytest.approx(share)}
    assert [row["passed"] for _, row in results[0]] == [i < right for i in range(total)]
