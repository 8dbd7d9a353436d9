"""`import evomerge as em`: exactly these names, loaded when first used; reading a study loads no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import evomerge as em
from evomerge.errors import ConfigError, NothingToExport, StudyError
from evomerge.evaluation import Evaluation, Items, ItemScore
from evomerge.launch.ask_tell import AskTell, Candidate
from evomerge.recipes import Recipe
from evomerge.store import NewTrial, Store, StudyFacts
from tests.support.toy import REPO, environment, search_file, weight_space

PUBLIC = {
    "METHODS",
    "OPTIMIZERS",
    "AskTell",
    "Objective",
    "Recipe",
    "Store",
    "__version__",
    "compare",
    "export_candidate",
    "load",
    "merge",
    "open_study",
    "plan",
    "run",
    "sensitivity",
}
ITEMS: Items = {"first": ("a", "b")}
SPACE = weight_space()
HEAVY = {"torch", "ray", "transformers", "lm_eval", "pydantic", "yaml"}


def python(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPO,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def add(store: Store, slot: int, error: str | None = None, generation: int = 1) -> None:
    recipe = SPACE.decode([slot / 64] * len(SPACE.axes))
    scores = () if error else tuple(ItemScore("first", item, 0.5) for item in ITEMS["first"])
    evaluation = Evaluation(recipe.id, scores, {} if error else {"first": slot / 64}, {}, error)
    store.add_trial(
        NewTrial(
            generation=generation,
            slot=slot,
            origin="sampled" if generation else "parent",
            label=None if generation else "math & <co>",
            genome=None,
            parents=(),
            recipe=recipe,
            items=ITEMS,
            evaluation=evaluation,
            score=None if error else slot / 64,
            task_values=None if error else (slot / 64,),
        )
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "trial"
    folder.mkdir()
    with Store.open(folder / "study.db", write=True) as store:
        store.begin("trial", 3, "study: trial\n", {}, StudyFacts(tasks={"first": "x"}))
        add(store, 0, generation=0)
        for slot in (1, 2, 3):
            add(store, slot, "it is broken" if slot == 1 else None)
        store.set_state("paused")
    return tmp_path


# ---- names ----------------------------------------


def test_the_public_names_are_exactly_these() -> None:
    assert set(em.__all__) == PUBLIC
    assert set(em.__all__) <= set(dir(em))
    for name in em.__all__:
        assert getattr(em, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'exprt'"):
        em.exprt  # noqa: B018


def test_every_public_function_is_the_library_s_own() -> None:
    from evomerge.methods import METHODS
    from evomerge.optimizers import OPTIMIZERS

    assert em.METHODS is METHODS
    assert em.OPTIMIZERS is OPTIMIZERS
    assert em.Recipe is Recipe
    assert em.Store is Store


def test_importing_evomerge_imports_nothing_else() -> None:
    program = "import sys, evomerge; print(*sorted(m for m in sys.modules if m.startswith('evomerge')))"
    assert python(program).split() == ["evomerge"]


def test_the_package_ships_its_types() -> None:
    assert (REPO / "evomerge" / "py.typed").is_file()


@pytest.mark.parametrize("words", [["-m", "evomerge", "--version"], ["-m", "evomerge", "--help"]])
def test_the_package_is_a_program(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *words], cwd=REPO, env=environment(), capture_output=True, text=True, check=True
    )
    assert f"evomerge {em.__version__}" in done.stdout or "Usage" in done.stdout


# ---- a stored study ----------------------------------------


def test_a_study_is_read_without_torch_or_ray(root: Path) -> None:
    program = f"""
import sys, json, evomerge as em
study = em.open_study("trial", root={str(root)!r})
study.status, study.best(), study.pareto(), study.candidates(), study.recipe("best"), study._repr_html_()
print(json.dumps(sorted({{name.partition(".")[0] for name in sys.modules}})))
"""
    assert set(json.loads(python(program))) & HEAVY == set()


def test_a_study_says_what_its_rows_hold(root: Path) -> None:
    study = em.open_study("trial", root=root)
    assert (study.name, study.status) == ("trial", "paused")
    assert study.best()["id"] == 4
    assert study.recipe() == study.recipe(4) == SPACE.decode([3 / 64] * len(SPACE.axes))
    assert "4 evaluations" not in repr(study)
    assert "3 evaluations" in repr(study)
    assert em.open_study(root / "trial").path == em.open_study(root / "trial" / "study.db").path == study.path


def test_candidates_are_a_frame_where_pandas_is(root: Path) -> None:
    pandas = pytest.importorskip("pandas")
    study = em.open_study("trial", root=root)
    frame = study.candidates()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.index) == [1, 2, 3, 4]
    assert list(frame["error"].notna()) == [False, True, False, False]
    assert frame["first"].max() == 3 / 64
    assert set(study.pareto().columns) >= {"recipe", "objective", "first"}


def test_candidates_are_rows_where_pandas_is_not(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    rows = em.open_study("trial", root=root).candidates()
    assert [row["id"] for row in rows] == [1, 2, 3, 4]
    assert rows[1]["error"] == "it is broken"


def test_a_notebook_shows_a_study_and_no_markup_of_its_rows(root: Path) -> None:
    text = em.open_study("trial", root=root)._repr_html_()
    assert "<td>math &amp; &lt;co&gt;</td>" in text
    assert text.count("<tr>") == 3


def test_a_study_that_is_not_there_is_one_sentence(root: Path) -> None:
    with pytest.raises(StudyError, match="Did you mean 'trial'"):
        em.open_study("trail", root=root)
    with pytest.raises(StudyError):
        em.open_study("trial", root=root).recipe("nobody")


# ---- searches ----------------------------------------


def test_a_search_is_loaded_from_a_file_a_name_or_a_mapping(tmp_path: Path) -> None:
    file = search_file(tmp_path, "small")
    by_path = em.load(file, evaluations=7, seed=5)
    content = json.loads(file.read_text())
    by_content = em.load(content)
    assert by_path.settings == by_content.settings
    assert em.load(by_path) == by_path
    assert by_path.effective_settings.budgets[-1] == 7
    assert by_path.effective_settings.search.seed == 5
    assert em.load("demo").settings.study == "demo"
    assert em.load(by_content, study="other").settings.study == "other"


def test_a_wrong_search_is_the_configuration_s_own_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'demo'"):
        em.load("dmeo")
    with pytest.raises(ConfigError, match="methdo"):
        em.load({"study": "x", "methdo": "ties"})
    with pytest.raises(ConfigError, match="evaluations"):
        em.load("demo", evaluations=0)


def test_a_search_is_planned_run_compared_and_exported(tmp_path: Path) -> None:
    search = em.load(search_file(tmp_path, "small", dtype="bfloat16"), evaluations=4)
    planned = em.plan(search)
    assert planned["study"] == "small"
    assert planned["stages"][0]["evaluations"] == 4
    notes: list[str] = []
    study = em.run(search, root=tmp_path, on_progress=lambda progress: notes.append(progress.note))
    assert study.status == "done"
    assert any(note.startswith("generation 1") for note in notes)
    with pytest.raises(StudyError, match="exists"):
        em.run(search, root=tmp_path)
    assert em.run(search, root=tmp_path, resume=True).best() == study.best()
    compared = em.compare(["small/best", "small/math"], root=tmp_path)
    assert [row["task"] for row in compared["rows"]]
    out = em.export_candidate(study, "best", tmp_path / "out")
    assert Recipe.from_json((out / "recipe.json").read_text()) == study.recipe("best")
    models = {name: model.path for name, model in search.settings.models.items()}
    em.merge(study.recipe("best"), tmp_path / "merged", models=models)
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    failed = [
        row for row in study.candidates().reset_index().to_dict("records") if row["score"] != row["score"]
    ]
    for row in failed[:1]:
        with pytest.raises(NothingToExport):
            study.export(int(row["id"]), tmp_path / "failed")


@pytest.mark.parametrize("names", [["demo/best"], ["demo", "demo/best"]])
def test_a_comparison_takes_two_candidates(names: list[str]) -> None:
    with pytest.raises(ConfigError):
        em.compare(names)


# ---- ask and tell ----------------------------------------


def value(recipe: Recipe) -> float:
    """A score that only depends on the recipe."""
    return int(recipe.id[:6], 16) / 16**6


def told(search: AskTell, generations: int) -> list[str]:
    recipes = []
    for _ in range(generations):
        for candidate in search.ask():
            recipes.append(candidate.recipe.id)
            search.tell(candidate, value(candidate.recipe))
    return recipes


def test_ask_and_tell_searches_a_space_or_a_search_file(tmp_path: Path) -> None:
    for search in (AskTell(SPACE, population=6), AskTell(search_file(tmp_path, "small"), population=6)):
        assert search.best is None
        recipes = told(search, 3)
        assert len(recipes) == 18
        assert search.generation == 3
        assert search.best is not None
        assert search.best.score == max(int(recipe[:6], 16) / 16**6 for recipe in recipes)
        assert isinstance(search.mean, Recipe)


def test_the_same_scores_give_the_same_candidates_in_any_order() -> None:
    first, second = AskTell(SPACE, seed=4, population=6), AskTell(SPACE, seed=4, population=6)
    for _ in range(4):
        asked = first.ask()
        assert [c.genome for c in asked] == [c.genome for c in second.ask()]
        for candidate in asked:
            first.tell(candidate, value(candidate.recipe))
        for candidate in reversed(second.ask()):
            second.tell(candidate, value(candidate.recipe))
    assert [c.genome for c in AskTell(SPACE, seed=5, population=6).ask()] != [c.genome for c in first.ask()]


@pytest.mark.parametrize("broken", [0, 1, 8])
def test_a_search_with_a_store_goes_on_where_it_ended(tmp_path: Path, broken: int) -> None:
    whole = told(AskTell(SPACE, seed=1, population=6), 4)
    file = tmp_path / "mine" / "study.db"
    with AskTell(SPACE, seed=1, population=6, store=file) as search:
        recipes = told(search, 1)
        for candidate in search.ask()[:broken]:  # and in the midst of a generation
            recipes.append(candidate.recipe.id)
            search.tell(candidate, value(candidate.recipe))
    with AskTell(SPACE, seed=1, population=6, store=file) as search:
        while len(recipes) < len(whole):
            recipes += told(search, 1)
    assert recipes == whole
    study = em.open_study(tmp_path / "mine")
    assert study.status == "paused"
    assert len(study.candidates()) == len(whole)
    assert study.best()["search"] == max(int(recipe[:6], 16) / 16**6 for recipe in whole)


def test_a_store_of_another_search_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "study.db"
    with AskTell(SPACE, seed=1, population=6, store=file) as search:
        told(search, 1)
    with pytest.raises(StudyError, match="another search file or seed"):
        AskTell(SPACE, seed=2, population=6, store=file)
    with (
        AskTell(SPACE, seed=1, population=6, sigma=0.9, store=file) as search,
        pytest.raises(StudyError, match="begun with other settings"),
    ):
        search.ask()


def test_scores_by_task_become_one_number_and_a_failure_is_none() -> None:
    def worst(metrics: Any) -> float:
        return float(min(metrics.values()))

    search = AskTell(SPACE, population=4, objective=worst)
    one, two, three, four = search.ask()
    search.tell(one, {"a": 0.5, "b": 0.2})
    search.tell(two, None)
    search.tell(three, float("nan"))
    assert search.best is not None
    assert search.best.score == 0.2
    assert search.best.metrics == {"a": 0.5, "b": 0.2}
    assert search.ask() == [four]
    search.tell(four, 0.1)
    assert search.best.slot == one.slot
    assert search.ask()[0].generation == 2


def test_a_candidate_is_told_once() -> None:
    search = AskTell(SPACE, population=4)
    first = search.ask()[0]
    search.tell(first, 1.0)
    stranger = Candidate(1, 1, first.genome, first.recipe)
    for candidate in (first, stranger):
        with pytest.raises(ConfigError, match="tell each candidate"):
            search.tell(candidate, 1.0)
