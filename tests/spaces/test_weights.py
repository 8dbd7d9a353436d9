"""Genome and recipe: one snapped number on both sides, every tensor under the number of its own component."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge import _yaml
from evomerge.checkpoints import Checkpoint
from evomerge.config import loading
from evomerge.errors import ConfigError
from evomerge.launch import weight_space as weight_space_module
from evomerge.merging import merge, tensor_plan
from evomerge.methods import METHODS, method
from evomerge.recipes import Filtered, Mix, Recipe, params
from evomerge.spaces import Axis, Range, WeightSpace, baselines
from tests.support.toy import SEGMENTS, llama, llama_shapes, weight_space

GRID = 1e-4
SEARCHED = [n for n in METHODS if n != "passthrough" and not all(p.flag for p in METHODS[n].params)]
CHOICES = [c for n in (1, 2, 3) for c in itertools.combinations(("attention", "mlp", "other"), n)]


def full_space(
    name: str, components: tuple[str, ...] = ("attention", "mlp"), groups: tuple[int, ...] = (3, 2)
) -> WeightSpace:
    """A space that searches every parameter of a method."""
    ranges = {
        p.name: Range(p.low, p.high, round(p.low + 0.4 * (p.high - p.low), 4))
        for p in method(name).params
        if not p.flag
    }
    models = ("a", "b", "c")[: method(name).models[1]]
    return weight_space(name, models, groups, components, ranges)


def component_of(tensor: str) -> str:
    """The component that a Llama tensor's name says, told apart by module names alone."""
    module = tensor.split(".")[3]
    return {"self_attn": "attention", "mlp": "mlp"}.get(module, "other")


def curve(low: float, high: float, start: float, gene: float) -> float:
    """The map of the design: a logistic curve through the start, with the slope high - low there."""
    f = (start - low) / (high - low)
    z = math.log(f / (1 - f)) + gene / (f * (1 - f))
    return low + (high - low) * (1 / (1 + math.exp(-z)) if z > -700 else 0.0)


def values_of(recipe: Recipe, space: WeightSpace, axis: Axis) -> list[float]:
    """What the recipe holds for an axis: one number per layer of its group, read by full tensor names."""
    if axis.component is None:
        mixes = (
            [(recipe.embeddings, "model.embed_tokens.weight")]
            if axis.group == "embeddings"
            else [(recipe.head, "lm_head.weight")]
        )
    else:
        own = [
            n for n in llama_shapes(1) if n.startswith("model.layers") and component_of(n) == axis.component
        ]
        mixes = [
            (recipe.layers[i], n.replace("layers.0", f"layers.{i}"))
            for i in dict(space.spans())[axis.group]
            for n in own
        ]
    return [resolve(mix, axis.param, axis.source, name) for mix, name in mixes]


def resolve(mix: Mix, param: str, source: str | None, tensor: str) -> float:
    """A parameter's value for one tensor, by the rule of mergekit's filters: the first case whose text is in
    the name."""
    value = dict(mix.params)[param]
    if isinstance(value, tuple):
        value = value[[name for name, _ in mix.sources].index(source or "")]
    if isinstance(value, Filtered):
        return next(number for text, number in value.cases if text == "*" or text in tensor)
    return value


# ---- one axis ----------------------------------------------------------------------------------------------

bounds = st.tuples(st.integers(-30_000, 30_000), st.integers(20, 40_000), st.floats(0.02, 0.98)).map(
    lambda t: (t[0] * GRID, (t[0] + t[1]) * GRID, t[0] * GRID + t[2] * t[1] * GRID)
)


def axis_of(low: float, high: float, start: float) -> Axis:
    return Axis("layers 0-1", "mlp", "weight", "a", low, high, start)


@given(bounds, st.floats(-5, 5))
def test_a_gene_is_a_point_of_the_curve_snapped_to_the_grid(
    b: tuple[float, float, float], gene: float
) -> None:
    value = axis_of(*b).value(gene)
    assert abs(value - curve(*b, gene)) <= 0.5 * GRID + 1e-9
    assert value == round(value, 4)


@given(bounds, st.floats(allow_nan=False, allow_infinity=False))
def test_any_finite_gene_stays_between_the_bounds(b: tuple[float, float, float], gene: float) -> None:
    low, high, _ = b
    assert low - 1e-9 <= axis_of(*b).value(gene) <= high + 1e-9


@given(bounds, st.floats(-3, 3), st.floats(-3, 3))
def test_a_larger_gene_is_never_a_smaller_value(b: tuple[float, float, float], x: float, y: float) -> None:
    axis = axis_of(*b)
    assert (axis.value(x) - axis.value(y)) * (x - y) >= 0


@given(bounds)
def test_gene_zero_is_the_start_and_its_slope_the_range(b: tuple[float, float, float]) -> None:
    low, high, start = b
    axis = axis_of(*b)
    assert abs(axis.value(0.0) - start) <= 0.5 * GRID + 1e-9
    step = 0.01
    slope = (axis.value(step) - axis.value(-step)) / (2 * step)
    exact = (curve(*b, step) - curve(*b, -step)) / (2 * step)
    assert abs(slope - exact) <= GRID / (2 * step) + 1e-9
    if 0.2 < (start - low) / (high - low) < 0.8:
        assert exact == pytest.approx(high - low, rel=0.02)


@given(bounds, st.integers(0, 40_000))
def test_a_value_inside_survives_its_gene(b: tuple[float, float, float], steps: int) -> None:
    low, high, _ = b
    axis = axis_of(*b)
    value = round(low + GRID * (1 + steps % round((high - low) / GRID)), 4)
    kept = axis.value(axis.gene(value))
    edge = GRID * (high - low)
    assert kept == value or (
        min(value - low, high - value) <= edge + GRID and abs(kept - value) <= edge + GRID
    )


@given(bounds, st.floats(-1e6, 1e6))
def test_a_value_outside_is_moved_to_the_nearest_end(b: tuple[float, float, float], value: float) -> None:
    low, high, _ = b
    axis = axis_of(*b)
    gene = axis.gene(value)
    assert math.isfinite(gene)
    nearest = min(max(value, low), high)
    assert abs(axis.value(gene) - nearest) <= GRID * (high - low) + GRID


@pytest.mark.parametrize(
    ("low", "high", "start"), [(0, 1, 0), (0, 1, 1), (0, 1, -1), (1, 0, 0.5), (0, 0, 0), (0, 1, math.nan)]
)
def test_an_axis_starts_inside_its_bounds(low: float, high: float, start: float) -> None:
    with pytest.raises(ConfigError, match="must lie inside"):
        axis_of(low, high, start)


# ---- a space -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEARCHED)
def test_zeros_decode_to_the_starts(name: str) -> None:
    space = full_space(name)
    recipe = space.decode([0.0] * len(space.axes))
    for axis in space.axes:
        assert set(values_of(recipe, space, axis)) == {round(axis.start, axis.digits)}, axis.name


@pytest.mark.parametrize("components", CHOICES, ids="+".join)
@pytest.mark.parametrize("name", ["task_arithmetic", "dare_ties", "slerp"])
@settings(max_examples=25)
@given(data=st.data())
def test_every_tensor_gets_the_value_of_its_own_component(
    name: str, components: tuple[str, ...], data: st.DataObject
) -> None:
    space = full_space(name, components)
    genes = data.draw(st.lists(st.floats(-0.6, 0.6), min_size=len(space.axes), max_size=len(space.axes)))
    recipe = space.decode(genes)
    wanted = {axis: axis.value(g) for axis, g in zip(space.axes, genes, strict=True)}
    for axis, value in wanted.items():
        assert set(values_of(recipe, space, axis)) == {value}, axis.name
    rest = {"attention", "mlp", "other"} - set(components)
    for group, span in space.spans():
        for component in rest:
            for param, source in {(a.param, a.source) for a in space.axes}:
                listed = [
                    v for a, v in wanted.items() if (a.group, a.param, a.source) == (group, param, source)
                ]
                lost = Axis(
                    group,
                    component,
                    param,
                    source,
                    0,
                    1,
                    0.5,
                    next(a.digits for a in wanted if a.param == param),
                )
                found = values_of(recipe, space, lost)
                assert len(found) == len(span) * {"attention": 4, "mlp": 3, "other": 2}[component]
                mean = math.fsum(listed) / len(listed)
                assert all(abs(v - mean) <= 0.5 * 10.0**-lost.digits + 1e-9 for v in found), (
                    f"{component} takes the mean of {components}"
                )


@pytest.mark.parametrize("name", SEARCHED)
@settings(max_examples=25)
@given(data=st.data())
def test_encode_inverts_decode(name: str, data: st.DataObject) -> None:
    space = full_space(
        name,
        data.draw(st.sampled_from(CHOICES)),
        data.draw(st.sampled_from([(5,), (1, 1, 1, 1, 1), (1, 4), (2, 3)])),
    )
    genes = data.draw(st.lists(st.floats(-0.4, 0.4), min_size=len(space.axes), max_size=len(space.axes)))
    recipe = space.decode(genes)
    back = space.encode(recipe)
    assert back is not None
    assert space.decode(back) == recipe
    assert space.decode(back).id == recipe.id
    for axis, before, after in zip(space.axes, genes, back, strict=True):
        assert (
            abs(
                curve(axis.low, axis.high, axis.start, before) - curve(axis.low, axis.high, axis.start, after)
            )
            <= 0.5 * 10.0**-axis.digits + 1e-9
        )


@pytest.mark.parametrize("groups", [(5,), (1, 4), (2, 2, 1), (1, 1, 1, 1, 1)])
def test_groups_may_be_ragged_and_cover_every_layer_once(groups: tuple[int, ...]) -> None:
    space = weight_space(groups=groups)
    spans = [list(span) for _, span in space.spans()]
    assert [len(s) for s in spans] == list(groups)
    assert list(itertools.chain(*spans)) == list(range(5))
    assert len(space.axes) == 2 * (2 * len(groups) + 2)
    genes = [0.02 * i for i in range(len(space.axes))]
    recipe = space.decode(genes)
    assert [[layer for _, layer in mix.sources] for mix in recipe.layers] == [[i, i] for i in range(5)]
    for span in spans:
        assert len({recipe.layers[i].params for i in span}) == 1
    assert len({mix.params for mix in recipe.mixes}) == len(groups) + 2


@pytest.mark.parametrize("bad", [[0.0], [], [math.nan], [math.inf], [-math.inf]])
def test_only_finite_genomes_of_the_right_length_decode(bad: Sequence[float]) -> None:
    space = weight_space()
    genome = [0.0] * (len(space.axes) - 1) + list(bad)
    if len(genome) == len(space.axes) and math.isfinite(genome[-1]):
        genome = [*genome, 0.0]
    with pytest.raises(ValueError, match=f"{len(space.axes)} finite numbers"):
        space.decode(genome)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=12, max_size=12))
def test_any_finite_genome_is_a_recipe_that_its_method_accepts(genome: list[float]) -> None:
    space = weight_space(
        "dare_linear",
        ("a",),
        (2, 1),
        ("attention", "mlp"),
        {"weight": Range(-0.5, 2, 0.5), "density": Range(0.0, 1.0, 0.6)},
    )
    recipe = space.decode(genome)
    tensor_plan.check(recipe)
    assert Recipe.from_json(recipe.canonical()) == recipe


def test_fixed_parameters_and_switches_have_no_axis() -> None:
    space = weight_space(
        "ties",
        ranges={"weight": Range(0, 2, 1), "density": Range(0.3, 0.3, 0.3), "normalize": Range(0.0, 0.0, 0.0)},
    )
    assert {a.param for a in space.axes} == {"weight"}
    for mix in space.decode([0.1] * len(space.axes)).mixes:
        assert dict(mix.params)["density"] == (0.3, 0.3)
        assert dict(mix.params)["normalize"] == 0.0
        assert dict(mix.params)["lambda"] == 1.0


@pytest.mark.parametrize(("embeddings", "head"), [(True, False), (False, True), (False, False)])
def test_outer_tensors_left_out_keep_the_start(embeddings: bool, head: bool) -> None:
    space = weight_space(embeddings=embeddings, head=head)
    assert {a.group for a in space.axes} - {"layers 0-1", "layer 2"} == {
        n for n, on in (("embeddings", embeddings), ("head", head)) if on
    }
    recipe = space.decode([0.3] * len(space.axes))
    for mix, on in ((recipe.embeddings, embeddings), (recipe.head, head)):
        assert (dict(mix.params)["weight"] == (0.5, 0.5)) is not on


# ---- encode: what a space can hold -------------------------------------------------------------------------


def test_encode_knows_its_own_method_models_and_depth_alone() -> None:
    space = weight_space()
    own = space.decode([0.1] * len(space.axes))
    assert space.encode(own) is not None
    others = [
        weight_space("linear"),
        weight_space("ties"),
        weight_space(models=("b", "a")),
        weight_space(models=("a",)),
        weight_space(models=("a", "c")),
        weight_space(groups=(2, 2)),
        weight_space(groups=(2,)),
    ]
    for other in others:
        assert space.encode(other.decode([0.1] * len(other.axes))) is None
    mixed = Recipe(
        own.base,
        own.layers,
        own.embeddings,
        Mix("passthrough", (("a", None),), None, params({"scale": (1.0,)})),
    )
    assert space.encode(mixed) is None


@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "ties", "dare_ties"])
def test_a_hand_recipe_that_is_encoded_is_held_by_the_space(name: str) -> None:
    """What 'start: best' and the injected candidates rest on: the genome found is the recipe that was
    scored."""
    models = ("a", "b", "c")
    spaces = [
        weight_space(name, models, ranges={"weight": Range(-1.0, 3.0, 0.5)}),
        weight_space(
            name,
            models,
            ranges={"weight": Range(-1.0, 3.0, 0.5)}
            | ({"density": Range(0.2, 0.9, 0.4)} if "ti" in name[-4:] else {}),
        ),
    ]
    for space in spaces:
        for baseline in baselines(space):
            genome = space.encode(baseline.recipe)
            if genome is None:
                continue
            held = space.decode(genome)
            for a, b in zip(held.mixes, baseline.recipe.mixes, strict=True):
                assert a.params == b.params, f"'{baseline.label}' is taken for another recipe of {name}"


def test_encode_of_a_fixed_parameter_that_differs_is_none() -> None:
    space = weight_space("ties", ranges={"weight": Range(0, 2, 1), "density": Range(0.3, 0.3, 0.3)})
    other = weight_space("ties", ranges={"weight": Range(0, 2, 1), "density": Range(0.8, 0.8, 0.8)})
    assert space.encode(space.decode([0.1] * len(space.axes))) is not None
    assert space.encode(other.decode([0.1] * len(other.axes))) is None


# ---- over real checkpoints ---------------------------------------------------------------------------------

FILE = """\
study: trial
models: {{base: x, a: x, b: x, c: x}}
base: base
method: {method}
space:
  groups: [2, 1, 2]
  components: {components}
  parameters: {parameters}
tasks: [{{task: t}}]
"""


def made(
    parents: Mapping[str, Checkpoint],
    name: str = "task_arithmetic",
    components: str = "[attention, mlp]",
    parameters: str = "{}",
) -> WeightSpace:
    text = FILE.format(method=name, components=components, parameters=parameters)
    return weight_space_module.make_space(loading.check(_yaml.parse(text, "file")), parents)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """a differs everywhere but in attention of layers 0-1; b only in mlp of layer 2 and norms of layer 4; c
    only in the head."""
    root = tmp_path_factory.mktemp("family")
    base = llama(root / "base", 0)
    spared = {
        "a": lambda n: (
            component_of(n) == "attention" and n.split(".")[2] in ("0", "1") if "layers" in n else False
        ),
        "b": lambda n: (
            n not in ("model.layers.2.mlp.up_proj.weight", "model.layers.4.input_layernorm.weight")
        ),
        "c": lambda n: n != "lm_head.weight",
    }
    folders = {"base": base} | {
        m: llama(root / m, i, near=base, same=same) for i, (m, same) in enumerate(spared.items(), 1)
    }
    return {name: Checkpoint(folder) for name, folder in folders.items()}


def merged(recipe: Recipe, parents: Mapping[str, Checkpoint]) -> dict[str, torch.Tensor]:
    return dict(merge.merged_tensors(recipe, parents))


@pytest.mark.parametrize("components", CHOICES, ids="+".join)
def test_an_axis_is_there_if_and_only_if_it_changes_the_merge(
    components: tuple[str, ...], family: dict[str, Checkpoint]
) -> None:
    space = made(family, components=f"[{', '.join(components)}]")
    there = {(a.group, a.component, a.source) for a in space.axes}
    everywhere = [
        ("embeddings", None),
        ("head", None),
        *((g, c) for g, _ in space.spans() for c in components),
    ]
    free = WeightSpace(
        **{f: getattr(space, f) for f in space.__dataclass_fields__ if f not in ("axes", "dead")}
    )
    assert {(a.group, a.component, a.source) for a in free.axes} == {
        (g, c, m) for g, c in everywhere for m in "abc"
    }
    middle = merged(free.decode([0.0] * len(free.axes)), family)
    changes = set()
    for i, axis in enumerate(free.axes):
        moved = merged(free.decode([5.0 * (i == j) for j in range(len(free.axes))]), family)
        if any(not torch.equal(moved[name], middle[name]) for name in middle):
            changes.add((axis.group, axis.component, axis.source))
    assert there == changes


def test_the_numbers_reach_the_tensors(family: dict[str, Checkpoint]) -> None:
    space = made(family)
    genes = [0.3 * math.sin(i) for i in range(len(space.axes))]
    at = {(a.group, a.component, a.source): a.value(g) for a, g in zip(space.axes, genes, strict=True)}
    out = merged(space.decode(genes), family)
    assert set(out) == set(llama_shapes(5))
    group_of = {i: group for group, span in space.spans() for i in span}
    start = round(1 / 3, 4)
    for name, tensor in out.items():
        wanted = family["base"].tensor(name).double()
        for model in "abc":
            if ".layers." not in name:
                w = at.get(("embeddings" if "embed" in name else "head", None, model), start)
            else:
                group, component = group_of[int(name.split(".")[2])], component_of(name)
                both = [at.get((group, c, model), start) for c in ("attention", "mlp")]
                w = (
                    at.get((group, component, model), start)
                    if component != "other"
                    else round(sum(both) / 2, 4)
                )
            wanted += w * (family[model].tensor(name).double() - family["base"].tensor(name).double())
        assert torch.allclose(tensor.double(), wanted, rtol=2**-8, atol=1e-6), name


def test_segments_are_those_of_the_checkpoint(family: dict[str, Checkpoint]) -> None:
    assert made(family).segments == SEGMENTS


def test_methods_without_a_base_have_no_dead_axis(family: dict[str, Checkpoint]) -> None:
    assert len(made(family, "linear").axes) == 3 * (3 * 2 + 2)


def test_defaults_start_inside(family: dict[str, Checkpoint]) -> None:
    starts = {(axis.param, round(axis.start, 9)) for axis in made(family, "dare_ties").axes}
    assert starts == {("weight", round(1 / 3, 9)), ("density", 0.5)}, "what the method declares"
    two = {k: family[k] for k in ("base", "a")}
    text = FILE.format(method="slerp", components="[attention]", parameters="{}").replace(", b: x, c: x", "")
    assert {
        (a.param, a.start)
        for a in weight_space_module.make_space(loading.check(_yaml.parse(text, "file")), two).axes
    } == {("t", 0.5)}


def test_parents_equal_to_the_base_leave_nothing_to_search(family: dict[str, Checkpoint]) -> None:
    with pytest.raises(ConfigError, match="nothing to search"):
        made(dict.fromkeys(("base", "a", "b", "c"), family["base"]))


def test_groups_must_add_up(family: dict[str, Checkpoint]) -> None:
    text = FILE.format(method="linear", components="[mlp]", parameters="{}").replace("[2, 1, 2]", "[2, 2]")
    with pytest.raises(ConfigError, match="add up to 4 layers, 'base' has 5"):
        weight_space_module.make_space(loading.check(_yaml.parse(text, "file")), family)


@pytest.mark.parametrize(
    ("groups", "sizes"), [(1, [5]), (2, [3, 2]), (3, [2, 2, 1]), (5, [1] * 5), (9, [1] * 5)]
)
def test_a_number_of_groups_divides_the_layers_evenly(
    groups: int, sizes: list[int], family: dict[str, Checkpoint]
) -> None:
    text = FILE.format(method="linear", components="[mlp]", parameters="{}").replace("[2, 1, 2]", str(groups))
    assert (
        list(weight_space_module.make_space(loading.check(_yaml.parse(text, "file")), family).groups) == sizes
    )


SPARSE = ("ties", "dare_ties", "dare_linear", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties")


@pytest.mark.parametrize("name", SPARSE)
def test_a_sparse_method_searches_its_density_unasked(name: str, family: dict[str, Checkpoint]) -> None:
    assert {axis.param for axis in made(family, name).axes} == {"weight", "density"}
    fixed = made(family, name, parameters="{density: 0.7}")
    assert {axis.param for axis in fixed.axes} == {"weight"}


def test_a_study_that_searched_no_density_goes_on_without(family: dict[str, Checkpoint]) -> None:
    text = FILE.format(method="dare_ties", components="[mlp]", parameters="{}")
    settings = loading.check(_yaml.parse(text, "file"))
    assert weight_space_module.searched_unnamed(settings) == ("density",)
    old = weight_space_module.make_space(settings, family, ())
    assert {axis.param for axis in old.axes} == {"weight"}
    assert dict(old.uniform({}).layers[0].params)["density"] == (1.0, 1.0, 1.0)
    new = weight_space_module.make_space(settings, family, ("density",))
    assert new.axes == weight_space_module.make_space(settings, family).axes


@pytest.mark.parametrize("name", ["linear", "multislerp", "nuslerp"])
def test_one_expert_is_mixed_with_the_base_where_a_method_has_none(
    name: str, family: dict[str, Checkpoint]
) -> None:
    two = {k: family[k] for k in ("base", "a")}
    text = FILE.format(method=name, components="[mlp]", parameters="{}").replace(", b: x, c: x", "")
    space = weight_space_module.make_space(loading.check(_yaml.parse(text, "file")), two)
    assert {(axis.param, axis.source, axis.start) for axis in space.axes} == {
        ("weight", "base", 0.5),
        ("weight", "a", 0.5),
    }
    from evomerge.merging.merge import merged_tensors
    from evomerge.spaces import baselines

    labels = [b.label for b in baselines(space)]
    assert labels[:2] == ["base", "a"]
    assert len(labels) == len(set(labels))
    merged = dict(merged_tensors(space.decode(space.start), two))
    name = "model.layers.0.mlp.up_proj.weight"
    mean = (two["base"].tensor(name).float() + two["a"].tensor(name).float()) / 2
    assert torch.allclose(merged[name].float(), mean, atol=0.02)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_with_numbers_has_a_search_by_default_or_says_what_to_give(
    name: str, family: dict[str, Checkpoint]
) -> None:
    count = METHODS[name].models[1]
    models = {k: family[k] for k in ("base", "a", "b", "c")[: 1 + min(count, 3)]}
    text = FILE.format(method=name, components="[mlp]", parameters="{}")
    listed = ", ".join(f"{m}: x" for m in models)
    text = re.sub(r"models: \{[^}]*\}", f"models: {{{listed}}}", text)
    settings = loading.check(_yaml.parse(text, "file"))
    try:
        space = weight_space_module.make_space(settings, models)
    except ConfigError as error:
        said = str(error)
        space = None
    if space is None:
        assert not any(p.searched for p in METHODS[name].params)
        assert "give a range in space.parameters" in said
    else:
        assert {axis.param for axis in space.axes} == {p.name for p in METHODS[name].params if p.searched}
