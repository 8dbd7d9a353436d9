"""What a tokenizer.json would do to a text, checked before it is loaded: grow without bounds, or never end.

The tokenizers library applies a file's steps one after another, each of which may replace a character by a
text of any length, and compares regular expressions by backtracking.
"""

from __future__ import annotations

import base64
import binascii
import functools
import json
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from evomerge.checkpoints import safetensors_headers
from evomerge.errors import CheckpointError

_MOST_GROWTH = 1000  # characters that the steps of a tokenizer may make of one
_MOST_PADDING = 1_000_000  # tokens
_MOST_BYTES = 250_000_000  # of a tokenizer.json
_MOST_REPEATS = 12  # of a choice of a regular expression
_LONGEST_EXPRESSION = 5000  # characters
_LIBRARIES = (
    ("*.model", "sentencepiece", "sentencepiece"),
    ("*.spm", "sentencepiece", "sentencepiece"),
    ("*.tiktoken", "tiktoken", "tiktoken"),
    ("tekken.json", "mistral_common", "mistral-common"),
)
"""(pattern of a tokenizer's file, module that reads it, package of the module)."""
_UNICODE = {"NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "Nmt": 1, "BertNormalizer": 12, "Lowercase": 3}
"""Type of a normalizer -> how many characters it makes of one at most."""


def check_tokenizer(folder: Path) -> None:
    """Checks the tokenizer.json of a model folder, if there is one.

    Args:
        folder: The model's folder.

    Raises:
        CheckpointError: Its steps could grow a text beyond all bounds or take for ever; names the step.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return
    status = file.stat()
    reason = _fault(file, status.st_size, status.st_mtime_ns)
    if reason:
        raise CheckpointError(
            f"{file}: {reason}; take the tokenizer of the model that this one was made from"
        )


def missing_library(folder: Path) -> str | None:
    """The library that a tokenizer's only form needs and that is not installed.

    Args:
        folder: The model's folder.

    Returns:
        What to install and why, to end a sentence; None where no library is missing.
    """
    if (folder / "tokenizer.json").is_file():
        return None
    for pattern, library, package in _LIBRARIES:
        file = next(iter(sorted(folder.glob(pattern))), None)
        if file is not None and find_spec(library) is None:
            return (
                f"its only tokenizer is {file.name}, which {package} reads and which is not installed: "
                f"pip install {package}"
            )
    return None


@functools.lru_cache(maxsize=64)
def _fault(file: Path, size: int, changed: int) -> str:
    """What is wrong with a file of this size and time of change; empty for nothing."""
    safetensors_headers.check_file(file)
    if size > _MOST_BYTES:
        return f"it has {size:,} bytes, at most {_MOST_BYTES:,} are read"
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"it cannot be read as JSON ({' '.join(str(error).split())[:200]})"
    if not isinstance(data, dict):
        return f"it must hold a JSON object, got {type(data).__name__}"
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        steps = list(_steps(data.get(part)))
        growth = 1.0
        for step in steps:
            growth *= _growth(step)
        if growth > _MOST_GROWTH:
            return f"its {part} makes up to {growth:,.0f} characters of one"
        for step in steps:
            expression = _expression(step)
            if expression is not None and not _is_fast(expression):
                return f"its {part} has the expression {expression!r:.80}, which may take for ever"
    padding = data.get("padding")
    if isinstance(padding, dict) and max(_numbers(padding), default=0) > _MOST_PADDING:
        return f"it pads to more than {_MOST_PADDING:,} tokens"
    return ""


def _steps(step: Any) -> Iterator[Mapping[str, Any]]:
    """Every step of a normalizer, pre-tokenizer or decoder, those inside sequences too."""
    if isinstance(step, dict):
        yield step
        for inner in step.values():
            if isinstance(inner, list):
                for one in inner:
                    yield from _steps(one)


def _growth(step: Mapping[str, Any]) -> float:
    """How many characters a step makes of one at most."""
    kind = step.get("type")
    if kind == "Replace":
        return max(1.0, len(str(step.get("content", ""))))
    if kind == "Precompiled":
        return _longest_piece(step.get("precompiled_charsmap"))
    return float(_UNICODE.get(str(kind), 1))


def _longest_piece(charsmap: Any) -> float:
    """The longest text that a map of sentencepiece has for a character: a trie, then texts ended by zeros."""
    try:
        data = base64.b64decode(str(charsmap or ""), validate=True)
    except (binascii.Error, ValueError):
        return 1.0  # the library refuses it
    texts = data[4 + int.from_bytes(data[:4], "little") :]
    return float(max(1, *(len(text) for text in texts.split(b"\0"))))


def _expression(step: Mapping[str, Any]) -> str | None:
    pattern = step.get("pattern")
    found = pattern.get("Regex") if isinstance(pattern, dict) else None
    return found if isinstance(found, str) else None


def _is_fast(expression: str) -> bool:
    """Whether no repeat of an expression holds another one or a choice, and none stands beside its like."""
    if len(expression) > _LONGEST_EXPRESSION:
        return False
    groups, repeats, last = [False], 0, ""  # whether each open group repeats or chooses
    for found in _PART.finditer(expression):
        part, quantifier = found["part"], found["quantifier"] or ""
        is_repeat = quantifier[:1] in ("*", "+") or (quantifier[:1] == "{" and "," in quantifier)
        if part.startswith("(") and part != "(?":
            groups.append(False)
            last = ""
            continue
        if part == ")":
            varies = groups.pop() if len(groups) > 1 else False
            if varies and (is_repeat or quantifier[:1] == "{"):
                return False
            groups[-1] = groups[-1] or varies or bool(quantifier)
        elif part == "|":
            groups[-1], repeats = True, 0
        else:
            if is_repeat and part == last:
                return False
            groups[-1] = groups[-1] or is_repeat or quantifier[:1] == "?"
        repeats += is_repeat
        if repeats > _MOST_REPEATS:
            return False
        last = part if is_repeat else ""
    return True


_PART = re.compile(
    r"(?P<part>\\[pP]\{\^?\w+\}|\\x\{[0-9a-fA-F]+\}|\\u[0-9a-fA-F]{4}|\\."
    r"|\[\^?\]?(?:\\.|\[:\w+:\]|[^\]\\])*\]"
    r"|\(\?[a-z-]+\)|\((?:\?(?:[:=!>]|<[=!]|<\w+>|[a-z-]+:))?|\)|\||.)"
    r"(?P<quantifier>[*+?][+?]?|\{\d*,?\d*\}[+?]?)?",
    re.DOTALL,
)


def _numbers(value: Any) -> Iterator[int]:
    for inner in value.values() if isinstance(value, dict) else ():
        if isinstance(inner, dict):
            yield from _numbers(inner)
        elif type(inner) is int:
            yield inner
