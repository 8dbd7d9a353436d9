"""A written config.json under the names of transformers 4 too, beside those of transformers 5.

transformers 5 stores rotary positions in `rope_parameters` and the number of experts under one name;
transformers 4 ignores the first and reads another name of the second, and so do programs that follow it.
llama.cpp's conversion stops without some keys that transformers 4 has a default for.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from evomerge.checkpoints.config_meanings import built_text_config

_THETA = {"gpt_neox": "rotary_emb_base", "gpt_neox_japanese": "rotary_emb_base"}
_ROTARY_PART = {"gpt_neox": ("rotary_pct", 0.25), "gpt_neox_japanese": ("rotary_pct", 1.0)}
"""Architecture -> key of transformers 4, and its default in all versions."""
_POSITIONS = {"gpt2": ("n_ctx", "n_positions")}
"""Architecture -> two keys of one number, of which transformers 5 writes the second alone."""
_EXPERTS = ("qwen3_moe", "qwen3_vl_moe_text")  # transformers 4 reads num_experts
_SCALING = {"phi3": ("type", "short_factor", "long_factor")}  # the only keys that transformers 4 takes there
_OUTSIDE = ("rope_theta", "partial_rotary_factor")  # beside rope_scaling, not in it


def with_older_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Adds what transformers 4 reads to a config that transformers 5 saved.

    A key is added only where it is missing and transformers reads the same config with it as without it.

    Args:
        config: A config.json.

    Returns:
        A new config; equal to the given one where nothing is missing or transformers does not know the model.
    """
    out = copy.deepcopy(dict(config))
    text = out.get("text_config", out)
    wanted = [(key, value) for key, value in _older_keys(text) if text.get(key) is None]
    read = _reading(config) if wanted else None
    if read is None:
        return out
    for key, value in wanted:
        trial = copy.deepcopy(out)
        trial.get("text_config", trial)[key] = value
        if _reading(trial) == read:
            out = trial
    return out


def _older_keys(text: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a text config says under the keys of transformers 4; the scaling last, read with the rest."""
    kind = text.get("model_type")
    if kind in _EXPERTS and "num_local_experts" in text:
        yield "num_experts", text["num_local_experts"]
    if kind in _POSITIONS and (positions := text.get(_POSITIONS[kind][1])) is not None:
        yield _POSITIONS[kind][0], positions
    rope = text.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return
    if isinstance(local := rope.get("sliding_attention"), Mapping):
        yield "rope_local_base_freq", local.get("rope_theta")
    if isinstance(of_full := rope.get("full_attention"), Mapping):
        rope = of_full
    if "rope_theta" in rope:
        yield _THETA.get(str(kind), "rope_theta"), rope["rope_theta"]
    if kind in _ROTARY_PART:
        key, default = _ROTARY_PART[kind]
        yield key, rope.get("partial_rotary_factor", default)
    elif "partial_rotary_factor" in rope:
        yield "partial_rotary_factor", rope["partial_rotary_factor"]
    scaling = {key: copy.deepcopy(value) for key, value in rope.items() if key not in _OUTSIDE}
    if set(scaling) - {"rope_type", "type"} or scaling.get("rope_type", "default") != "default":
        if keys := _SCALING.get(str(kind)):
            scaling["type"] = scaling.get("rope_type")
            scaling = {key: scaling.get(key) for key in keys}
        yield "rope_scaling", scaling


def _reading(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What transformers makes of a config: its values without the older keys; None if it refuses it."""
    built = built_text_config(config)
    if built is None:
        return None
    values = built.to_dict()
    rope = values.get("rope_parameters") or {}
    values["rope_parameters"] = {key: value for key, value in rope.items() if key != "type"}
    added = {"rope_scaling", "rope_local_base_freq", *_OUTSIDE, *_THETA.values()}
    added |= {key for key, _ in (*_ROTARY_PART.values(), *_POSITIONS.values())}
    return {key: value for key, value in values.items() if key not in added}
