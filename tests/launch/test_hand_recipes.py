"""Recipes that a search file names: scored beside the hand recipes, and where a search begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from evomerge import _yaml
from evomerge.checkpoints import Checkpoint, Parent
from evomerge.config import Config, loading
from evomerge.errors import ConfigError
from evomerge.launch.hand_recipes import start_genome
from evomerge.launch.new_search.mergekit_recipe import LABEL, read_recipe
from evomerge.launch.new_search.proposal import propose
from evomerge.launch.new_search.survey import survey_models
from evomerge.launch.new_search.wishes import TaskWish
from evomerge.launch.stages import reference_recipes
from evomerge.launch.weight_space import make_space
from tests.support.toy import llama

LAYERS = 4


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    base = llama(folder / "base", 0, layers=LAYERS, dtype=torch.float32)
    for seed, name in enumerate(("a", "b"), 1):
        llama(folder / name, seed, layers=LAYERS, near=base, dtype=torch.float32)
    return folder


def started(file: Path) -> tuple[Config, dict[str, Parent], tuple[str, ...]]:
    """The search file that begins with a recipe, and its models."""
    from dataclasses import replace

    wishes = replace(read_recipe(file), tasks=(TaskWish("first"),))
    draft = propose(wishes, survey_models(wishes.models, wishes.base), ("hash", "as it is"))
    settings = loading.check(_yaml.parse(draft.text(), "draft"))
    parents: dict[str, Parent] = {n: Checkpoint(Path(m.path)) for n, m in settings.models.items()}
    return settings, parents, wishes.notes


def written(tmp_path: Path, document: dict[str, Any]) -> Path:
    file = tmp_path / "recipe.yml"
    file.write_text(yaml.safe_dump(document))
    return file


def stepped(zoo: Path) -> dict[str, Any]:
    """TIES with other numbers in the lower and the upper half, attention apart in the lower."""

    def source(name: str, first: int, last: int, **parameters: Any) -> dict[str, Any]:
        entry = {"model": str(zoo / name), "layer_range": [first, last]}
        return entry | ({"parameters": parameters} if parameters else {})

    apart = [{"filter": "self_attn", "value": 0.7}, {"value": 0.9}]
    lower = [
        source("base", 0, 2),
        source("a", 0, 2, weight=apart, density=0.5),
        source("b", 0, 2, weight=1.2, density=0.6),
    ]
    upper = [
        source("base", 2, 4),
        source("a", 2, 4, weight=0.3, density=0.5),
        source("b", 2, 4, weight=-0.2, density=0.6),
    ]
    return {
        "merge_method": "ties",
        "base_model": str(zoo / "base"),
        "slices": [{"sources": lower}, {"sources": upper}],
        "parameters": {"normalize": False},
        "dtype": "bfloat16",
    }


def test_a_search_begins_at_the_recipe_and_has_it_to_beat(zoo: Path, tmp_path: Path) -> None:
    file = written(tmp_path, stepped(zoo))
    settings, parents, notes = started(file)
    assert settings.space.groups == (2, 2)
    assert notes == ()
    space = make_space(settings, parents)
    hand = {b.label: b for b in reference_recipes(settings, space, parents)}[LABEL]
    assert hand.origin == "hand"
    start = space.decode(start_genome(LABEL, space, settings, parents))
    given = {
        ("layers 0-1", "attention", "a"): 0.7,
        ("layers 0-1", "mlp", "a"): 0.9,
        ("layers 2-3", "mlp", "a"): 0.3,
        ("layers 0-1", "mlp", "b"): 1.2,
        ("layers 2-3", "attention", "b"): -0.2,
    }
    values = space.values(start)
    assert values is not None
    at = {
        (a.group, a.component, a.source): v
        for a, v in zip(space.axes, values, strict=True)
        if a.param == "weight"
    }
    for place, value in given.items():
        assert at[place] == pytest.approx(value, abs=1e-3), place
    assert [mix.base for mix in hand.recipe.layers] == [("base", i) for i in range(LAYERS)]
    assert hand.recipe.layers[0].sources == (("a", 0), ("b", 0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer_source": "union"}, "tokenizer"),
        ({"chat_template": "auto"}, "chat_template"),
        ({"dtype": "float16"}, "out_dtype"),
        ({"unknown_key": 3}, "unknown_key"),
    ],
)
def test_what_a_search_cannot_hold_of_a_recipe_is_named(
    change: dict[str, Any], words: str, zoo: Path, tmp_path: Path
) -> None:
    _, _, notes = started(written(tmp_path, stepped(zoo) | change))
    assert any(words in note for note in notes)


def test_a_gradient_begins_at_each_group_s_first_layer(zoo: Path, tmp_path: Path) -> None:
    models = [
        {"model": str(zoo / "base")},
        *({"model": str(zoo / n), "parameters": {"weight": [0.0, 0.9]}} for n in "ab"),
    ]
    document = {"merge_method": "task_arithmetic", "base_model": str(zoo / "base"), "models": models}
    settings, parents, _ = started(written(tmp_path, document | {"dtype": "float32"}))
    assert settings.space.groups == (1, 1, 1, 1)
    space = make_space(settings, parents)
    start = space.values(space.decode(start_genome(LABEL, space, settings, parents)))
    assert start is not None
    axes = zip(space.axes, start, strict=True)
    found = [v for axis, v in axes if (axis.component, axis.source) == ("mlp", "a")]
    assert found == pytest.approx([0.0, 0.3, 0.6, 0.9], abs=1e-3)


def test_a_stack_of_layers_begins_a_search_of_routes(zoo: Path, tmp_path: Path) -> None:
    slices = [
        {"sources": [{"model": str(zoo / n), "layer_range": span}]}
        for n, span in (("a", [0, 3]), ("b", [1, 4]))
    ]
    file = written(tmp_path, {"merge_method": "passthrough", "slices": slices, "dtype": "bfloat16"})
    settings, parents, _ = started(file)
    assert settings.kinds == ("routes",)
    labels = [b.label for b in reference_recipes(settings, make_space(settings, parents), parents)]
    assert file.name in labels


def test_a_recipe_of_another_model_or_another_method_is_said(zoo: Path, tmp_path: Path) -> None:
    file = written(tmp_path, stepped(zoo))
    settings, parents, _ = started(file)
    space = make_space(settings, parents)
    other = llama(tmp_path / "other", 7, layers=LAYERS, dtype=torch.float32)
    file.write_text(file.read_text().replace(f"{zoo}/b\n", f"{other}\n"))
    with pytest.raises(ConfigError, match=r"given recipe.*not among the models"):
        reference_recipes(settings, space, parents)
    file.write_text(yaml.safe_dump(stepped(zoo) | {"merge_method": "dare_ties"}))
    with pytest.raises(ConfigError, match="cannot hold the hand recipe"):
        start_genome(LABEL, space, settings, parents)
    file.unlink()
    with pytest.raises(ConfigError, match="no file"):
        reference_recipes(settings, space, parents)


def test_labels_and_starts_are_checked_with_the_file() -> None:
    document = {
        "study": "x",
        "models": {"a": "x", "b": "y"},
        "base": "a",
        "method": "ties",
        "tasks": [{"task": "t"}],
        "hand_recipes": {"mine": "r.yml"},
        "search": {"start": "mnie"},
    }
    with pytest.raises(ConfigError, match="Did you mean 'mine'"):
        loading.check(_yaml.parse(json.dumps(document), "file"))
    for label in ("best", "a"):
        wrong = document | {"hand_recipes": {label: "r.yml"}, "search": {}}
        with pytest.raises(ConfigError, match="give another label"):
            loading.check(_yaml.parse(json.dumps(wrong), "file"))
