"""A recipe made live is the model that the same recipe writes to disk; parents are taken by reference; routes
pass a gate first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from evomerge.checkpoints import Checkpoint, Parent
from evomerge.errors import RecipeError
from evomerge.evaluation import Items, ItemScore, perplexity_screen
from evomerge.evaluation.perplexity_screen import NATS_PER_TOKEN, PerplexityScreen, ScreenText
from evomerge.merging import checkpoint_writer
from evomerge.merging.live_model import ModelBuilder
from evomerge.merging.merge import Merge
from evomerge.merging.model_loading import load_base
from evomerge.merging.routing.decoder_layers import stack
from evomerge.methods.fused.magnitude_tables import MagnitudeTables
from evomerge.recipes import Recipe
from evomerge.workers.worker import Worker
from tests.support.live_recipes import RECIPES, merged, route
from tests.support.toy import llama

IDS = torch.tensor([[1, 5, 9, 3, 14, 7, 2, 11], [4, 4, 8, 15, 6, 10, 12, 13]])


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Parent]:
    root = tmp_path_factory.mktemp("parents")
    base = llama(root / "base", 0)
    return {
        "base": Checkpoint(base),
        **{name: Checkpoint(llama(root / name, seed, near=base)) for name, seed in (("a", 1), ("b", 2))},
    }


@pytest.fixture(scope="module")
def live(parents: dict[str, Parent]) -> ModelBuilder:
    return ModelBuilder(
        parents,
        parents,
        "base",
        load_base(parents["base"], "bfloat16"),
        "bfloat16",
        "cpu",
        MagnitudeTables(build=True),
    )


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_a_live_recipe_is_the_model_on_disk(
    name: str, parents: dict[str, Parent], live: ModelBuilder, tmp_path: Path
) -> None:
    checkpoint_writer.write(RECIPES[name], parents, tmp_path / "written")
    wanted = logits(load_base(Checkpoint(tmp_path / "written"), "bfloat16"))
    for _ in range(2):
        view = live.build(RECIPES[name])
        view.install()
        assert torch.equal(logits(view.module), wanted)
        live.build(merged())  # what the skeleton holds in between is another model


def test_layers_that_are_passed_through_are_the_parents_own(live: ModelBuilder) -> None:
    view = live.build(RECIPES["repeats, skips, two parents"])
    view.install()
    sources = {p.data_ptr() for name in ("a", "b") for p in live.model(name).parameters()}
    assert {p.data_ptr() for p in view.module.parameters()} <= sources
    assert live.costs(view)["layers"] == 6
    layer, whole = (
        sum(p.numel() for p in m.parameters()) for m in (stack(live.model("a"))[1][0], live.model("a"))
    )
    assert live.costs(view)["parameters"] == whole + layer


def test_routes_of_one_kind_share_a_module_and_weight_merges_the_skeleton(live: ModelBuilder) -> None:
    one, other = live.build(RECIPES["shorter"]), live.build(RECIPES["repeats, skips, two parents"])
    assert one.module is other.module
    assert live.build(merged()).module is not one.module
    assert [h.layer for h in one.reference_hops] == [0, 1, 2, 3, 4]
    assert one.reference_hops == other.reference_hops


def test_scales_change_a_route_and_ones_do_not(live: ModelBuilder) -> None:
    hops = (("a", 0), ("b", 1), ("a", 2))
    found = []
    for scales in ((), (1.0, 1.0, 1.0), (1.0, 0.5, 1.2)):
        view = live.build(route(*hops, scales=scales))
        view.install()
        found.append(logits(view.module))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_scales_are_not_dropped_where_they_cannot_be_written(parents: dict[str, Parent]) -> None:
    with pytest.raises(RecipeError, match="scales"):
        Merge(route(("a", 0), ("b", 1), scales=(1.0, 0.5)), parents)


# ---- in a worker


class Watching:
    """Scores a model by one logit, and remembers which layers the module had when it was made ready and when
    it was scored.
    """

    def __init__(self) -> None:
        self.prepared: list[list[int]] = []
        self.scored: list[list[int]] = []

    def items(self, role: str) -> Items:
        return {"toy": ("i",)}

    def prepare(self, model: nn.Module, items: Items) -> None:
        self.prepared.append(pointers(model))

    def score(self, model: nn.Module, items: Items) -> tuple[tuple[ItemScore, ...], dict[str, float]]:
        self.scored.append(pointers(model))
        value = float(logits(model)[0, -1, 3])
        return (ItemScore("toy", "i", value),), {"toy": value}


def pointers(model: nn.Module) -> list[int]:
    return [next(layer.parameters()).data_ptr() for layer in stack(model)[1]]


def rows(count: int = 6) -> tuple[ScreenText, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        ScreenText(tuple(torch.randint(3, 16, (9 + i % 2,), generator=generator).tolist()), 5)
        for i in range(count)
    )


def test_techniques_are_probed_on_the_same_route_whatever_comes_first(parents: dict[str, Parent]) -> None:
    seen = []
    for names in (("shorter", "repeats, skips, two parents"), ("repeats, skips, two parents", "shorter")):
        watching = Watching()
        worker = Worker(parents, "base", watching, dtype="bfloat16")
        found = {name: worker.evaluate(RECIPES[name], {"toy": ("i",)}) for name in names}
        assert [e.error for e in found.values()] == [None, None]
        own = [next(layer.parameters()).data_ptr() for layer in stack(worker.builder.model("a"))[1]]
        assert watching.prepared == [own], "once, on the path of the model that gives the embeddings"
        assert [len(p) for p in watching.scored] == [len(RECIPES[name].layers) for name in names]
        seen.append({name: e.metrics for name, e in found.items()})
        worker.evaluate(RECIPES["shorter"], {"toy": ("i", "j")})
        assert len(watching.prepared) == 2, "and again for other items"
    assert seen[0] == seen[1]


def test_a_route_that_the_gate_keeps_out_is_not_scored_and_says_how_bad_it_is(
    parents: dict[str, Parent],
) -> None:
    watching = Watching()
    worker = Worker(parents, "base", watching, dtype="bfloat16")
    found = perplexity_screen.nats_per_token(worker.builder.model("a"), rows())
    worker.screen = PerplexityScreen(rows(), found + 1e-6)
    own = worker.evaluate(route(*(("a", i) for i in range(5)), scales=(1, 1, 1, 1.0, 1)), {"toy": ("i",)})
    assert own.error is None, "the path itself passes, as a weight merge would without being asked"
    broken = worker.evaluate(route(("b", 4), ("b", 4), ("b", 4), ("a", 0)), {"toy": ("i",)})
    worker.screen = PerplexityScreen(rows(), 0.0)
    refused = worker.evaluate(route(("a", 0), ("a", 1)), {"toy": ("i",)})
    assert refused.error is not None
    assert "gate" in refused.error
    assert refused.metrics.keys() == {NATS_PER_TOKEN}
    assert refused.metrics[NATS_PER_TOKEN] == perplexity_screen.nats_per_token(
        installed(worker, route(("a", 0), ("a", 1))), rows()
    )
    assert len(watching.scored) == 1 + (broken.error is None)
    assert "gate" in refused.seconds
    assert worker.evaluate(merged(), {"toy": ("i",)}).error is None, "weight merges are not asked"


def installed(worker: Worker, recipe: Recipe) -> nn.Module:
    view = worker.builder.build(recipe)
    view.install()
    return view.module


def test_nats_are_those_of_the_tokens_that_count(parents: dict[str, Parent]) -> None:
    model = load_base(parents["a"], "float32")
    some: Sequence[ScreenText] = (*rows(), ScreenText((3, 4), 1))
    total, count = 0.0, 0
    for row in some:  # token by token
        with torch.no_grad():
            scores = torch.log_softmax(model(input_ids=torch.tensor([row.ids])).logits.double(), -1)[0]
        for at in range(row.first, len(row.ids)):
            total -= float(scores[at - 1, row.ids[at]])
            count += 1
    assert perplexity_screen.nats_per_token(model, some) == pytest.approx(total / count, rel=1e-5)


def test_rows_hold_the_answers_and_as_many_tokens_as_asked() -> None:
    passages = [((1, 2, 3), (1, 2, 3, 4, 5)), ((), (6, 7, 8)), ((9, 9), (9, 9)), ((1,) * 40, (*(1,) * 40, 5))]
    assert perplexity_screen.screen_texts(passages, 100, longest=10) == (
        ScreenText((1, 2, 3, 4, 5), 3),
        ScreenText((6, 7, 8), 1),
        ScreenText((9, 9), 1),
        ScreenText((*(1,) * 9, 5), 9),
    )
    assert len(perplexity_screen.screen_texts(passages, 5)) == 1
    assert len(perplexity_screen.screen_texts(passages, 6)) == 2


def test_logits_that_are_not_finite_do_not_pass(parents: dict[str, Parent]) -> None:
    model = load_base(parents["a"], "float32")
    with torch.no_grad():
        stack(model)[1][2].get_parameter("mlp.down_proj.weight")[0, 0] = float("nan")
    assert perplexity_screen.nats_per_token(model, rows()) == float("inf")
    assert PerplexityScreen(rows(), 1e9).rejection(float("inf")) is not None
