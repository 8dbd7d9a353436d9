"""A working directory whose modules carry the names of Python's own and of installed ones: no process that a
verb starts imports from it.
"""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from evomerge.export import route_checkpoint
from tests.support import shipped_routes
from tests.support.toy import REPO, environment, search_file

_OWN = {"evomerge", "tests"}
_PROGRAM = """import sys
from evomerge.cli import main

if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder with a module for each name that could be imported; each leaves a mark of its name."""
    folder, left = tmp_path / "hostile", tmp_path / "marks"
    folder.mkdir(), left.mkdir()
    installed = {name for name in importlib.metadata.packages_distributions() if name.isidentifier()}
    for name in (sys.stdlib_module_names | installed) - _OWN:
        (folder / f"{name}.py").write_text(f"open({str(left / name)!r}, 'w').close()\n")
    return folder


def run(hostile: Path, *words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs the installed program, a file in another folder, in the hostile one."""
    program = hostile.parent / "bin" / "evomerge"
    program.parent.mkdir(exist_ok=True)
    program.write_text(_PROGRAM)
    return subprocess.run(
        [sys.executable, program, *map(str, words)],
        cwd=hostile,
        env={k: v for k, v in environment().items() if k != "PYTHONSAFEPATH"} | variables,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def imported(hostile: Path) -> list[str]:
    """Names of the planted modules that were imported."""
    return sorted(path.name for path in (hostile.parent / "marks").iterdir())


def search(hostile: Path) -> Path:
    """A search of a few candidates."""
    return search_file(hostile.parent, "trial", evaluations=4, population=4)


@pytest.mark.sweep
def test_worker_processes_import_nothing_from_the_working_directory(hostile: Path) -> None:
    done = run(hostile, "run", search(hostile), "--workers", 2, "--root", hostile.parent / "studies")
    assert imported(hostile) == []
    assert done.returncode == 0, done.stderr


def test_an_export_checks_its_weights_in_a_process_that_imports_nothing_from_the_working_directory(
    hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = shipped_routes.case(shipped_routes.files(tmp_path, "llama", "float32"))
    monkeypatch.chdir(hostile)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    route_checkpoint.write_checkpoint(case.routed, case.hops, tmp_path / "out", case.donor)
    assert imported(hostile) == []


@pytest.mark.cluster
def test_workers_of_ray_import_nothing_from_the_working_directory(hostile: Path) -> None:
    where = ("--ray", "local", "--workers", 1, "--root", hostile.parent / "studies")
    done = run(hostile, "run", search(hostile), *where)
    assert imported(hostile) == []
    assert done.returncode == 0, done.stderr


def test_every_python_that_the_package_starts_leaves_out_the_working_directory() -> None:
    started = [
        (file.name, ast.unparse(node))
        for file in sorted((REPO / "evomerge").rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.List) and node.elts and ast.unparse(node.elts[0]) == "sys.executable"
    ]
    assert started
    safe = ("[sys.executable, '-P'", "[sys.executable, '-I'")  # -I implies -P
    assert [place for place in started if not place[1].startswith(safe)] == []
