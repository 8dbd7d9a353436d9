"""A study as a database of optuna, read by optuna itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomerge.errors import NothingToExport, SetupError
from evomerge.export.optuna_study import export_optuna
from evomerge.store import Store, StudyFacts
from tests.support.toy import ToyPool
from tests.support.toy_search import own, plan, search, sometimes

optuna = pytest.importorskip("optuna")


def test_optuna_reads_every_candidate_of_a_study(tmp_path: Path) -> None:
    file = tmp_path / "trial" / "study.db"
    search(file, ToyPool(lambda recipe: own(recipe) and sometimes(recipe)), plan())
    out = tmp_path / "optuna.db"
    with Store.open(file) as store:
        trials = store.trials()
        assert export_optuna(store, out) == len(trials)
        recipes = {trial.id: store.recipe(trial.recipe_id) for trial in trials}
    study = optuna.load_study(study_name="trial", storage=f"sqlite:///{out}")
    assert study.direction.name == "MAXIMIZE"
    states = {"FAIL": 0, "COMPLETE": 0}
    for read, trial in zip(study.trials, trials, strict=True):
        states[read.state.name] += 1
        assert read.user_attrs["evomerge id"] == trial.id
        assert (read.state.name == "FAIL") is (trial.error is not None)
        if trial.error is None:
            assert read.value == trial.reported
            assert read.user_attrs["task first"] == trial.metrics["first"]
        sources = [name for name, _ in recipes[trial.id].embeddings.sources]
        weights = dict(recipes[trial.id].embeddings.params).get("weight")
        if isinstance(weights, tuple):
            assert [read.params[f"embeddings, {name}"] for name in sources] == list(weights)
    assert min(states.values()) > 0
    reported = [trial.reported for trial in trials if trial.reported is not None]
    assert study.best_value == max(reported)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["optuna.db", "trial"]


def test_nothing_is_written_over_or_without_candidates(tmp_path: Path) -> None:
    (tmp_path / "trial").mkdir()
    out = tmp_path / "optuna.db"
    with Store.open(tmp_path / "trial" / "study.db", write=True) as store:
        store.begin("trial", 3, "study: trial\n", {}, StudyFacts())
        with pytest.raises(NothingToExport, match="no candidate yet"):
            export_optuna(store, out)
        assert not out.exists()
        out.write_text("mine")
        with pytest.raises(SetupError, match="exists"):
            export_optuna(store, out)
    assert out.read_text() == "mine"
