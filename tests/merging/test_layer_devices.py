"""Models over several cards: on fake cards no operation mixes two, on the CPU nothing changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from evomerge.checkpoints import Checkpoint
from evomerge.errors import RouteError
from evomerge.evaluation.inference import kv_cache
from evomerge.merging import layer_devices
from evomerge.merging.layer_devices import LayerDevices, devices_of, moved, place_model
from evomerge.merging.memory_plan import RESERVE, MemoryRequest, parent_size, plan_memory
from evomerge.merging.model_loading import load_base
from evomerge.merging.routing.decoder_layers import stack
from evomerge.merging.routing.routed_model import Hop, RoutedModel
from tests.support.fake_cards import FakeCards

TWO = LayerDevices(("cuda:0", "cuda:1"), (range(2), range(2, 4)))


def model_of(kind: str) -> nn.Module:
    """A model of four layers with random values."""
    import transformers

    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "vocab_size": 32,
    }
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    config = transformers.AutoConfig.for_model(kind, **sizes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2"])
def test_a_forward_over_two_cards_mixes_none(kind: str) -> None:
    model = model_of(kind)
    with torch.no_grad():
        expected = model(input_ids=torch.zeros(2, 5, dtype=torch.long)).logits
    with FakeCards(), torch.no_grad():
        place_model(model, TWO)
        ids = torch.zeros(2, 5, dtype=torch.long, device="cuda:0")
        out = model(input_ids=ids, use_cache=True)
        assert torch.equal(out.logits.cpu(), expected)
        assert out.logits.device == torch.device("cuda:0")
        keys = [layer.keys.device.index for layer in out.past_key_values.layers]
        assert keys == [0, 0, 1, 1]
        index = torch.zeros(3, dtype=torch.long, device="cuda:0")
        cache = kv_cache.fork(out.past_key_values, index=index)
        assert model(input_ids=ids[:1, :1].expand(3, 1), past_key_values=cache).logits.shape[:2] == (3, 1)


def test_a_route_over_two_cards_goes_back_and_forth() -> None:
    with FakeCards(), torch.no_grad():
        models = [place_model(model_of("llama"), TWO) for _ in range(2)]
        routed = RoutedModel(models[0], models)
        routed.install([Hop(models[0], 0), Hop(models[1], 3), Hop(models[1], 1), Hop(models[0], 2)])
        ids = torch.zeros(1, 5, dtype=torch.long, device="cuda:0")
        assert routed.model(input_ids=ids).logits.device == torch.device("cuda:0")


def test_fake_cards_would_tell_of_a_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_devices, "fetch_inputs", lambda module, device: None)
    with FakeCards(), torch.no_grad():
        model = place_model(model_of("llama"), TWO)
        with pytest.raises(RuntimeError, match="tensors on cuda:0, cuda:1"):
            model(input_ids=torch.zeros(1, 5, dtype=torch.long, device="cuda:0"))


def test_on_one_device_nothing_changes(tiny: dict[str, Path]) -> None:
    plain = load_base(Checkpoint(tiny["math"]), "float32")
    spread = load_base(Checkpoint(tiny["math"]), "float32")
    before = dict(spread.named_parameters())
    depth = len(stack(spread)[1])
    place_model(spread, LayerDevices(("cpu", "cpu"), (range(2), range(2, depth))))
    assert all(parameter is before[name] for name, parameter in spread.named_parameters())
    ids = torch.arange(6).view(2, 3)
    assert torch.equal(plain(input_ids=ids).logits, spread(input_ids=ids).logits)
    assert place_model(plain, LayerDevices(("cpu",), (range(9),))) is plain


def test_a_model_without_layers_cannot_be_spread(tiny: dict[str, Path]) -> None:
    model = load_base(Checkpoint(tiny["math"]), "float32")
    model.config.num_hidden_layers = 77
    with pytest.raises(RouteError, match="no list of 77 layers"):
        place_model(model, TWO)


def test_the_devices_are_those_of_the_plan(tiny: dict[str, Path]) -> None:
    size = parent_size(Checkpoint(tiny["math"]))
    request = MemoryRequest({"base": size}, size)
    plan = plan_memory(request, [RESERVE + size.total * 6 // 5] * 2, 0)
    devices = devices_of(plan, ("cuda:3", "cuda:4"))
    depth = len(size.layers)
    assert devices.first == devices.of(None) == "cuda:3"
    of_layers = [devices.of(layer) for layer in range(depth)]
    assert of_layers == sorted(of_layers)
    assert set(of_layers) == {"cuda:3", "cuda:4"}
    assert devices.of(depth + 5) == "cuda:4"
    assert devices_of(None, ("cpu",)) == LayerDevices(("cpu",), (range(0),))


def test_what_is_moved_and_what_is_left_alone() -> None:
    with FakeCards():
        here, there = torch.device("cuda:0"), torch.device("cuda:1")
        tensor = torch.zeros(2, device=here)
        cache = object()
        value = {"pair": (tensor, None), "cache": cache, "rows": [tensor, 3]}
        found = moved(value, there)
        assert found["pair"][0].device == found["rows"][0].device == there
        assert found["cache"] is cache
        assert moved(value, here) is value
