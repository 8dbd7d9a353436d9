"""What a config.json may not have a library fetch, import or build: checked before transformers sees it.

A config is data of whoever made the model. transformers 5 and timm take names of repositories, files and
programs from it, and build whatever sizes it gives; `REFUSED` is the list of such entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from evomerge.errors import CheckpointError

_OWN = ("eager", "sdpa", "flex_attention", "batched_mm", "grouped_mm")
"""transformers' own ways to compute attention or experts, which need nothing from elsewhere."""
_FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
"""Those of a package, in whose place transformers fetches a program of the Hub where it is not installed."""


@dataclass(frozen=True, slots=True)
class Refused:
    """An entry of a config.json that is refused, at any depth.

    Attributes:
        consequence: What transformers would do with it.
        is_harmless: Whether a value has no such consequence.
    """

    consequence: str
    is_harmless: Callable[[Any], bool]


def _is_own_name(value: Any) -> bool:
    """Whether a value is one of transformers' own implementations, or one for each part of a model."""
    names = list(value.values()) if isinstance(value, dict) else [value]
    known = (None, *_OWN, *(_FLASH if find_spec("flash_attn") else ()))
    return all(name in known for name in names)


def _is_no_place(value: Any) -> bool:
    """Whether a value is no repository, path or URL."""
    return not isinstance(value, str) or not any(character in value for character in ":/\\")


_PROGRAM = "would have transformers fetch and run a program of the Hub"
_WEIGHTS = "would have timm or transformers fetch weights"
_QUANTISED = "would have transformers import a library for quantised weights, which cannot be merged"
_WITH_WEIGHTS = {"pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}


def _is_empty(value: Any) -> bool:
    return not value


REFUSED: dict[str, Refused] = {
    **dict.fromkeys(
        (
            *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
            *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
        ),
        Refused(_PROGRAM, _is_own_name),
    ),
    **dict.fromkeys(("kernel_config", "use_kernels"), Refused(_PROGRAM, _is_empty)),
    **dict.fromkeys(("quantization_config", "compression_config"), Refused(_QUANTISED, _is_empty)),
    "transformers_weights": Refused(
        "would have transformers read other weights than these", lambda value: value is None
    ),
    "use_pretrained_backbone": Refused(_WEIGHTS, _is_empty),
    **dict.fromkeys(("backbone", "architecture"), Refused(_WEIGHTS, _is_no_place)),
    **dict.fromkeys(
        ("backbone_kwargs", "model_args"),
        Refused(
            "would be arguments of a program that builds a model",
            lambda value: not value or not _WITH_WEIGHTS & set(value),
        ),
    ),
    **dict.fromkeys(
        ("fusion_config", "distributed_config"),
        Refused("would have transformers replace parts of its own program", _is_empty),
    ),
}
"""Name of an entry -> why it is refused, and unless when."""


def check_references(config: Mapping[str, Any], file: Path) -> None:
    """Checks that a config has nothing fetched, imported or read from elsewhere.

    Args:
        config: The content of the file.
        file: The config.json that errors name.

    Raises:
        CheckpointError: An entry would; names it.
    """
    for place, key, value in _entries(config):
        refused = REFUSED.get(key)
        if refused is not None and not refused.is_harmless(value):
            raise CheckpointError(
                f"{file}: {place} is {value!r:.80}, which {refused.consequence}; remove the entry if you "
                "trust the weights"
            )


def check_numbers(config: Mapping[str, Any], file: Path, tensors: int, longest: int) -> None:
    """Checks that a config asks for no model that is out of proportion to the weights.

    Args:
        config: The content of the file.
        file: The config.json that errors name.
        tensors: Number of tensors of the folder.
        longest: The longest side of any of them.

    Raises:
        CheckpointError: A number is beyond what the weights could be, or not a number; names its entry.
    """
    for place, key, value in _entries(config):
        if isinstance(value, float) and math.isnan(value):
            raise CheckpointError(f"{file}: {place} is NaN; fetch the model again")
        if type(value) is not int:
            continue
        limit = _limit(key, tensors, longest)
        if abs(value) > limit:
            raise CheckpointError(
                f"{file}: {place} is {value if abs(value) <= _LARGEST else 'a number of many digits'}, at "
                f"most {limit:,} fits the weights beside it; fetch the model again"
            )


def _limit(key: str, tensors: int, longest: int) -> int:
    """The largest number that an entry of a config may be, by its name."""
    if any(word in key for word in ("layers", "depth", "blocks", "n_layer")):
        return max(tensors, _FEW)  # each has a tensor
    if "expert" in key:
        return max(tensors, longest, _FEW)  # each has a tensor, or a row of one
    if key.startswith(("num_", "n_")) or key.endswith(("_heads", "_size", "_dim")):
        return _ROOM * max(tensors, longest, _SMALL)
    return _LARGEST


_FEW = 256  # layers that a config may name, whatever the weights
_SMALL = 4096  # side of a tensor that a config may name, whatever the weights
_ROOM = 16  # times the weights' own sides: sizes of fused layers and of images are products of several
_LARGEST = 2**53  # of any whole number: beyond, programs that read JSON disagree


def _entries(value: Any, place: str = "") -> Iterator[tuple[str, str, Any]]:
    """(dotted place, key, value) of every entry of nested mappings; of lists of numbers, each number."""
    stack = [(place, value)]
    while stack:
        where, found = stack.pop()
        if isinstance(found, Mapping):
            for key, inner in found.items():
                at = f"{where}.{key}" if where else str(key)
                yield at, str(key), inner
                stack.append((at, inner))
        elif isinstance(found, list):
            stack += [
                (f"{where}.{i}", inner) for i, inner in enumerate(found) if isinstance(inner, dict | list)
            ]
