"""Which way a metric goes: from the metric, the task's file or the search file, never guessed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evomerge.checkpoints import Checkpoint
from evomerge.config import loading
from evomerge.errors import TaskError
from evomerge.evaluation.lm_harness.task_loading import TaskSpec
from evomerge.launch import opening
from evomerge.merging import model_loading
from evomerge.store.study_facts import StudyFacts, TermFacts
from tests.support.lm_eval_tasks import CHOOSE, GENERATE, load, write_task
from tests.support.toy import search_file, zoo_folder

OWN = """
def letters(doc, results):
    return {"letters": float(len(results[0]))}
"""
UNDECLARED: dict[str, Any] = {
    key: value for key, value in GENERATE.items() if key not in ("filter_list", "metric_list")
} | {
    "process_results": "!function own.letters",
    "metric_list": [{"metric": "letters", "aggregation": "mean"}],
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return model_loading.load_tokenizer(Checkpoint(zoo_folder() / "base"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write_task(tmp_path / "tasks", "undeclared", UNDECLARED)
    (folder / "own.py").write_text(OWN)
    return folder


def test_a_metric_without_a_direction_is_asked_about_and_not_minimised(folder: Path, tokenizer: Any) -> None:
    with pytest.raises(TaskError, match=r"'letters'.*higher_is_better: true or false"):
        load(folder, tokenizer, TaskSpec("undeclared", splits="declared"))


@pytest.mark.parametrize("higher", [True, False])
def test_the_search_files_direction_is_taken_where_the_metric_has_none(
    folder: Path, tokenizer: Any, higher: bool
) -> None:
    harness = load(folder, tokenizer, TaskSpec("undeclared", splits="declared", higher_is_better=higher))
    assert harness.sign("undeclared") == (1 if higher else -1)


def test_a_direction_against_the_metrics_own_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    folder = write_task(tmp_path / "tasks", "choose", CHOOSE)
    harness = load(folder, tokenizer, TaskSpec("choose", splits="declared", higher_is_better=True))
    assert harness.sign("choose") == 1
    with pytest.raises(TaskError, match=r"'acc'.*higher is better.*remove higher_is_better"):
        load(folder, tokenizer, TaskSpec("choose", splits="declared", higher_is_better=False))


def test_the_key_of_the_search_file_reaches_the_task(folder: Path, tmp_path: Path) -> None:
    file = search_file(tmp_path, "asked", include=[str(folder)])
    text = file.read_text().replace('"zoo_arithmetic"', '"undeclared", "higher_is_better": false')
    file.write_text(text)
    settings, _ = loading.load(str(file))
    opened = opening.open_search(settings, opening.Allowed(tasks=True))
    assert opened.harness.sign("undeclared") == -1


def test_a_study_that_was_begun_by_a_guess_goes_on_by_it(folder: Path, tmp_path: Path) -> None:
    file = search_file(tmp_path, "old", include=[str(folder)])
    file.write_text(file.read_text().replace("zoo_arithmetic", "undeclared"))
    settings, _ = loading.load(str(file))
    stored = StudyFacts(terms={"undeclared": TermFacts(-1, True, (), (("undeclared", 1.0),))})
    opened = opening.open_search(settings, opening.Allowed(tasks=True), stored)
    assert opened.harness.sign("undeclared") == -1
