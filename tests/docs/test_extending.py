"""The examples of docs/extending: each diff applies to a copy of the repository, where its tests pass."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.toy import REPO

EXTENDING = REPO / "docs" / "extending"
EXAMPLES = {
    "merge-method": (
        ["tests/contracts/test_methods.py", "tests/methods/test_methods.py"],
        "median and (float64 or zero or order or reference)",
    ),
    "optimizer": (["tests/contracts/test_optimizers.py"], "comma and (same or replay or injected or failed)"),
    "stage": (["tests/launch/test_stages.py", "tests/launch/test_refine_stage.py"], ""),
    "backend": (["tests/contracts/test_backends.py"], ""),
    "kernel": (["tests/contracts/test_kernel_backends.py"], ""),
}


def copy_of_the_repository(folder: Path) -> Path:
    """The tracked files as they are in the working tree, and the trained models by a link."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, check=True)
    for name in listed.stdout.decode().split("\0"):
        if name and (REPO / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((REPO / name).read_bytes())
    (folder / "results" / "zoo").symlink_to(REPO / "results" / "zoo")
    return folder


def test_every_diff_has_a_page_and_a_rehearsal() -> None:
    assert {file.stem for file in EXTENDING.glob("*.diff")} == set(EXAMPLES)
    assert {file.stem for file in EXTENDING.glob("*.md")} == {*EXAMPLES, "index"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_diff_adds_no_branch_and_few_files(name: str) -> None:
    text = (EXTENDING / f"{name}.diff").read_text()
    files = [line for line in text.splitlines() if line.startswith("+++ b/")]
    code = [line for line in files if line.startswith("+++ b/evomerge/")]
    changed = [
        line for line in text.splitlines() if line.startswith(("-", "+")) and line[:3] not in ("---", "+++")
    ]
    assert len(code) <= 2
    assert len(files) <= 3
    assert len([line for line in changed if line.startswith("-")]) <= 3


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_diff_applies_and_its_contract_passes(name: str, tmp_path: Path) -> None:
    files, chosen = EXAMPLES[name]
    folder = copy_of_the_repository(tmp_path)
    diff = (EXTENDING / f"{name}.diff").read_bytes()
    applied = subprocess.run(
        ["git", "apply", "--verbose", "-"], cwd=folder, input=diff, capture_output=True, check=False
    )
    assert applied.returncode == 0, applied.stderr.decode()
    program = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    program += ["-k", chosen] if chosen else []
    env = {**os.environ, "PYTHONPATH": str(folder)}
    run = subprocess.run(program, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout
