"""What the parents score before a search begins: tasks without a signal, tasks without a common unit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from evomerge.config import loading
from evomerge.errors import ConfigError, TaskError
from evomerge.launch.dry_run import plan_search
from evomerge.launch.opening import Allowed
from evomerge.launch.prepare import prepare_study
from evomerge.launch.search_request import SearchRequest
from evomerge.store import Store
from tests.support.lm_eval_tasks import CHOOSE, GENERATE, LIKELIHOOD, ROLLING, write_task
from tests.support.toy import REPO, in_process, search_file

ALL = Allowed(python=True, tasks=True)
NEVER = GENERATE | {"doc_to_target": "{{answer}} apples"}
OWN = """
ITEMS = [f"item {i}" for i in range(50)]

def constant(model, tokenizer):
    return {item: 0.01 * i for i, item in enumerate(ITEMS)}

def large(model, tokenizer):
    total = float(model.get_input_embeddings().weight.float().abs().sum())
    return {item: total + i for i, item in enumerate(ITEMS)}
"""


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVOMERGE_THREADS", "1")
    monkeypatch.chdir(REPO)


def written(tmp_path: Path, tasks: list[dict[str, Any]], items: int = 8, **changes: Any) -> Path:
    """A search file over these tasks, and those of the folder beside it."""
    file = search_file(tmp_path, "first", evaluations=8, include=[str(tmp_path / "tasks")], items=items)
    (tmp_path / "tasks").mkdir(exist_ok=True)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tasks": tasks} | changes))
    return file


def refusal(file: Path, tmp_path: Path) -> str:
    settings, text = loading.load(str(file))
    with pytest.raises((TaskError, ConfigError)) as caught:
        prepare_study(SearchRequest(settings, text), tmp_path / "root", allowed=ALL)
    assert not (tmp_path / "root" / "first").exists(), "nothing is begun"
    return str(caught.value)


def test_a_task_at_its_floor_is_named_before_the_search_and_asks_for_a_flag(tmp_path: Path) -> None:
    file = written(tmp_path, [{"task": "zoo_lookup"}, {"task": "never"}], items=30)
    write_task(tmp_path / "tasks", "never", NEVER)
    said = refusal(file, tmp_path)
    assert "task 'never': 0 of 30 items right for each of base, math, lang, string" in said
    assert " apples'" in said, "the target is shown"
    assert "answered '" in said
    assert "--accept-floor" in said
    assert "zoo_lookup" not in said
    root = tmp_path / "root"
    code, out, err = in_process("run", file, "--root", root, "--allow-tasks", "--accept-floor")
    assert code == 0, err
    report = (root / "first" / "report.md").read_text()
    assert "task 'never': 0 of 30 items right for each of base, math, lang, string" in report
    assert "task never: no parent had it" in report
    assert "task never: no parent had it" in out
    with Store.open(root / "first" / "study.db") as store:
        assert store.study() is not None
    code, out, err = in_process("resume", "first", "--root", root, "--allow-tasks")
    assert code == 0, err


def test_a_search_in_which_all_score_alike_announces_no_winner(tmp_path: Path) -> None:
    file = written(tmp_path, [{"task": "never"}], items=30)
    write_task(tmp_path / "tasks", "never", NEVER)
    root = tmp_path / "root"
    code, out, err = in_process("run", file, "--root", root, "--allow-tasks", "--accept-floor")
    assert code == 0, err
    title, *rest = (root / "first" / "report.md").read_text().splitlines()
    assert title.startswith("# first: no winner: all ")
    assert (
        "score alike (0.000 on search items and 0.000 on validation items), so nothing was learned" in title
    )
    assert "## The best candidate" not in rest
    assert "score alike (0.000 on search items" in out
    assert not re.search(r"^best: ", out, re.MULTILINE)
    assert "evomerge export" not in out
    code, out, err = in_process("status", "--root", root)
    assert "best none: all score 0.000" in out


def test_a_filter_that_finds_no_answer_is_said(tmp_path: Path) -> None:
    none = GENERATE | {
        "filter_list": [
            {
                "name": "boxed",
                "filter": [{"function": "regex", "regex_pattern": "boxed (.*)"}, {"function": "take_first"}],
            }
        ]
    }
    file = written(tmp_path, [{"task": "boxed"}])
    write_task(tmp_path / "tasks", "boxed", none)
    said = refusal(file, tmp_path)
    assert "filter 'boxed' gave '[invalid]' for 8 of 8" in said


def test_a_task_that_is_the_same_for_every_parent_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "floor_own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    file = written(tmp_path, [{"task": "zoo_lookup"}, {"name": "same", "python": "floor_own:constant"}])
    said = refusal(file, tmp_path)
    assert "task 'same': each of base, math, lang, string has the same value on every one of 8 items" in said


def test_parents_are_not_scored_twice(tmp_path: Path) -> None:
    file = search_file(tmp_path, "first", evaluations=8)
    code, _, err = in_process("run", file, "--root", tmp_path / "root")
    assert code == 0, err
    with Store.open(tmp_path / "root" / "first" / "study.db") as store:
        parents = [t.recipe_id for t in store.trials() if t.origin == "parent"]
        attempts = [a["recipe"] for a in _rows(store, "attempts")]
        evaluations = [e["recipe"] for e in _rows(store, "evaluations") if e["role"] == "search"]
    for recipe in parents:
        assert evaluations.count(recipe) == 1
        assert attempts.count(recipe) == 3, "once for each role"


def _rows(store: Store, table: str) -> list[dict[str, Any]]:
    import sqlite3

    connection = sqlite3.connect(store.path)
    connection.row_factory = sqlite3.Row
    try:
        return [dict(row) for row in connection.execute(f"SELECT * FROM {table}")]
    finally:
        connection.close()


@pytest.mark.parametrize("kind", ["mean", "worst"])
def test_an_accuracy_and_a_perplexity_have_no_mean(tmp_path: Path, kind: str) -> None:
    file = written(tmp_path, [{"task": "zoo_lookup"}, {"task": "rolling"}], objective=kind)
    write_task(tmp_path / "tasks", "rolling", ROLLING)
    said = refusal(file, tmp_path)
    assert "'zoo_lookup'" in said
    assert "'rolling'" in said
    assert "word_perplexity" in said
    with pytest.raises(ConfigError, match="word_perplexity"):
        plan_search(loading.load(str(file))[0], allowed=ALL)


def test_weights_that_are_written_say_what_a_unit_is_worth(tmp_path: Path) -> None:
    tasks = [{"task": "choose", "weight": 1}, {"task": "rolling", "weight": 0.01}]
    file = written(tmp_path, tasks)
    write_task(tmp_path / "tasks", "rolling", ROLLING)
    write_task(tmp_path / "tasks", "choose", CHOOSE)
    assert plan_search(loading.load(str(file))[0], allowed=ALL)["tasks"][1]["weight"] == 0.01


def test_two_metrics_of_one_unit_have_a_mean(tmp_path: Path) -> None:
    file = written(tmp_path, [{"task": "likelihood"}, {"task": "rolling"}])
    write_task(tmp_path / "tasks", "rolling", ROLLING)
    write_task(tmp_path / "tasks", "likelihood", LIKELIHOOD)
    assert len(plan_search(loading.load(str(file))[0], allowed=ALL)["tasks"]) == 2


def test_numbers_far_outside_those_of_an_accuracy_have_no_mean_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "large_own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    file = written(tmp_path, [{"task": "zoo_lookup"}, {"name": "large", "python": "large_own:large"}])
    said = refusal(file, tmp_path)
    assert "'zoo_lookup'" in said
    assert "'large'" in said
    assert "weight" in said


def test_few_items_that_are_alike_by_chance_are_no_floor(tmp_path: Path) -> None:
    file = search_file(tmp_path, "first", evaluations=8)  # zoo_cross: 0 of 8 for every parent
    settings, text = loading.load(str(file))
    study = prepare_study(SearchRequest(settings, text), tmp_path / "root", allowed=ALL)
    study.pool.close()
    study.store.close()
