"""A study is its folder: renamed, copied, moved with or without its models, it goes on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from evomerge.store import Store
from tests.support.toy import in_process, search_file, stored_rows, zoo_folder

MODELS = ("base", "math", "lang", "string")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project: models/, searches/trial.yaml that names them by ../models, and its finished study.

    Run from another folder. To be copied, not written to.
    """
    project = tmp_path_factory.mktemp("made") / "project"
    for name in MODELS:
        shutil.copytree(zoo_folder() / name, project / "models" / name)
    (project / "searches").mkdir()
    file = search_file(project / "searches", "trial", evaluations=8)
    settings = json.loads(file.read_text())
    settings["models"] = {name: f"../models/{name}" for name in MODELS}
    file.write_text(yaml.safe_dump(settings, sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVOMERGE_THREADS", "1")
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        code, _, err = in_process("run", file, "--root", project / "results")
    assert code == 0, err
    return project


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The project itself for a test, in its place; the working directory is another."""
    kept = tmp_path / "kept"
    shutil.copytree(made, kept)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("EVOMERGE_THREADS", "1")
    monkeypatch.setenv("COLUMNS", "200")
    yield made
    shutil.rmtree(made)
    shutil.copytree(kept, made)


def trials(store: Path) -> int:
    with Store.open(store) as opened:
        return opened.count_trials()


def test_a_renamed_study_goes_on_under_its_new_name(project: Path) -> None:
    root = project / "results"
    before = stored_rows(root / "trial" / "study.db")
    (root / "trial").rename(root / "old")
    code, out, err = in_process("status", "old", "--root", root)
    assert code == 0, err
    assert out.startswith("old: done")
    assert "best: old/" in out
    code, out, err = in_process("resume", "old", "--evaluations", "+8", "--root", root)
    assert code == 0, err
    assert "old: done, 16 evaluations" in out
    assert "evomerge export old/best" in out
    assert sorted(p.name for p in root.iterdir()) == ["old"], "nothing begins under the name of before"
    after = stored_rows(root / "old" / "study.db")
    assert after["trials"][: len(before["trials"])] == before["trials"]
    assert after["study"][0]["name"] == "old"
    assert 'study: "old"' in after["study"][0]["config"]


def test_a_copied_study_goes_on_beside_the_first(project: Path) -> None:
    root = project / "results"
    before = stored_rows(root / "trial" / "study.db", ())
    shutil.copytree(root / "trial", root / "second")
    code, out, err = in_process("resume", "second", "--evaluations", "+8", "--root", root)
    assert code == 0, err
    assert "second: done, 16 evaluations" in out
    assert stored_rows(root / "trial" / "study.db", ()) == before


def test_run_goes_on_with_a_renamed_study_too(project: Path) -> None:
    root = project / "results"
    (root / "trial").rename(root / "old")
    words = ("run", project / "searches" / "trial.yaml", "--study", "old", "--resume", "--root", root)
    code, out, err = in_process(*words)
    assert code == 0, err
    assert "old: done, 8 evaluations" in out


def test_a_folder_that_is_no_name_of_a_study_is_refused_with_the_reason(project: Path) -> None:
    root = project / "results"
    (root / "trial").rename(root / "trial (copy)")
    code, out, err = in_process("status", "trial (copy)", "--root", root)
    assert code == 0, err
    code, out, err = in_process("resume", "trial (copy)", "--root", root)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "'trial (copy)'" in err
    assert "rename the folder" in err


def test_paths_of_models_are_relative_to_the_search_file_wherever_it_is_exported(
    project: Path, tmp_path: Path
) -> None:
    code, _, err = in_process("export", "trial/best", tmp_path / "out", "--root", project / "results")
    assert code == 0, err
    assert str(project / "models" / "math") in (tmp_path / "out" / "recipe.yaml").read_text()
    code, _, err = in_process("merge", tmp_path / "out" / "recipe.yaml", tmp_path / "model")
    assert code == 0, err
    code, _, err = in_process("plan", project / "searches" / "trial.yaml")
    assert code == 0, err


def test_models_that_moved_together_are_found_by_one_of_them(project: Path, tmp_path: Path) -> None:
    root = project / "results"
    (project / "models").rename(tmp_path / "new")
    for words in (("resume", "trial", "--evaluations", "+8"), ("export", "trial/best", tmp_path / "out")):
        code, out, err = in_process(*words, "--root", root)
        assert (code, out) == (3, ""), err
        assert "--models base=PATH" in err
        assert len([line for line in err.splitlines() if line.startswith("error")]) == 1
    given = ("--models", f"base={tmp_path / 'new' / 'base'}")
    code, _, err = in_process("export", "trial/best", tmp_path / "out", *given, "--root", root)
    assert code == 0, err
    code, out, err = in_process("resume", "trial", "--evaluations", "+8", *given, "--root", root)
    assert code == 0, err
    assert "16 evaluations" in out
    code, _, err = in_process("export", "trial/best", tmp_path / "again", "--root", root)
    assert code == 0, "the study has learnt where its models are"
    assert str(tmp_path / "new" / "math") in (tmp_path / "again" / "recipe.yaml").read_text()


def test_a_project_that_moved_as_a_whole_finds_its_models(project: Path, tmp_path: Path) -> None:
    shutil.copytree(project, tmp_path / "moved")
    (project / "models").rename(project / "gone")
    code, _, err = in_process(
        "export", "trial/best", tmp_path / "out", "--root", tmp_path / "moved" / "results"
    )
    assert code == 0, err
    assert str(tmp_path / "moved" / "models") in (tmp_path / "out" / "recipe.yaml").read_text()


def test_another_model_in_the_place_of_one_is_refused(project: Path, tmp_path: Path) -> None:
    root, models = project / "results", project / "models"
    before = stored_rows(root / "trial" / "study.db", ())
    for words in (("resume", "trial", "--evaluations", "+8"), ("export", "trial/best", tmp_path / "out")):
        code, out, err = in_process(*words, "--models", f"math={models / 'lang'}", "--root", root)
        assert (code, out) == (2, ""), err
        assert "math" in err
        assert "sha256" in err or "not the one" in err
        code, out, err = in_process(*words, "--models", "maths=x", "--root", root)
        assert (code, out) == (2, ""), err
        assert "Did you mean 'math'" in err
        code, out, err = in_process(*words, "--models", "math", "--root", root)
        assert (code, out) == (2, ""), err
        assert "NAME=PATH" in err
    assert stored_rows(root / "trial" / "study.db", ()) == before
    assert os.listdir(tmp_path / "here") == []
