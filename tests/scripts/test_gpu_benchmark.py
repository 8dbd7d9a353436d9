"""The benchmark for a lent card: no row is lost, every gpu test is named, its models are what they say."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch

from evomerge.checkpoints import total_bytes
from scripts.benchmarks import gpu, gpu_models
from scripts.benchmarks.gpu_rows import Rows
from scripts.benchmarks.gpu_test_order import position
from tests.support.toy import REPO


def test_every_row_is_in_both_files_as_soon_as_it_is_added(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "bench.jsonl", "Title", "note", minutes=1)
    for number in range(3):
        rows.add("part", f"row {number}", ms=1234.5678 * number, verdict="good")
        lines = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
        assert [line["what"] for line in lines] == [f"row {n}" for n in range(number + 1)]
        text = (tmp_path / "bench.md").read_text()
        assert text.count("| row ") == number + 1
    assert lines[1]["ms"] == 1235
    assert not list(tmp_path.glob("*.tmp"))


def test_a_part_that_fails_or_has_no_time_left_is_named_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(run: gpu.Run) -> None:
        raise ValueError("broken")

    def last(run: gpu.Run) -> None:
        run.rows.add("last", "it ran")
        run.rows._end = 0.0

    monkeypatch.setattr(gpu, "PARTS", {"first": fail, "second": last, "third": fail})
    run = gpu.Run(Rows(tmp_path / "bench.jsonl", "t", "n", minutes=1), True, tmp_path)
    gpu.measure(run, ["first", "second", "third"])
    gpu.tests(run)
    rows = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    assert [(row["part"], row["what"]) for row in rows] == [
        ("failed", "first"),
        ("last", "it ran"),
        ("left out", "third"),
        ("left out", "tests"),
    ]
    assert rows[0]["error"] == "ValueError: broken"


def test_a_dry_run_has_no_figures(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "bench.jsonl", "t", "n", minutes=1, dry=True)
    rows.add("part", "row", ms=3.5, counted=2, verdict="equal")
    row = json.loads((tmp_path / "bench.jsonl").read_text())
    assert row == {"part": "part", "what": "row", "ms": "–", "counted": 2, "verdict": "equal"}


def test_tests_run_in_the_order_of_the_command_line() -> None:
    asked = ["tests/b.py::test_two", "tests/a.py", "tests/b.py::test_one"]
    ids = ["tests/a.py::test_x", "tests/b.py::test_one[3]", "tests/b.py::test_two", "tests/c.py::test_y"]
    assert sorted(ids, key=lambda nodeid: position(nodeid, asked)) == [ids[2], ids[0], ids[1], ids[3]]


def marked(file: Path) -> set[str]:
    """Node ids of a file's tests that are marked gpu; the file itself where all are."""
    tree, name = ast.parse(file.read_text()), str(file.relative_to(REPO))
    if any(
        isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node) and "mark.gpu" in ast.unparse(node)
        for node in tree.body
    ):
        return {f"{name}::{n.name}" for n in tree.body if getattr(n, "name", "").startswith("test_")}
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    gpu_marked = [f for f in functions if any("mark.gpu" in ast.unparse(d) for d in f.decorator_list)]
    return {f"{name}::{f.name}" for f in gpu_marked}


def test_every_test_marked_gpu_is_among_those_that_the_script_runs() -> None:
    files = [file for file in (REPO / "tests").rglob("test_*.py") if "mark.gpu" in file.read_text()]
    there = set().union(*map(marked, files))
    assert len(there) > 15
    missing = {test for test in there if test not in gpu.TESTS and test.partition("::")[0] not in gpu.TESTS}
    assert not missing, "name them in TESTS of scripts/benchmarks/gpu.py"
    assert {test for test in gpu.TESTS if "::" in test} <= there


def test_models_have_real_headers_and_no_files_of_weights(tmp_path: Path) -> None:
    models = gpu_models.make("odd", tmp_path, "cpu")
    for name, parent in models.files.items():
        assert total_bytes(parent) == models.nbytes == 2 * models.parameters
        tensors = {key: models.parents[name].tensor(key) for key in parent.tensors}
        assert {key: tuple(t.shape) for key, t in tensors.items()} == {
            key: tuple(info.shape) for key, info in parent.tensors.items()
        }
    assert torch.equal(models.parents["base"].tensor("lm_head.weight"), models.live.lm_head.weight)
    base, other = (models.parents[name].tensor("lm_head.weight") for name in ("base", "a"))
    unchanged = float((base == other).float().mean())
    assert 0.05 < unchanged < 0.5
