"""The study file: what goes in comes out, one writer at a time, and nothing acknowledged is ever lost."""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import EvomergeError, StudyError
from evomerge.evaluation import Evaluation, Items, ItemScore
from evomerge.recipes import Recipe
from evomerge.store import (
    NewEvaluation,
    NewTrial,
    Outcome,
    Store,
    StudyFacts,
    Trial,
    TrialReader,
    integrity,
    item_set_id,
)
from evomerge.store.migrations import MIGRATIONS, READABLE_FROM
from tests.support.toy import stored_rows, weight_space

SPACE = weight_space()
ITEMS: Items = {"first": ("a", "b"), "second": ("c",)}


def recipe(gene: float = 0.0) -> Recipe:
    return SPACE.decode([gene] * len(SPACE.axes))


def evaluation(of: Recipe, items: Items = ITEMS, value: float = 0.5, error: str | None = None) -> Evaluation:
    if error:
        return Evaluation(of.id, (), {}, {"merge": 0.25}, error)
    scores = tuple(
        ItemScore(task, item, value + i / 7) for task, ids in items.items() for i, item in enumerate(ids)
    )
    return Evaluation(of.id, scores, dict.fromkeys(items, value / 3), {"merge": 0.25, "score": 1 / 3})


def add(
    store: Store,
    generation: int,
    slot: int,
    of: Recipe,
    items: Items = ITEMS,
    error: str | None = None,
    **more: Any,
) -> Trial:
    given: dict[str, Any] = {
        "origin": "sampled",
        "label": None,
        "genome": (0.1, -1e-17),
        "parents": (1, 2),
    } | more
    score = None if error else 1 / 3
    return store.add_trial(
        NewTrial(
            generation=generation,
            slot=slot,
            recipe=of,
            items=items,
            evaluation=evaluation(of, items, error=error),
            score=score,
            **given,
        )
    )


@pytest.fixture
def store(file: Path):
    with Store.open(file, write=True) as opened:
        opened.begin(
            "trial",
            2**31 - 1,
            "study: trial\n",
            {"evaluations": 7},
            StudyFacts.from_json({"axes": ["é"], "n": 1, "none": None}),
        )
        yield opened


# ---- what goes in comes out ------------------------------------------------------------------------------


def test_the_study_row_comes_back(store: Store) -> None:
    row = store.study()
    assert row is not None
    assert (row.name, row.seed, row.config, row.state, row.outcome) == (
        "trial",
        2**31 - 1,
        "study: trial\n",
        "running",
        None,
    )
    assert row.overrides == {"evaluations": 7}
    assert row.facts == StudyFacts(axes=("é",), extra={"n": 1, "none": None})
    moved = replace(row.facts, files={"include": ("/new/tasks",)})
    store.set_config("trial", "study: trial # more\n", {"evaluations": 9, "seed": 1}, moved)
    store.set_state("paused")
    row = store.study()
    assert row is not None
    assert (row.config, row.overrides, row.state) == (
        "study: trial # more\n",
        {"evaluations": 9, "seed": 1},
        "paused",
    )
    assert row.facts.files == {"include": ["/new/tasks"]}
    store.finish(Outcome({"id": 3, "recipe": "r", "test": 1 / 3}, extra={"lead": None}))
    row = store.study()
    assert row is not None
    assert (row.state, row.outcome) == (
        "done",
        Outcome({"id": 3, "recipe": "r", "test": 1 / 3}, extra={"lead": None}),
    )


def test_a_study_begins_once(store: Store) -> None:
    with pytest.raises((sqlite3.IntegrityError, StudyError)):
        store.begin("other", 0, "", {}, StudyFacts())


def test_a_trial_comes_back_to_the_bit(store: Store, file: Path) -> None:
    genome = (0.1, -0.0, 1e-300, 2.0**-14, math.pi, -1e17)
    one = add(
        store, 3, 5, recipe(0.2), genome=genome, parents=(4, 2, 9), origin="injected", label="TIES .5, sum"
    )
    two = add(store, 3, 6, recipe(0.3), genome=None, parents=(), origin="hand", error="it broke")
    assert one == Trial(
        1, 3, 5, "injected", "TIES .5, sum", genome, (4, 2, 9), recipe(0.2).id, 1 / 3, None,
        {"first": 0.5 / 3, "second": 0.5 / 3}, {"merge": 0.25, "score": 1 / 3}, reported=1 / 3,
    )  # fmt: skip
    assert two == Trial(
        2, 3, 6, "hand", None, None, (), recipe(0.3).id, None, "it broke", {}, {"merge": 0.25}
    )
    assert store.trial(1) == store.trial_at(3, 5) == one
    assert store.trial_at(3, 7) is None
    with Store.open(file) as reader:
        assert reader.trials() == [one, two]
        assert reader.recipe(one.recipe_id) == recipe(0.2)
        scored = reader.evaluation(one.recipe_id, "search", ITEMS)
        assert scored is not None
        assert (scored.score, scored.evaluation) == (1 / 3, evaluation(recipe(0.2)))
        assert reader.evaluations(two.recipe_id)[0][1].evaluation == evaluation(recipe(0.3), error="it broke")


def test_an_empty_genome_is_not_a_missing_one(store: Store) -> None:
    assert add(store, 1, 0, recipe(), genome=()).genome == ()


def test_evaluations_outside_the_search_come_back(store: Store) -> None:
    store.add_evaluation(NewEvaluation(recipe(), "validation", ITEMS, evaluation(recipe(), value=0.7), 0.7))
    store.add_evaluation(NewEvaluation(recipe(), "test", ITEMS, evaluation(recipe(), error="no"), None))
    assert [(role, s.score) for role, s in store.evaluations(recipe().id)] == [
        ("validation", 0.7),
        ("test", None),
    ]
    assert store.count_evaluations() == {"validation": 1, "test": 1, "failed": 1}
    assert store.count_trials() == 0


def test_trials_come_in_the_order_of_generation_and_slot(store: Store) -> None:
    places = [(g, s) for g in range(3) for s in range(4)]
    for g, s in random.Random(1).sample(places, len(places)):
        add(store, g, s, recipe(g + s / 10))
    assert [(t.generation, t.slot) for t in store.trials()] == places
    with pytest.raises(StudyError, match="no candidate 13; it has 1 to 12"):
        store.trial(13)
    with pytest.raises(StudyError, match="no recipe"):
        store.recipe("0" * 16)


def test_a_reader_gives_what_it_gave_for_rows_that_are_as_they_were(store: Store, file: Path) -> None:
    reader = TrialReader()
    add(store, 1, 0, recipe(0.1))
    add(store, 1, 1, recipe(0.2))
    first = store.trials(reader)
    add(store, 0, 0, recipe(0.3), origin="parent", label="base")
    with closing(sqlite3.connect(file)) as other, other:
        other.execute("UPDATE trials SET dropped = 1 WHERE slot = 1")
    second = store.trials(reader)
    assert second == store.trials()
    assert [trial.generation for trial in second] == [0, 1, 1]
    assert second[1] is first[0]
    assert (first[1].dropped, second[2].dropped) == (None, 1)


def test_soft_scores_come_back_to_the_bit(store: Store, file: Path) -> None:
    scores = (
        ItemScore("first", "a", 1.0, 0.1, -1 / 3),
        ItemScore("first", "b", 0.0, None, -1e-300),
        ItemScore("second", "c", 0.5),
    )
    whole = Evaluation(recipe().id, scores, {"first": 0.5, "first:probability": 0.1, "second": 0.5}, {})
    trial = store.add_trial(
        NewTrial(
            generation=1,
            slot=0,
            origin="sampled",
            label=None,
            genome=None,
            parents=(),
            recipe=recipe(),
            items=ITEMS,
            evaluation=whole,
            score=0.3,
            reported=0.5,
            dropped=2,
            whole=40,
            violation=0.25,
        )
    )
    assert (trial.score, trial.reported, trial.dropped, trial.whole, trial.violation) == (
        0.3,
        0.5,
        2,
        40,
        0.25,
    )
    with Store.open(file) as reader:
        assert reader.scored(trial).evaluation == whole
        assert reader.scored(trial).reported == 0.5
        assert reader.trial(trial.id) == trial
    assert [row["probabilities"] for row in stored_rows(file)["evaluations"]] == ["[0.1, null, null]"]


def test_rungs_are_kept_apart_from_what_is_shown(store: Store) -> None:
    store.add_evaluation(NewEvaluation(recipe(), "rung", ITEMS, evaluation(recipe()), None))
    store.add_evaluation(
        NewEvaluation(recipe(), "rung", {"first": ("z",)}, evaluation(recipe(), error="no"), None)
    )
    found = store.evaluation(recipe().id, "rung", ITEMS)
    assert found is not None
    assert (found.score, found.evaluation) == (None, evaluation(recipe()))
    assert store.evaluation(recipe().id, "search", ITEMS) is None
    assert store.evaluations(recipe().id) == []
    assert store.count_evaluations() == {"rung": 2, "failed": 0}


# ---- what is equal is stored once ------------------------------------------------------------------------


def test_a_recipe_on_the_same_items_is_stored_once(store: Store, file: Path) -> None:
    first = add(store, 1, 0, recipe())
    second = add(store, 2, 1, recipe(), genome=(9.0,))
    store.add_evaluation(NewEvaluation(recipe(), "search", ITEMS, evaluation(recipe(), value=0.9), 0.9))
    assert (first.id, second.id) == (1, 2)
    assert second.score == first.score == 1 / 3, "the first answer stands"
    rows = stored_rows(file)
    assert [len(rows[t]) for t in ("recipes", "item_sets", "evaluations", "trials")] == [1, 1, 1, 2]


def test_other_items_roles_and_recipes_are_stored_apart(store: Store, file: Path) -> None:
    sets: list[Items] = [
        ITEMS,
        {"first": ("b", "a"), "second": ("c",)},
        {"second": ("c",), "first": ("a", "b")},
    ]
    sets += [{"first": ("a",)}, {"firstb": ("a",)}, {"first": ("b",)}, {"first": ("ab",)}]
    for items in sets:
        store.add_evaluation(NewEvaluation(recipe(), "search", items, evaluation(recipe(), items), 0.5))
    store.add_evaluation(NewEvaluation(recipe(), "test", ITEMS, evaluation(recipe()), 0.5))
    store.add_evaluation(NewEvaluation(recipe(1.0), "search", ITEMS, evaluation(recipe(1.0)), 0.5))
    assert len({item_set_id(items) for items in sets}) == len(sets)
    assert len(stored_rows(file)["evaluations"]) == len(sets) + 2
    for items in sets:
        found = store.evaluation(recipe().id, "search", items)
        assert found is not None
        assert found.evaluation == evaluation(recipe(), items)
    assert store.evaluation(recipe().id, "validation", ITEMS) is None


def test_a_slot_is_filled_once(store: Store, file: Path) -> None:
    add(store, 1, 0, recipe())
    before = stored_rows(file)
    with pytest.raises((sqlite3.IntegrityError, StudyError)):
        add(store, 1, 0, recipe(0.5), items={"first": ("z",)})
    assert stored_rows(file) == before, "half a record stayed"


@pytest.mark.parametrize("broken", ["label", "genome", "parents", "score", "evaluation"])
def test_a_failure_in_the_middle_leaves_no_half_record(broken: str, store: Store, file: Path) -> None:
    add(store, 1, 0, recipe())
    before = stored_rows(file)
    bad: dict[str, Any] = {"label": object(), "genome": (object(),), "parents": (object(),)}
    new = recipe(0.5)
    score: Any = object() if broken == "score" else 0.5
    result = (
        Evaluation(new.id, (ItemScore("first", "a", object()),), {}, {})
        if broken == "evaluation"
        else evaluation(new)
    )  # type: ignore[arg-type]
    given: dict[str, Any] = {"origin": "sampled", "label": None, "genome": (0.1,), "parents": ()} | (
        {broken: bad[broken]} if broken in bad else {}
    )
    with pytest.raises((TypeError, sqlite3.Error, StudyError)):
        store.add_trial(
            NewTrial(
                generation=1,
                slot=1,
                recipe=new,
                items={"first": ("z",)},
                evaluation=result,
                score=score,
                **given,
            )
        )
    assert stored_rows(file) == before
    add(store, 1, 1, recipe(0.5))  # and the store goes on
    assert store.count_trials() == 2


def test_a_full_disk_is_said_and_leaves_no_half_record(store: Store, file: Path) -> None:
    add(store, 1, 0, recipe())
    before = stored_rows(file)
    pages = int(store._file.db.execute("PRAGMA page_count").fetchone()[0])
    store._file.db.execute(f"PRAGMA max_page_count = {pages + 1}")
    big: Items = {"first": tuple(f"item {i}" for i in range(5000))}
    with pytest.raises(EvomergeError, match="full"):
        add(store, 1, 1, recipe(0.5), items=big)
    assert stored_rows(file) == before
    store._file.db.execute("PRAGMA max_page_count = 1000000")  # room again
    add(store, 1, 1, recipe(0.5), items=big)
    assert [t.slot for t in store.trials()] == [0, 1]
    assert store.check() == "ok"


# ---- one writer, many readers ----------------------------------------------------------------------------


class Child:
    """A process that runs `work`, which gets a function to send text to `lines`; ends with the test."""

    def __init__(self, work: Callable[[Callable[[object], None]], None]) -> None:
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(reading)
                work(lambda text: os.write(writing, f"{text}\n".encode()) and None)
            finally:
                os._exit(1)
        os.close(writing)
        self.lines = os.fdopen(reading)

    def kill(self) -> None:
        """SIGKILL, and waits for the end; what was sent before can still be read."""
        os.kill(self.pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]) == -signal.SIGKILL


def holder(file: Path) -> Child:
    """A process that holds the file open for writing."""

    def work(send: Callable[[object], None]) -> None:
        with Store.open(file, write=True):
            send("open")
            signal.pause()

    child = Child(work)
    assert child.lines.readline() == "open\n"
    return child


def test_a_second_writer_is_refused_at_once_with_the_firsts_host_and_pid(file: Path) -> None:
    first = holder(file)
    try:
        for _ in range(2):
            started = time.monotonic()
            with pytest.raises(StudyError) as caught:
                Store.open(file, write=True)
            assert time.monotonic() - started < 1
            assert f"pid {first.pid}" in str(caught.value)
            assert socket.gethostname() in str(caught.value)
            assert "trial" in str(caught.value)
        with Store.open(file) as reader:
            assert reader.is_driven()
    finally:
        first.kill()


def test_a_killed_writer_leaves_no_lock(file: Path) -> None:
    holder(file).kill()
    with Store.open(file, write=True) as store:
        store.begin("trial", 0, "", {}, StudyFacts())
        assert store.is_driven()
    with Store.open(file) as reader:
        assert not reader.is_driven()


def test_readers_see_what_is_committed_while_a_writer_is_open(store: Store, file: Path) -> None:
    with Store.open(file) as reader:
        for slot in range(5):
            add(store, 1, slot, recipe(slot / 10))
            assert [t.slot for t in reader.trials()] == list(range(slot + 1))
        assert reader.is_driven()
        with pytest.raises((sqlite3.OperationalError, StudyError), match="readonly"):
            reader.set_state("done")


def test_looking_never_keeps_a_writer_out(file: Path) -> None:
    """`status` in a loop beside a `run` that starts: the look must not be taken for another driver."""
    Store.open(file, write=True).close()
    over = threading.Event()

    def look() -> None:
        with Store.open(file) as reader:
            while not over.is_set():
                reader.is_driven()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(200):
            Store.open(file, write=True).close()
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("folder", ["a#b", "50%", "what?", "a b", "ü", "a%20b", "q&mode=rwc"])
def test_any_folder_name_will_do(folder: str, tmp_path: Path) -> None:
    file = tmp_path / folder / "study.db"
    file.parent.mkdir()
    with Store.open(file, write=True) as store:
        add(store, 1, 0, recipe())
    with Store.open(file) as reader:
        assert reader.count_trials() == 1
    assert [p.name for p in tmp_path.iterdir()] == [folder]


# ---- damage ----------------------------------------------------------------------------------------------


def read_everything(file: Path) -> None:
    with Store.open(file) as store:
        store.study()
        store.count_evaluations()
        for trial in store.trials():
            store.recipe(trial.recipe_id)
            store.evaluations(trial.recipe_id)
        if store.check() != "ok":
            raise StudyError("the check says so")


def filled(file: Path) -> bytes:
    """A whole study file, checkpointed: its bytes are all there is."""
    with Store.open(file, write=True) as store:
        store.begin("trial", 0, "study: trial\n" * 500, {}, StudyFacts.from_json({"axes": ["x" * 50] * 100}))
        for slot in range(40):
            add(store, 1, slot, recipe(slot / 10))
    assert not file.with_name("study.db-wal").exists()
    return file.read_bytes()


def truncate(to: float) -> Callable[[bytes], bytes]:
    return lambda content: content[: int(to * len(content))]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut to nothing": lambda content: b"",
    "cut inside the header": lambda content: content[:50],
    "cut after the first page": lambda content: content[:4096],
    "cut in half": truncate(0.5),
    "cut inside the last page": lambda content: content[:-1000],
    "text": lambda content: b"this is not a database, it is a sentence\n" * 200,
    "noise": lambda content: random.Random(1).randbytes(len(content)),
    "zeros": lambda content: bytes(len(content)),
    "noise in the middle": lambda content: (
        content[:8192] + random.Random(2).randbytes(len(content) - 16384) + content[-8192:]
    ),
    "zeros behind the header": lambda content: content[:4096] + bytes(len(content) - 4096),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_never_misread(damage: str, file: Path) -> None:
    content = filled(file)
    broken = DAMAGE[damage](content)
    file.write_bytes(broken)
    with pytest.raises(StudyError):
        read_everything(file)
    assert file.read_bytes() == broken, "looking changed the file"


def test_a_whole_file_is_read_to_its_end(file: Path) -> None:
    content = filled(file)
    assert len(content) > 80_000
    read_everything(file)
    assert file.read_bytes() == content


@pytest.mark.parametrize("write", [False, True])
def test_a_newer_schema_is_refused_untouched(write: bool, file: Path) -> None:
    filled(file)
    with sqlite3.connect(file) as db:
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    db.close()
    for _ in range(2):
        with pytest.raises(StudyError, match="newer evomerge"):
            Store.open(file, write=write)


@pytest.mark.parametrize("version", range(READABLE_FROM, len(MIGRATIONS)))
def test_an_older_file_is_read_as_it_is_where_only_columns_are_missing(version: int, file: Path) -> None:
    """A study of the version before is shown without being resumed, and left as it is to the byte."""
    filled(file)
    with sqlite3.connect(file) as db:
        for script in reversed(MIGRATIONS[version:]):
            table, column = re.findall(r"ALTER TABLE (\w+) ADD COLUMN (\w+)", script)[0]
            db.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
        db.execute(f"PRAGMA user_version = {version}")
    db.close()
    before = file.read_bytes()
    with Store.open(file) as store:
        assert store.check() == "ok"
        trials = store.trials()
        assert trials
        assert all(store.scored(trial).evaluation.slopes is None for trial in trials)
    assert file.read_bytes() == before


@pytest.mark.parametrize("version", range(1, len(MIGRATIONS)))
def test_an_older_file_is_brought_up_to_date_when_written(version: int, file: Path) -> None:
    """As an older evomerge left it: its rows are all there, and say of what is new that there is none."""
    db = sqlite3.connect(file)
    for script in MIGRATIONS[:version]:
        db.executescript(script)
    db.execute(f"PRAGMA user_version = {version}")
    db.execute(
        "INSERT INTO study (id, name, seed, config, overrides, facts, state, created) "
        "VALUES (1, 'trial', 3, 'study: trial', '{}', '{}', 'paused', 1.0)"
    )
    db.execute("INSERT INTO recipes VALUES (?, ?)", (recipe().id, recipe().canonical()))
    db.execute(
        "INSERT INTO item_sets VALUES (?, ?)",
        (item_set_id(ITEMS), json.dumps([[t, list(i)] for t, i in ITEMS.items()], separators=(",", ":"))),
    )
    names = "recipe, role, item_set, score, error, metrics, scores, seconds, created"
    values = (
        recipe().id,
        "search",
        item_set_id(ITEMS),
        0.25,
        None,
        '{"first": 0.5, "second": 0.0}',
        "[1.0, 0.0, 0.0]",
        "{}",
        1.0,
    )
    db.execute(f"INSERT INTO evaluations ({names}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
    names = "generation, slot, origin, label, genome, parents, recipe, evaluation"
    db.execute(
        f"INSERT INTO trials ({names}) VALUES (0, 0, 'parent', 'base', NULL, '[]', ?, 1)", (recipe().id,)
    )
    if version >= 6:  # rows have digests
        db.row_factory = sqlite3.Row
        integrity.seal_all(db)
    db.commit()
    db.close()
    if version < READABLE_FROM:
        with pytest.raises(StudyError, match="older evomerge"):
            Store.open(file)
    with Store.open(file, write=True) as store:
        (trial,) = store.trials()
        assert (trial.score, trial.reported, trial.dropped, trial.whole, trial.violation) == (
            0.25,
            0.25,
            None,
            None,
            0.0,
        )
        assert [(s.value, s.probability, s.logprob) for s in store.scored(trial).evaluation.items] == [
            (v, None, None) for v in (1.0, 0.0, 0.0)
        ]
        assert store.front("search") == []
        add(store, 1, 0, recipe(0.2))
    with Store.open(file) as reader:
        assert reader.count_trials() == 2


def test_another_programs_database_is_refused(file: Path) -> None:
    with sqlite3.connect(file) as db:
        db.execute("CREATE TABLE notes (text)")
        db.execute("PRAGMA user_version = 1")
    db.close()
    with pytest.raises(StudyError):
        read_everything(file)


def test_a_missing_file_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no study at"):
        Store.open(tmp_path / "study.db")
    assert list(tmp_path.iterdir()) == []


# ---- kill -9 ---------------------------------------------------------------------------------------------


def test_a_killed_writer_loses_no_acknowledged_row(file: Path) -> None:
    def work(send: Callable[[object], None]) -> None:
        with Store.open(file, write=True) as store:
            slot = store.count_trials()
            while True:
                add(store, slot // 50, slot % 50, recipe(slot / 1000), items={"first": (str(slot),)})
                slot += 1
                send(slot)  # acknowledged

    rng, before = random.Random(4), 0
    for _ in range(20):
        child = Child(work)
        acknowledged = 0
        for _ in range(rng.randrange(1, 30)):
            acknowledged = int(child.lines.readline())
        time.sleep(rng.random() * 0.01)
        child.kill()
        acknowledged = max([acknowledged, *(int(line) for line in child.lines.read().split())])
        with Store.open(file, write=True) as store:
            assert store.check() == "ok"
            trials = store.trials()
            assert len(trials) in (acknowledged, acknowledged + 1)
            assert [50 * t.generation + t.slot for t in trials] == list(range(len(trials)))
            for t in trials[before:]:
                assert store.recipe(t.recipe_id).id == t.recipe_id
                assert len(store.evaluations(t.recipe_id)) == 1
        rows = stored_rows(file)
        assert len(rows["evaluations"]) == len(rows["item_sets"]) == len(rows["recipes"]) == len(trials)
        assert json.loads(rows["evaluations"][-1]["scores"])
        before = len(trials)
    assert before > 100
