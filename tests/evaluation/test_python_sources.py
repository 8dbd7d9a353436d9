"""What code a Python task is made of: everything below its folder, and packages by version."""

from __future__ import annotations

import json
import platform
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from evomerge.config import loading
from evomerge.errors import StudyError
from evomerge.evaluation.python_sources import sources_of
from evomerge.launch import opening
from evomerge.launch.prepare import prepare_study
from evomerge.launch.search_request import SearchRequest
from evomerge.store import Store
from tests.support.toy import in_process, search_file

TASK = """
import json
import torch
import {helper}

def size(model, tokenizer, items):
    names = [f"item {{i}}" for i in range(40)] if items is None else items
    total = float(model.model.norm.weight.float().norm())
    return {{name: {helper}.scaled(total, len(name)) for name in names}}
"""
HELPER = """
def scaled(total, length):
    import numpy
    return float(numpy.tanh(total / 100)) / length
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a search whose Python task imports a module beside it."""
    name = "sources_" + tmp_path.name.replace("-", "_")
    (tmp_path / f"{name}.py").write_text(TASK.format(helper=f"{name}_helper"))
    (tmp_path / f"{name}_helper.py").write_text(HELPER)
    file = search_file(tmp_path, "trial", evaluations=4, population=4)
    document = json.loads(file.read_text())
    document["tasks"] = [{"python": f"{name}:size", "name": "size"}]
    file.write_text(json.dumps(document))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def begun(folder: Path, resume: bool = False) -> None:
    settings, text = loading.load(str(folder / "trial.yaml"))
    study = prepare_study(
        SearchRequest(settings, text, resume=resume),
        folder / "studies",
        allowed=opening.Allowed(python=True),
        accept_floor=True,
    )
    study.pool.close()
    study.store.close()


def test_a_changed_helper_of_a_python_task_stops_a_resume(folder: Path) -> None:
    begun(folder)
    begun(folder, resume=True)
    helper = next(folder.glob("*_helper.py"))
    helper.write_text(HELPER.replace("100", "1"))
    with pytest.raises(StudyError, match=rf"{helper.name} was "):
        begun(folder, resume=True)
    helper.write_text(HELPER)
    begun(folder, resume=True)
    (folder / "part").mkdir()
    (folder / "part" / "new.py").write_text("X = 1\n")
    with pytest.raises(StudyError, match=r"part/new.py was None"):
        begun(folder, resume=True)


def test_a_changed_helper_stops_a_comparison_that_scores(folder: Path) -> None:
    (folder / "studies").mkdir()
    code, _, err = in_process("run", "trial.yaml", "--root", "studies", "--allow-python", "--accept-floor")
    assert code == 0, err
    next(folder.glob("*_helper.py")).write_text(HELPER.replace("100", "1"))
    code, _, err = in_process("sensitivity", "trial/best", "--root", "studies", "--allow-python")
    assert code == StudyError.exit_code
    assert "_helper.py" in err


def test_a_study_that_knows_of_no_sources_goes_on(folder: Path) -> None:
    begun(folder)
    settings, text = loading.load(str(folder / "trial.yaml"))
    with Store.open(folder / "studies" / "trial" / "study.db") as store:
        study = store.study()
        assert study is not None
        assert set(study.facts.sources) == {"size"}
    file = folder / "old" / "trial" / "study.db"
    file.parent.mkdir(parents=True)
    with Store.open(file, write=True) as store:
        store.begin(settings.study, 0, text, {}, replace(study.facts, sources={}))
    (folder / "studies" / "trial").rename(folder / "newer")
    (folder / "old" / "trial").rename(folder / "studies" / "trial")
    begun(folder, resume=True)


def test_folders_are_hashed_and_packages_known_by_version(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("import os, numpy as np\nfrom pkg.inner import thing\n")
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text("")
    (tmp_path / "pkg" / "inner.py").write_text("def thing():\n    import safetensors.torch\n")
    (tmp_path / "unrelated.py").write_text("import yaml\n")
    for hidden in (".venv", "__pycache__", "env"):
        (tmp_path / hidden).mkdir()
        (tmp_path / hidden / "x.py").write_text("")
    (tmp_path / "env" / "pyvenv.cfg").write_text("")
    found = sources_of("own", tmp_path / "own.py")
    files = {name for name in found if name.endswith(".py")}
    assert files == {"own.py", "pkg/__init__.py", "pkg/inner.py", "unrelated.py"}
    assert found["python"] == platform.python_version()
    for package in ("numpy", "safetensors"):
        assert found[package] == version(package)
    assert "PyYAML" not in found, "a file that the task does not import counts by its text alone"
    before = dict(found)
    shutil.rmtree(tmp_path / "env")
    assert sources_of("own", tmp_path / "own.py") == before
    (tmp_path / "pkg" / "inner.py").write_text("def thing():\n    return 2\n")
    changed = sources_of("own", tmp_path / "own.py")
    assert {name for name in before if changed.get(name) != before[name]} == {"pkg/inner.py", "safetensors"}


def test_a_module_of_a_package_is_hashed_from_the_folder_that_it_is_imported_from(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text("")
    (tmp_path / "pkg" / "own.py").write_text("from . import near\nfrom .near import x\n")
    (tmp_path / "pkg" / "near.py").write_text("import numpy\n")
    (tmp_path / "beside.py").write_text("")
    found = sources_of("pkg.own", tmp_path / "pkg" / "own.py")
    assert {"pkg/own.py", "pkg/near.py", "beside.py", "numpy"} <= set(found)


def test_an_installed_module_is_known_by_version_alone() -> None:
    import yaml

    found = sources_of("yaml", Path(yaml.__file__))
    assert found == {"PyYAML": version("PyYAML"), "python": platform.python_version()}
