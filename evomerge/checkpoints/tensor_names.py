"""Which tensors of a checkpoint are the language model's, from names and shapes, for any architecture."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, ...]
_BUFFERS = re.compile(
    r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.(attn|attention)\.(masked_)?bias$"
)
"""Names of what older versions of transformers stored beside the weights and compute since."""


@dataclass(frozen=True, slots=True)
class Towers:
    """The language model among the tensors of a checkpoint.

    Attributes:
        stack: Prefix of the language model's decoder layers, as 'model.layers'.
        others: Names of the tensors outside the language model, sorted.
    """

    stack: str
    others: tuple[str, ...]


def is_buffer(name: str, shape: Shape) -> bool:
    """Whether a tensor is no weight but a table that the model computes itself, as checkpoints of 2023 store.

    Args:
        name: Name on disk.
        shape: Its shape, which tells a causal mask [1, 1, n, n] from the bias of a projection.

    Returns:
        True for rotary frequencies, causal masks and the value that stands where a mask hides.
    """
    if not _BUFFERS.search(name):
        return False
    return not name.endswith(".bias") or (len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3])


def find_towers(shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> Towers | None:
    """Finds the language model among a checkpoint's tensors.

    A vision tower of equal depth differs in width, or in its distance from the token embeddings.

    Args:
        shapes: Name on disk -> shape.
        config: config.json. Where it leaves depth, width or vocabulary to transformers' defaults, the tensors
            answer.

    Returns:
        The stack and the tensors outside the language model; None if no numbered family of tensors has the
        depth that the config says.
    """
    text = _text(config)
    width = _number(text, "hidden_size", "n_embd")
    tables = _token_tables(shapes, _number(text, "vocab_size"), width)
    widths = {shapes[name][1] for name in tables} if width is None else {width}
    stack = _stack(shapes, _number(text, "num_hidden_layers", "n_layer"), widths, tables)
    if stack is None:
        return None
    if not _has_inner_models(config):
        return Towers(stack, ())
    owner = stack.rpartition(".")[0]
    inside = owner + "." if owner else ""
    sizes = {shapes[name][0] for name in tables}
    outside = [
        name
        for name, shape in shapes.items()
        if not name.startswith(inside) and not _is_vocabulary_sized(shape, sizes, widths)
    ]
    if outside and inside:  # the other towers are elsewhere: all below the stack's owner is language
        return Towers(stack, tuple(sorted(outside)))
    others = [
        name
        for name, shape in shapes.items()
        if not name.startswith(stack + ".")
        and not _is_vocabulary_sized(shape, sizes, widths)
        and name.removeprefix(inside).count(".") > 1
    ]
    return Towers(stack, tuple(sorted(others)))


def _token_tables(shapes: Mapping[str, Shape], vocabulary: int | None, width: int | None) -> list[str]:
    """Names of the matrices with one row a token."""
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    tables = [
        name for name, (rows, columns) in matrices.items() if rows == vocabulary and width in (None, columns)
    ]
    if tables:
        return tables
    # a padded vocabulary, or none in the config: the tallest matrices
    tallest = max((rows for rows, _ in matrices.values()), default=0)
    return [name for name, (rows, _) in matrices.items() if rows == tallest]


def _stack(shapes: Mapping[str, Shape], depth: int | None, widths: set[int], tables: list[str]) -> str | None:
    """Prefix of a numbered family of that depth.

    Of several: as wide as the language model, then nearest the embeddings, then the largest.
    """
    counts: dict[str, dict[int, int]] = {}  # prefix -> index -> number of tensors
    fitting: dict[str, int] = {}  # prefix -> tensors with an axis as long as the language model is wide
    for name, shape in shapes.items():
        numbered = re.search(r"\.(\d+)\.", name)  # the first number: experts are numbered inside layers
        if not numbered:
            continue
        prefix, index = name[: numbered.start()], int(numbered[1])
        family = counts.setdefault(prefix, {})
        family[index] = family.get(index, 0) + 1
        fitting[prefix] = fitting.get(prefix, 0) + bool(widths & set(shape))
    best: tuple[bool, bool, int, int, str] | None = None
    for prefix, family in counts.items():
        if set(family) != set(range(len(family))) or (depth is not None and len(family) < depth):
            continue
        count = sum(family.values())
        is_wide = 2 * fitting[prefix] >= count
        # a longer one: layers that predict further tokens follow the decoder's
        is_exact = depth is None or len(family) == depth
        nearness = max((_shared_parts(prefix, table) for table in tables), default=0)
        rank = (is_wide, is_exact, nearness, count, prefix)
        if best is None or rank > best:
            best = rank
    return best[-1] if best else None


def _shared_parts(prefix: str, name: str) -> int:
    """How many leading parts two dotted names share."""
    parts = 0
    for a, b in zip(prefix.split("."), name.split("."), strict=False):
        if a != b:
            break
        parts += 1
    return parts


def _is_vocabulary_sized(shape: Shape, sizes: set[int], widths: set[int]) -> bool:
    """Whether a shape is that of token embeddings, of the head or of its bias."""
    return bool(shape) and shape[0] in sizes and set(shape[1:]) <= widths


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def _has_inner_models(config: Mapping[str, Any]) -> bool:
    """Whether the config describes models inside the model; quantisation and attention settings are none."""
    inner = [value for key, value in config.items() if key.endswith("_config") and isinstance(value, Mapping)]
    return any(value.get("model_type") or "hidden_size" in value for value in inner)


def _number(config: Mapping[str, Any], *names: str) -> int | None:
    return next((int(config[name]) for name in names if isinstance(config.get(name), int)), None)
