"""Gains in weights: a layer that reads g x adds g times as much, and a fold that does not is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import functional_call

from evomerge.errors import FoldError
from evomerge.merging.routing import scale_folding
from evomerge.merging.routing.decoder_layers import calls, sample, stack
from evomerge.merging.routing.scale_folding import Fold
from tests.support import text_architectures

PRE_NORM = Fold(("mlp.down_proj.weight", "self_attn.o_proj.weight"))
READS = tuple(
    f"{part}.weight"
    for part in ("mlp.gate_proj", "mlp.up_proj", "self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj")
)
KINDS = (
    "llama",
    "gemma3_text",
    "olmo2",
    "gpt2",
    "bloom",
    "mixtral",
    "gpt_oss",
    "qwen3_next",
    "opt",
    "phi",
    "mamba2",
    "granite",
    "deepseek_v3",
    "lfm2_moe",
)


def layers(name: str) -> tuple[nn.Module, nn.ModuleList]:
    model = text_architectures.build(name)
    return model, stack(model)[1]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", PRE_NORM),
        (
            "gemma2",
            Fold(
                (), (("post_attention_layernorm.weight", "1+w"), ("post_feedforward_layernorm.weight", "1+w"))
            ),
        ),
        (
            "olmo2",
            Fold(
                (),
                (("post_attention_layernorm.weight", "w"), ("post_feedforward_layernorm.weight", "w")),
                READS,
            ),
        ),
        ("gpt2", Fold(("attn.c_proj.bias", "attn.c_proj.weight", "mlp.c_proj.bias", "mlp.c_proj.weight"))),
        ("mixtral", Fold(("mlp.experts.down_proj", "self_attn.o_proj.weight"))),
        (
            "gpt_oss",
            Fold(
                (
                    "mlp.experts.down_proj",
                    "mlp.experts.down_proj_bias",
                    "self_attn.o_proj.bias",
                    "self_attn.o_proj.weight",
                )
            ),
        ),
    ],
)
def test_what_writes_to_the_stream_is_what_the_papers_of_these_models_draw(name: str, expected: Fold) -> None:
    model, _ = layers(name)
    assert scale_folding.observe(model, 1) == expected


@pytest.mark.parametrize("name", KINDS)
def test_a_gain_in_the_weights_multiplies_what_a_layer_adds(name: str) -> None:
    model, own = layers(name)
    found = calls(model, sample(model))
    generator = torch.Generator().manual_seed(3)
    for i, call in enumerate(found):
        fold = scale_folding.fold_of(model, i)
        hidden = 5 * torch.randn(call.hidden.shape, generator=generator)
        with torch.no_grad():
            added = call.run(own[i], hidden) - hidden
            for gain in (0.3, 2.5):
                new = scale_folding.folded(own[i], fold, gain)
                got = (
                    call.run(
                        lambda *a, layer=own[i], new=new, **k: functional_call(layer, new, a, k),
                        gain * hidden,
                    )
                    - gain * hidden
                )
                torch.testing.assert_close(got / gain, added, rtol=1e-4, atol=2e-4 * float(added.abs().max()))


@pytest.mark.parametrize("name", KINDS)
def test_every_plan_that_leaves_out_what_writes_is_refused(name: str) -> None:
    model, own = layers(name)
    kinds = {scale_folding.fold_of(model, i): i for i in range(len(own))}
    for fold, layer in kinds.items():
        assert scale_folding.probe(model, layer, fold) < 1e-4
        wrong = [replace(fold, outputs=tuple(n for n in fold.outputs if n != name)) for name in fold.outputs]
        wrong += [replace(fold, norms=tuple(n for n in fold.norms if n != norm)) for norm in fold.norms]
        wrong += (
            [replace(fold, norms=tuple((n, "w" if f == "1+w" else "1+w") for n, f in fold.norms))]
            if fold.norms
            else []
        )
        wrong += [replace(fold, inputs=())] if fold.inputs else []
        earlier = [
            n for n, _ in own[layer].named_parameters() if n.endswith(("v_proj.weight", "up_proj.weight"))
        ]
        wrong += [
            replace(fold, outputs=(*fold.outputs, n)) for n in earlier if fold.outputs
        ]  # a post-norm would not see them
        for plan in wrong:
            with pytest.raises(FoldError, match="of what it adds"):
                scale_folding.probe(model, layer, plan)


def test_a_plan_with_an_output_that_is_multiplied_by_the_wrong_power_is_refused() -> None:
    model, _ = layers("olmo2")
    fold = scale_folding.fold_of(model, 0)
    with pytest.raises(FoldError):
        scale_folding.probe(model, 0, Fold(fold.inputs, fold.norms, ()))


@pytest.mark.parametrize(("name", "layer"), [("minimax", 1), ("rwkv", 0), ("zamba2", 1)])
def test_a_layer_that_does_not_add_to_its_input_is_refused_with_its_name(name: str, layer: int) -> None:
    model, _ = layers(name)
    with pytest.raises(FoldError, match=f"layer {layer} of {type(model).__name__}"):
        scale_folding.observe(model, layer)


@pytest.mark.parametrize("gain", [0.37, 1.0, 1.9])
def test_folded_tensors_are_the_products_rounded_once(gain: float) -> None:
    for name in ("gemma2", "olmo2", "gpt2"):
        model, own = layers(name)
        fold = scale_folding.fold_of(model, 0)
        new = scale_folding.folded(own[0], fold, gain)
        assert set(new) == set(fold.names)
        for key, tensor in new.items():
            old = own[0].get_parameter(key).detach().double()
            form = dict(fold.norms).get(key)
            expected = (
                (1 + old) * gain - 1 if form == "1+w" else old / gain if key in fold.inputs else old * gain
            )
            torch.testing.assert_close(tensor.double(), expected, rtol=2**-23, atol=2**-24)


def test_folded_tensors_of_bfloat16_are_within_one_rounding() -> None:
    model = text_architectures.build("llama", dtype=torch.bfloat16)
    layer = stack(model)[1][0]
    for name, tensor in scale_folding.folded(layer, PRE_NORM, 0.7).items():
        assert tensor.dtype == torch.bfloat16
        exact = layer.get_parameter(name).detach().double() * 0.7
        assert bool(((tensor.double() - exact).abs() <= 2**-8 * (1 + 2**-8) * exact.abs()).all())


@pytest.mark.parametrize("gain", [0.0, -1.0, float("inf"), float("nan")])
def test_a_gain_that_is_not_positive_and_finite_is_refused(gain: float) -> None:
    _, own = layers("llama")
    with pytest.raises(FoldError, match="gain"):
        scale_folding.folded(own[0], PRE_NORM, gain)
