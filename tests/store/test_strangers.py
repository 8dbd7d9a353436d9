"""A store that somebody else has made or edited: objects, scores and texts that a search did not write."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from evomerge import reports
from evomerge.errors import EvomergeError, StudyError
from evomerge.evaluation import Objective, Term
from evomerge.search import Study
from evomerge.store import Store, StudyFacts, TermFacts, integrity, score_check
from tests.support.toy import ToyPool
from tests.support.toy_search import plan

OBJECTIVE = Objective((Term("first"), Term("second", 2.0)))
FACTS = StudyFacts(
    tasks={"first": "a", "second": "b"},
    metrics={"first": "acc", "second": "acc"},
    terms={name: TermFacts(1, True, (), ((name, 1.0),)) for name in ("first", "second")},
    objective=score_check.objective_facts(OBJECTIVE),
)


@pytest.fixture(scope="module")
def finished_toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished study over the toy landscape, with the facts of a real one."""
    file = tmp_path_factory.mktemp("toy") / "trial" / "study.db"
    file.parent.mkdir()
    with Store.open(file, write=True) as store:
        store.begin("trial", 5, "study: trial\n", {}, FACTS)
        Study(plan(objective=OBJECTIVE), store, ToyPool()).run()
    return file.parent


@pytest.fixture
def toy(finished_toy: Path, tmp_path: Path) -> Path:
    """The store of a copy of the finished study."""
    return Path(shutil.copytree(finished_toy, tmp_path / "trial")) / "study.db"


def forge(file: Path, *statements: str | tuple[str, tuple[Any, ...]]) -> None:
    """Runs SQL on a store, and makes all digests anew, as somebody who read the code would."""
    db = sqlite3.connect(file)
    db.row_factory = sqlite3.Row
    for statement in statements:
        db.execute(*((statement,) if isinstance(statement, str) else statement))
    for table in integrity.SEALED:
        for row in db.execute(f"SELECT rowid AS number FROM {table}").fetchall():
            integrity.seal(db, table, row["number"])
    db.commit()
    db.close()


def read_all(file: Path) -> None:
    """All that status and show read, the check left out."""
    with Store.open(file) as store:
        reports.study_summary(store, check=False)
        reports.study_activity(store)
        reports.front(store)
        for trial in store.trials():
            reports.candidate(store, trial)


def test_a_store_of_a_search_is_ok(toy: Path) -> None:
    with Store.open(toy, write=True) as store:
        assert store.check() == "ok"
    read_all(toy)


OBJECTS = {
    "trigger": ["CREATE TRIGGER better AFTER INSERT ON trials BEGIN SELECT 1; END"],
    "view": ["CREATE VIEW best AS SELECT * FROM trials"],
    "table": ["CREATE TABLE notes (text TEXT)"],
    "index": ["CREATE INDEX by_score ON evaluations (score)"],
    "view for a table": [
        "ALTER TABLE front RENAME TO real_front",
        "CREATE VIEW front AS SELECT evaluation, point, digest FROM real_front",
    ],
    "column that is computed": [
        "DROP TABLE front",
        "CREATE TABLE front (evaluation INTEGER PRIMARY KEY REFERENCES evaluations, point TEXT NOT NULL, "
        "digest TEXT, more TEXT GENERATED ALWAYS AS (point))",
    ],
}


@pytest.mark.parametrize("what", OBJECTS)
def test_objects_that_a_store_does_not_have_are_refused(what: str, toy: Path) -> None:
    db = sqlite3.connect(toy)
    for statement in OBJECTS[what]:
        db.execute(statement)
    db.commit()
    db.close()
    for write in (False, True):
        with pytest.raises(StudyError, match=r"is not one of a study's|is not what it was"):
            Store.open(toy, write=write)


def number(file: Path, sql: str) -> Any:
    db = sqlite3.connect(file)
    try:
        return db.execute(sql).fetchone()[0]
    finally:
        db.close()


BEST = "(SELECT json_extract(outcome, '$.best.recipe') FROM study)"
SCORES: dict[str, list[str]] = {
    "metric": [
        f"UPDATE evaluations SET metrics = json_set(metrics, '$.first', 0.999) WHERE recipe = {BEST}",
    ],
    "reported score": [f"UPDATE evaluations SET reported = 0.999 WHERE recipe = {BEST} AND role = 'test'"],
    "ranking score": [
        "UPDATE evaluations SET score = 0.999 WHERE id = (SELECT min(evaluation) FROM trials "
        "WHERE generation = 1)"
    ],
    "item": [
        "UPDATE evaluations SET scores = replace(scores, '0.0', '1.0') WHERE id = "
        "(SELECT id FROM evaluations WHERE scores LIKE '%0.0%' AND role = 'test' LIMIT 1)"
    ],
    "evaluation of another": [
        "UPDATE trials SET evaluation = (SELECT max(evaluation) FROM trials) WHERE id = "
        "(SELECT min(id) FROM trials)"
    ],
    "failure": ["UPDATE evaluations SET error = 'it failed' WHERE role = 'validation'"],
    "winner": ["UPDATE study SET outcome = json_set(outcome, '$.best.test', 0.999)"],
    "reference": ["UPDATE study SET outcome = json_set(outcome, '$.references[0].validation', 0.001)"],
}


@pytest.mark.parametrize("what", SCORES)
def test_a_score_that_its_items_contradict_is_refused(what: str, toy: Path) -> None:
    """With digests that are right."""
    forge(toy, *SCORES[what])
    with Store.open(toy) as store:
        found = store.check()
    assert "contradict" in found or "is of another" in found, found
    with pytest.raises(StudyError, match="damaged"):
        Store.open(toy, write=True)


@pytest.mark.parametrize("what", ["metric", "reported score", "item"])
def test_a_candidate_whose_items_contradict_its_score_is_not_shown(what: str, toy: Path) -> None:
    forge(toy, *SCORES[what])
    with pytest.raises(StudyError, match="contradict"):
        read_all(toy)


def test_a_score_without_stored_objective_lies_among_its_metrics(toy: Path) -> None:
    """A study of a version that did not store it."""
    forge(toy, "UPDATE study SET facts = json_remove(facts, '$.objective')")
    with Store.open(toy, write=True) as store:
        assert store.check() == "ok"
    forge(toy, *SCORES["reported score"])
    with Store.open(toy) as store:
        assert "contradict" in store.check()


DEEP = "[" * 100_000 + "]" * 100_000
COLUMNS = (
    *(("study", name) for name in ("facts", "outcome", "overrides")),
    *(("trials", name) for name in ("genome", "parents")),
    *(
        ("evaluations", name)
        for name in ("metrics", "scores", "seconds", "costs", "probabilities", "logprobs")
    ),
    ("recipes", "body"),
    ("item_sets", "body"),
)


@pytest.mark.parametrize(("table", "column"), COLUMNS)
@pytest.mark.parametrize("value", [DEEP, "nul\x00", "{", "[1]", "{}", "7", '"x"', "null", "\ud800"[:0]])
def test_any_json_is_an_error_of_ours_or_none(table: str, column: str, value: str, toy: Path) -> None:
    forge(toy, (f"UPDATE {table} SET {column} = ?", (value,)))
    said: list[str] = []
    for act in (lambda: read_all(toy), lambda: Store.open(toy, write=True).close()):
        try:
            act()
        except EvomergeError as error:
            said.append(str(error))
    assert all(len(text.splitlines()) == 1 and len(text) < 1100 for text in said)
    with Store.open(toy) as store:
        store.check()


def test_a_label_with_control_characters_is_refused(toy: Path) -> None:
    forge(toy, ("UPDATE trials SET label = ? WHERE id = 1", ("\x1b[2Jmath\nbest: small/1  0.999",)))
    with pytest.raises(StudyError, match="a row cannot be read") as caught:
        read_all(toy)
    assert str(caught.value).isprintable()


def test_a_name_that_is_a_path_is_that_of_the_folder(toy: Path) -> None:
    forge(toy, "UPDATE study SET name = '../../etc/passwd', config = 'study: ../../etc/passwd'")
    with Store.open(toy) as store:
        study = store.study()
        assert study is not None
        assert study.name == "trial"
