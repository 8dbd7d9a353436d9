"""A short run of scripts/validation/edges.py, in a process of its own, must find nothing wrong; and what it
calls wrong.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.validation import edges
from tests.support.sweeps import sweep

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("cases", "folders"), sweep([(4, 2), (12, 3), (40, 10)], []))
def test_odd_command_lines_and_hostile_folders_end_in_one_sentence_and_a_code(
    cases: int, folders: int, tmp_path: Path
) -> None:
    out = tmp_path / "edges.md"
    program = [sys.executable, str(REPO / "scripts" / "validation" / "edges.py"), "--cases", str(cases)]
    done = subprocess.run(
        [*program, "--folders", str(folders), "--seed", "7", "--out", str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = re.findall(r"^\| (\S+) \| (\d+) \|", out.read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == ["UTF-8", "latin-1", "ASCII"]
    assert sum(int(cases) for _, cases in rows) == cases + folders


@pytest.mark.parametrize(
    ("code", "err", "why"),
    [
        (2, "error[E100] --seed should be a number\n", ""),
        (3, "2026-01-01 x: opening models\nwarning: x\nerror[E200] no\n", ""),
        (1, "error[E000] KeyError: 'x' (a bug; -v shows where)\n", "E000"),
        (2, "Traceback (most recent call last):\n", "E000"),
        (-11, "", "exit code -11"),
        (2, "", "no message"),
        (2, "error[E100] one\nand two\n", "not one line at the end"),
        (2, "error[E100] x: Input should be a valid number\n", "words of a library"),
        (2, "error[E100] 1 validation error for Config\n", "words of a library"),
        (2, "error[E100] model \x1b[31m\n", "an escape sequence"),
    ],
)
def test_what_the_fuzz_calls_wrong(code: int, err: str, why: str) -> None:
    found = {"code": code, "err": err, "out": "", "ended": ""}
    assert edges.fault(found) == why
    assert edges.fault(found | {"ended": "hang"}) == "hang"


def test_a_case_is_a_function_of_its_number_and_the_seed() -> None:
    many = [edges.cases.case(number, 0) for number in range(200)]
    assert many == [edges.cases.case(number, 0) for number in range(200)]
    assert many != [edges.cases.case(number, 1) for number in range(200)]
    assert {case.words[0] for case in many if case.words} >= set(edges.cases.VERBS) - {""}
    changes = {edges.cases.model_case(number, 0).change.split("/")[0] for number in range(100)}
    assert changes == set(edges.cases.MODEL_CHANGES)
