"""Recipes with a weight for each row: merged as rows are, refused where they mean nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evomerge.checkpoints import Checkpoint
from evomerge.errors import CheckpointError, RecipeError
from evomerge.merging import checkpoint_writer, step_slopes
from evomerge.merging.coefficient_slopes import CoefficientSlopes
from evomerge.merging.merge import Merge, merge_into
from evomerge.merging.model_loading import load_base
from evomerge.merging.weight_map import WeightMap
from evomerge.recipes import Mix, PerRow, Recipe, mergekit_yaml, params
from tests.support.merge_cases import live

MODELS = ("math", "code")
DEPTH = 4
TENSOR = "self_attn.q_proj.weight"
NUMBER = st.floats(-10, 10).map(lambda x: x + 0.0)


def rows_of(parents: dict[str, Checkpoint]) -> int:
    return parents["base"].tensors[f"model.layers.0.{TENSOR}"].shape[0]


def by_row(parents: dict[str, Checkpoint], rows: int | None = None) -> Recipe:
    """A sum whose weights of one tensor a layer differ from row to row, of the other parent from none."""
    count = rows or rows_of(parents)

    def mix(layer: int | None) -> Mix:
        weights = tuple((row % 11) / 10 for row in range(count))
        of_math = PerRow(((TENSOR, weights), ("input_layernorm.weight", (0.25,))), 0.5)
        given = params({"weight": (of_math if layer is not None else 0.5, 0.3)})
        return Mix("task_arithmetic", tuple((m, layer) for m in MODELS), ("base", layer), given)

    return Recipe("base", tuple(mix(i) for i in range(DEPTH)), mix(None), mix(None), out_dtype="float32")


@pytest.fixture
def parents(tiny: dict[str, Path]) -> dict[str, Checkpoint]:
    return {name: Checkpoint(path) for name, path in tiny.items()}


@given(
    st.lists(
        st.tuples(st.text(max_size=5), st.lists(NUMBER, min_size=1, max_size=4).map(tuple)),
        min_size=1,
        max_size=3,
    ),
    NUMBER,
)
def test_a_recipe_with_rows_is_its_text(cases: list[tuple[str, tuple[float, ...]]], rest: float) -> None:
    mix = Mix("linear", (("a", 0),), None, params({"weight": (PerRow(tuple(cases), rest),)}))
    one = Recipe("a", (mix,), mix, mix)
    again = Recipe.from_json(one.canonical())
    assert again == one
    assert again.id == one.id
    assert one.row_numbers == 3 * sum(len(values) for _, values in cases)


def test_an_empty_setting_and_a_text_of_another_form_are_refused() -> None:
    with pytest.raises(RecipeError, match="at least one tensor"):
        PerRow((), 1.0)
    mix = Mix("linear", (("a", 0),), None, params({"weight": (PerRow((("x", (1.0,)),), 1.0),)}))
    document = json.loads(Recipe("a", (mix,), mix, mix).canonical())
    document["head"]["params"]["weight"][0]["rows"][0][1] = ["nan"]
    with pytest.raises(RecipeError, match="not a recipe"):
        Recipe.from_json(json.dumps(document))


def test_each_row_has_its_own_weight_and_other_tensors_the_rest(parents: dict[str, Checkpoint]) -> None:
    merged = dict(Merge(by_row(parents), parents))
    for name, tensor in merged.items():
        base, math, code = (parents[m].tensor(name).double() for m in ("base", *MODELS))
        weights = torch.full((len(base),), 0.5, dtype=torch.float64)
        if TENSOR in name:
            weights = torch.tensor([(row % 11) / 10 for row in range(len(base))], dtype=torch.float64)
        elif "input_layernorm" in name:
            weights = torch.full((len(base),), 0.25, dtype=torch.float64)
        wanted = base + weights.reshape(-1, *[1] * (base.dim() - 1)) * (math - base) + 0.3 * (code - base)
        assert torch.allclose(tensor.double(), wanted, rtol=1e-5, atol=1e-6), name


def test_a_live_model_and_a_written_checkpoint_hold_the_same_bits(
    parents: dict[str, Checkpoint], tiny: dict[str, Path], tmp_path: Path
) -> None:
    recipe = replace(by_row(parents), out_dtype="bfloat16")
    resident = live(tiny["base"])
    merge_into(recipe, parents, resident)
    checkpoint_writer.write(recipe, parents, tmp_path / "out")
    written = Checkpoint(tmp_path / "out")
    for name in written.tensors:
        assert torch.equal(written.tensor(name), resident.run(name, torch.bfloat16)), name


def test_slopes_of_rows_are_the_whole_tensors_when_added(parents: dict[str, Checkpoint]) -> None:
    """By the chain rule: the derivative by one weight for all rows is the sum of those by each."""
    recipe = by_row(parents)
    merge = Merge(recipe, parents)
    step = next(step for step in merge.steps if TENSOR in step.name)
    gradient = torch.randn(step.info.shape, generator=torch.Generator().manual_seed(0))
    assert step_slopes.slopes(merge, step, gradient) == {}
    found = step_slopes.row_slopes(merge, step, gradient)
    for model, slopes in found.items():
        delta = parents[model].tensor(step.name).float() - parents["base"].tensor(step.name).float()
        assert float(slopes.sum()) == pytest.approx(
            float((delta.double() * gradient.double()).sum()), rel=1e-4
        )
        assert slopes.shape == (step.info.shape[0],)
    plain = next(step for step in merge.steps if "up_proj" in step.name)
    assert step_slopes.row_slopes(merge, plain, torch.zeros(plain.info.shape)) == {}


def test_slopes_of_rows_add_up_over_backward_passes(parents: dict[str, Checkpoint]) -> None:
    recipe = by_row(parents)
    model: Any = load_base(parents["base"], "float32")
    resident = WeightMap(model, parents["base"].tensors)
    merge_into(recipe, parents, resident)
    name = f"model.layers.1.{TENSOR}"
    found = []
    for passes in (1, 2):
        with CoefficientSlopes(Merge(recipe, parents), resident) as slopes:
            for _ in range(passes):
                ids = torch.arange(3, 15)[None]
                (model(input_ids=ids).logits.log_softmax(-1)[..., 5].sum() / passes).backward()
        found.append(slopes.rows[name, "weight", "math"])
        assert (name, "weight", "math") not in slopes.partials
    assert torch.allclose(found[0], found[1], rtol=1e-5, atol=1e-9)
    assert bool(found[0].abs().max() > 0)


def test_what_cannot_have_rows_is_refused(parents: dict[str, Checkpoint]) -> None:
    recipe = by_row(parents)

    def changed(mix: Mix) -> Mix:
        return replace(mix, method="ties")

    of_ties = replace(
        recipe,
        layers=tuple(map(changed, recipe.layers)),
        embeddings=changed(recipe.embeddings),
        head=changed(recipe.head),
    )
    with pytest.raises(RecipeError, match="weight of ties cannot have a value for each row"):
        Merge(of_ties, parents)
    with pytest.raises(RecipeError, match="mergekit has no weights for rows"):
        Merge(replace(recipe, policy="mergekit", dtype="float32"), parents)
    with pytest.raises(CheckpointError, match=r"3 weights for the rows of 'model\.layers\.0\."):
        Merge(by_row(parents, rows=3), parents)
    with pytest.raises(RecipeError, match="mergekit has no weights for rows"):
        mergekit_yaml.dump(recipe, {name: name for name in parents})
