"""The parts of scripts/validation/real_model.py on the zoo: what agrees is equal, what does not is counted.

The zoo's models and a finished study stand in for the real ones; lm-eval's command line runs in this process.
"""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.validation import lm_eval_command, real_model
from scripts.validation.real_model_parts import items, searches
from tests.support.toy import REPO, in_process, zoo_folder

INCLUDE = REPO / "evaluators"
COUNTS = {"zoo_lookup": 6, "zoo_arithmetic": 5, "real_mmlu_anatomy": 1}
Done = subprocess.CompletedProcess[str]


@pytest.fixture
def command_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that the script starts run in this process."""
    from lm_eval.__main__ import cli_evaluate

    others = subprocess.run

    def run(words: list[str], **options: Any) -> Done:
        if "export" in words:
            code, out, err = in_process(*words[words.index("export") :])
            return subprocess.CompletedProcess(words, code, out, err)
        if "lm_eval" not in words:
            return others(words, **options)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", words[words.index("lm_eval") :])
            cli_evaluate()
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.chdir(REPO)
    monkeypatch.setenv("EVOMERGE_THREADS", "1")
    monkeypatch.setattr(subprocess, "run", run)


@pytest.mark.usefixtures("command_lines")
def test_items_are_equal_to_the_command_lines_and_another_models_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = zoo_folder() / "lang"
    rows = items.compare(folder, "float32", COUNTS, INCLUDE, tmp_path / "log")
    assert [(row.task, row.items, row.differ) for row in rows] == [(t, n, 0) for t, n in COUNTS.items()]
    assert [(row.texts, row.other_texts) for row in rows] == [(0, 0), (5, 0), (0, 0)]
    assert all(row.ours == pytest.approx(row.theirs) for row in rows)
    assert 0 < sum(row.ours for row in rows) < len(rows), "answers are neither all right nor all wrong"

    with monkeypatch.context() as patch:
        patch.setattr(lm_eval_command, "run", lambda *_: None)  # the log is the other model's
        rows = items.compare(zoo_folder() / "math", "float32", COUNTS, INCLUDE, tmp_path / "log")
    assert sum(row.differ for row in rows) > 0
    assert sum(row.other_texts for row in rows) > 0


@pytest.mark.usefixtures("command_lines")
def test_an_export_scores_what_is_stored_but_for_the_item_that_is_changed_here(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged = lm_eval_command.values

    def one_other(out: Path, task: str) -> dict[str, float]:
        found = logged(out, task)
        first = next(iter(found))
        return found | ({first: 1 - found[first]} if task == "zoo_lookup" else {})

    monkeypatch.setattr(lm_eval_command, "values", one_other)
    root = Path(shutil.copytree(finished, tmp_path / "root"))
    found = searches.exported(root, "small", INCLUDE)
    assert (found.items, found.differ) == (32, 1)
    assert abs(found.score - found.again) == pytest.approx(1 / 32)
    assert 1 / 32 < found.score < 31 / 32
    assert real_model._export(real_model.asdict(found))[1] == 1


@pytest.mark.parametrize("is_changed", [False, True])
def test_a_row_that_a_kill_changed_is_found(
    is_changed: bool, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(file: Path, root: Path) -> None:
        if not (root / "small").exists():
            shutil.copytree(finished / "small", root / "small")
        elif is_changed:
            connection = sqlite3.connect(root / "small" / "study.db")
            connection.execute("UPDATE trials SET slot = 999 WHERE rowid = 1")
            connection.commit()
            connection.close()

    def start(file: Path, root: Path) -> subprocess.Popen[str]:
        words = f"sleep 0.2; mkdir -p {root}; cp -r {finished / 'small'} {root}; exec sleep 60"
        return subprocess.Popen(["sh", "-c", words], stderr=subprocess.PIPE, text=True)

    monkeypatch.setattr(searches, "run", run)
    monkeypatch.setattr(searches, "start", start)
    if is_changed:
        with pytest.raises(AssertionError, match="trials lost rows"):
            searches.killed(finished / "small.yaml", tmp_path, (3,))
    else:
        broken = searches.killed(finished / "small.yaml", tmp_path, (3,))
        assert broken.other == ()
        assert broken.stored == (broken.evaluations,)
        assert broken.tables > 5


def test_the_report_counts_what_is_not_equal() -> None:
    row = {"task": "t", "metric": "acc", "items": 4, "differ": 1, "ours": 0.5, "theirs": 0.75, "seconds": 1.0}
    export = {"study": "s", "winner": "search", "score": 0.5, "again": 0.5, "items": 4, "differ": 0}
    broken = {"evaluations": 60, "stored": (25,), "tables": 9, "other": ("trials",)}
    made = {"seconds": 60.0, "commit": "abc"}
    text, wrong = real_model.report(
        {
            "items": {"rows": [row], **made},
            "killed": {"broken": broken, "export": export, **made},
            "gguf": {"rounding": 0.5, "export": export | {"again": 0.25}, **made},
        }
    )
    assert wrong == 1 + 1 + 2
    assert "3 of 4 parts done, 4 differences" in text
    assert "those of trials are not" in text


def test_its_tasks_are_there_with_their_sources() -> None:
    assert len(real_model.COUNTS) == 10
    for task in real_model.COUNTS:
        folder = INCLUDE / "real" / task
        assert "Source:" in (folder / "README.md").read_text()
        assert (folder / f"{task}.yaml").read_text().count(f"evaluators/real/{task}/{task}.") == 3
