"""Merges of merges: a file of several documents is the same as merging its stages to folders one by one."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from evomerge._yaml import parse_all
from evomerge.checkpoints import Checkpoint
from evomerge.errors import EvomergeError, RecipeError
from evomerge.export.recipe_file import merge_recipe_file
from evomerge.merging import checkpoint_writer, merge
from evomerge.methods.fused.magnitude_tables import MagnitudeTables
from evomerge.recipes import Mix, Recipe, TokenizerSpec, params
from evomerge.recipes.mergekit_yaml import dump, load, with_outer_filters
from tests.support.merge_cases import assert_equal, candidate, files, live


def stage(
    method: str, base: Path | str | None, models: dict[Path | str, float | None], name: str = "", **more: Any
) -> dict[str, Any]:
    listed = [
        {"model": str(m), **({} if w is None else {"parameters": {"weight": w}})} for m, w in models.items()
    ]
    top = {"name": name} if name else {}
    return (
        top
        | {"merge_method": method}
        | ({"base_model": str(base)} if base else {})
        | {"models": listed}
        | more
    )


def save(file: Path, *documents: dict[str, Any]) -> Path:
    file.write_text("---\n".join(yaml.safe_dump(d, sort_keys=False) for d in documents))
    return file


def three(tiny: dict[str, Path], one: Path | str = "one", two: Path | str = "two") -> list[dict[str, Any]]:
    """A stage, a stage that reads it, and a result that reads both."""
    base, math, code, chat = (tiny[m] for m in ("base", "math", "code", "chat"))
    return [
        stage("ties", base, {math: 0.7, code: 0.6}, "one", parameters={"density": 0.6}, out_dtype="bfloat16"),
        stage("slerp", one, {chat: None}, "two", parameters={"t": [0.2, 0.8]}, out_dtype="bfloat16"),
        stage(
            "dare_linear",
            base,
            {two: 0.5, one: 0.4, math: 0.3},
            parameters={"density": 0.5},
            out_dtype="bfloat16",
        ),
    ]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
@pytest.mark.parametrize("policy", ["float32", "mergekit"])
def test_stages_in_any_order_are_folders_merged_one_by_one(
    order: tuple[int, ...], policy: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    documents = three(tiny)
    merge_recipe_file(
        save(tmp_path / "all.yaml", *(documents[i] for i in order)), tmp_path / "all", policy=policy
    )
    for name, document in zip(
        ("one", "two", "last"), three(tiny, tmp_path / "one", tmp_path / "two"), strict=True
    ):
        document.pop("name", None)
        if name == "last":  # masks are keyed by the model's name
            break
        merge_recipe_file(save(tmp_path / f"{name}.yaml", document), tmp_path / name, policy=policy)
    parents = {str(path): Checkpoint(path) for path in tiny.values()} | {
        m: Checkpoint(tmp_path / m) for m in ("one", "two")
    }
    recipe = load(
        parse_all(yaml.safe_dump(three(tiny)[2]), "last"),
        lambda m: parents[m].layout.num_layers,
        lambda m: parents[m].dtype,
        policy,
    )
    assert_equal(
        load_file(tmp_path / "all" / "model.safetensors"), dict(merge.merged_tensors(recipe, parents))
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "all",
        "all.yaml",
        "one",
        "one.yaml",
        "two",
        "two.yaml",
    ]


def test_the_last_document_is_the_result_if_all_have_names(tiny: dict[str, Path], tmp_path: Path) -> None:
    documents = three(tiny)
    merge_recipe_file(save(tmp_path / "a.yaml", *documents), tmp_path / "a")
    merge_recipe_file(
        save(tmp_path / "b.yaml", *documents[:2], {"name": "end", **documents[2]}), tmp_path / "b"
    )
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_stage_of_slices_has_their_depth_and_lists(tiny: dict[str, Path], tmp_path: Path) -> None:
    slices = [{"sources": [{"model": str(tiny["math"]), "layer_range": span}]} for span in ([0, 3], [1, 4])]
    deep = {"name": "deep", "merge_method": "passthrough", "slices": slices}
    last = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": "deep", "layer_range": [2, 6]}]}],
    }
    merge_recipe_file(save(tmp_path / "recipe.yaml", deep, last), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 4
    own, out = (
        load_file(tiny["math"] / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    for output, layer in enumerate((2, 1, 2, 3)):
        assert torch.equal(
            out[f"model.layers.{output}.mlp.up_proj.weight"], own[f"model.layers.{layer}.mlp.up_proj.weight"]
        )
    last["slices"][0]["sources"][0]["layer_range"] = [2, 7]  # type: ignore[index]
    with pytest.raises(
        RecipeError, match=r"recipe\.yaml:\d+:\d+ layer_range must be .* <= 6 for deep, got \[2, 7\]"
    ):
        merge_recipe_file(save(tmp_path / "recipe.yaml", deep, last), tmp_path / "no")


def test_task_analogy_is_the_sum_written_out(tiny32: dict[str, Path], tmp_path: Path) -> None:
    """C + (B - A), then half of it with the base: what float64 gives."""
    a, b, c = (tiny32[m] for m in ("base", "math", "code"))
    analogy = stage(
        "linear",
        c,
        {c: 1.0, b: 1.0, a: -1.0},
        "analogy",
        parameters={"normalize": False},
        out_dtype="float32",
    )
    last = stage("linear", a, {"analogy": 0.5, a: 0.5}, parameters={"normalize": False}, out_dtype="float32")
    merge_recipe_file(save(tmp_path / "recipe.yaml", analogy, last), tmp_path / "out")
    own = {m: load_file(tiny32[m] / "model.safetensors") for m in ("base", "math", "code")}
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        wanted = own["code"][name].double() + (own["math"][name].double() - own["base"][name].double())
        torch.testing.assert_close(
            tensor.double(), (wanted + own["base"][name].double()) / 2, rtol=1e-6, atol=1e-7
        )


# ---- mistakes

LINE = "merge_method: linear\nmodels: [{model: MODEL, parameters: {weight: 1}}]\n"
MISTAKES = {
    "a cycle": (
        [
            f"name: a\n{LINE.replace('MODEL', 'b')}",
            f"name: b\n{LINE.replace('MODEL', 'a')}",
            LINE.replace("MODEL", "a"),
        ],
        "1:1",
        "stage 'a' needs itself, by way of a and b",
    ),
    "a stage nobody reads": ([f"name: a\n{LINE}", LINE], "1:1", "stage 'a' is read by none of the others"),
    "a name twice": (
        [f"name: a\n{LINE}", f"name: a\n{LINE}", LINE.replace("MODEL", "a")],
        "5:1",
        "name must be a text that no other document has",
    ),
    "two without a name": ([LINE, LINE], "4:1", "the second document without a name"),
    "a name that is a list": ([f"name: [a]\n{LINE}", LINE], "1:1", "name must be a text"),
    "a last document that is a list": ([f"name: a\n{LINE}", "- a\n"], "5:1", "a recipe is a mapping"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_with_its_place(name: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    documents, place, message = MISTAKES[name]
    file = tmp_path / "recipe.yaml"
    file.write_text("---\n".join(documents).replace("MODEL", str(tiny["math"])))
    with pytest.raises(EvomergeError, match=re.escape(message)) as caught:
        merge_recipe_file(file, tmp_path / "out")
    assert "\n" not in str(caught.value)
    if place:
        assert str(caught.value).startswith(f"{file}:{place} ")
    assert not (tmp_path / "out").exists()


# ---- as values, in a search

OUTER = ("model.embed_tokens.weight",), ("lm_head.weight", "model.norm.weight")


def staged(method: str, weight: float, seed: int = 0, **fields: Any) -> Recipe:
    """A candidate whose first source is a stage: the average of math and code at that weight."""
    given = params({"weight": (weight, 1 - weight), "normalize": 0.0})
    mixes = [Mix("linear", (("math", i), ("code", i)), None, given) for i in (*range(4), None)]
    inner = Recipe("base", tuple(mixes[:4]), mixes[4], mixes[4])
    recipe = candidate(method, seed)

    def moved(mix: Mix) -> Mix:
        return replace(mix, sources=(("half", mix.sources[0][1]), *mix.sources[1:]))

    return replace(
        recipe,
        layers=tuple(map(moved, recipe.layers)),
        embeddings=moved(recipe.embeddings),
        head=moved(recipe.head),
        stages=(("half", inner),),
        **fields,
    )


@pytest.fixture
def parents(tiny: dict[str, Path]) -> dict[str, Checkpoint]:
    return {name: Checkpoint(path) for name, path in tiny.items()}


@pytest.mark.parametrize(
    "method", ["linear", "slerp", "ties", "dare_ties", "breadcrumbs", "della", "karcher"]
)
def test_tables_of_a_search_remember_no_stage_of_another_recipe(
    method: str, parents: dict[str, Checkpoint], tiny: Any, tmp_path: Path
) -> None:
    known, resident = MagnitudeTables(build=True), live(tiny["base"])
    for i, weight in enumerate((0.2, 0.9, -0.4, 0.2)):
        recipe = staged(method, weight, i)
        merge.merge_into(recipe, parents, resident, known)
        assert_equal(resident.model.state_dict(), dict(merge.merged_tensors(recipe, parents)))  # type: ignore[arg-type]
        checkpoint_writer.write(recipe, parents, tmp_path / str(i))
        assert_equal(load_file(tmp_path / str(i) / "model.safetensors"), resident.model.state_dict())  # type: ignore[arg-type]


def test_recipes_with_stages_survive_their_text(parents: dict[str, Checkpoint]) -> None:
    recipe = staged("ties", 0.3, tokenizer=TokenizerSpec("base"), chat_template="chatml")
    back = Recipe.from_json(recipe.canonical())
    assert back == recipe
    assert back.id == recipe.id
    assert back.id not in {replace(recipe, stages=()).id, staged("ties", 0.4).id}
    assert_equal(
        dict(merge.merged_tensors(staged("ties", 0.3), parents)),
        dict(merge.merged_tensors(Recipe.from_json(staged("ties", 0.3).canonical()), parents)),
    )


def test_stages_are_written_as_documents_and_read_back(tiny: dict[str, Path], tmp_path: Path) -> None:
    folders = {name: str(path) for name, path in tiny.items()}
    (tmp_path / "recipe.yaml").write_text(dump(with_outer_filters(staged("ties", 0.3), *OUTER), folders))
    read = load(parse_all((tmp_path / "recipe.yaml").read_text(), "recipe.yaml"), lambda _: 4)
    assert [name for name, _ in read.stages] == ["half"]
    merge_recipe_file(tmp_path / "recipe.yaml", tmp_path / "out")
    named = {name: Checkpoint(path) for name, path in tiny.items()}
    assert_equal(
        load_file(tmp_path / "out" / "model.safetensors"),
        dict(merge.merged_tensors(staged("ties", 0.3), named)),
    )


def test_a_stage_remembers_its_parents_by_content(
    parents: dict[str, Checkpoint], tiny: dict[str, Path]
) -> None:
    def digest(recipe: Recipe, given: dict[str, Checkpoint]) -> str:
        return merge.Merge(recipe, given).parents["half"].content_hash()

    first = digest(staged("ties", 0.3), parents)
    assert first == digest(staged("linear", 0.3), parents)
    assert first != digest(staged("ties", 0.4), parents)
    assert first != digest(staged("ties", 0.3), parents | {"math": Checkpoint(tiny["chat"])})
