"""A route is said to be a plain checkpoint exactly if a saved copy of it computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from evomerge.merging.routing import decoder_layers, routed_model
from evomerge.merging.routing.plain_checkpoint import reasons
from evomerge.merging.routing.routed_model import Hop, RoutedModel
from tests.support import route_oracle as oracle
from tests.support import text_architectures


def routed_of(
    models: list[nn.Module], route: tuple[tuple[int, int], ...], gains: tuple[float, ...] | None = None
) -> RoutedModel:
    routed = RoutedModel(models[0], models)
    routed.install(oracle.hops(models, route, gains))
    return routed


def pair(name: str) -> list[nn.Module]:
    return [text_architectures.build(name, seed=seed) for seed in (0, 1)]


@pytest.mark.parametrize(
    "name", ["gemma3_text", "gpt_neo", "qwen3_next", "minicpm3", "mamba2", "deepseek_v3"]
)
def test_a_route_without_reasons_is_what_transformers_loads_from_its_folder(
    name: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    models = pair(name)
    routed = routed_of(models, oracle.MIXED if name != "deepseek_v3" else oracle.LEADING)
    if name == "deepseek_v3":  # its first layer alone is dense
        routed.install(oracle.hops(models, ((1, 0), (0, 1), (1, 3), (0, 1))))
    assert reasons(routed) == ()
    oracle.copied(models[0], decoder_layers.stack(models[0])[0], routed.hops).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation=models[0].config._attn_implementation
    ).eval()
    assert torch.equal(oracle.logits(loaded, oracle.batch()), oracle.logits(routed.model, oracle.batch()))


def test_gains_are_no_reason() -> None:
    assert reasons(routed_of(pair("gemma2"), oracle.MIXED, routed_model.gains(oracle.SCALES[:7], 7))) == ()


def _gpt2(**changed: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM, GPT2Config

    return AutoModelForCausalLM.from_config(
        GPT2Config(**text_architectures.CONFIGS["gpt2"], **changed)
    ).eval()


def test_attention_scaled_by_the_layers_number_is_a_reason_at_another_number_only() -> None:
    model = _gpt2(scale_attn_by_inverse_layer_idx=True)
    routed = RoutedModel(model)
    assert reasons(routed) == ()
    routed.install([Hop(model, i) for i in (0, 2, 2)])
    assert len(reasons(routed)) == 1
    assert "layer 1 computes with attn.scaling" in reasons(routed)[0]


def test_a_constant_that_depends_on_the_depth_is_kept_and_said_in_the_config() -> None:
    models = pair("minicpm3")
    own = decoder_layers.stack(models[0])[1][0].residual_scale
    routed = routed_of(models, oracle.MIXED)
    assert [layer.residual_scale for layer in decoder_layers.stack(routed.model)[1]] == [own] * 7
    depth = routed.model.config.scale_depth / 7**0.5
    assert depth == pytest.approx(own)


def test_a_norm_of_another_epsilon_is_a_reason() -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    models = [
        AutoModelForCausalLM.from_config(
            LlamaConfig(**text_architectures.CONFIGS["llama"], rms_norm_eps=eps)
        ).eval()
        for eps in (1e-6, 1e-5)
    ]
    assert reasons(routed_of(models, ((0, 0), (0, 1)))) == ()
    found = reasons(routed_of(models, ((0, 0), (1, 1))))
    assert found
    assert all(reason.startswith("layer 1 ") and "eps" in reason for reason in found)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("jamba", "layers_block_type"),
        ("recurrent_gemma", "layers_block_type"),
        ("lfm2_moe", "feed_forward.class"),
        ("diffllama", "lambda_init"),
    ],
)
def test_patterns_that_a_config_cannot_say_are_reasons_with_their_names(name: str, words: str) -> None:
    assert any(words in reason for reason in reasons(routed_of(pair(name), oracle.MIXED)))


@pytest.mark.parametrize(
    ("name", "route"),
    [("jamba", oracle.PERIODIC), ("lfm2_moe", oracle.LEADING), ("diffllama", oracle.IN_PLACE)],
)
def test_routes_that_keep_the_pattern_have_no_reasons(name: str, route: tuple[tuple[int, int], ...]) -> None:
    assert reasons(routed_of(pair(name), route)) == ()
