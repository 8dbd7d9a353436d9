"""Where parents are kept: by a plan over several places, small ones on a CPU; each stays what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.checkpoints import Checkpoint, total_bytes
from evomerge.errors import SetupError
from evomerge.merging import parent_placement
from evomerge.merging.memory_plan import RESERVE, MemoryPlan, MemoryRequest, parent_size, plan_memory
from evomerge.merging.parent_placement import (
    HOST,
    PlacedParent,
    check_free,
    describe,
    destinations,
    keep_small,
    load_parents,
    place_parent,
    placed,
)

NAMES = ("base", "math", "code")


def models(tiny: dict[str, Path]) -> dict[str, Checkpoint]:
    return {name: Checkpoint(tiny[name]) for name in NAMES}


def planned(parents: dict[str, Checkpoint], cards: int, of_each: float) -> MemoryPlan:
    """A plan over cards that have room for so many models each."""
    sizes = {name: parent_size(parent) for name, parent in parents.items()}
    room = RESERVE + int(of_each * sizes["base"].total)
    return plan_memory(MemoryRequest(sizes, sizes["base"]), [room] * cards, 1 << 40)


@pytest.mark.parametrize(("cards", "of_each"), [(1, 5), (2, 2.7), (1, 3.3), (2, 1.9)])
def test_parents_by_a_plan_are_the_parents(tiny: dict[str, Path], cards: int, of_each: float) -> None:
    parents = models(tiny)
    plan = planned(parents, cards, of_each)
    arenas = load_parents(parents, plan, ["cpu"] * cards)
    for name, parent in placed(parents, arenas).items():
        own = parents[name]
        assert all(torch.equal(parent.tensor(key), own.tensor(key)) for key in own.tensors)
        assert isinstance(parent, PlacedParent)
        assert parent.is_padded
        assert parent.is_resident is (name not in plan.streamed)
        assert (parent.config, parent.layout, parent.tensors) == (own.config, own.layout, own.tensors)
        assert parent.content_hash() == own.content_hash()


def test_every_tensor_goes_to_the_card_of_its_layer(tiny: dict[str, Path]) -> None:
    parents = models(tiny)
    plan = planned(parents, 2, 1.9)
    assert plan.streamed
    for name, parent in parents.items():
        places = destinations(parent, name, plan)
        assert sorted(tensor for names in places.values() for tensor in names) == sorted(parent.tensors)
        for where, names in places.items():
            layers = {parent.layout.place(tensor).layer for tensor in names}
            if where == HOST:
                assert layers <= plan.streamed[name]
            else:
                assert all(plan.card_of(layer) == where for layer in layers)
                assert not layers & plan.streamed.get(name, frozenset())


def test_a_card_that_another_process_uses_is_refused(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    parents = models(tiny)
    needed = sum(total_bytes(parent) for parent in parents.values())
    places = {name: {0: list(parent.tensors)} for name, parent in parents.items()}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (needed, 80 * 10**9))
    check_free(parents, places, ["cuda:0"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (needed - 1, 80 * 10**9))
    with pytest.raises(SetupError, match=r"cuda:0 has 0\.0 GB of 80\.0 GB free.*another process"):
        check_free(parents, places, ["cuda:0"])
    check_free(parents, places, ["cpu"])


def test_on_a_cpu_small_parents_are_kept_and_the_base_comes_first(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    parents: dict[str, Any] = models(tiny)
    size = total_bytes(parents["base"])
    for room, kept in ((3 * size, {"base", "math", "code"}), (size, {"base"}), (size - 1, set())):
        monkeypatch.setattr(parent_placement, "_SMALL", room)
        found = keep_small(parents, "base")
        assert {name for name, parent in found.items() if isinstance(parent, PlacedParent)} == kept
        assert list(found) == list(parents)
    assert describe(found, None) == "base, math, code on disk"


def test_where_parents_are_in_words(tiny: dict[str, Path]) -> None:
    parents = models(tiny)
    assert describe(parents, planned(parents, 1, 5)) == "base, math, code on the device"
    streamed = planned(parents, 1, 3.8)
    assert describe(parents, streamed) == "base, math on the device; code streamed from pinned memory"


def test_a_parent_kept_in_memory_reads_each_tensor_once_and_is_otherwise_itself(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(tiny["math"])
    reads: list[str] = []
    original = checkpoint.tensor
    monkeypatch.setattr(checkpoint, "tensor", lambda name: reads.append(name) or original(name))
    parent = place_parent(checkpoint, "device", "cpu")
    for name in checkpoint.tensors:
        assert torch.equal(parent.tensor(name), parent.tensor(name))
        assert torch.equal(parent.tensor(name), original(name))
    assert reads == list(checkpoint.tensors)
    assert parent.layout.num_layers == checkpoint.layout.num_layers
    assert place_parent(checkpoint, "disk", "cpu") is checkpoint


@pytest.mark.gpu
def test_a_worker_on_a_gpu_merges_what_the_cpu_merges(tiny: dict[str, Path]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    checkpoint = Checkpoint(tiny["math"])
    parent = place_parent(checkpoint, "device", "cuda")
    assert all(parent.tensor(name).is_cuda for name in parent.tensors)
    pinned = place_parent(checkpoint, "pinned", "cuda")
    assert all(torch.equal(pinned.tensor(name), parent.tensor(name).cpu()) for name in parent.tensors)
