"""Pictures of a study, and its candidates as a table."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evomerge import reports
from evomerge.errors import ConfigError, StudyError
from evomerge.reports.candidate_table import candidate_rows, write_candidates
from evomerge.reports.panels import PANELS, Snapshot
from evomerge.reports.study_plots import PICTURES, draw
from evomerge.store import NewEvaluation, NewSensitivity, Store, StudyFacts
from tests.support.large_study import StudyPlan, make_study
from tests.support.stored import ITEMS, evaluation
from tests.support.toy import ToyPool
from tests.support.toy_search import SPACE, plan, search, sometimes

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search of weights over two tasks, with a scan of its best and some failures."""
    made = tmp_path_factory.mktemp("drawn") / "trial" / "study.db"
    search(made, ToyPool(lambda recipe: sometimes(recipe) and sometimes_sampled(recipe)), plan())
    with Store.open(made, write=True) as store:
        study = store.study()
        assert study is not None
        axes = [axis.name for axis in SPACE.axes]
        stored = {**study.facts.to_json(), "axes": axes, "tasks": {"first": "x", "second": "y"}}
        facts = StudyFacts.from_json(stored)
        store.set_config(study.name, study.config, {}, facts)
        best = store.recipe(reports.resolve(store, "best").recipe_id)
        for value in (0.25, 0.5, 0.75):
            changed = SPACE.decode([value] * len(SPACE.axes))
            scored = NewEvaluation(changed, "search", ITEMS, evaluation(changed), value)
            store.add_sensitivity(NewSensitivity(best, axes[0], value, scored))
    return made


def sometimes_sampled(recipe: Any) -> bool:
    return recipe.id not in {baseline.recipe.id for baseline in plan().baselines}


@pytest.fixture
def store(file: Path) -> Iterator[Store]:
    with Store.open(file) as opened:
        yield opened


TEXTS = {
    "history": ("trial: score history", "best of the generation", "uniform average"),
    "heatmap": ("trial: coefficients, generation 3", "embeddings", "head"),
    "tasks": ("trial: the best by task", "first", "second", "best parent"),
    "sensitivity": ("sensitivity", SPACE.axes[0].name, "objective on search items"),
    "pareto": ("trial: trade-off on search items", "on the front of all tasks", "hand recipe"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_picture_holds_what_its_panel_says_and_is_the_same_again(
    kind: str, store: Store, tmp_path: Path
) -> None:
    trial = reports.resolve(store, "best")
    for name in ("one.svg", "other.svg", "picture.png"):
        draw(Snapshot(store), kind, trial, tmp_path / name)
    text = (tmp_path / "one.svg").read_text()
    assert [words for words in TEXTS[kind] if words not in text] == []
    assert text == (tmp_path / "other.svg").read_text()
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_routes_are_drawn_with_a_line_a_hop_and_a_row_a_model(tmp_path: Path) -> None:
    made = make_study(tmp_path, StudyPlan(candidates=40, population=20, name="routed", routes=True))
    with Store.open(made) as store:
        snapshot = Snapshot(store)
        panel = PANELS["routes"](snapshot)
        assert panel is not None
        assert panel.chart is not None
        draw(snapshot, "routes", reports.resolve(store, "best"), tmp_path / "routes.svg")
    text = (tmp_path / "routes.svg").read_text()
    assert f"routed: the {panel.chart['routes']} best routes" in text
    assert [model for model in panel.chart["models"] if model not in text] == []
    assert text.count("stroke-opacity: 0.6") == len(panel.chart["links"])


def test_what_cannot_be_drawn_is_one_sentence(store: Store, tmp_path: Path) -> None:
    assert set(PICTURES) == {*TEXTS, "routes"}
    trial = reports.resolve(store, "best")
    with pytest.raises(StudyError, match="the search has no routes of layers"):
        draw(Snapshot(store), "routes", trial, tmp_path / "x.png")
    with pytest.raises(StudyError, match="make one: evomerge sensitivity trial/1"):
        draw(Snapshot(store), "sensitivity", store.trial(1), tmp_path / "x.png")
    with pytest.raises(ConfigError, match="names no kind of picture"):
        draw(Snapshot(store), "history", trial, tmp_path / "x.txt")
    assert list(tmp_path.iterdir()) == []


# ---- tables ----------------------------------------


def test_csv_and_parquet_hold_every_candidate(store: Store, tmp_path: Path) -> None:
    rows, trials = candidate_rows(store), store.trials()
    for name in ("c.csv", "c.parquet"):
        write_candidates(rows, tmp_path / name)
    pandas = pytest.importorskip("pandas")
    for frame in (pandas.read_csv(tmp_path / "c.csv"), pandas.read_parquet(tmp_path / "c.parquet")):
        assert list(frame["id"]) == [trial.id for trial in trials]
        assert list(frame["objective"].notna()) == [trial.reported is not None for trial in trials]
        for trial, found in zip(trials, frame.to_dict("records"), strict=True):
            if trial.reported is not None:
                assert found["objective"] == pytest.approx(trial.reported)
                assert found["task:first"] == pytest.approx(trial.metrics["first"])
            if trial.genome is not None:
                assert found[f"gene:{SPACE.axes[0].name}"] == pytest.approx(trial.genome[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.csv", "c.parquet"]


def test_a_spreadsheet_computes_nothing_of_a_label(tmp_path: Path) -> None:
    write_candidates([{"id": 1, "label": '=HYPERLINK("http://x")', "score": -0.5}], tmp_path / "c.csv")
    with (tmp_path / "c.csv").open(newline="") as text:
        (row,) = csv.DictReader(text)
    assert row == {"id": "1", "label": '\'=HYPERLINK("http://x")', "score": "-0.5"}


def test_a_table_of_another_kind_or_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"end it with .csv or .parquet"):
        write_candidates([{"id": 1}], tmp_path / "c.xlsx")
    with pytest.raises(ConfigError, match="no candidate yet"):
        write_candidates([], tmp_path / "c.csv")


def test_a_candidate_was_shown_without_its_coefficients(store: Store) -> None:
    from evomerge.cli.study_tables import candidate_text

    trial = reports.resolve(store, "uniform average")
    data = reports.candidate(store, trial)
    models = [name for name, _ in store.recipe(trial.recipe_id).layers[0].sources]
    assert data["coefficients"]["models"] == models
    rows = data["coefficients"]["rows"]
    assert rows[0][0].startswith("embeddings")
    assert rows[-1][0].startswith("head")
    assert all(len(set(values)) == 1 for _, values in rows), "of an average all models have one weight"
    lines = candidate_text(data).splitlines()
    heading = next(line for line in lines if line.startswith("how much of"))
    assert heading.split()[3:] == models
    assert f"{rows[0][1][0]:.2f} █" in "\n".join(lines)
