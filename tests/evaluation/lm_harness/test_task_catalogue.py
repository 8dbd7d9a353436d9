"""Tasks are found by name, their data beside their YAML, and lm-eval's index of its own is read once."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import TaskIndex

from evomerge.errors import TaskError
from evomerge.evaluation.lm_harness import task_index
from evomerge.evaluation.lm_harness.sandbox import TREE
from evomerge.evaluation.lm_harness.task_catalogue import TaskCatalogue, placed
from evomerge.evaluation.lm_harness.task_index import manager_of_everything, own_index
from tests.support.lm_eval_tasks import CHOOSE, sums, write_task


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "evomerge"


def relative(folder: Path, name: str) -> None:
    """Writes a task whose data files are named from its YAML."""
    write_task(folder, name, CHOOSE, {"test": sums(9)})
    file = folder / f"{name}.yaml"
    file.write_text(file.read_text().replace(str(folder) + "/", ""))
    assert str(folder) not in file.read_text()


# ---- data files --------------------------------------------------------------------------------------------


def test_data_files_of_an_included_task_were_sought_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, elsewhere = tmp_path / "tasks", tmp_path / "elsewhere"
    relative(folder, "trial")
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    tasks, _, _ = TaskCatalogue([folder]).build("trial")
    assert len(tasks["trial"].test_docs()) == 9


def test_data_files_beside_the_working_directory_are_still_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    relative(tmp_path / "tasks", "trial")
    (tmp_path / "here").mkdir()
    for file in (tmp_path / "tasks").glob("*.jsonl"):
        file.rename(tmp_path / "here" / file.name)
    monkeypatch.chdir(tmp_path / "here")
    tasks, _, _ = TaskCatalogue([tmp_path / "tasks"]).build("trial")
    assert len(tasks["trial"].test_docs()) == 9
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TaskError, match=r"its data file 'trial-test.jsonl' is not in .*tasks nor in "):
        TaskCatalogue([tmp_path / "tasks"]).build("trial")


def test_data_files_in_all_forms_that_datasets_takes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    full = str(tmp_path / "a.jsonl")
    assert placed("a.jsonl", [tmp_path], "t") == full
    assert placed(["a.jsonl", full], [tmp_path], "t") == [full, full]
    assert placed({"test": ["*.jsonl"]}, [tmp_path], "t") == {"test": [str(tmp_path / "*.jsonl")]}
    for address in ("hf://datasets/a/b.jsonl", "https://host/a.jsonl", "zip://a.jsonl::https://host/a.zip"):
        assert placed(address, [tmp_path], "t") == address


def test_bars_and_log_lines_of_datasets_came_before_the_table(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    datasets.enable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.WARNING)
    relative(tmp_path / "tasks", "trial")
    TaskCatalogue([tmp_path / "tasks"]).build("trial")
    logging.getLogger("datasets.load").warning("Using the latest cached version of the dataset")
    assert capfd.readouterr() == ("", "")


# ---- lm-eval's own index -----------------------------------------------------------------------------------


@pytest.fixture
def small_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree with a group, a tag, functions, included settings and a date, which JSON has none of."""
    tree = tmp_path / "tree"
    for name in ("gsm8k", "hellaswag", "arc", "humaneval"):
        (tree / name).mkdir(parents=True)
        for file in (TREE / name).iterdir():
            if file.is_file() and file.suffix in (".yaml", ".py", ""):
                (tree / name / file.name).write_bytes(file.read_bytes())
    (tree / "dated.yaml").write_text("task: dated\ndataset_path: json\nmetadata: {since: 2024-01-01}\n")
    (tree / "group.yaml").write_text("group: both\ntask: [gsm8k, hellaswag]\n")
    monkeypatch.setattr(task_index, "TREE", tree)
    return tree


def fields(index: dict[str, Any]) -> dict[str, Any]:
    return {name: (e.kind, e.yaml_path, e.cfg, e.tags) for name, e in index.items()}


def test_a_plan_spent_half_its_time_on_an_index_of_14_000_files(
    small_tree: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = own_index()
    assert fields(first) == fields(TaskIndex.build([small_tree]))
    assert {"gsm8k", "hellaswag", "both", "dated", "humaneval"} <= set(first)
    assert any(entry.kind.name == "TAG" for entry in first.values())
    monkeypatch.setattr(TaskIndex, "build", lambda paths: pytest.fail("the tree was read again"))
    assert fields(own_index()) == fields(first)


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"tree": 3}', "other tree", "others may write"])
def test_an_index_that_cannot_be_trusted_is_made_anew(damage: str, small_tree: Path, cache: Path) -> None:
    own_index()
    (file,) = cache.glob("lm-eval-*-index.json")
    if damage == "other tree":
        data = json.loads(file.read_text())
        file.write_text(json.dumps(data | {"tree": [1, "/elsewhere", 0], "entries": {}}))
    elif damage == "others may write":
        data = json.loads(file.read_text())
        file.write_text(json.dumps(data | {"entries": {}}))
        file.chmod(0o666)
    else:
        file.write_text(damage)
    assert "gsm8k" in own_index()


def test_the_manager_is_the_one_that_lm_eval_makes(small_tree: Path, tmp_path: Path) -> None:
    """It takes no index, so that its attributes are set; another lm-eval may have others."""
    relative(tmp_path / "own", "gsm8k")
    folders = [tmp_path / "own"]
    ours = manager_of_everything(small_tree, folders)
    theirs = TaskManager(include_path=[str(f) for f in (small_tree, *folders)], include_defaults=False)
    assert fields(ours.task_index) == fields(theirs.task_index)
    assert ours.task_index["gsm8k"].yaml_path == tmp_path / "own" / "gsm8k.yaml"
    assert set(vars(ours)) == set(vars(theirs))
    for name in ("all_tasks", "all_subtasks", "all_groups", "all_tags"):
        assert getattr(ours, name) == getattr(theirs, name), name
