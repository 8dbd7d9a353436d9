"""Tokenizer files of parents: which tokens have rows, and the output's tokenizer made from them."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from evomerge.checkpoints import Parent
from evomerge.checkpoints.tokenizer_checks import check_tokenizer, missing_library
from evomerge.errors import CheckpointError
from evomerge.merging.vocabulary.embedding_tables import embedding_rows
from evomerge.recipes import TokenizerSpec

_VOCABULARY_FILES = ("tokenizer.json", "*.model", "vocab.*", "tekken.json", "*.tiktoken")
"""Patterns of files of which any holds a vocabulary."""
_FURTHER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ParentTokens:
    """A parent's tokens that have a row.

    Attributes:
        rows: Token -> row.
        added: Its added tokens with their settings (transformers' AddedToken), by row.
    """

    rows: dict[str, int]
    added: tuple[Any, ...]

    def at(self, row: int) -> str:
        """The token of a row, for a message.

        Args:
            row: The row.

        Returns:
            The token in quotes, or 'no token'.
        """
        return next((f"'{token}'" for token, number in self.rows.items() if number == row), "no token")


def read_tokens(parents: Mapping[str, Parent]) -> dict[str, ParentTokens | None]:
    """Reads the tokens of parents; equal files are read once.

    Args:
        parents: Name -> parent.

    Returns:
        Name -> tokens, None for a parent without tokenizer files.

    Raises:
        CheckpointError: A tokenizer cannot be read; names the folder.
    """
    by_content: dict[Hashable, ParentTokens] = {}
    tokens_of: dict[str, ParentTokens | None] = {}
    for name, key in tokenizer_digests(parents).items():
        if key is not None and key not in by_content:
            by_content[key] = _tokens(parents[name], embedding_rows(parents[name]))
        tokens_of[name] = None if key is None else by_content[key]
    return tokens_of


def tokenizer_digests(parents: Mapping[str, Parent]) -> dict[str, Hashable]:
    """Digests the tokenizers of parents; runs and loads none.

    Args:
        parents: Name -> parent.

    Returns:
        Name -> a value that parents with the same tokenizer files and rows share, None for one without.
    """
    digests: dict[str, Hashable] = {}
    for name, parent in parents.items():
        digests[name] = None
        if _files(parent, _VOCABULARY_FILES):
            files = _files(parent, _VOCABULARY_FILES + _FURTHER_FILES)
            content = ((file.name, hashlib.sha256(file.read_bytes()).digest()) for file in files)
            digests[name] = (embedding_rows(parent), *content)
    return digests


def fill_missing(
    tokens_of: Mapping[str, ParentTokens | None], base: str, parents: Mapping[str, Parent]
) -> dict[str, ParentTokens]:
    """Gives parents without tokenizer files the base's tokens.

    Args:
        tokens_of: Name -> tokens, as `read_tokens` reads them.
        base: Name of the base.
        parents: Name -> parent.

    Returns:
        Name -> tokens.

    Raises:
        CheckpointError: A parent without tokenizer files has another number of rows than the base, or the
            base has none.
    """
    filled = {}
    for name, own in tokens_of.items():
        tokens = own or tokens_of[base]
        has_base_rows = own is not None or embedding_rows(parents[name]) == embedding_rows(parents[base])
        if tokens is None or not has_base_rows:
            raise _no_tokenizer(parents[name])
        filled[name] = tokens
    return filled


@dataclass(frozen=True, slots=True)
class OutputTokenizer:
    """The tokenizer of a merge.

    Attributes:
        tokenizer: A tokenizer of transformers.
        is_as_in_source: Whether it has the tokens of the model that it was made from, with their settings.
    """

    tokenizer: Any
    is_as_in_source: bool


def output_tokenizer(
    spec: TokenizerSpec, source: Parent, base: str, tokens_of: Mapping[str, ParentTokens]
) -> OutputTokenizer:
    """Makes the output's tokenizer: the base's or a model's, cut to its rows, then the further tokens.

    Args:
        spec: The tokenizer of the recipe.
        source: The model whose tokenizer it begins as.
        base: Name of the base.
        tokens_of: Name -> tokens, for every parent.

    Returns:
        The tokenizer.

    Raises:
        CheckpointError: The source's tokenizer cannot be read or cut; names the folder.
    """
    loaded = _load(source)
    before = _content(loaded)
    tokenizer, lost_roles = _cut(loaded, source)
    if spec.source == "union":
        _add_union(tokenizer, [tokens_of[base], *(own for name, own in tokens_of.items() if name != base)])
    vocabulary = tokenizer.get_vocab()
    tokenizer.add_tokens([token for token, _ in spec.tokens if token not in vocabulary])
    vocabulary = tokenizer.get_vocab()
    for role, token in lost_roles.items():
        if token in vocabulary:
            setattr(tokenizer, role, token)
    return OutputTokenizer(tokenizer, _content(tokenizer) == before)


def _content(tokenizer: Any) -> tuple[dict[str, int], dict[int, str], dict[str, Any]]:
    """Tokens, settings of the added ones, roles: a copy."""
    added = {number: repr(token) for number, token in tokenizer.added_tokens_decoder.items()}
    return dict(tokenizer.get_vocab()), added, dict(tokenizer.special_tokens_map)


def _add_union(tokenizer: Any, parents: list[ParentTokens]) -> None:
    """Adds the tokens of all parents in order: ordinary ones by row, then added ones with their settings."""
    settings: dict[str, Any] = {}
    for tokens in parents:
        for info in tokens.added:
            if settings.setdefault(info.content, info) != info:
                _LOG.warning(
                    "token '%s' is added with several settings; those of the first model that has it are "
                    "taken",
                    info.content,
                )
    ordinary = [
        token for tokens in parents for _, token in sorted((row, token) for token, row in tokens.rows.items())
    ]
    vocabulary = tokenizer.get_vocab()
    tokenizer.add_tokens(
        [token for token in dict.fromkeys(ordinary) if token not in vocabulary and token not in settings]
    )
    tokenizer.add_tokens(list(settings.values()))


def _cut(tokenizer: Any, parent: Parent) -> tuple[Any, dict[str, str]]:
    """(the tokenizer without tokens that have no row, the roles that they had: role -> token)."""
    size = embedding_rows(parent)
    gone = {token for token, number in tokenizer.get_vocab().items() if number >= size}
    if not gone:
        return tokenizer, {}
    what = (
        f"the tokenizer in {parent.path} has {len(gone)} tokens, such as '{min(gone)}', beyond the "
        f"embedding's {size} rows"
    )
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"{what} and no tokenizer.json from which they could be removed; remove them by hand"
        )
    lost_roles = {
        role: token
        for role, token in tokenizer.special_tokens_map.items()
        if isinstance(token, str) and token in gone
    }
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        _edit(Path(folder) / "tokenizer.json", partial(_without_tokens, gone=gone, size=size))
        _edit(Path(folder) / "tokenizer_config.json", partial(_without_roles, gone=gone))
        out = _from_folder(Path(folder), parent.path)
    if set(out.get_vocab()) & gone:
        raise CheckpointError(f"{what}, and they could not be removed; remove them by hand")
    return out, lost_roles


def _edit(file: Path, change: Callable[[Any], Any]) -> None:
    data = change(json.loads(file.read_text(encoding="utf-8")))
    file.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def _without_tokens(data: Any, gone: set[str], size: int) -> Any:
    """A tokenizer.json without the tokens and without the merges that make or use them."""
    model = data["model"]
    data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] < size]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {token: number for token, number in model["vocab"].items() if number < size}
    else:  # Unigram: [token, score] in the order of numbers
        model["vocab"] = model["vocab"][:size]

    def stays(merge: Any) -> bool:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        return not gone & {left, right, left + right}

    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if stays(merge)]
    return data


def _without_roles(data: Any, gone: set[str]) -> Any:
    """A tokenizer_config.json whose roles name none of the tokens, which loading would add again."""

    def is_gone(value: Any) -> bool:
        text = value.get("content") if isinstance(value, dict) else value
        return isinstance(text, str) and text in gone

    out: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, list):
            out[key] = [item for item in value if not is_gone(item)]
        elif key == "added_tokens_decoder":
            out[key] = {number: info for number, info in value.items() if not is_gone(info)}
        elif not (is_gone(value) and key.endswith("_token")):
            out[key] = value
    return out


def _tokens(parent: Parent, size: int) -> ParentTokens:
    """The tokens of a parent's tokenizer among its `size` rows."""
    tokenizer = _load(parent)
    rows = {token: number for token, number in tokenizer.get_vocab().items() if number < size}
    added = sorted(
        (number, token) for number, token in tokenizer.added_tokens_decoder.items() if number < size
    )
    return ParentTokens(rows, tuple(token for _, token in added))


def _files(parent: Parent, patterns: tuple[str, ...]) -> list[Path]:
    return sorted(file for pattern in patterns for file in parent.path.glob(pattern))


def _load(parent: Parent) -> Any:
    if not _files(parent, _VOCABULARY_FILES):
        raise _no_tokenizer(parent)
    return _from_folder(parent.path, parent.path)


def _no_tokenizer(parent: Parent) -> CheckpointError:
    return CheckpointError(
        f"{parent.path} has no tokenizer (tokenizer.json); put the files of the one it was trained with there"
    )


def _from_folder(folder: Path, named: Path) -> Any:
    """The tokenizer of a folder. named: the folder that an error names."""
    from transformers import AutoTokenizer

    check_tokenizer(folder)
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception for a broken file
        reason = missing_library(folder) or (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"the tokenizer in {named} cannot be read: {reason}") from error
