"""A candidate merged by launches over tables has the bits of one merged tensor by tensor, in every model.

Without Triton's interpreter a launch is done row by row on the CPU, from the same table and numbers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from evomerge.checkpoints import Checkpoint, Parent
from evomerge.errors import CandidateError, CheckpointError
from evomerge.merging import candidate_launch
from evomerge.merging.arena import allocate_arena, arena_layout_of_headers
from evomerge.merging.candidate_launch import CandidateLaunches
from evomerge.merging.merge import Merge, merge_into
from evomerge.merging.merge_plan import MergePlans
from evomerge.merging.parent_placement import PlacedParent
from evomerge.merging.weight_map import WeightMap
from evomerge.methods import METHODS
from evomerge.methods.fused import MagnitudeTables, magnitude_tables
from evomerge.recipes import Filtered, PerRow, Recipe, params
from tests.support import architectures
from tests.support.merge_cases import candidate

ONE_BY_ONE = {"arcee_fusion", "nearswap", "passthrough", "ram", "ramplus_tl", "sce"}
"""Methods that are no weighted sums."""


class ArenaParent(PlacedParent):
    """A parent whose tensors are views of an arena."""

    def __init__(self, parent: Parent) -> None:
        super().__init__(parent)
        self.is_padded = True
        self._cache = allocate_arena(arena_layout_of_headers(parent.tensors), "cpu").view
        for name, view in self._cache.items():
            view.copy_(parent.tensor(name))


class Zoo:
    """A base and its fine-tunes in arenas, and two live models: one for launches, one merged one by one."""

    def __init__(self, paths: dict[str, Path], kind: str = "llama") -> None:
        self.parents: dict[str, Parent] = {n: ArenaParent(Checkpoint(path)) for n, path in paths.items()}
        self.launched, self.plain = (
            WeightMap(architectures.load(paths["base"], kind, torch.bfloat16), self.parents["base"].tensors)
            for _ in range(2)
        )
        self.launched.use_arena()
        self.tables = MagnitudeTables(build=True, ranks_bytes=1 << 24)
        self.launches = CandidateLaunches(self.tables)
        self.plans = MergePlans(self.parents, self.launches)

    def merge(self, recipe: Recipe) -> list[str]:
        """Merges by launches; checks the bits of all tensors and returns those that a table held."""
        for weights in (self.launched, self.plain):  # what an earlier merge left behind is no result
            for tensor in weights.model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.fill_(0.123)
        merge_into(recipe, self.parents, self.launched, self.tables, plans=self.plans)
        launched = [row.target for _, group, _ in self.launches._pending for row in group.rows]
        self.launches.check()
        merge_into(recipe, self.parents, self.plain)
        assert_same_bits(self.launched.model, self.plain.model)
        return launched


def assert_same_bits(one: nn.Module, two: nn.Module) -> None:
    expected = two.state_dict()
    for name, tensor in one.state_dict().items():
        assert torch.equal(bits(tensor), bits(expected[name])), name


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


@pytest.fixture(scope="module")
def llama(tiny: dict[str, Path]) -> Zoo:
    return Zoo(tiny)


@pytest.fixture(autouse=True)
def tables_of_the_largest_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(magnitude_tables, "_SMALL", 1600)


# ---- the bits


@pytest.mark.parametrize("method", METHODS)
def test_launched_tensors_have_the_bits_of_tensors_merged_one_by_one(method: str, llama: Zoo) -> None:
    for seed in range(2):
        launched = llama.merge(candidate(method, seed))
    steps = [step.name for step in Merge(candidate(method), llama.parents).steps if step.mix is not None]
    assert sorted(launched) == ([] if method in ONE_BY_ONE else sorted(steps))


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].param("normalize")])
def test_switches_are_taken_from_the_recipe(method: str, llama: Zoo) -> None:
    rule = METHODS[method]
    for switches in ({"normalize": 0.0, "rescale": 1.0}, {"normalize": 1.0, "rescale": 0.0}):
        given = {name: value for name, value in switches.items() if rule.param(name)}
        recipe = candidate(method, 3)
        mixes = [replace(mix, params=params({**dict(mix.params), **given})) for mix in recipe.mixes]
        recipe = replace(recipe, embeddings=mixes[0], layers=tuple(mixes[1:-1]), head=mixes[-1])
        assert llama.merge(recipe)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "mixtral"])
@pytest.mark.parametrize("method", ["linear", "dare_ties", "della", "slerp"])
def test_fused_tied_and_transposed_parameters_are_written_where_they_lie(
    kind: str, method: str, zoos: dict[str, Zoo], tmp_path_factory: pytest.TempPathFactory
) -> None:
    if kind not in zoos:
        zoos[kind] = Zoo(architectures.build(tmp_path_factory.mktemp(kind), kind, torch.bfloat16), kind)
    zoo = zoos[kind]
    objects = {name: id(p) for name, p in zoo.launched.model.named_parameters(remove_duplicate=False)}
    assert len(zoo.merge(candidate(method, 4))) == len(zoo.parents["base"].tensors)
    after = {name: id(p) for name, p in zoo.launched.model.named_parameters(remove_duplicate=False)}
    assert after == objects


@pytest.fixture(scope="module")
def zoos() -> dict[str, Zoo]:
    return {}


def test_other_types_of_the_output_go_through_scratch(llama: Zoo) -> None:
    """The live model is bfloat16: results in float32 are rounded as they are copied."""
    assert llama.merge(candidate("ties", out_dtype="float32"))


# ---- what no table can hold


def by_row(recipe: Recipe) -> Recipe:
    rows = PerRow((("layers.1.self_attn.q_proj", tuple(0.01 * i for i in range(32))),), 0.5)
    mixes = [
        replace(mix, params=params({**dict(mix.params), "weight": (rows, 0.2, 0.3)})) for mix in recipe.layers
    ]
    return replace(recipe, layers=tuple(mixes))


def test_weights_by_row_are_merged_by_themselves_and_the_others_launched(llama: Zoo) -> None:
    launched = llama.merge(by_row(candidate("task_arithmetic")))
    assert "model.layers.2.self_attn.q_proj.weight" in launched
    assert "model.layers.1.self_attn.q_proj.weight" not in launched


def test_some_layers_by_another_method_are_merged_by_themselves(llama: Zoo) -> None:
    recipe = candidate("linear")
    recipe = replace(recipe, layers=(candidate("sce").layers[0], *recipe.layers[1:]))
    launched = llama.merge(recipe)
    assert len(launched) > 20
    assert not [name for name in launched if ".layers.0." in name]


@pytest.mark.parametrize("how", ["mergekit's arithmetic", "an intermediate merge", "angles of rows"])
def test_what_no_table_holds_has_the_same_bits(how: str, llama: Zoo) -> None:
    recipe = candidate("nuslerp" if how == "angles of rows" else "linear")
    if how == "mergekit's arithmetic":
        recipe = replace(recipe, policy="mergekit", dtype="bfloat16")
    elif how == "an intermediate merge":
        mixes = [replace(m, sources=(("half", m.sources[0][1]), *m.sources[1:])) for m in recipe.mixes]
        layers = tuple(mixes[1:-1])
        recipe = replace(recipe, embeddings=mixes[0], layers=layers, head=mixes[-1])
        recipe = replace(recipe, stages=(("half", candidate("slerp")),))
    else:
        given = {"nuslerp_flatten": 0.0}
        layers = tuple(replace(m, params=params({**dict(m.params), **given})) for m in recipe.layers)
        recipe = replace(recipe, layers=layers)
    launched = llama.merge(recipe)
    assert not [name for name in launched if ".layers." in name]


def test_parents_that_are_read_anew_are_merged_one_by_one(tiny: dict[str, Path], llama: Zoo) -> None:
    files = {name: Checkpoint(path) for name, path in tiny.items()}
    launches = CandidateLaunches(MagnitudeTables())
    merge_into(candidate("linear"), files, llama.launched, plans=MergePlans(files, launches))
    assert not launches._pending
    merge_into(candidate("linear"), files, llama.plain)
    assert_same_bits(llama.launched.model, llama.plain.model)


def test_parents_and_parameters_without_padding_are_launched_too(tiny: dict[str, Path]) -> None:
    zoo = Zoo(tiny)
    zoo.parents = {name: PlacedParent(Checkpoint(path)) for name, path in tiny.items()}
    model = architectures.load(tiny["base"], "llama", torch.bfloat16)
    zoo.launched = WeightMap(model, zoo.parents["base"].tensors)
    zoo.plans = MergePlans(zoo.parents, zoo.launches)
    assert len(zoo.merge(candidate("dare_ties"))) == len(zoo.parents["base"].tensors)


# ---- planned once


def test_a_second_candidate_makes_no_table_and_reads_no_parent(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo = Zoo(tiny)
    zoo.merge(candidate("ties", 0))
    expected = dict(Merge(candidate("ties", 5), zoo.parents))
    monkeypatch.setattr(candidate_launch, "TensorTable", None)
    for parent in zoo.parents.values():
        monkeypatch.setattr(parent, "tensor", None)
    merge_into(candidate("ties", 5), zoo.parents, zoo.launched, zoo.tables, plans=zoo.plans)
    state = zoo.launched.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_masks_follow_the_seed_of_the_recipe(llama: Zoo) -> None:
    for seed in (1, 2, 1):
        llama.merge(replace(candidate("dare_linear", 7), seed=seed))


# ---- what is not finite


@pytest.mark.parametrize("method", ["linear", "ties", "slerp"])
def test_a_value_that_is_not_finite_names_its_tensor_when_it_is_asked(method: str, llama: Zoo) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    recipe = candidate(method)
    tensor = llama.parents["math"].tensor(name)
    kept = tensor.clone()
    tensor[3, 5] = float("nan")
    try:
        tables = MagnitudeTables()
        plans = MergePlans(llama.parents, CandidateLaunches(tables))
        merge_into(recipe, llama.parents, llama.launched, tables, plans=plans)
        with pytest.raises(CheckpointError, match=f"'math' holds NaN in tensor '{name}'"):
            plans.launches.check()
        plans.launches.check()  # is told once
    finally:
        tensor.copy_(kept)


def launch_and_check(recipe: Recipe, zoo: Zoo) -> None:
    merge_into(recipe, zoo.parents, zoo.launched, plans=zoo.plans)
    zoo.launches.check()


def test_the_first_tensor_is_named_and_one_merged_by_itself_does_not_come_before_it(llama: Zoo) -> None:
    recipe = candidate("linear")
    huge = Filtered((("layers.1.mlp.up_proj", 3e38), ("layers.2.mlp", 3e38), ("*", 0.5)))
    given = {"weight": (huge, huge, huge), "normalize": 0.0}
    layers = [replace(mix, params=params(given)) for mix in recipe.layers]
    layers[3] = replace(candidate("nearswap").layers[3], params=params({"t": 1e-30}))
    recipe = replace(recipe, layers=tuple(layers), out_dtype="float16")
    with pytest.raises(CandidateError) as expected:
        merge_into(recipe, llama.parents, llama.plain)
    with pytest.raises(CandidateError) as found:
        launch_and_check(recipe, llama)
    assert "layers.1.mlp.up_proj" in str(expected.value)
    assert str(found.value) == str(expected.value)
