"""A search that chooses the method of each layer group, from its file to an export that mergekit runs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from evomerge.checkpoints import Checkpoint
from evomerge.launch.opening import Allowed, open_stored_search
from evomerge.merging.mergekit_check import compare, find_program, run_mergekit
from evomerge.recipes import Recipe
from evomerge.store import Store
from tests.support.toy import REPO, in_process, stored_rows, zoo_folder

ENVIRONMENT = Path(os.environ.get("EVOMERGE_MERGEKIT_ENV") or REPO / ".venv-mergekit")
METHODS = ["task_arithmetic", "linear", "dare_ties"]
KEYS = ("generation", "slot", "genome", "recipe")
TASK = """
def likes(model, tokenizer, items):
    names = [f"item {i}" for i in range(40)] if items is None else items
    ids = tokenizer("one two", return_tensors="pt").input_ids
    size = float(model(input_ids=ids).logits.float().pow(2).mean())
    return {name: size + len(name) for name in names}
"""


def write(folder: Path, study: str, **changes: Any) -> Path:
    """A search file of two experts of the zoo and a Python task."""
    document = {
        "study": study,
        "models": {name: str(zoo_folder() / name) for name in ("base", "math", "lang")},
        "base": "base",
        "method": METHODS,
        "out_dtype": "float32",
        "space": {"groups": 2, "components": ["mlp"], "embeddings": True},
        "tasks": [{"python": "method_likes:likes", "name": "likes"}],
        "search": {"evaluations": 12, "population": 6, "finalists": 1, "seed": 3},
    } | changes
    file = folder / f"{study}.yaml"
    file.write_text(json.dumps(document))
    return file


@pytest.fixture(autouse=True)
def task(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.mktemp("task")
    (folder / "method_likes.py").write_text(TASK)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("EVOMERGE_THREADS", "1")


def run(*words: object) -> str:
    """Runs a command; its output."""
    allowed = ("--allow-python",) if words[0] in ("plan", "run", "resume", "sensitivity") else ()
    code, out, err = in_process(*words, *allowed)
    assert code == 0, err
    return out


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Studies: 'chosen' of 12 evaluations, and its file."""
    folder = tmp_path_factory.mktemp("search")
    with pytest.MonkeyPatch.context() as patch:
        (folder / "method_likes.py").write_text(TASK)
        patch.syspath_prepend(str(folder))
        patch.setenv("EVOMERGE_THREADS", "1")
        run("run", write(folder, "chosen"), "--root", folder, "--accept-floor")
    return folder


def recipes(store: Store) -> dict[int, Recipe]:
    """Number of a sampled candidate -> its recipe."""
    return {t.id: store.recipe(t.recipe_id) for t in store.trials() if t.origin == "sampled"}


def test_the_plan_says_what_is_chosen_and_by_what(root: Path) -> None:
    data = json.loads(run("plan", root / "chosen.yaml", "--json"))
    assert [choice["methods"] for choice in data["space"]["choices"]] == [METHODS] * 3
    assert data["optimizer"]["name"] == "CatCMA"
    assert data["recommended"]["reasons"] == ["a choice of methods has no gradient"]
    said = run("plan", root / "chosen.yaml")
    assert "task_arithmetic or linear or dare_ties over 3 models" in said
    assert f"{data['space']['axes']} axes in 2 layer groups, 3 of them choose a method" in said
    assert "method of layers 0-2: task_arithmetic or linear or dare_ties" in said
    assert "CatCMA: population 6" in said


def test_candidates_have_other_methods_in_other_groups_and_show_names_them(root: Path) -> None:
    with Store.open(root / "chosen" / "study.db") as store:
        sampled = recipes(store)
    mixed = {number: r for number, r in sampled.items() if len({mix.method for mix in r.mixes}) > 1}
    assert len(mixed) >= 4
    assert {mix.method for r in sampled.values() for mix in r.mixes} == set(METHODS)
    number, recipe = next(iter(mixed.items()))
    said = run("show", f"chosen/{number}", "--root", root)
    for method in {mix.method for mix in recipe.mixes}:
        assert any(line.startswith(f"{method} in ") for line in said.splitlines())
    data = json.loads(run("show", f"chosen/{number}", "--root", root, "--json"))
    assert data["methods"][recipe.embeddings.method].startswith("embeddings")
    assert set(data["methods"]) == {mix.method for mix in recipe.mixes}


def test_a_search_cut_short_and_gone_on_with_is_the_same_search(root: Path, tmp_path: Path) -> None:
    """CatCMA is replayed with its categories."""
    file = write(tmp_path, "chosen", search={"evaluations": 6, "population": 6, "finalists": 1, "seed": 3})
    run("run", file, "--root", tmp_path, "--accept-floor")
    run("resume", "chosen", "--root", tmp_path, "--evaluations", "12")

    def sampled(folder: Path) -> list[Any]:
        rows = stored_rows(folder / "chosen" / "study.db")["trials"]
        return [[t[key] for key in KEYS] for t in rows if t["origin"] in ("sampled", "injected")]

    assert len(sampled(tmp_path)) == 12
    assert sampled(tmp_path) == sampled(root)


def test_a_study_with_another_list_is_another_search(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "chosen", tmp_path / "chosen")
    for methods in (METHODS[:2], METHODS[::-1], METHODS[0]):
        file = write(tmp_path, "chosen", method=methods)
        code, _, err = in_process("run", file, "--resume", "--root", tmp_path, "--allow-python")
        assert code == 2, err
        assert "so this would be another search: method" in err


def test_an_exported_candidate_merges_to_the_scored_one_by_evomerge_and_by_mergekit(
    root: Path, tmp_path: Path
) -> None:
    with Store.open(root / "chosen" / "study.db") as store:
        number, recipe = next(
            (n, r)
            for n, r in recipes(store).items()
            if {mix.method for mix in r.mixes} == {"task_arithmetic", "linear"}
        )
        opened = open_stored_search(store, Allowed(python=True))
    out = tmp_path / "out"
    said = run("export", f"chosen/{number}", out, "--weights", "--root", root)
    assert "mergekit-multi recipe.yaml" in (out / "README.md").read_text()
    assert "build it" in said or "try it" in said
    scored = Checkpoint(out)
    live = opened.load().module(recipe, {}).state_dict()
    assert all(torch.equal(live[name], scored.tensor(name)) for name in scored.tensors)
    for file in ("recipe.json", "recipe.yaml"):
        run("merge", out / file, tmp_path / file)
        merged = Checkpoint(tmp_path / file)
        assert set(merged.tensors) == set(scored.tensors)
        assert all(merged.tensor(name).equal(scored.tensor(name)) for name in scored.tensors)
    *stages, last = yaml.safe_load_all((out / "recipe.yaml").read_text())
    assert {stage["merge_method"] for stage in stages} == {"task_arithmetic", "linear"}
    assert last["merge_method"] == "passthrough"
    if not (ENVIRONMENT / "bin" / "mergekit-multi").is_file():
        pytest.skip("needs scripts/make_mergekit_env")
    run_mergekit(find_program(out / "recipe.yaml", ENVIRONMENT), out / "recipe.yaml", tmp_path / "theirs")
    compared = compare(scored, Checkpoint(tmp_path / "theirs"))
    assert not compared.only
    assert compared.largest < 1e-6, "sums of float32 in another order"
