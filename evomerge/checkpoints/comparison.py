"""Two models side by side: the first thing that keeps them from being merged, and what speaks against it.

From headers and configs alone, but for `equal_models`. A difference is named as what it is, a number of the
config where there is one, with the values of both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from evomerge.checkpoints.config_meanings import Difference, differences
from evomerge.checkpoints.lora import AdaptedCheckpoint
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
_SHOWN = 12  # config keys that a warning names
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
        if twin is None and (theirs := _another_name(tensor, parent, base)):
            return (
                f"'{name}' stores what '{tensor}' is in base '{base_name}' under the names of another "
                f"version of transformers, such as '{theirs}'; write it anew under the base's: "
                f"`evomerge merge` of a linear recipe of '{name}' alone with base_model '{base_name}'"
            )
        if twin is None:
            kinds = f", {_kind(parent)} and {_kind(base)}" if _kind(parent) != _kind(base) else ""
            return f"'{name}' lacks the tensor '{tensor}' of base '{base_name}'{kinds}; {other}"
        by_token = rows is None and base.layout.place(tensor).layer is None
        if twin.shape[by_token:] != info.shape[by_token:]:
            shapes = f"{list(twin.shape)} in '{name}' and {list(info.shape)} in base '{base_name}'"
            return f"'{tensor}' is {shapes}; {other}"
    return None


def lacking(parent: Parent, base: Parent) -> tuple[str, ...]:
    """Finds the tensors of a base that a model has none of that name for.

    Args:
        parent: The model.
        base: The base.

    Returns:
        Names of the base's tensors, without those of other towers, of layers beyond the model's, and of a
        head that may be tied to the embeddings.
    """
    names = []
    for name in base.tensors:
        place = base.layout.place(name)
        is_deeper = place.layer is not None and place.layer >= parent.layout.num_layers
        if (
            name not in parent.tensors
            and place.part != "tower"
            and not is_deeper
            and name not in _heads(base)
        ):
            names.append(name)
    return tuple(names)


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
    differing = [_sentence(name, base_name, found) for found in differences(parent.config, base.config)]
    if differing:
        more = f" (and {len(differing) - _SHOWN} more)" if len(differing) > _SHOWN else ""
        yield (
            f"{'; '.join(differing[:_SHOWN])}{more}: weights mean other things there, and the merge has the "
            "base's config"
        )
    is_tied = not _has_head(base) or _is_tied(base)
    if _has_head(parent) and is_tied and not _is_tied(parent) and not _head_is_embedding(parent):
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


def meaningless(name: str, parent: Parent, base_name: str, base: Parent) -> str | None:
    """Finds a number of the configs by which the weights of one shape mean nothing to each other.

    Args:
        name: Name of the model.
        parent: The model.
        base_name: Name of the base.
        base: The base.

    Returns:
        A sentence with both values, the reason and what to do; None without such a number, and where shapes
        inside the layers differ, which is said of them.
    """
    if _layer_shapes_differ(parent, base):
        return None
    for found in differences(parent.config, base.config):
        if found.meaning.verdict == "refused":
            return (
                f"{_sentence(name, base_name, found)}: {found.meaning.reason}; take a fine-tune of the same "
                "base"
            )
    return None


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
        advice = _advice_on_rows(parent, parents[base])
        reason = first_difference(name, parent, base, parents[base], rows=advice, deeper=deeper)
        reason = reason or meaningless(name, parent, base, parents[base])
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


def _another_name(tensor: str, parent: Parent, base: Parent) -> str | None:
    """A tensor of a model that may be the one that it lacks, by its name; None where it has nothing alike.

    Versions of transformers differ in what stands before the numbered layers, and hold experts in one tensor.
    """
    if _kind(parent) != _kind(base):
        return None
    ours, theirs = set(base.tensors), set(parent.tensors)
    ending = tensor.rsplit(".layers.", 1)[-1].removeprefix("transformer.").removeprefix("model.")
    for other in sorted(theirs - ours):
        if other.endswith("." + ending) or tensor.endswith("." + other) or other == ending:
            return other
        is_expert = "expert" in tensor and "expert" in other
        if is_expert and len(parent.tensors[other].shape) > len(base.tensors[tensor].shape):
            return other
    return None


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


def _advice_on_rows(parent: Parent, base: Parent) -> str:
    """How to give a model the base's tokens, and as many rows: the base may have more rows than tokens.

    The base stands in the recipe with weight 0, for rows of tokens that the model lacks.
    """
    adapter = f"+{parent.adapter}" if isinstance(parent, AdaptedCheckpoint) else ""
    model, donor = (
        json.dumps(text, ensure_ascii=False) for text in (f"{parent.path}{adapter}", str(base.path))
    )
    return (
        "a search mixes rows by number, so bring it to the base's tokens first: evomerge merge, the recipe "
        f"{{merge_method: linear, base_model: {donor}, "
        f"models: [{{model: {model}, parameters: {{weight: 1}}}}, "
        f"{{model: {donor}, parameters: {{weight: 0}}}}], "
        f"tokenizer: {{source: base, pad_to_multiple_of: {_rows(base)}}}}}"
    )


def _heads(parent: Parent) -> list[str]:
    return [name for name in parent.layout.outer_names("head") if len(parent.tensors[name].shape) == 2]


def _has_head(parent: Parent) -> bool:
    return bool(_heads(parent))


def _is_tied(parent: Parent) -> bool:
    """Whether the config says that the head is the embeddings' table, whatever is stored."""
    return _text(parent).get("tie_word_embeddings", parent.config.get("tie_word_embeddings")) is True


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


def _sentence(name: str, base_name: str, found: Difference) -> str:
    return f"{found.key} is {_shown(found.one)} in '{name}' and {_shown(found.two)} in base '{base_name}'"


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    text = str(value)
    if isinstance(value, float):
        text = f"{value:,.0f}" if value.is_integer() else f"{value:g}"
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
