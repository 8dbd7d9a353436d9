"""Panels of the page: what they say is what the store holds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import StudyError
from evomerge.recipes import Filtered, Mix, Recipe, params
from evomerge.reports.outputs import keep_outputs, stored_outputs
from evomerge.reports.panels import (
    PANELS,
    Panel,
    Snapshot,
    TableQuery,
    candidates,
    overview,
    pair,
    study_panels,
)
from evomerge.reports.panels.coefficients import EMBEDDINGS, HEAD, coefficients
from evomerge.reports.panels.panel import cell, duration, spread_out
from evomerge.store import Store, Trial
from tests.support.large_study import TASKS, StudyPlan, make_study, making

PLAN = StudyPlan(candidates=120, population=20, name="small")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_study(tmp_path_factory.mktemp("panels"), PLAN)


@pytest.fixture(scope="module")
def routes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = StudyPlan(candidates=60, population=20, name="routes", routes=True)
    return make_study(tmp_path_factory.mktemp("routes"), plan)


@pytest.fixture
def snapshot(study: Path) -> Iterator[Snapshot]:
    with Store.open(study) as store:
        yield Snapshot(store)


def trials_of(study: Path) -> list[Trial]:
    with Store.open(study) as store:
        return store.trials()


def chart(panel: Panel) -> dict[str, Any]:
    assert panel.chart is not None
    return dict(panel.chart)


def test_every_panel_is_plain_data(snapshot: Snapshot) -> None:
    panels = study_panels(snapshot)
    assert [panel.id for panel in panels] == [name for name in PANELS if name != "routes"]
    for panel in panels:
        text = json.dumps(panel.to_plain(), allow_nan=False)
        assert "NaN" not in text
        assert panel.tables or panel.note, f"{panel.id} has nothing to read without its chart"
        for table in panel.tables:
            assert {len(row) for row in table.rows} <= {len(table.columns)}


def test_the_history_has_every_score_and_the_generations_best(snapshot: Snapshot, study: Path) -> None:
    searched = [trial for trial in trials_of(study) if trial.generation > 0]
    data = chart(PANELS["history"](snapshot))  # type: ignore[arg-type]
    assert {point[0]: point[1] for point in data["points"]} == {
        trial.id: round(trial.reported, 4) for trial in searched if trial.reported is not None
    }
    for generation, first, last, best, median in data["generations"]:
        scores = [t.reported for t in searched if t.generation == generation and t.reported is not None]
        assert best == round(max(scores), 4)
        assert median == round(statistics.median(scores), 4)
        assert [t.id for t in searched if t.generation == generation][:: PLAN.population - 1] == [first, last]
    names = {reference["name"] for reference in data["references"]}
    assert {"math", "lang", "string", "uniform average"} <= names


def test_the_table_is_sorted_and_filtered_by_the_address(snapshot: Snapshot, study: Path) -> None:
    panel = candidates(snapshot, TableQuery.of({"sort": "objective", "origin": "sampled", "page": "2"}))
    scores = [t.reported for t in trials_of(study) if t.origin == "sampled" and t.reported is not None]
    assert [row[5] for row in panel.tables[0].rows] == sorted(scores)[25:50]
    failed = candidates(snapshot, TableQuery.of({"state": "failed", "text": "CUDA"})).tables[0]
    assert [row[4] for row in failed.rows] == ["failed"]
    nothing = candidates(snapshot, TableQuery.of({"text": "no such label"})).tables[0]
    assert nothing.rows == ()


@pytest.mark.parametrize("page", ["0", "-1", "x", "9" * 30, "²"])
def test_an_address_that_nobody_wrote_shows_the_first_page(page: str) -> None:
    assert TableQuery.of({"page": page}).page == 1
    assert len(TableQuery.of({"sort": "x" * 10_000}).sort) == 100


def test_beliefs_are_means_of_the_best_candidates_coefficients(snapshot: Snapshot, study: Path) -> None:
    data = chart(PANELS["beliefs"](snapshot))  # type: ignore[arg-type]
    last = data["generations"][-1]
    own = [t for t in trials_of(study) if t.generation == last and t.score is not None]
    best = sorted(own, key=lambda t: -(t.score or 0.0))[:4]
    values = [coefficients(snapshot.recipe(t.recipe_id))[0, "attention"]["math"] for t in best]
    row, column = data["rows"].index("layer 0 attention"), data["models"].index("math")
    assert data["values"][-1][row][column] == pytest.approx(statistics.fmean(values), abs=1e-3)


def test_coefficients_of_filters_and_of_layers_that_are_taken_over() -> None:
    both = Filtered(((".self_attn.", 0.5), (".mlp.", 2.0), ("*", 9.0)))
    sources = (("a", 0), ("b", 0))
    layer = Mix("linear", sources, params=params({"weight": (both, 1.0)}))
    taken = Mix("passthrough", (("a", 0),))
    outer = Mix("linear", (("a", None), ("b", None)), params=params({"weight": (0.25, 0.75)}))
    recipe = Recipe("a", (layer, taken), outer, outer)
    found = coefficients(recipe)
    assert found[0, "attention"] == {"a": 0.5, "b": 1.0}
    assert found[0, "mlp"] == {"a": 2.0, "b": 1.0}
    assert found[1, ""] == {"a": 1.0}
    assert found[EMBEDDINGS, ""] == found[HEAD, ""] == {"a": 0.25, "b": 0.75}


def test_tasks_name_the_best_parent_and_what_is_lost(snapshot: Snapshot, study: Path) -> None:
    table = PANELS["tasks"](snapshot).tables[0]  # type: ignore[union-attr]
    outcome = snapshot.study.outcome
    assert outcome is not None
    lost = {row["task"] for row in outcome.retention if row["lost"]}
    assert {row[0] for row in table.rows if row[6]} == lost
    parents = [row for row in outcome.references if row["origin"] == "parent"]
    for row in table.rows:
        best = max(parents, key=lambda parent: parent["test_metrics"][row[0]])
        assert row[3] == best["test_metrics"][row[0]]
        assert row[5] == pytest.approx(row[2] - row[3])


def test_routes_are_drawn_as_flows_between_their_layers(routes: Path) -> None:
    with Store.open(routes) as store:
        data = chart(PANELS["routes"](Snapshot(store)))  # type: ignore[arg-type]
    nodes = {node["name"] for node in data["nodes"]}
    assert all(link["source"] in nodes and link["target"] in nodes for link in data["links"])
    first = [link["value"] for link in data["links"] if link["source"].startswith("0:")]
    assert sum(first) == data["routes"]


def test_the_verdict_of_a_finished_search_has_the_stored_numbers(snapshot: Snapshot) -> None:
    outcome = snapshot.study.outcome
    assert outcome is not None
    head = overview(snapshot)
    assert head.state == "done"
    assert f"{outcome.best['test']:.3f}" in head.verdict
    assert head.verdict.count("\n") == 0


@pytest.mark.parametrize("state", ["running", "paused", "failed"])
def test_a_search_that_is_not_done_has_a_page(tmp_path: Path, state: str) -> None:
    plan = StudyPlan(candidates=20, population=10, name="part", budget=100)
    with Store.open(make_study(tmp_path, plan, state)) as store:
        snapshot = Snapshot(store)
        head, panels = overview(snapshot), study_panels(snapshot)
    assert head.state == ("interrupted" if state == "running" else state)
    assert head.progress == 0.2
    assert "best so far" in head.verdict
    assert {panel.id for panel in panels} >= {"history", "tasks", "candidates"}


def test_a_search_that_has_just_begun_says_so_in_every_panel(tmp_path: Path) -> None:
    with making(tmp_path, StudyPlan(name="begun")) as maker, Store.open(maker.store.path) as store:
        snapshot = Snapshot(store)
        assert overview(snapshot).state == "running"
        notes = {panel.id: panel.note for panel in study_panels(snapshot)}
    assert notes["history"]
    assert notes["beliefs"]
    assert notes["timeline"]


def test_a_file_without_a_study_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty" / "study.db"
    path.parent.mkdir()
    Store.open(path, write=True).close()
    with Store.open(path) as store, pytest.raises(StudyError, match="holds no study yet"):
        overview(Snapshot(store))


def test_two_candidates_are_compared_on_their_common_items(snapshot: Snapshot) -> None:
    outcome = snapshot.study.outcome
    assert outcome is not None
    parent = next(row for row in outcome.references if row["label"] == "math")
    table = pair(snapshot, "best", "math").tables[0]
    by_task = {row[0]: row for row in table.rows}
    assert set(by_task) == {*TASKS, "objective"}
    assert by_task["objective"][4] == pytest.approx(outcome.best["test"] - parent["test"])
    missing = pair(snapshot, "best", "no such candidate")
    assert "no such candidate" in missing.note


def test_outputs_that_a_comparison_kept_are_shown(study: Path, snapshot: Snapshot) -> None:
    best, parent = snapshot.best, snapshot.best_parent()
    assert best is not None
    assert parent is not None
    tables = pair(snapshot).tables
    task, item = tables[1].rows[0][:2]
    answers = [{"output": text, "options": []} for text in ("<b>four</b>", "five")]
    sample = {"task": task, "item": item, "prompt": "2 + 2 =", "target": "4", "answers": answers}
    keep_outputs(study.parent, [best.recipe_id, parent.recipe_id], [sample])
    try:
        shown = pair(snapshot).tables[1]
        assert shown.rows == ((task, "2 + 2 =", "4", "<b>four</b>", "five"),)
    finally:
        (study.parent / "outputs.json").unlink()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 3}', '{"a": [1, {"task": 2}]}', "[" * 100_000])
def test_a_file_of_outputs_that_is_none_of_ours_counts_as_empty(tmp_path: Path, text: str) -> None:
    (tmp_path / "outputs.json").write_text(text)
    assert stored_outputs(tmp_path, "a") == {}


def test_cells_are_written_by_kind() -> None:
    assert cell(None, "score") == cell(float("nan"), "score") == "–"
    assert cell(0.12345, "score") == "0.123"
    assert cell(0.5, "signed") == "+0.500"
    assert cell(12345, "count") == "12,345"
    assert cell((0.1, 0.2), "interval") == "0.100 to 0.200"
    assert [duration(s) for s in (45, 720, 12_000, 187_200)] == ["45 s", "12 min", "3 h 20 min", "2 d 4 h"]
    assert spread_out(list(range(100)), 3) == [0, 50, 99]


def test_failures_that_differ_in_their_numbers_are_one_kind(tmp_path: Path) -> None:
    with making(tmp_path, StudyPlan(name="failing", population=200)) as maker:
        maker.add_candidates(200)
        with Store.open(maker.store.path) as store:
            panel = PANELS["failures"](Snapshot(store))
    assert panel is not None
    by_cause, by_error = panel.tables
    assert by_cause.rows[0][:2] == ("out of memory", 2)
    assert [row[1] for row in by_error.rows] == [2]
    assert "1 GiB" in by_error.rows[0][0]


def test_routes_of_several_lengths_leave_their_rows_empty_where_they_have_no_layer(routes: Path) -> None:
    with Store.open(routes) as store:
        data = chart(PANELS["beliefs"](Snapshot(store)))  # type: ignore[arg-type]
    assert data["rows"][0] == "embeddings"
    assert data["rows"][-1] == "head"
    for rows in data["values"]:
        for row in rows:
            assert row[0] is None or sum(row) == pytest.approx(1.0, abs=0.01)
