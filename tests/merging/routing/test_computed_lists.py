"""Lists that a config's class computes: overruled for one config alone, and given back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from transformers import JambaConfig

from evomerge.merging.routing import computed_lists

LAYERS = ["mamba", "attention", "mamba", "mamba"]


def config() -> Any:
    return JambaConfig(num_hidden_layers=4, attn_layer_period=4, attn_layer_offset=1)


def test_transformers_computes_a_list_of_layers_that_cannot_be_set() -> None:
    """If this fails, the config can be told its layers without another class, and `computed_lists` can go."""
    assert list(config().layers_block_type) == LAYERS
    assert isinstance(type(config()).layers_block_type, property)
    with pytest.raises(AttributeError):
        config().layers_block_type = LAYERS[::-1]


def test_one_config_returns_another_list_and_others_of_its_class_do_not() -> None:
    own, other = config(), config()
    computed_lists.overrule(own, {"layers_block_type": LAYERS[::-1]})
    assert own.layers_block_type == LAYERS[::-1]
    assert isinstance(own, JambaConfig)
    assert type(own).__name__ == "JambaConfig"
    assert list(other.layers_block_type) == LAYERS
    own.layers_block_type.clear()
    assert own.layers_block_type == LAYERS[::-1]  # a new list at every call


def test_a_config_gets_its_class_back_however_often_it_was_overruled() -> None:
    own = config()
    computed_lists.overrule(own, {"layers_block_type": LAYERS[::-1]})
    computed_lists.overrule(own, {"layers_block_type": ["attention"] * 4})
    assert own.layers_block_type == ["attention"] * 4
    copied = copy.deepcopy(own)
    for each in (own, copied):
        computed_lists.restore_class(each)
        assert type(each) is JambaConfig
        assert list(each.layers_block_type) == LAYERS
    computed_lists.restore_class(own)  # nothing to give back
    assert type(own) is JambaConfig


def test_no_lists_give_the_class_back() -> None:
    own = config()
    computed_lists.overrule(own, {"layers_block_type": LAYERS[::-1]})
    computed_lists.overrule(own, {})
    assert type(own) is JambaConfig
    assert own.to_dict() == config().to_dict()
