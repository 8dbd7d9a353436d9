"""Which tensors of a checkpoint are the language model's, from their names and shapes. Knows no architecture by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Towers:
    """stack: prefix of the language tower's decoder layers, as 'model.layers'; others: tensors outside the language model, sorted."""

    stack: str
    others: tuple[str, ...]


def towers(shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> Towers | None:
    """The language tower among a checkpoint's tensors; None if no numbered family has the depth that the config says.

    shapes: name on disk -> shape. config: config.json as a dict; where it leaves depth, width or vocabulary to
    transformers' defaults, the tensors answer. A vision tower of equal depth differs in width, or in its distance
    from the token embeddings.
    """
    text = _text(config)
    vocabulary, width = _number(text, "vocab_size"), _number(text, "hidden_size", "n_embd")
    tables = [n for n, s in shapes.items() if len(s) == 2 and s[0] == vocabulary and width in (None, s[1])]
    if not tables:  # a padded vocabulary, or none said: the tallest table
        tall = max((s[0] for s in shapes.values() if len(s) == 2), default=0)
        tables = [n for n, s in shapes.items() if len(s) == 2 and s[0] == tall]
    widths = {shapes[name][1] for name in tables} if width is None else {width}
    stack = _stack(shapes, _number(text, "num_hidden_layers", "n_layer"), widths, tables)
    if stack is None:
        return None
    if not _many(config):
        return Towers(stack, ())
    owner = stack.rpartition(".")[0]
    inside = owner + "." if owner else ""
    sizes = {shapes[name][0] for name in tables}
    outside = [
        n for n in shapes if not n.startswith(inside) and not _vocabulary_sized(shapes[n], sizes, widths)
    ]
    if outside and inside:  # the other towers live elsewhere: all below the stack's owner is language
        return Towers(stack, tuple(sorted(outside)))
    others = [
        name
        for name, shape in shapes.items()
        if not name.startswith(stack + ".")
        and not _vocabulary_sized(shape, sizes, widths)
        and name.removeprefix(inside).count(".") > 1
    ]
    return Towers(stack, tuple(sorted(others)))


def _stack(shapes: Mapping[str, Shape], depth: int | None, widths: set[int], tables: list[str]) -> str | None:
    """Of the numbered families of that depth: of the language model's width, nearest the token embeddings, with most tensors."""
    families: dict[str, dict[int, int]] = {}  # prefix -> index -> number of tensors
    fitting: dict[str, int] = {}  # prefix -> tensors with an axis as long as the language model is wide
    for name, shape in shapes.items():
        if match := re.search(r"\.(\d+)\.", name):  # the first number: experts are numbered inside layers
            prefix = name[: match.start()]
            seen = families.setdefault(prefix, {})
            seen[int(match[1])] = seen.get(int(match[1]), 0) + 1
            fitting[prefix] = fitting.get(prefix, 0) + bool(widths & set(shape))
    best: tuple[bool, bool, int, int, str] | None = None
    for prefix, seen in families.items():
        if set(seen) != set(range(len(seen))) or (depth is not None and len(seen) < depth):
            continue
        count = sum(seen.values())
        exact = (
            depth is None or len(seen) == depth
        )  # more: layers that predict further tokens follow the decoder's
        rank = (
            2 * fitting[prefix] >= count,
            exact,
            max((_shared(prefix, table) for table in tables), default=0),
            count,
            prefix,
        )
        best = rank if best is None or rank > best else best
    return best[-1] if best else None


def _shared(prefix: str, name: str) -> int:
    """How many leading parts two dotted names share."""
    parts = 0
    for a, b in zip(prefix.split("."), name.split("."), strict=False):
        if a != b:
            break
        parts += 1
    return parts


def _vocabulary_sized(shape: Shape, sizes: set[int], widths: set[int]) -> bool:
    """Token embeddings, the head and its bias."""
    return bool(shape) and shape[0] in sizes and set(shape[1:]) <= widths


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def _many(config: Mapping[str, Any]) -> bool:
    """Whether the config describes models inside the model; quantisation and attention settings are none."""
    inner = [value for key, value in config.items() if key.endswith("_config") and isinstance(value, Mapping)]
    return any(value.get("model_type") or "hidden_size" in value for value in inner)


def _number(config: Mapping[str, Any], *names: str) -> int | None:
    return next((int(config[name]) for name in names if isinstance(config.get(name), int)), None)
