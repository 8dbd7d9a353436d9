"""What is proposed: the method by what the models are, groups and items by the budget, all of it valid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evomerge import _yaml
from evomerge.config import loading
from evomerge.errors import ConfigError
from evomerge.launch.new_search.proposal import propose
from evomerge.launch.new_search.survey import ModelFacts, Survey
from evomerge.launch.new_search.wishes import TaskWish, Wishes, named_models, read_task, study_name
from evomerge.methods import METHODS

SPLITS = ("declared", "they say so")


def survey(distance: float, overlap: float | None, experts: int = 3, layers: int = 32) -> Survey:
    names = ["base", *(f"m{i}" for i in range(experts))]
    models = {
        name: ModelFacts(name, f"/{name}", "Llama", layers, 10**9, "bfloat16", 2 * 10**9, 100, None, (), True)
        for name in names
    }
    return Survey(models, "base", "as given", dict.fromkeys(names[1:], distance), overlap, (), {})


def wishes(found: Survey, **more: Any) -> Wishes:
    return Wishes({name: f"/{name}" for name in found.models}, (TaskWish("first"),), **more)


@pytest.mark.parametrize(
    ("found", "method"),
    [
        (survey(0.1, 0.05), "task_arithmetic"),
        (survey(0.1, None, experts=1), "task_arithmetic"),
        (survey(0.1, -0.4), "dare_ties"),
        (survey(0.1, 0.05, experts=5), "dare_ties"),
        (survey(1.4, 0.5), "linear"),
        (survey(1.4, None, experts=1), "slerp"),
    ],
)
def test_the_method_follows_from_distances(found: Survey, method: str) -> None:
    draft = propose(wishes(found), found, SPLITS)
    assert draft.document["method"] == method
    assert draft.comments["method",]


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("evaluations", [20, 1000])
def test_every_method_and_budget_makes_a_valid_file(name: str, evaluations: int) -> None:
    least, most = METHODS[name].models
    found = survey(0.1, 0.2, experts=max(least, min(most, 3)))
    draft = propose(wishes(found, method=name, evaluations=evaluations), found, SPLITS)
    settings = loading.check(_yaml.parse(draft.text(), "draft"))
    assert settings.method == name
    assert settings.search.evaluations == evaluations
    searched = {p.name for p in METHODS[name].params if p.searched}
    assert set(settings.space.parameters) == searched
    assert settings.model_dump()["tasks"][0]["task"] == "first"


def test_more_evaluations_buy_more_groups_and_never_fewer_than_one() -> None:
    found = survey(0.1, 0.0)
    groups = [
        propose(wishes(found, evaluations=n), found, SPLITS).document["space"]["groups"]
        for n in (1, 100, 500, 1000, 10_000)
    ]
    assert groups == sorted(groups)
    assert (groups[0], groups[2], groups[-1]) == (1, 3, 8)
    shallow = survey(0.1, 0.0, layers=2)
    draft = propose(wishes(shallow, evaluations=10_000), shallow, SPLITS)
    assert draft.document["space"]["groups"] == 2


def test_final_scores_take_no_longer_than_a_short_search() -> None:
    found = survey(0.1, 0.0)
    blocks = {n: propose(wishes(found, evaluations=n), found, SPLITS) for n in (20, 100, 150, 300, 1000)}
    tests = {n: draft.document["evaluation"].get("test") for n, draft in blocks.items()}
    assert tests == {20: 200, 100: 200, 150: 300, 300: None, 1000: None}
    for n, draft in blocks.items():
        evaluation = draft.document["evaluation"]
        if evaluation.get("test"):
            assert evaluation["validation"] == evaluation["test"] // 2
            assert ("evaluation", "test") in draft.comments
            assert n < 200 or 25 * evaluation["test"] <= n * evaluation["items"]
    given = propose(wishes(found, evaluations=20, blocks={"evaluation": {"test": 900}}), found, SPLITS)
    assert given.document["evaluation"]["test"] == 900


def test_the_start_of_a_sum_is_where_it_moves_as_far_as_each_model_did() -> None:
    """For n task vectors of one length and cosine c, s (1 + (n - 1) c) = 1."""
    for overlap, expected in ((0.0, 1.0), (0.5, 0.5), (1.0, 1 / 3)):
        found = survey(0.1, overlap)
        weight = propose(wishes(found), found, SPLITS).document["space"]["parameters"]["weight"]
        assert weight["start"] == pytest.approx(expected, abs=1e-3)


def test_unread_models_are_said_to_be_unread() -> None:
    draft = propose(Wishes({"a": "org/a@main", "b": "org/b"}, (TaskWish("first"),)), None, SPLITS)
    assert draft.document["models"] == {"a": {"path": "org/a", "revision": "main"}, "b": "org/b"}
    assert draft.document["base"] == "a"
    assert "not read" in draft.text()
    loading.check(_yaml.parse(draft.text(), "draft"))


def test_models_are_named_by_their_paths() -> None:
    models = named_models(["org/Model-7B@main", "x/base+y/lora", "mine=z/base", "other/Model-7B"])
    assert models == {
        "Model-7B": "org/Model-7B@main",
        "lora": "x/base+y/lora",
        "mine": "z/base",
        "Model-7B-2": "other/Model-7B",
    }
    with pytest.raises(ConfigError, match="twice"):
        named_models(["a=x", "a=y"])
    with pytest.raises(ConfigError, match="NAME=PATH"):
        named_models(["a="])


def test_tasks_are_read_with_metric_and_weight() -> None:
    assert read_task("gsm8k:exact_match=2") == TaskWish("gsm8k", 2.0, "exact_match")
    assert read_task("gsm8k") == TaskWish("gsm8k")
    for wrong in ("gsm8k=0", "gsm8k=-1", "gsm8k=x", "=2", "gsm8k=inf"):
        with pytest.raises(ConfigError, match="--task"):
            read_task(wrong)


def test_the_name_of_a_study_is_always_one() -> None:
    assert study_name(["math", "lang"]) == "math-lang"
    for names in (["é"], ["-"], [".hidden"], ["x" * 99, "y"], ["a b/c"]):
        rest = "models: {a: x, b: y}\nbase: a\nmethod: ties\ntasks: [{task: t}]\n"
        text = f"study: {study_name(names)}\n{rest}"
        loading.check(_yaml.parse(text, "draft"))


def test_paths_of_a_search_file_are_relative_below_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evomerge.launch.new_search.write import _with_places

    (tmp_path / "models" / "a").mkdir(parents=True)
    (tmp_path / "far").mkdir()
    monkeypatch.chdir(tmp_path / "models")
    given = Wishes({"a": "a", "far": "../far", "hub": "org/hub"}, ())
    placed = _with_places(given, tmp_path / "models")
    assert placed.models == {"a": "a", "far": str(tmp_path / "far"), "hub": "org/hub"}
