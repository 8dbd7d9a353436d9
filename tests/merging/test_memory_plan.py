"""Plans of memory on made-up cards: the design's table, each rule at its limit, laws of all plans."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.checkpoints import Checkpoint, total_bytes
from evomerge.errors import SetupError
from evomerge.evaluation.scoring_size import scoring_size
from evomerge.merging.layer_split import split_layers
from evomerge.merging.memory_plan import (
    BUFFERS,
    RESERVE,
    MemoryRequest,
    ModelSize,
    ScoringSize,
    describe,
    fewest_cards,
    parent_size,
    plan_memory,
)

GB = 10**9
HOST = 2_000 * GB
H200, H100 = 150 * GB, 85 * GB  # as the driver shows cards that are sold with 141 and 80 GB
CONFIGS = {  # hidden, inner, heads, heads of keys, width of a head, vocabulary, layers, tied
    "0.5B": (896, 4864, 14, 2, 64, 151936, 24, True),  # Qwen2.5
    "7B": (3584, 18944, 28, 4, 128, 152064, 28, False),  # Qwen2.5
    "13B": (5120, 13824, 40, 40, 128, 32000, 40, False),  # Llama 2
    "32B": (5120, 27648, 40, 8, 128, 152064, 64, False),  # Qwen2.5
    "70B": (8192, 28672, 64, 8, 128, 128256, 80, False),  # Llama 3
}


def request_of(name: str, card: int) -> MemoryRequest:
    """A base and three fine-tunes of a known model, bfloat16, on such cards."""
    hidden, inner, heads, kv_heads, width, vocabulary, layers, tied = CONFIGS[name]
    layer = 2 * hidden * heads * width + 2 * hidden * kv_heads * width + 3 * hidden * inner + 2 * hidden
    size = ModelSize(2 * ((2 - tied) * vocabulary * hidden + hidden), (2 * layer,) * layers)
    config = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width,
        "vocab_size": vocabulary,
    }
    names = ("base", "math", "code", "chat")
    return MemoryRequest(dict.fromkeys(names, size), size, scoring=scoring_size(config, 2, layers, card))


def small(**changes: object) -> MemoryRequest:
    """A base and two parents of four layers of 10 bytes each, 5 bytes outside, and no scoring."""
    size = ModelSize(5, (10,) * 4)
    request = MemoryRequest({"base": size, "math": size, "code": size}, size)
    return replace(request, **changes)  # type: ignore[arg-type]


# ---- the design's table ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "model", "h200", "left", "h100"),
    [
        ("0.5B", 1.0, 1, 143, 1),
        ("7B", 15.2, 1, 72, 2),
        ("13B", 26.0, 1, 18, 2),
        ("32B", 65.5, 3, 39, 5),
        ("70B", 141.1, 6, 30, 10),
    ],
)
def test_the_table_of_cards(name: str, model: float, h200: int, left: int, h100: int) -> None:
    request = request_of(name, H200)
    assert round(request.live.total / GB, 1) == model
    assert fewest_cards(request, H200) == h200
    assert fewest_cards(request_of(name, H100), H100) == h100
    plan = plan_memory(request, [H200] * h200, 0)
    before_scoring = sum(card.left + card.scoring for card in plan.cards) / h200
    assert round(before_scoring / GB) == left


@pytest.mark.parametrize(("name", "cards", "most"), [("7B", 1, 15.2), ("70B", 8, 141.1)])
def test_the_rows_of_the_table_with_a_parent_streamed(name: str, cards: int, most: float) -> None:
    plan = plan_memory(request_of(name, H100), [H100] * cards, HOST)
    assert 0 < plan.pinned / GB <= most  # at most the bytes of one parent
    with pytest.raises(SetupError, match=r"streamed from pinned memory, of which 0\.0 GB can be had"):
        plan_memory(request_of(name, H100), [H100] * cards, 0)


def test_a_13b_search_leaves_little_of_one_h200() -> None:
    plan = plan_memory(request_of("13B", H200), [H200], 0)
    assert 0 < plan.left / GB < 10


# ---- each rule at its limit --------------------------------------------------------------------------------


def test_everything_lies_on_a_card_that_has_just_the_bytes() -> None:
    request = small(scoring=ScoringSize(7, 8, 2), tables=3)
    needed = RESERVE + 4 * 45 + 7 + 8 + 4 * 2 + 3
    assert plan_memory(request, [needed], 0).left == 0
    plan = plan_memory(request, [needed - 1], 1000)
    assert plan.streamed == {"code": {0, 1, 2}}  # a buffer of two pieces is needed too
    assert plan.cards[0].buffers == BUFFERS * 10
    assert (plan.left, plan.pinned) == (9, 30)


def test_the_last_parent_is_streamed_first_and_the_base_last() -> None:
    request = small()
    everything = RESERVE + 45 + BUFFERS * 10
    assert plan_memory(request, [everything + 90], HOST).streamed.keys() == {"code"}
    assert plan_memory(request, [everything + 89], HOST).streamed.keys() == {"code", "math"}
    plan = plan_memory(request, [everything], HOST)
    assert plan.streamed == {name: {0, 1, 2, 3, None} for name in ("base", "math", "code")}
    assert plan.is_streamed("base", None)
    assert not plan.is_streamed("none", 0)
    assert plan.pinned == 135
    with pytest.raises(SetupError, match="too little for the live models"):
        plan_memory(request, [everything - 1], HOST)


def test_pinned_memory_has_to_hold_what_is_streamed() -> None:
    card = RESERVE + 45 + BUFFERS * 10
    assert plan_memory(small(), [card], 135).pinned == 135
    with pytest.raises(SetupError, match=r"0\.0 GB would be streamed"):
        plan_memory(small(), [card], 134)


def test_layers_of_two_cards_and_what_is_outside_on_the_first() -> None:
    request = small(scoring=ScoringSize(logits=40))
    plan = plan_memory(request, [RESERVE + 100, RESERVE + 159], 0)
    assert [card.layers for card in plan.cards] == [range(1), range(1, 4)]
    assert [card.scoring for card in plan.cards] == [40, 0]
    assert [card.left for card in plan.cards] == [0, 39]
    assert [plan.card_of(layer) for layer in (None, 0, 1, 3, 9)] == [0, 0, 1, 1, 1]


def test_workers_of_a_card_share_parents_and_nothing_else() -> None:
    one = plan_memory(small(scoring=ScoringSize(7, 8, 2)), [HOST], 0).cards[0]
    three = plan_memory(small(scoring=ScoringSize(7, 8, 2), workers=3), [HOST], 0).cards[0]
    assert three.parents == one.parents
    assert (three.live, three.scoring, three.reserve) == (3 * one.live, 3 * one.scoring, 3 * one.reserve)


def test_routes_have_the_parents_as_live_models_too() -> None:
    assert plan_memory(small(live_models=4), [HOST], 0).cards[0].live == 4 * 45


def test_rank_tables_take_what_is_left() -> None:
    request = small(ranks=50)
    assert plan_memory(request, [RESERVE + 4 * 45 + 50], 0).ranks == 50
    plan = plan_memory(request, [RESERVE + 4 * 45 + 20], 0)
    assert plan.ranks == 20
    assert describe(plan)[-1].startswith("rank tables: 0.0 GB of 0.0 GB are kept")


def test_a_parent_with_fewer_layers_has_no_pieces_where_it_ends() -> None:
    sizes = {"base": ModelSize(5, (10,) * 4), "short": ModelSize(5, (10, 10))}
    plan = plan_memory(replace(small(), parents=sizes), [HOST], 0)
    assert plan.cards[0].parents == 45 + 25


# ---- refusals ----------------------------------------------------------------------------------------------


def test_a_refusal_says_what_is_needed_what_there_is_and_what_to_change() -> None:
    with pytest.raises(SetupError) as refused:
        plan_memory(request_of("70B", H100), [H100] * 2, HOST)
    assert str(refused.value) == (
        "the models do not fit: 4 parents 564.4 GB, live models 141.1 GB, scoring 15.6 GB and a reserve of "
        "4.0 GB are 725.1 GB; 2 cards have 170.0 GB, too little for the live models, scoring and a layer of "
        "each parent; take cluster.gpus: 10 of such cards, or fewer parents"
    )
    with pytest.raises(SetupError, match=r"fewer workers a card, or larger cards or fewer parents$"):
        plan_memory(replace(request_of("70B", H100), workers=4), [8 * GB], HOST)


# ---- text --------------------------------------------------------------------------------------------------


def test_a_plan_in_words() -> None:
    assert describe(plan_memory(request_of("7B", H200), [H200], 0)) == [
        "card: live 15.2, parents 60.9, scoring 15.7, reserve 2.0 of 150.0 GB, 56.1 GB left"
    ]
    lines = describe(plan_memory(request_of("70B", H100), [H100] * 8, HOST))
    assert lines[0].startswith("card 0, layers 0 to ")
    assert lines[-1].endswith(" layers streamed from pinned memory, 8.6 GB for each candidate")


# ---- laws --------------------------------------------------------------------------------------------------

sizes = st.integers(0, 60)
models = st.integers(1, 7).flatmap(
    lambda n: st.lists(
        st.builds(ModelSize, sizes, st.lists(sizes, min_size=n, max_size=n).map(tuple)),
        min_size=2,
        max_size=4,
    )
)
requests = st.builds(
    lambda found, scoring, workers: MemoryRequest(
        {f"m{i}": size for i, size in enumerate(found)},
        found[0],
        scoring=ScoringSize(*scoring),
        workers=workers,
    ),
    models,
    st.tuples(sizes, sizes, sizes),
    st.integers(1, 3),
)
cards = st.lists(st.integers(0, 900), min_size=1, max_size=4)


def planned(request: MemoryRequest, free: list[int], host: int) -> object:
    """The plan; None where it is refused. Cards have the reserve beside what is free."""
    try:
        return plan_memory(request, [size + RESERVE * request.workers for size in free], host)
    except SetupError:
        return None


@settings(max_examples=60, deadline=None)
@given(requests, cards, st.integers(0, 900))
def test_a_plan_places_every_piece_once_within_all_limits(
    request: MemoryRequest, free: list[int], host: int
) -> None:
    plan = planned(request, free, host)
    if plan is None:
        return
    layers = list(itertools.chain.from_iterable(card.layers for card in plan.cards))  # type: ignore[attr-defined]
    assert layers == list(range(len(request.live.layers)))
    assert all(card.left >= 0 for card in plan.cards)  # type: ignore[attr-defined]
    assert plan.pinned <= host  # type: ignore[attr-defined]
    held = sum(card.parents for card in plan.cards) + plan.pinned  # type: ignore[attr-defined]
    assert held == sum(size.total for size in request.parents.values())


@settings(max_examples=60, deadline=None)
@given(requests, cards, st.integers(0, 900), st.integers(0, 300), st.integers(0, 3))
def test_more_memory_never_makes_a_plan_worse(
    request: MemoryRequest, free: list[int], host: int, more: int, which: int
) -> None:
    before = planned(request, free, host)
    larger = [size + more * (i == which) for i, size in enumerate(free)]
    assert before is None or planned(request, larger, host + more) is not None
    resident = planned(request, free, 0)
    assert resident is None or planned(request, larger, 0) is not None


@settings(max_examples=60, deadline=None)
@given(st.lists(sizes, max_size=6), st.lists(st.integers(-20, 90), min_size=1, max_size=3))
def test_layers_are_split_as_well_as_can_be(loads: list[int], capacities: list[int]) -> None:
    def overflows(runs: list[range]) -> list[int]:
        return [sum(loads[i] for i in run) - c for run, c in zip(runs, capacities, strict=True)]

    found = overflows(split_layers(loads, capacities))
    best = []
    for cuts in itertools.combinations_with_replacement(range(len(loads) + 1), len(capacities) - 1):
        ends = (0, *cuts, len(loads))
        of_cut = overflows([range(a, b) for a, b in itertools.pairwise(ends)])
        best.append((max(of_cut), sum(max(0, own) for own in of_cut)))
    assert (max(found), sum(max(0, own) for own in found)) == min(best)


# ---- real headers ------------------------------------------------------------------------------------------


def test_the_size_of_a_parent_is_that_of_its_tensors(tiny) -> None:  # type: ignore[no-untyped-def]
    parent = Checkpoint(tiny["math"])
    size = parent_size(parent)
    assert size.total == total_bytes(parent)
    assert len(size.layers) == parent.layout.num_layers
    assert min(size.pieces) > 0
    elements = sum(size.pieces) // next(
        iter({2 if i.dtype == "BF16" else 4 for i in parent.tensors.values()})
    )
    assert parent_size(parent, 1).total == elements
