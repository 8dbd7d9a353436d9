"""The benchmarks run end to end at a tiny size, compare what they time, and write their tables."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.toy import REPO, environment, zoo_folder

HEADS = {"evaluation": "| workload |", "search": "| items × 4 tasks |"}


def table(name: str, arguments: list[str], out: Path) -> list[list[str]]:
    """The cells of the rows of the first table that a script writes."""
    program = [
        sys.executable,
        str(REPO / "scripts" / "benchmarks" / f"{name}.py"),
        "--quick",
        "--out",
        str(out),
        *arguments,
    ]
    done = subprocess.run(
        program, env=environment(), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = out.read_text().splitlines()
    assert any("figures mean nothing" in line for line in lines)
    first = next(at for at, line in enumerate(lines) if line.startswith(HEADS[name]))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[first:]]
    end = next((at for at, row in enumerate(rows) if len(row) < 2), len(rows))
    assert {len(row) for row in rows[:end]} == {len(rows[0])}
    return rows[2:end]


@pytest.mark.sweep
def test_scoring_is_timed_beside_lm_eval(tmp_path: Path) -> None:
    zoo_folder()
    rows = table("evaluation", ["--only", "zoo", "likelihood", "--repeats", "1"], tmp_path / "eval.md")
    assert [row[0].split(",")[0] for row in rows] == [
        "zoo",
        "zoo",
        "5-shot: 600 shared tokens",
        "0-shot: context of 90–110",
    ]
    assert [bool(row[1]) for row in rows] == [True, True, False, False], (
        "simple_evaluate takes whole tasks alone"
    )
    assert all(row[2] and row[3] and 0 < float(row[8].rstrip("%")) <= 100 for row in rows)
    said = (tmp_path / "eval.md").read_text()
    assert said.count("of 8 metrics 0 differ") == 2
    assert "0 of 1 choices" in said


@pytest.mark.sweep
def test_searches_are_timed(tmp_path: Path) -> None:
    zoo_folder()
    rows = table("search", ["--items", "50", "--modes", "one"], tmp_path / "search.md")
    assert [row[:3] for row in rows] == [["50", "1 worker", "8"]]
    assert rows[0][-1] == "0", "no candidate failed"


def test_a_ratio_is_the_median_of_neighbours() -> None:
    from scripts.benchmarks import evaluation as bench

    took = {
        "a": [bench.Took(10, 8), bench.Took(30, 9), bench.Took(12, 7)],
        "c": [bench.Took(1, 1), bench.Took(10, 3), bench.Took(2, 2)],
    }
    row = bench.Row("x", took, [0.9], 1.0, "a", 5.0, None, "")
    assert row.ratio("a", "wall") == 6.0  # of 10, 3 and 6
    assert row.ratio("a", "processor") == 3.5  # of 8, 3 and 3.5
