"""A method for each layer group: every group is what the space of its method makes of the same genes."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from evomerge.errors import ConfigError
from evomerge.optimizers import OPTIMIZERS, OptimizerSettings
from evomerge.search import Plan
from evomerge.spaces import Axis, MethodChoiceSpace, Range, baselines, first_method
from evomerge.spaces.method_choices import MethodAxis
from evomerge.spaces.weights import EMBEDDINGS, HEAD
from tests.support.toy import stored_rows, weight_space
from tests.support.toy_search import broken, plan

WEIGHT, DENSITY = Range(-0.5, 2.0, 0.5), Range(0.1, 1.0, 0.5)
SUM = weight_space("task_arithmetic", ranges={"weight": WEIGHT}, seed=7)
DARE = weight_space("dare_ties", ranges={"weight": WEIGHT, "density": DENSITY}, seed=7)
AVERAGE = weight_space("linear", ranges={"weight": Range(0.0, 1.0, 0.5)}, seed=7)
SPACE = MethodChoiceSpace((SUM, DARE, AVERAGE))
GROUPS = (EMBEDDINGS, "layers 0-1", "layer 2", HEAD)
LAYERS = {"layers 0-1": (0, 1), "layer 2": (2,)}


def genome(choices: tuple[int, ...], seed: int = 0) -> list[float]:
    numbers = np.random.default_rng(seed).standard_normal(len(SPACE.axes) - len(choices))
    return [*map(float, choices), *numbers]


def number(values: list[float], space: MethodChoiceSpace, of: Axis, method: str) -> float:
    """The gene of a method's axis: of its name, or of its name with the methods that share it."""
    names = [axis.name for axis in space.axes]
    found = [
        name for name in names if name == of.name or (name.startswith(f"{of.name}, by ") and method in name)
    ]
    assert len(found) == 1
    return values[names.index(found[0])]


@pytest.mark.parametrize("choices", itertools.product(range(3), repeat=4))
def test_each_group_is_what_the_space_of_its_method_makes_of_its_genes(choices: tuple[int, ...]) -> None:
    values = genome(choices)
    recipe = SPACE.decode(values)
    of_method = [
        space.decode([number(values, SPACE, axis, space.method.name) for axis in space.axes])
        for space in SPACE.alternatives
    ]
    chosen = dict(zip(GROUPS, choices, strict=True))
    assert recipe.embeddings == of_method[chosen[EMBEDDINGS]].embeddings
    assert recipe.head == of_method[chosen[HEAD]].head
    for group, layers in LAYERS.items():
        for layer in layers:
            assert recipe.layers[layer] == of_method[chosen[group]].layers[layer]
    assert recipe.seed == (7 if 1 in choices else 0), "masks are drawn by DARE alone"
    assert SPACE.encode(recipe) is not None


def test_methods_share_a_number_where_they_take_it_in_one_range() -> None:
    names = [axis.name for axis in SPACE.axes]
    assert names[:4] == [f"method of {group}" for group in GROUPS]
    assert names[4:8] == [
        "weight of a in embeddings, by task_arithmetic and dare_ties",
        "weight of b in embeddings, by task_arithmetic and dare_ties",
        "density of a in embeddings",
        "density of b in embeddings",
    ]
    assert "weight of a in layer 2, mlp, by linear" in names
    numbers = [axis for axis in SPACE.axes if isinstance(axis, Axis)]
    assert len(numbers) == len(DARE.axes) + len(AVERAGE.axes)


def test_a_number_that_the_groups_method_does_not_take_changes_nothing() -> None:
    values = genome((0, 0, 0, 0))
    recipe = SPACE.decode(values)
    idle = [
        i for i, axis in enumerate(SPACE.axes) if axis.name.startswith("density") or "linear" in axis.name
    ]
    assert idle
    assert SPACE.decode([9.0 if i in idle else gene for i, gene in enumerate(values)]) == recipe


@pytest.mark.parametrize("choice", [-1.0, 3.0, 0.5])
def test_a_method_that_does_not_exist_is_no_genome(choice: float) -> None:
    values = genome((0, 0, 0, 0))
    values[1] = choice
    with pytest.raises(ValueError, match=r"method of layers 0-1 is a whole number in \[0, 3\)"):
        SPACE.decode(values)


def test_hand_recipes_of_its_methods_are_points_of_the_space() -> None:
    held = {b.label for b in baselines(first_method(SPACE)) if SPACE.encode(b.recipe) is not None}
    alone = {
        b.label for b in baselines(SUM) for space in SPACE.alternatives if space.encode(b.recipe) is not None
    }
    assert held == alone
    assert {"task arithmetic 0.5", "a alone at 0.5", "DARE-TIES .5, weight 1"} <= held


def test_nothing_is_chosen_where_every_model_equals_the_base_and_where_nothing_is_searched() -> None:
    dead = frozenset({("layer 2", c, m) for c in ("attention", "mlp") for m in ("a", "b")})
    space = MethodChoiceSpace(
        (
            weight_space("ties", dead=dead, head=False),
            weight_space("linear", ranges={"weight": Range(0.0, 1.0, 0.5)}, head=False),
        )
    )
    chosen = [axis.group for axis in space.axes if isinstance(axis, MethodAxis)]
    assert chosen == [EMBEDDINGS, "layers 0-1"]
    assert not any("layer 2" in axis.name or "head" in axis.name for axis in space.axes)
    recipe = space.decode([1.0, 1.0, *space.start[2:]])
    methods = [mix.method for mix in recipe.mixes]
    assert methods == ["linear", "linear", "linear", "ties", "ties"]


@pytest.mark.parametrize("spaces", [(SUM,), (SUM, SUM), ()], ids=["one", "one twice", "none"])
def test_a_choice_is_between_different_methods(spaces: tuple[object, ...]) -> None:
    with pytest.raises(ConfigError, match="between two or more different methods"):
        MethodChoiceSpace(spaces)  # type: ignore[arg-type]


def test_nothing_to_choose_is_said() -> None:
    dead = frozenset(
        (group, c, m)
        for m in ("a", "b")
        for group, c in [("layers 0-1", "mlp"), ("layer 2", "mlp"), (EMBEDDINGS, None), (HEAD, None)]
    )
    spaces = tuple(
        weight_space(name, components=("mlp",), dead=dead, searchable=False) for name in ("ties", "dare_ties")
    )
    with pytest.raises(ConfigError, match="nothing to choose"):
        MethodChoiceSpace(spaces)


@pytest.mark.parametrize("optimizer", ["cat_cma", "elitist", "random"])
def test_a_search_of_methods_broken_off_and_taken_up_is_the_same_search(
    optimizer: str, tmp_path: Path
) -> None:
    settings = OptimizerSettings(
        0.15, 6, 5, categories=SPACE.categories, keep_probability=SPACE.keep_probability
    )

    def of() -> Plan:
        return plan(
            space=SPACE, optimizer=lambda start: OPTIMIZERS[optimizer].make(start, settings), evaluations=18
        )

    whole = tmp_path / "whole" / "study.db"
    (pool,) = broken(whole, [], "kill", of())
    rows = stored_rows(whole)
    sampled = [t for t in rows["trials"] if t["origin"] == "sampled"]
    assert len({str(t["genome"])[:16] for t in sampled}) > 2, "several choices were tried"
    for k, how in ((3, "kill"), (14, "lost"), (len(pool.calls) - 2, "kill")):
        parts = tmp_path / f"{k}" / "study.db"
        broken(parts, [k], how, of())
        assert stored_rows(parts) == rows


def test_catcma_learns_which_method_a_group_wants() -> None:
    """A landscape that asks for one method in each group, whatever the numbers are."""
    wanted = (2.0, 0.0, 1.0, 0.0)
    settings = OptimizerSettings(
        0.15, 12, 1, categories=SPACE.categories, keep_probability=SPACE.keep_probability
    )
    optimizer = OPTIMIZERS["cat_cma"].make(SPACE.start, settings)
    for _ in range(40):
        genomes = optimizer.ask()
        optimizer.tell(genomes, [float(np.sum(g[:4] == wanted)) - 0.01 * float(abs(g[4])) for g in genomes])
    assert tuple(optimizer.mean[:4]) == wanted
