"""A learned stage of rows over the zoo: its derivatives, its texts, its recipe on disk, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.checkpoints import Checkpoint
from evomerge.config import loading
from evomerge.evaluation import GradientRequest, Teacher
from evomerge.launch import learned_spaces
from evomerge.launch.learned_spaces import make_row_space
from evomerge.launch.opening import Opened, open_search
from evomerge.recipes import Recipe
from evomerge.store import Store
from evomerge.workers.worker import Worker
from tests.support.sweeps import sweep
from tests.support.toy import in_process, search_file, stored_rows

TEXTS = ("Q: next three A: 4", "Q: same a b c A: a b c", "Q: first two nine A: 2")


def row_file(folder: Path, study: str, stage: dict[str, Any] | None = None, **more: Any) -> Path:
    """A search file of one learned stage by rows in float32, with texts beside it."""
    file = search_file(folder, study)
    (file.parent / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    document = json.loads(file.read_text())
    del document["search"]["evaluations"], document["search"]["population"], document["search"]["sigma"]
    given = {"stage": "learned", "genome": "row", "steps": 2, "items": 4, "retain": str(folder / "texts.txt")}
    stages = [{name: value for name, value in (given | (stage or {})).items() if value is not None}]
    file.write_text(json.dumps(document | {"stages": stages, "out_dtype": "float32"} | more, indent=1))
    return file


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[Opened, Worker]:
    """(models and tasks, a worker in float32)."""
    settings, _ = loading.load(str(row_file(tmp_path_factory.mktemp("opened"), "opened")))
    found = open_search(settings)
    return found, Worker(found.parents, settings.base, found.harness, dtype="float32")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a finished study 'rows'."""
    root = tmp_path_factory.mktemp("rows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVOMERGE_THREADS", "1")
        code, _, err = in_process("run", row_file(root, "rows", {"check": 1}), "--root", root)
    assert code == 0, err
    return root


@pytest.mark.parametrize("with_texts", [False, True])
def test_slopes_of_rows_are_central_differences_of_the_loss(
    with_texts: bool, opened: tuple[Opened, Worker]
) -> None:
    """Through lm-eval's tasks or the texts' divergence, and the merge, on the zoo in float32."""
    search, worker = opened
    space = make_row_space(search.space, search.parents)
    items = {task: ids[:3] for task, ids in search.harness.items("search").items()}
    request = GradientRequest(dict.fromkeys(items, 0.05))
    genome = list(space.start)
    if with_texts:
        teacher = Teacher(space.decode([0.5] * len(genome)), dict(enumerate_texts()))
        items = {"retain": tuple(teacher.texts)}
        request = GradientRequest({"retain": 0.5}, teacher=teacher)
    found = worker.slopes(space.decode(genome), items, request)
    assert found.slopes is not None, found.error
    gradient = space.pull_rows(found.slopes.partials, found.slopes.rows)
    largest = sorted(range(len(gradient)), key=lambda i: -abs(gradient[i]))[:3]
    for place in largest:
        ends = []
        for step in (0.02, -0.02):
            moved = list(genome)
            moved[place] += step
            evaluation = worker.slopes(space.decode(moved), items, request)
            assert evaluation.slopes is not None
            ends.append(evaluation.slopes.loss)
        assert gradient[place] == pytest.approx((ends[0] - ends[1]) / 0.04, rel=0.01)


def enumerate_texts() -> list[tuple[str, str]]:
    return [(f"id{number}", text) for number, text in enumerate(TEXTS)]


def test_a_teacher_has_no_divergence_from_itself(opened: tuple[Opened, Worker]) -> None:
    search, worker = opened
    recipe = search.space.decode(search.space.start)
    teacher = Teacher(recipe, dict(enumerate_texts()))
    request = GradientRequest({"retain": 1.0}, teacher=teacher)
    found = worker.slopes(recipe, {"retain": tuple(teacher.texts)}, request)
    assert found.slopes is not None, found.error
    assert found.slopes.loss == pytest.approx(0.0, abs=1e-6)
    assert max(map(abs, found.slopes.partials.values())) < 1e-5


@pytest.mark.parametrize("workers", sweep(["", "--workers 2"], [""]))
def test_a_study_stores_its_rows_and_resumes_from_them(workers: str, done: Path, tmp_path: Path) -> None:
    with Store.open(done / "rows" / "study.db") as store:
        steps = [trial for trial in store.trials() if trial.origin == "learned"]
        recipe = store.recipe(steps[-1].recipe_id)
    rows = stored_rows(done / "rows" / "study.db")
    gradients = [row for row in rows["evaluations"] if row["role"] == "gradient"]
    assert len(steps) == 2
    assert recipe.row_numbers == len(steps[-1].genome or ())
    assert Recipe.from_json(recipe.canonical()) == recipe
    retained = [json.loads(row["body"]) for row in rows["item_sets"] if "retain:" in row["body"]]
    assert any(len(tasks) == 1 for tasks in retained), "texts alone"
    assert sum(len(tasks) > 1 for tasks in retained) >= 2, "texts with the items of each step"
    assert all(row["slopes"] for row in gradients)
    code, _, err = in_process(
        "run", row_file(tmp_path, "rows", {"check": 1}), "--root", tmp_path, *workers.split()
    )
    assert code == 0, err
    again = stored_rows(tmp_path / "rows" / "study.db")
    for table in ("trials", "evaluations", "recipes", "item_sets"):
        assert again[table] == rows[table], table


def test_the_recipe_leaves_as_weights_with_what_it_is(done: Path, tmp_path: Path) -> None:
    with Store.open(done / "rows" / "study.db") as store:
        end = next(trial for trial in store.trials() if trial.label == "end of the learned stage")
        count = store.recipe(end.recipe_id).row_numbers
    code, _, err = in_process("export", f"rows/{end.id}", tmp_path / "out", "--weights", "--root", done)
    assert code == 0, err
    assert not (tmp_path / "out" / "recipe.yaml").exists()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "fine-tuning in the span of the parents" in card
    assert f"{count:,} weights" in card
    assert "32 items of the search, and held to a teacher's answers on 3 texts" in card
    assert "mergekit has no weights for rows" in card
    assert "- `recipe.yaml`" not in card
    code, _, err = in_process("merge", tmp_path / "out" / "recipe.json", tmp_path / "again")
    assert code == 0, err
    own, again = Checkpoint(tmp_path / "out"), Checkpoint(tmp_path / "again")
    for name in own.tensors:
        assert torch.equal(own.tensor(name), again.tensor(name)), name


def test_other_texts_are_another_search(done: Path) -> None:
    file = done / "texts.txt"
    before = file.read_text()
    file.write_text(before + "Q: last two nine A: 9\n")
    try:
        code, _, err = in_process("run", done / "rows.yaml", "--root", done, "--resume")
    finally:
        file.write_text(before)
    assert code != 0
    assert "another search" in err
    assert "texts.txt" in err


@pytest.mark.parametrize(
    ("stage", "more", "words"),
    [
        ({"retain": None}, {}, "name texts by retain, or what must not be lost by keep"),
        ({"retain_weight": 0.0}, {}, "name texts by retain, or what must not be lost by keep"),
        ({"genome": "svd"}, {}, "is not built for singular directions"),
        ({}, {"method": "ties"}, "genome: row needs a plain sum of task vectors, and 'ties' is none"),
        ({"retain": "nowhere.txt"}, {}, "there is no file"),
        ({"teacher": "nobody"}, {}, "'nobody' is not among the models"),
        ({"patience": 2}, {}, "patience counts checks; give check"),
        (
            {"retain": None, "retain_items": 5},
            {"keep": {"zoo_string": 0.1}},
            "retain_items belongs to retain",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(
    stage: dict[str, Any], more: dict[str, Any], words: str, tmp_path: Path
) -> None:
    file = row_file(tmp_path, "refused", stage, **more)
    code, out, err = in_process("run", file, "--root", tmp_path)
    assert (code, out) != (0, ""), err
    assert words in err
    assert not (tmp_path / "refused" / "study.db").exists()


def test_too_many_rows_are_refused_with_their_number(
    opened: tuple[Opened, Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learned_spaces, "MOST_ROWS", 100)
    with pytest.raises(Exception, match=r"24,028 weights, and at most 100 are learned"):
        make_row_space(opened[0].space, opened[0].parents)
