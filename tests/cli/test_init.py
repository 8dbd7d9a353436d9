"""`evomerge init`: flags, answers on a terminal, files that are there; from init to a finished search with
no file written by hand."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from evomerge import _yaml
from evomerge.cli import init as init_module
from evomerge.config import loading
from tests.support.command_line import Call, one_line
from tests.support.toy import REPO, zoo_folder

ITEMS = 24


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with a task of few items."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    shipped = REPO / "evaluators" / "zoo"
    config = yaml.safe_load((shipped / "zoo_lookup.yaml").read_text())
    config["task"] = "few"
    config["dataset_kwargs"]["data_files"] = {}
    for role in ("search", "validation", "test"):
        lines = (shipped / f"zoo_lookup.{role}.jsonl").read_text().splitlines()[:ITEMS]
        (folder / f"{role}.jsonl").write_text("\n".join(lines) + "\n")
        config["dataset_kwargs"]["data_files"][role] = f"{role}.jsonl"
    (folder / "few.yaml").write_text(yaml.safe_dump(config))
    return folder


def zoo_flags(*names: str) -> list[str]:
    zoo = zoo_folder()
    return [word for name in names for word in ("--model", str(zoo / name))]


def test_from_init_to_a_finished_search(tmp_path: Path, tasks: Path, call: Call) -> None:
    file = tmp_path / "mine" / "search.yaml"
    words = ["init", file, *zoo_flags("math", "base", "lang"), "--task", "few", "--include", tasks]
    code, out, err = call(*words, "--evaluations", 4, "--slurm", "--root", tmp_path / "studies")
    assert code == 0, err
    assert "base (base)" in out, "the base is found"
    assert f"evomerge run {file} --resume" in out
    settings, text = loading.load(str(file))
    assert settings.search.evaluations == 4
    assert settings.evaluation.splits == "declared"
    lines = text.splitlines()
    schema = json.loads(file.with_name(lines[0].partition("$schema=")[2]).read_text())
    assert lines[0].startswith("# yaml-language-server: $schema=")
    assert Draft202012Validator(schema).is_valid(_yaml.read(file).data)
    for key in (
        "study",
        "models",
        "base",
        "method",
        "groups",
        "weight",
        "tasks",
        "splits",
        "items",
        "evaluations",
    ):
        at = next(i for i, line in enumerate(lines) if line.lstrip().startswith(f"{key}:"))
        assert lines[at - 1].lstrip().startswith("#"), f"{key} has a comment"
    assert file.with_suffix(".slurm").stat().st_mode & 0o100
    code, out, err = call("run", file, "--allow-tasks", "--accept-floor", "--root", tmp_path / "studies")
    assert code == 0, err
    assert "lang-math" in out or "math-lang" in out
    code, out, err = call("show", f"{settings.study}/best", "--root", tmp_path / "studies")
    assert code == 0, err


def test_init_keeps_files_that_are_there(tmp_path: Path, call: Call) -> None:
    file = tmp_path / "search.yaml"
    words = ["init", file, *zoo_flags("base", "math"), "--task", "zoo_lookup"]
    file.write_text("mine")
    code, _, err = call(*words)
    assert code == 3
    assert "--force" in one_line(err, "E200")
    assert file.read_text() == "mine"
    assert call(*words, "--force")[0] == 0
    assert file.read_text() != "mine"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "needs --model for each parent and --task"),
        (["--task", "zoo_lookup"], 2, "needs --model"),
        (["--model", "results/zoo/base", "--model", "results/zoo/math"], 2, "needs --task"),
        (["--model", "results/zoo/base", "--task", "zoo_lookup"], 2, "two models or more"),
        (["--model", "a=x", "--model", "a=y", "--task", "zoo_lookup"], 2, "twice"),
        (["--from-mergekit", "a", "--from-mergekit-evolve", "b", "--task", "t"], 2, "two starts"),
        (["--from-mergekit-evolve", "none.yaml"], 2, "none.yaml"),
    ],
)
def test_what_is_missing_is_one_error_without_a_question(
    words: list[str], code: int, said: str, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    file = tmp_path / "search.yaml"
    found, _, err = call("init", file, *words)
    assert found == code
    assert said in err.strip().splitlines()[-1]
    assert not file.exists()


def test_a_task_that_does_not_exist_writes_nothing(tmp_path: Path, call: Call) -> None:
    file = tmp_path / "search.yaml"
    code, _, err = call("init", file, *zoo_flags("base", "math"), "--task", "zoo_lokup")
    assert code == 3
    assert "Did you mean 'zoo_lookup'" in err
    assert list(tmp_path.iterdir()) == []


def test_on_a_terminal_init_asks_for_what_is_missing(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo = zoo_folder()
    answers = [
        str(zoo / "base"),
        "",
        f"m={zoo / 'math'}",
        "",
        "",
        "ties",
        "zoo_lookup=2",
        "",
        "",
        "40",
        "ray",
    ]
    monkeypatch.setattr(init_module, "_is_terminal", lambda: True)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(answers) + "\n"))
    file = tmp_path / "search.yaml"
    code, _, err = call("init", file)
    assert code == 0, err
    settings, _ = loading.load(str(file))
    assert list(settings.models) == ["base", "m"]
    assert settings.method == "ties"
    assert [(t.task, t.weight) for t in settings.tasks] == [("zoo_lookup", 2.0)]
    assert settings.search.evaluations == 40
    assert (tmp_path / "search.ray.sh").is_file()


def test_the_end_of_the_answers_is_no_traceback(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(init_module, "_is_terminal", lambda: True)
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n"))
    code, _, err = call("init", tmp_path / "search.yaml")
    assert code == 130
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_models_that_are_not_here_can_be_written_unread(tmp_path: Path, call: Call) -> None:
    file = tmp_path / "search.yaml"
    words = ["--model", "org/base@main", "--model", "org/math", "--task", "zoo_lookup", "--base", "base"]
    code, _, err = call("init", file, *words, "--unread")
    assert code == 0, err
    settings, text = loading.load(str(file))
    assert settings.models["base"].revision == "main"
    assert "not read" in text


def test_a_schema_that_cannot_be_written_is_no_bug(tmp_path: Path, call: Call) -> None:
    code, _, err = call("schema", "-o", tmp_path / "missing" / "s.json")
    assert code != 1
    assert "E000" not in err
    assert "s.json" in err


def test_the_schema_is_printed_and_written(tmp_path: Path, call: Call) -> None:
    code, out, _ = call("schema")
    assert code == 0
    assert call("schema", "-o", tmp_path / "s.json")[0] == 0
    assert json.loads(out) == json.loads((tmp_path / "s.json").read_text())
