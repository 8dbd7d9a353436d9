"""A parent's tokenizer files: which tokens have rows, and the output's tokenizer made from them. Knows no weights."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from evomerge.checkpoints import Parent
from evomerge.errors import CheckpointError
from evomerge.recipes import WHOLE, TokenizerSpec

_FILES = (
    "tokenizer.json",
    "*.model",
    "vocab.*",
    "tekken.json",
    "*.tiktoken",
)  # any of them holds a vocabulary
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tokens:
    """A parent's tokens that have a row. rows: token → row; added: its added tokens with their settings, by row."""

    rows: dict[str, int]
    added: tuple[Any, ...]

    def at(self, row: int) -> str:
        """The token of a row, quoted, for a message."""
        return next((f"'{token}'" for token, own in self.rows.items() if own == row), "no token")


def rows_of(parent: Parent) -> int:
    """Number of rows of the embedding, tokens and padding: the config's vocab_size.

    Some configs leave it to their class; then it is the rows of the tallest table outside the layer stack.
    """
    size = (parent.config.get("text_config") or parent.config).get(
        "vocab_size", parent.config.get("vocab_size")
    )
    if size is None:
        outside = [
            info.shape for name, info in parent.tensors.items() if parent.layout.place(name).layer is None
        ]
        size = max((shape[0] for shape in outside if len(shape) == 2), default=None)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise CheckpointError(
            f"{parent.path / 'config.json'}: vocab_size must be a whole number of at least 1, got {size!r}"
        )
    return size


def output(spec: TokenizerSpec, base: str, parents: Mapping[str, Parent], own: Mapping[str, Tokens]) -> Any:
    """The output's tokenizer (a transformers one): the base's or a model's, cut to its rows, then the further tokens."""
    source = base if spec.source in WHOLE else spec.source
    tokenizer, lost = _cut(_load(parents[source]), parents[source])
    if spec.source == "union":
        vocabulary = tokenizer.get_vocab()
        others = [own[base], *(tokens for name, tokens in own.items() if name != base)]
        settings: dict[str, Any] = {}
        for tokens in others:
            for info in tokens.added:
                if settings.setdefault(info.content, info) != info:
                    _LOG.warning(
                        "token '%s' is added with several settings; those of the first model that has it are taken",
                        info.content,
                    )
        plain = [
            token
            for tokens in others
            for _, token in sorted((row, token) for token, row in tokens.rows.items())
        ]
        tokenizer.add_tokens(
            [token for token in dict.fromkeys(plain) if token not in vocabulary and token not in settings]
        )
        tokenizer.add_tokens(list(settings.values()))
    vocabulary = tokenizer.get_vocab()
    tokenizer.add_tokens([token for token, _ in spec.tokens if token not in vocabulary])
    vocabulary = tokenizer.get_vocab()
    for role, token in lost.items():
        if token in vocabulary:
            setattr(tokenizer, role, token)
    return tokenizer


def _cut(tokenizer: Any, parent: Parent) -> tuple[Any, dict[str, str]]:
    """(the tokenizer without tokens that have no row, the roles they had: role → token)."""
    size = rows_of(parent)
    gone = {token for token, number in tokenizer.get_vocab().items() if number >= size}
    if not gone:
        return tokenizer, {}
    what = f"the tokenizer in {parent.path} has {len(gone)} tokens, such as '{min(gone)}', beyond the embedding's {size} rows"
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"{what} and no tokenizer.json from which they could be removed; remove them by hand"
        )
    lost = {
        role: token
        for role, token in tokenizer.special_tokens_map.items()
        if isinstance(token, str) and token in gone
    }
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        _edit(Path(folder) / "tokenizer.json", partial(_without, gone=gone, size=size))
        _edit(Path(folder) / "tokenizer_config.json", partial(_without_roles, gone=gone))
        out = _from_folder(Path(folder), parent.path)
    if set(out.get_vocab()) & gone:
        raise CheckpointError(f"{what}, and they could not be removed; remove them by hand")
    return out, lost


def _edit(file: Path, change: Callable[[Any], Any]) -> None:
    file.write_text(
        json.dumps(change(json.loads(file.read_text(encoding="utf-8"))), ensure_ascii=False), encoding="utf-8"
    )


def _without(data: Any, gone: set[str], size: int) -> Any:
    """A tokenizer.json without the tokens: added ones, ordinary ones, and the merges that make or use them."""
    model = data["model"]
    data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] < size]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {token: number for token, number in model["vocab"].items() if number < size}
    else:  # Unigram: [token, score] in the order of numbers
        model["vocab"] = model["vocab"][:size]

    def kept(merge: Any) -> bool:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        return not gone & {left, right, left + right}

    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if kept(merge)]
    return data


def _without_roles(data: Any, gone: set[str]) -> Any:
    """A tokenizer_config.json in which no role names one of the tokens, as loading it would add them again."""

    def text(value: Any) -> Any:
        return value.get("content") if isinstance(value, dict) else value

    kept: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, list):
            kept[key] = [item for item in value if not (isinstance(text(item), str) and text(item) in gone)]
        elif key == "added_tokens_decoder":
            kept[key] = {number: info for number, info in value.items() if text(info) not in gone}
        elif not (isinstance(text(value), str) and text(value) in gone and key.endswith("_token")):
            kept[key] = value
    return kept


def read(parents: Mapping[str, Parent]) -> dict[str, Tokens | None]:
    """Each parent's tokens, None for one without tokenizer files; equal files are read once."""
    seen: dict[tuple[Any, ...], Tokens] = {}
    out: dict[str, Tokens | None] = {}
    for name, parent in parents.items():
        if not _files(parent, _FILES):
            out[name] = None
            continue
        size = rows_of(parent)
        key = (
            size,
            *(
                (file.name, hashlib.sha256(file.read_bytes()).digest())
                for file in _files(parent, _FILES + _BESIDE)
            ),
        )
        if key not in seen:
            tokenizer = _load(parent)
            added = sorted(
                (number, token) for number, token in tokenizer.added_tokens_decoder.items() if number < size
            )
            seen[key] = Tokens(
                {t: i for t, i in tokenizer.get_vocab().items() if i < size},
                tuple(token for _, token in added),
            )
        out[name] = seen[key]
    return out


def filled(read: Mapping[str, Tokens | None], base: str, parents: Mapping[str, Parent]) -> dict[str, Tokens]:
    """Each parent's tokens; the base's for one without tokenizer files, if it has as many rows."""
    out = {}
    for name, tokens in read.items():
        own = tokens or read[base]
        if own is None or (tokens is None and rows_of(parents[name]) != rows_of(parents[base])):
            raise CheckpointError(
                f"{parents[name].path} has no tokenizer (tokenizer.json); put the files of the one it was trained with there"
            )
        out[name] = own
    return out


def _files(parent: Parent, patterns: tuple[str, ...]) -> list[Path]:
    return sorted(file for pattern in patterns for file in parent.path.glob(pattern))


def _load(parent: Parent) -> Any:
    if not _files(parent, _FILES):
        raise CheckpointError(
            f"{parent.path} has no tokenizer (tokenizer.json); put the files of the one it was trained with there"
        )
    return _from_folder(parent.path, parent.path)


def _from_folder(folder: Path, named: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception for a broken file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"the tokenizer in {named} cannot be read: {reason}") from error
