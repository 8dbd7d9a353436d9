"""The examples of docs/extending: each diff applies to a copy of the repository, where its tests pass."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.toy import REPO

EXTENDING = REPO / "docs" / "extending"
EXAMPLES = {  # example -> test files, and which of their tests are about what it adds
    "merge-method": (
        ["tests/contracts/test_methods.py", "tests/methods/test_methods.py"],
        "test_methods and median and (float64 or zero or order or reference)",
    ),
    "optimizer": (
        ["tests/contracts/test_optimizers.py"],
        "test_optimizers and comma and (same or replay or injected or failed)",
    ),
    "stage": (
        ["tests/launch/test_stages.py", "tests/launch/test_refine_stage.py"],
        "test_stages or test_refine_stage",
    ),
    "backend": (["tests/contracts/test_backends.py"], "test_backends and unbatched"),
    "kernel": (["tests/contracts/test_kernel_backends.py"], "test_kernel_backends and half"),
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


def apply(name: str, folder: Path, *options: str) -> None:
    """Applies an example's diff to a copy of the repository."""
    applied = subprocess.run(
        ["git", "apply", "--verbose", *options, str(EXTENDING / f"{name}.diff")],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert applied.returncode == 0, applied.stderr


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository to which each diff applies; it has all of them."""
    folder = copy_of_the_repository(tmp_path_factory.mktemp("repository"))
    for name in EXAMPLES:
        apply(name, folder, "--check")
    for name in EXAMPLES:
        apply(name, folder)
    return folder


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_diff_applies_and_what_it_makes_is_python(name: str, copied: Path) -> None:
    for file in re.findall(r"^\+\+\+ b/(.*\.py)$", (EXTENDING / f"{name}.diff").read_text(), re.M):
        compile((copied / file).read_text(), file, "exec")


@pytest.mark.sweep
def test_each_contract_passes(copied: Path) -> None:
    """One process tests all examples, in one copy."""
    files = [file for of_example, _ in EXAMPLES.values() for file in of_example]
    chosen = " or ".join(f"({words})" for _, words in EXAMPLES.values())
    program = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *files, "-k", chosen]
    program += ["-m", "not sweep and not cluster"]
    env = {**os.environ, "PYTHONPATH": str(copied)}
    run = subprocess.run(program, cwd=copied, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:]
    passed = {line.partition("::")[0] for line in run.stdout.splitlines() if " PASSED" in line}
    assert passed == set(files)
