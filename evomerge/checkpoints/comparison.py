"""Two models side by side: the first thing that keeps them from being merged, and what speaks against it.

From headers and configs alone, but for `equal_models`. A difference is named as what it is, a number of the
config where there is one, with the values of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from evomerge.checkpoints.parent import Parent
from evomerge.errors import CheckpointError

_SIZES = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim"),
    "moe_intermediate_size": ("moe_intermediate_size",),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "num_key_value_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "number of experts": ("num_local_experts", "num_experts", "n_routed_experts"),
}
"""What a shape may come from -> the keys that configs have for it."""
_HARMLESS = {
    "architectures",
    "auto_map",
    "dtype",
    "id2label",
    "initializer_range",
    "label2id",
    "max_position_embeddings",
    "max_sequence_length",
    "model_max_length",
    "model_type",
    "n_layer",
    "n_positions",
    "num_hidden_layers",
    "pretraining_tp",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "vocab_size",
}
"""Keys of a config that change nothing in what weights mean, or that are compared by themselves."""
_ROWS_OF_A_SEARCH = (
    "a search mixes rows by number, so bring it to the base's tokens first: evomerge merge, a recipe with "
    "this model alone and 'tokenizer_source: base' (or 'tokenizer: {source: base}')"
)
_ROPE = {"rope_scaling", "rope_parameters", "rope_theta"}
_DEFAULT_THETA = 10_000.0
_SHOWN = 4  # config keys that a warning names
_LONGEST = 60  # characters of a value


def first_difference(
    name: str, parent: Parent, base_name: str, base: Parent, *, rows: str | None, deeper: bool = False
) -> str | None:
    """Finds the first true reason why a model cannot be merged with a base of the same kind.

    Args:
        name: Name of the model.
        parent: The model.
        base_name: Name of the base.
        base: The base.
        rows: What to do about another number of embedding rows; None where rows are matched by token.
        deeper: Whether the model may have more layers than the base.

    Returns:
        A sentence with both values and what to do; None where every tensor of the base has its like.
    """
    both = f"'{name}' and base '{base_name}'"
    other = "take a fine-tune of the same base"
    if sizes := _sizes_that_explain(parent, base):
        key, one, two = sizes
        kinds = "" if _kind(parent) == _kind(base) else f" ({_kind(parent)} and {_kind(base)})"
        return f"{key} is {one} in '{name}' and {two} in base '{base_name}'{kinds}; {other}"
    depth, wanted = parent.layout.num_layers, base.layout.num_layers
    if depth < wanted or (depth > wanted and not deeper):
        return (
            f"'{name}' has {depth} layers and base '{base_name}' {wanted}; {other}, or choose the layers "
            "with slices and merge_method: passthrough first"
        )
    if _has_head(base) and not _has_head(parent):
        return (
            f"'{name}' ties its output head to its embeddings and base '{base_name}' has a head of its own; "
            f"save '{name}' with tie_word_embeddings: false and the head's weight"
        )
    one, two = _rows(parent), _rows(base)
    if rows is not None and one != two:
        return f"{both} have {one} and {two} embedding rows, so their vocabularies differ; {rows}"
    for tensor, info in base.tensors.items():
        twin = parent.tensors.get(tensor)
        if twin is None:
            kinds = f", {_kind(parent)} and {_kind(base)}" if _kind(parent) != _kind(base) else ""
            return f"'{name}' lacks the tensor '{tensor}' of base '{base_name}'{kinds}; {other}"
        by_token = rows is None and base.layout.place(tensor).layer is None
        if twin.shape[by_token:] != info.shape[by_token:]:
            shapes = f"{list(twin.shape)} in '{name}' and {list(info.shape)} in base '{base_name}'"
            return f"'{tensor}' is {shapes}; {other}"
    return None


def doubts(name: str, parent: Parent, base_name: str, base: Parent) -> Iterator[str]:
    """Finds what fits in shape and speaks against merging two models all the same.

    Args:
        name: Name of the model.
        parent: The model.
        base_name: Name of the base.
        base: The base.

    Yields:
        Sentences with both values.
    """
    if _kind(parent) != _kind(base):
        yield (
            f"'{name}' is {_kind(parent)} and base '{base_name}' {_kind(base)}: of one shape, but their "
            "weights may mean other things"
        )
    differing = list(_config_differences(parent, base))
    if differing:
        shown = "; ".join(
            f"{key} is {_shown(one)} in '{name}' and {_shown(two)} in base '{base_name}'"
            for key, one, two in differing[:_SHOWN]
        )
        more = f" (and {len(differing) - _SHOWN} more)" if len(differing) > _SHOWN else ""
        yield f"{shown}{more}: weights mean other things there, and the merge has the base's config"
    if _has_head(parent) and not _has_head(base) and not _head_is_embedding(parent):
        yield (
            f"the output head {_heads(parent)[0]} of '{name}' is its own and that of base '{base_name}' "
            "tied to its embeddings: the merge is tied, and that head is left out"
        )
    towers = set(parent.layout.outer_names("tower"))
    surplus = [
        tensor
        for tensor in parent.tensors
        if tensor not in base.tensors and tensor not in towers and parent.layout.place(tensor).part == "layer"
    ]
    if surplus and parent.layout.num_layers == base.layout.num_layers:
        yield (
            f"{len(surplus)} tensors of '{name}' have no like in base '{base_name}' and are left out, such "
            f"as '{surplus[0]}'"
        )


def equal_models(one: Parent, other: Parent) -> bool:
    """Compares two models tensor by tensor; ends at the first difference.

    Args:
        one: A model.
        other: Another one.

    Returns:
        Whether they have the same tensors with the same values.
    """
    if {n: (i.shape, i.dtype) for n, i in one.tensors.items()} != {
        n: (i.shape, i.dtype) for n, i in other.tensors.items()
    }:
        return False
    by_place = sorted(one.tensors, key=lambda name: one.layout.place(name).part != "layer")
    return all(torch.equal(one.tensor(name), other.tensor(name)) for name in by_place)


def twins(parents: Mapping[str, Parent], base: str) -> Iterator[str]:
    """Finds models that are one: a parent twice, or one that is the base.

    Args:
        parents: Name -> model, the base among them.
        base: Name of the base.

    Yields:
        Sentences.
    """
    names = [base, *(name for name in parents if name != base)]
    for position, name in enumerate(names):
        for earlier in names[:position]:
            if not equal_models(parents[name], parents[earlier]):
                continue
            if earlier == base:
                yield f"'{name}' has exactly the weights of base '{base}': it adds nothing to a merge"
            else:
                yield f"'{name}' and '{earlier}' have exactly the same weights: one model counts twice"
            break


def check_compatible(parents: Mapping[str, Parent], base: str, *, deeper: bool = False) -> tuple[str, ...]:
    """Checks that every parent of a search has the base's tensors in the base's shapes, layer for layer.

    Args:
        parents: Name -> parent, the base among them.
        base: Name of the base.
        deeper: Whether parents may have more layers than the base, as where only routes are searched.

    Returns:
        What speaks against merging them all the same, each a sentence.

    Raises:
        CheckpointError: A parent does not fit; names it, the first true difference and what to do.
    """
    warnings: list[str] = []
    for name, parent in parents.items():
        if name == base:
            continue
        reason = first_difference(name, parent, base, parents[base], rows=_ROWS_OF_A_SEARCH, deeper=deeper)
        if reason is not None:
            raise CheckpointError(f"model {reason}" if reason.startswith("'") else reason)
        warnings += doubts(name, parent, base, parents[base])
    return tuple(warnings)


def _text(parent: Parent) -> Mapping[str, Any]:
    text = parent.config.get("text_config")
    return text if isinstance(text, dict) else parent.config


def _kind(parent: Parent) -> str:
    """The name of the architecture."""
    names = parent.config.get("architectures")
    if isinstance(names, list) and names:
        return str(names[0])
    return str(parent.config.get("model_type", "of no named architecture"))


def _sizes_that_explain(parent: Parent, base: Parent) -> tuple[str, Any, Any] | None:
    """The first size of the configs that differs, where a shape inside the layers does too."""
    if not _layer_shapes_differ(parent, base):
        return None
    for what, keys in _SIZES.items():
        one, two = (
            next((t[k] for k in keys if t.get(k) is not None), None) for t in map(_text, (parent, base))
        )
        if one is not None and two is not None and one != two:
            return what, one, two
    return None


def _layer_shapes_differ(parent: Parent, base: Parent) -> bool:
    for tensor, info in base.tensors.items():
        twin = parent.tensors.get(tensor)
        if twin is not None and twin.shape != info.shape:
            place = base.layout.place(tensor)
            if place.layer is not None or twin.shape[1:] != info.shape[1:]:
                return True
    return False


def _rows(parent: Parent) -> int | None:
    """Rows of the tallest table before the stack."""
    shapes = [parent.tensors[name].shape for name in parent.layout.outer_names("embeddings")]
    return max((shape[0] for shape in shapes if len(shape) == 2), default=None)


def _heads(parent: Parent) -> list[str]:
    return [name for name in parent.layout.outer_names("head") if len(parent.tensors[name].shape) == 2]


def _has_head(parent: Parent) -> bool:
    return bool(_heads(parent))


def _head_is_embedding(parent: Parent) -> bool:
    """Whether the head that is stored is the embedding's table again."""
    tables = [n for n in parent.layout.outer_names("embeddings") if len(parent.tensors[n].shape) == 2]
    return all(
        any(
            parent.tensors[table].shape == parent.tensors[head].shape
            and torch.equal(parent.tensor(table), parent.tensor(head))
            for table in tables
        )
        for head in _heads(parent)
    )


def _config_differences(parent: Parent, base: Parent) -> Iterator[tuple[str, Any, Any]]:
    """(key, value, value of the base) of what changes the meaning of weights, rotary positions first."""
    one, two = _text(parent), _text(base)
    thetas = (_theta(one), _theta(two))
    if thetas[0] != thetas[1] and not {None, _DEFAULT_THETA} >= set(thetas):
        yield ("rope_theta", *thetas)
    scalings = (_scaling(one), _scaling(two))
    if scalings[0] != scalings[1]:
        yield ("rope_scaling", *scalings)
    for key in sorted((set(one) & set(two)) - _HARMLESS - _ROPE):
        if key.startswith("_") or key.endswith(("_token_id", "_token_index", "dropout", "_pdrop", "_drop")):
            continue
        if isinstance(one[key], dict) or isinstance(two[key], dict) or None in (one[key], two[key]):
            continue
        if one[key] != two[key]:
            yield key, one[key], two[key]


def _theta(text: Mapping[str, Any]) -> float | None:
    """The base of the rotary frequencies, None where the config leaves it to its class."""
    nested = text.get("rope_parameters") or text.get("rope_scaling") or {}
    value = text.get("rope_theta", nested.get("rope_theta") if isinstance(nested, dict) else None)
    return float(value) if isinstance(value, int | float) else None


def _scaling(text: Mapping[str, Any]) -> Any:
    """How rotary positions are stretched, None where they are not."""
    nested = text.get("rope_parameters") or text.get("rope_scaling")
    if not isinstance(nested, dict):
        return None
    kind = nested.get("rope_type", nested.get("type", "default"))
    rest = {k: v for k, v in sorted(nested.items()) if k not in ("rope_theta", "rope_type", "type")}
    return None if kind == "default" and not rest else {"rope_type": kind, **rest}


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    text = str(value)
    if isinstance(value, float):
        text = f"{value:,.0f}" if value.is_integer() else f"{value:g}"
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
