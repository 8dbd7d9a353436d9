"""The wheel alone, outside the checkout: the command starts light and the data is on board."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support.toy import REPO, environment

LIGHT = ("typer", "pydantic", "PyYAML")
PROGRAM = """
import json, sys
import evomerge
from evomerge import _resources as data
assert "site-packages" in evomerge.__file__, evomerge.__file__
print(json.dumps({
    "spaces": {name: path.read_text() for name, path in data.search_spaces().items()},
    "evaluators": {
        str(p.relative_to(data.evaluators())): p.read_text()
        for p in sorted(data.evaluators().rglob("*"))
        if p.is_file()
    },
    "heavy": sorted(
        {name.split(".")[0] for name in sys.modules} & {"torch", "numpy", "cma", "lm_eval", "transformers"}
    ),
}))
"""


def run(*words: object, cwd: Path) -> str:
    env = {k: v for k, v in environment().items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        list(map(str, words)), cwd=cwd, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=REPO)
    (built,) = folder.glob("*.whl")
    return built


def data_files(folder: str) -> dict[str, str]:
    return {
        str(p.relative_to(REPO / folder)): p.read_text()
        for p in sorted((REPO / folder).rglob("*"))
        if p.is_file()
    }


def page_files() -> list[str]:
    """Templates, style and scripts of the page of a study."""
    folder = REPO / "evomerge" / "reports" / "page"
    files = (p for kind in ("static", "templates") for p in (folder / kind).rglob("*"))
    return [str(p.relative_to(folder)) for p in files if p.is_file()]


def test_the_wheel_holds_the_package_and_its_data_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if ".dist-info/" not in n]
    package = {
        str(p.relative_to(REPO))
        for p in (REPO / "evomerge").rglob("*")
        if p.suffix in (".py", ".c", ".h", ".typed")
    }
    page = {f"evomerge/reports/page/{name}" for name in page_files()}
    data = {
        f"evomerge/_data/{Path(folder).name}/{name}"
        for folder in ("search_spaces", "evaluators", "scripts/cluster")
        for name in data_files(folder)
    }
    assert set(names) == package | page | data
    assert len(page) >= 15
    assert len(data) >= 5
    assert len(set(names)) == len(names)


@pytest.mark.skipif(os.name != "posix", reason="paths of a posix environment")
def test_the_wheel_runs_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    place = tmp_path / "env"
    venv.create(place, with_pip=False)
    python = place / "bin" / "python"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--disable-pip-version-check",
    ]
    run(*pip, *LIGHT, cwd=tmp_path)
    run(*pip, "--no-deps", wheel, cwd=tmp_path)
    away = tmp_path / "away"
    away.mkdir()
    shown = run(place / "bin" / "evomerge", "--help", cwd=away)
    for verb in ("run", "resume", "status", "show", "export", "merge"):
        assert verb in shown
    assert run(python, "-m", "evomerge", "--version", cwd=away).startswith("evomerge ")
    found = json.loads(run(python, "-c", PROGRAM, cwd=away))
    assert {f"{name}.yaml": text for name, text in found["spaces"].items()} == data_files("search_spaces")
    assert found["evaluators"] == data_files("evaluators")
    assert found["heavy"] == []
    assert list(away.iterdir()) == []
