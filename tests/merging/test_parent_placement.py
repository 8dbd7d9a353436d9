"""Where parents are kept: the rule on made-up machines, and a parent kept elsewhere is the same."""

from __future__ import annotations

import pytest
import torch

from evomerge.checkpoints import Checkpoint
from evomerge.merging.parent_placement import choose_placements, describe, place_parent

SIZES = {"math": 10, "base": 10, "code": 10, "chat": 10}


@pytest.mark.parametrize(
    ("device", "host", "text"),
    [
        (100, 0, "base, math, code, chat on the device"),
        (25, 100, "base, math on the device; code, chat in pinned memory"),
        (13, 13, "base on the device; math in pinned memory; code, chat on disk"),
        (0, 0, "base, math, code, chat on disk"),
    ],
)
def test_the_base_comes_first_and_the_rest_goes_where_it_fits(device, host, text):
    placements = choose_placements(SIZES, "base", device, host)
    assert set(placements) == set(SIZES)
    assert describe(placements) == text
    for placement, room in (("device", device), ("pinned", host)):
        assert sum(SIZES[name] for name, chosen in placements.items() if chosen == placement) <= 0.8 * room


def test_a_small_parent_goes_where_a_large_one_did_not_fit():
    assert choose_placements({"base": 5, "large": 90, "small": 5}, "base", 20, 0) == {
        "base": "device",
        "large": "disk",
        "small": "device",
    }


def test_a_parent_kept_in_memory_reads_each_tensor_once_and_is_otherwise_itself(tiny, monkeypatch):
    checkpoint = Checkpoint(tiny["math"])
    reads = []
    original = checkpoint.tensor
    monkeypatch.setattr(checkpoint, "tensor", lambda name: reads.append(name) or original(name))
    parent = place_parent(checkpoint, "device", "cpu")
    for name in checkpoint.tensors:
        assert torch.equal(parent.tensor(name), parent.tensor(name))
        assert torch.equal(parent.tensor(name), original(name))
    assert reads == list(checkpoint.tensors)
    assert parent.layout.num_layers == checkpoint.layout.num_layers
    assert parent.layout.layer_suffixes(0) == checkpoint.layout.layer_suffixes(0)


@pytest.mark.gpu
def test_a_worker_on_a_gpu_merges_what_the_cpu_merges(tiny):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    parent = place_parent(Checkpoint(tiny["math"]), "device", "cuda")
    assert all(parent.tensor(name).is_cuda for name in parent.tensors)
