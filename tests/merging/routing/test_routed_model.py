"""Routes by reference against physically copied models, over architectures of every kind."""

from __future__ import annotations

import gc
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from evomerge.errors import FoldError, RouteError
from evomerge.merging.routing import checks, decoder_layers, fingerprint, routed_model, scale_folding
from evomerge.merging.routing.routed_model import Hop, RoutedModel
from tests.support import route_oracle as oracle
from tests.support import text_architectures, vision_architectures

TEXT = (
    "llama",
    "gemma3_text",
    "olmo2",
    "gpt2",
    "bloom",
    "mixtral",
    "qwen3_next",
    "opt",
    "minicpm3",
    "gpt_oss",
    "deepseek_v3",
    "falcon_h1",
)
VISION = ("gemma3", "qwen2_vl")
ALL = (*TEXT, *VISION)
GAINS = routed_model.gains(oracle.SCALES[:7], 7)


@cache
def parents(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """Two models of one architecture. Shared by tests: never written to."""
    module = vision_architectures if name in VISION else text_architectures
    return module.build(name, dtype=dtype), module.build(name, dtype=dtype, seed=1)


def path_of(model: nn.Module) -> str:
    return decoder_layers.stack(model)[0]


# ---- what a route computes


@pytest.mark.parametrize("name", ALL)
def test_a_route_computes_the_bits_of_a_physical_copy_and_generates_the_same(name: str) -> None:
    models = parents(name)
    hops = oracle.hops(models, oracle.MIXED)
    routed = RoutedModel(models[0], models)
    routed.install(hops)
    copied = oracle.copied(models[0], path_of(models[0]), hops)
    assert torch.equal(oracle.logits(routed.model, oracle.batch()), oracle.logits(copied, oracle.batch()))
    tokens, steps = oracle.generated(routed.model, oracle.batch(), cached=True)
    expected, others = oracle.generated(copied, oracle.batch(), cached=True)
    assert torch.equal(tokens, expected)
    assert all(torch.equal(a, b) for a, b in zip(steps, others, strict=True))


@pytest.mark.parametrize("name", ALL)
def test_repeated_layers_generate_with_a_cache_what_they_do_without(name: str) -> None:
    models = parents(name)
    routed = RoutedModel(models[0])
    routed.install(oracle.hops(models, oracle.MIXED))
    (tokens, steps), (expected, others) = (
        oracle.generated(routed.model, oracle.batch(), cached) for cached in (True, False)
    )
    assert torch.equal(tokens, expected)
    assert max(oracle.deviation(a, b) for a, b in zip(steps, others, strict=True)) < 1e-4


@pytest.mark.parametrize("name", ALL)
def test_gains_compute_what_hidden_states_that_are_scaled_do(name: str) -> None:
    models = parents(name)
    routed = RoutedModel(models[0])
    routed.install(oracle.hops(models, oracle.MIXED))
    plain = oracle.logits(routed.model, oracle.batch())
    handles = oracle.scale(routed.model, path_of(models[0]), oracle.SCALES[:7])
    expected = oracle.logits(routed.model, oracle.batch())
    for handle in handles:
        handle.remove()
    routed.install(oracle.hops(models, oracle.MIXED, GAINS))
    assert oracle.deviation(oracle.logits(routed.model, oracle.batch()), expected) < 5e-4
    assert oracle.deviation(plain, expected) > 0.05  # the scales are of effect


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_gains_are_evaluated_with_the_very_tensors_that_are_exported(name: str, dtype: torch.dtype) -> None:
    models = parents(name, dtype)
    hops = oracle.hops(models, oracle.MIXED, GAINS)
    routed = RoutedModel(models[0])
    routed.install(hops)
    copied = oracle.copied(models[0], path_of(models[0]), hops)
    assert torch.equal(oracle.logits(routed.model, oracle.batch()), oracle.logits(copied, oracle.batch()))
    assert torch.equal(
        oracle.generated(routed.model, oracle.batch(), True)[0],
        oracle.generated(copied, oracle.batch(), True)[0],
    )


HAND = {
    "gemma3_text": {
        "layer_types": [
            ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"][i]
            for _, i in oracle.MIXED
        ]
    },
    "qwen3_next": {"layer_types": [["linear_attention", "full_attention"][i % 2] for _, i in oracle.MIXED]},
    "bamba": {
        "attn_layer_indices": [position for position, (_, i) in enumerate(oracle.MIXED) if i in (1, 3)]
    },
    "gpt2": {},
    "llama4_text": {
        "layer_types": ["chunked_attention" if i < 3 else "full_attention" for _, i in oracle.MIXED],
        "no_rope_layers": [int(i < 3) for _, i in oracle.MIXED],
        "moe_layers": [position for position, (_, i) in enumerate(oracle.MIXED) if i % 2],
    },
}


@pytest.mark.parametrize("name", HAND)
def test_the_config_of_a_route_is_one_written_by_hand(name: str) -> None:
    from transformers import CONFIG_MAPPING

    models = parents(name)
    settings: dict[str, Any] = {**text_architectures.CONFIGS[name], **HAND[name]}
    depth = "n_layer" if name == "gpt2" else "num_hidden_layers"
    config = CONFIG_MAPPING[name](**{**settings, depth: 7})
    hops = oracle.hops(models, oracle.MIXED)
    found = routed_model.routed_config(models[0], hops)
    assert {key: getattr(found, key) for key in (*HAND[name], depth)} == {
        key: getattr(config, key) for key in (*HAND[name], depth)
    }
    routed = RoutedModel(models[0])
    routed.install(hops)
    copied = oracle.copied(models[0], path_of(models[0]), hops, config)
    assert torch.equal(oracle.logits(routed.model, oracle.batch()), oracle.logits(copied, oracle.batch()))


def test_other_layer_types_would_compute_something_else() -> None:
    models = parents("gemma3_text")
    hops = oracle.hops(models, oracle.MIXED)
    config = routed_model.routed_config(models[0], hops)
    config.layer_types = [models[0].config.layer_types[i % 4] for i in range(7)]
    wrong = oracle.logits(oracle.copied(models[0], "model.layers", hops, config), oracle.batch())
    right = oracle.logits(oracle.copied(models[0], "model.layers", hops), oracle.batch())
    assert oracle.deviation(wrong, right) > 0.05


def test_lists_that_only_the_config_class_can_compute_follow_the_route_too() -> None:
    models = parents("jamba")
    routed = RoutedModel(models[0])
    routed.install([Hop(models[0], 1), Hop(models[1], 0), Hop(models[0], 0)])
    assert routed.model.config.layers_block_type == ["attention", "mamba", "mamba"]
    assert models[0].config.layers_block_type == ["mamba", "attention"] * 2
    routed.install([Hop(models[0], i) for i in range(4)])
    assert type(routed.model.config) is type(models[0].config)
    assert torch.equal(oracle.logits(routed.model, oracle.batch()), oracle.logits(models[0], oracle.batch()))


def test_index_sets_are_renumbered() -> None:
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(**text_architectures.CONFIGS["qwen3_moe"], mlp_only_layers=[1])
    model = AutoModelForCausalLM.from_config(config).eval()
    assert routed_model.routed_config(model, [Hop(model, i) for i in (0, 1, 1, 2, 3, 1)]).mlp_only_layers == [
        1,
        2,
        5,
    ]


# ---- a module that stays


def test_the_module_its_config_and_its_hooks_stay_over_routes() -> None:
    models = parents("gemma3_text")
    routed = RoutedModel(models[0])
    module, config, layers = routed.model, routed.model.config, decoder_layers.stack(routed.model)[1]
    seen: list[int] = []
    module.get_output_embeddings().register_forward_pre_hook(lambda m, a: seen.append(1))
    for route in (oracle.MIXED, oracle.LEADING, oracle.IN_PLACE):
        routed.install(oracle.hops(models, route))
        with torch.no_grad():
            hidden = module(**oracle.batch(), output_hidden_states=True).hidden_states
        assert len(hidden) == len(route) + 1
        assert (module, config, layers) == (routed.model, module.config, decoder_layers.stack(module)[1])
        assert config.num_hidden_layers == len(layers) == len(route)
    assert len(seen) == 3


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_next", "gemma3"])
def test_routes_leave_the_models_as_they_were(name: str) -> None:
    models = parents(name)
    before = [oracle.logits(model, oracle.batch()) for model in models]
    said = [str(model.config) for model in models]
    routed = RoutedModel(models[0])
    routed.install(oracle.hops(models, oracle.MIXED, GAINS))
    oracle.generated(routed.model, oracle.batch(), cached=True)
    assert [str(model.config) for model in models] == said
    assert all(
        torch.equal(oracle.logits(model, oracle.batch()), b) for model, b in zip(models, before, strict=True)
    )


def test_a_route_comes_back_to_its_bits_after_others() -> None:
    models = parents("gemma3_text")
    routed = RoutedModel(models[0])
    own = oracle.logits(models[0], oracle.batch())
    for gains in (GAINS, None):
        routed.install(oracle.hops(models, oracle.MIXED, gains))
        oracle.logits(routed.model, oracle.batch())
    routed.install([Hop(models[0], i) for i in range(4)])
    assert torch.equal(oracle.logits(routed.model, oracle.batch()), own)


def test_weights_written_in_place_are_seen_scaled_or_not() -> None:
    models = [text_architectures.build("gemma2", seed=seed) for seed in (0, 1)]
    other = text_architectures.build("gemma2", seed=2)
    for gains in (None, GAINS):
        hops = oracle.hops(models, oracle.MIXED, gains)
        routed = RoutedModel(models[0])
        routed.install(hops)
        before = oracle.logits(routed.model, oracle.batch())
        with torch.no_grad():
            for own, new in zip(models[1].parameters(), other.parameters(), strict=True):
                own.copy_(own + 0.5 * new)
        after = oracle.logits(routed.model, oracle.batch())
        assert not torch.equal(before, after)
        assert torch.equal(
            after, oracle.logits(oracle.copied(models[0], "model.layers", hops), oracle.batch())
        )


def test_a_view_holds_no_tensor_of_its_own_scaled_or_not() -> None:
    models = parents("mixtral")
    own = {
        t.untyped_storage().data_ptr() for model in models for t in (*model.parameters(), *model.buffers())
    }
    routed = RoutedModel(models[0])
    for gains in (None, GAINS):
        routed.install(oracle.hops(models, oracle.MIXED, gains))
        oracle.generated(routed.model, oracle.batch(), cached=True)
        gc.collect()
        found = {
            id(t): t
            for part in routed.model.modules()
            for t in gc.get_referents(*_values(part))
            if isinstance(t, torch.Tensor)
        }
        assert len(found) > 20
        assert {t.untyped_storage().data_ptr() for t in found.values()} <= own


def _values(module: nn.Module) -> list[Any]:
    """What a module's attributes hold, two containers deep."""
    own = list(vars(module).values())
    return own + [
        v
        for value in own
        for v in ([*value.values()] if isinstance(value, dict) else [value])
        if not isinstance(v, (nn.Module, type))
    ]


def test_clones_of_old_routes_are_let_go() -> None:
    models = parents("llama")
    routed = RoutedModel(models[0])
    kind = type(decoder_layers.stack(models[0])[1][0])
    for start in range(40):
        routed.install([Hop(models[(start + i) % 2], (start * i) % 4) for i in range(3 + start % 5)])
    gc.collect()
    own = [
        o
        for o in gc.get_objects()
        if type(o) is kind and getattr(o.self_attn, "config", None) is routed.model.config
    ]
    assert len(own) <= 4 * 7


def test_a_route_that_fails_leaves_the_one_before() -> None:
    models = parents("minimax")
    routed = RoutedModel(models[0])
    routed.install([Hop(models[1], 1), Hop(models[0], 0)])
    before = oracle.logits(routed.model, oracle.batch())
    for bad, error in (
        ([Hop(models[0], 0, 0.5)], FoldError),
        ([Hop(models[0], 4)], RouteError),
        ([], RouteError),
        ([Hop(models[0], 0, -1.0)], RouteError),
    ):
        with pytest.raises(error):
            routed.install(bad)
        assert torch.equal(oracle.logits(routed.model, oracle.batch()), before)


# ---- vision-language models


@pytest.mark.parametrize("name", VISION)
def test_the_language_tower_is_routed_and_the_rest_is_the_shells(name: str) -> None:
    models = parents(name)
    routed = RoutedModel(models[0])
    routed.install(oracle.hops(models, oracle.MIXED))
    path = path_of(models[0])
    assert "language" in path
    shell = {n: p for n, p in models[0].named_parameters() if not n.startswith(path)}
    found = {n: p for n, p in routed.model.named_parameters() if not n.startswith(path)}
    assert shell.keys() == found.keys()
    assert all(found[n] is p for n, p in shell.items())
    assert routed.model.config.get_text_config().num_hidden_layers == 7
    assert str(routed.model.config.vision_config) == str(models[0].config.vision_config)


# ---- what is refused


def _llama(**changed: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    attention = changed.pop("attention", "sdpa")
    return AutoModelForCausalLM.from_config(
        LlamaConfig(**{**text_architectures.CONFIGS["llama"], **changed}), attn_implementation=attention
    ).eval()


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rotary"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, "rotary"),
        ({"attention": "eager"}, "attention implementation"),
        ({"hidden_size": 64}, "width"),
    ],
)
def test_parents_that_differ_outside_their_layers_are_refused_by_name(
    changed: dict[str, Any], what: str
) -> None:
    with pytest.raises(RouteError, match=f"{what}.*'math'"):
        checks.check_routable({"base": _llama(), "math": _llama(**changed)}, "base")


def test_parents_of_other_depth_or_weights_are_routable_other_classes_are_not() -> None:
    base = _llama()
    checks.check_routable({"base": base, "deep": _llama(num_hidden_layers=6)}, "base")
    with pytest.raises(
        RouteError, match="class of the stack of 'other' is MistralModel, of 'base' LlamaModel"
    ):
        checks.check_routable({"base": base, "other": text_architectures.build("mistral")}, "base")


@pytest.mark.parametrize("name", ["gemma3n_text", "zamba2", "rwkv"])
def test_models_whose_layers_reach_into_each_other_are_refused_by_numbers(name: str) -> None:
    with pytest.raises(RouteError, match="cannot be routed"):
        checks.check_routable_numerically(text_architectures.build(name))


@pytest.mark.parametrize("name", ["llama", "qwen3_next", "gemma3"])
def test_models_whose_routes_are_exact_pass_by_numbers(name: str) -> None:
    checks.check_routable_numerically(parents(name)[0])
    checks.check_scalable(parents(name)[0])


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba"])
def test_scales_are_refused_where_the_epsilon_of_norms_is_not_small(name: str) -> None:
    """Each layer's fold is exact, but the logits of scaled hidden states differ: with a smaller epsilon the
    same model passes.
    """
    model = text_architectures.build(name)
    scale_folding.check_scalable(model)
    with pytest.raises(
        FoldError,
        match=r"differ by \d\.\de-0[1-3] of the logits' deviation, at most 5e-04 is exact.*scales: none",
    ):
        checks.check_scalable(model)
    for part in model.modules():
        if hasattr(part, "variance_epsilon"):
            part.variance_epsilon *= 1e-3
    checks.check_scalable(model)


def test_a_model_without_layers_is_refused() -> None:
    model = _llama()
    model.model.layers = nn.ModuleList(list(model.model.layers)[:3])
    with pytest.raises(RouteError, match="no list of 4 layers"):
        decoder_layers.stack(model)


# ---- numbers and kinds


def test_gains_are_the_inverse_of_the_product_of_the_scales_so_far() -> None:
    assert routed_model.gains((), 3) == (1.0, 1.0, 1.0)
    assert routed_model.gains((1.0, 0.5, 0.8), 3) == pytest.approx((1.0, 2.0, 2.5))


@pytest.mark.parametrize(
    "scales", [(0.5, 1.0), (1.0,), (1.0, 0.0), (1.0, -1.0), (1.0, float("nan")), (1.0, float("inf"))]
)
def test_scales_that_are_not_exact_are_refused(scales: tuple[float, ...]) -> None:
    with pytest.raises(RouteError, match="scales"):
        routed_model.gains(scales, 2)


def test_signatures_tell_kinds_of_layers_apart_and_not_places_or_weights() -> None:
    models = parents("gemma3_text")
    sliding, full = fingerprint.signature(models[0], 0), fingerprint.signature(models[0], 2)
    assert sliding != full
    assert [fingerprint.signature(models[1], i) for i in range(4)] == [sliding, sliding, full, sliding]
    mixture = parents("deepseek_v3")[0]
    assert (
        fingerprint.signature(mixture, 0)
        != fingerprint.signature(mixture, 1)
        == fingerprint.signature(mixture, 3)
    )
