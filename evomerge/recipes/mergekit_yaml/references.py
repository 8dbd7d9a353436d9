"""Model references and tokenizer entries of mergekit's YAML in their mapping forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from evomerge.errors import RecipeError, suggest
from evomerge.recipes.tokenizer_spec import WHOLE, ZERO, TokenDonor, TokenizerSpec

Ignore = Callable[[str], None]
"""Takes a sentence about a key that changes nothing."""


def text(value: Mapping[str, Any], ignore: Ignore) -> str:
    """A model reference as one text.

    Args:
        value: {model: …, lora: …}, each a text or {path: …, revision: …}; lora may be left out.
        ignore: Called for each unknown key.

    Returns:
        'path[@revision][+adapter[@revision]]'.

    Raises:
        RecipeError: It has another form.
    """
    _keys(value, ("model", "lora", "override_architecture"), "a model reference", ignore)
    if value.get("override_architecture") is not None:
        raise RecipeError(
            "override_architecture is not needed here: names are read without a table of architectures; "
            "remove it"
        )
    model, adapter = _path(value.get("model"), ignore), value.get("lora")
    return model if adapter is None else f"{model}+{_path(adapter, ignore)}"


def tokenizer(value: Any, model: Callable[[Any], str], ignore: Ignore) -> TokenizerSpec:
    """The spec of mergekit's `tokenizer` mapping.

    Args:
        value: What the document has under `tokenizer`.
        model: Reads a model reference.
        ignore: Called for each unknown key.

    Returns:
        The spec.

    Raises:
        RecipeError: It is no such mapping.
    """
    value = _mapping(value, "tokenizer")
    _keys(value, ("source", "tokens", "pad_to_multiple_of"), "tokenizer", ignore)
    source = value.get("source", "union")
    tokens = []
    for token, entry in _mapping(value.get("tokens") or {}, "tokens").items():
        entry = _mapping(entry, f"token {token!r}")
        _keys(entry, ("source", "force"), f"token {token!r}", ignore)
        donor = _donor(entry.get("source"), model, ignore)
        tokens.append((token, TokenDonor(donor, entry.get("force", False))))
    return TokenizerSpec(
        source if source in WHOLE else model(source), tuple(tokens), value.get("pad_to_multiple_of")
    )


def _donor(source: Any, model: Callable[[Any], str], ignore: Ignore) -> str | tuple[str, str | int] | None:
    if not isinstance(source, dict) or "kind" not in source:
        return None if source is None else model(source)
    if source["kind"] == "zero":
        _keys(source, ("kind",), "a source of kind zero", ignore)
        return ZERO
    if source["kind"] != "model_token":
        raise RecipeError(f"a token's source has the kind zero or model_token, got {source['kind']!r:.60}")
    _keys(source, ("kind", "model", "token", "token_id"), "a source of kind model_token", ignore)
    rows = [source[key] for key in ("token", "token_id") if source.get(key) is not None]
    if len(rows) != 1:
        raise RecipeError("a source of kind model_token has exactly one of token and token_id")
    return model(source.get("model")), rows[0]


def _path(value: Any, ignore: Ignore) -> str:
    if isinstance(value, str) and value:
        return value
    value = _mapping(value, "a model")
    _keys(value, ("path", "revision"), "a model", ignore)
    path, revision = value.get("path"), value.get("revision")
    if not isinstance(path, str) or not path or not isinstance(revision, str | None):
        raise RecipeError(f"a model is a text, or a path with a revision, got {str(value)[:80]}")
    return f"{path}@{revision}" if revision else path


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise RecipeError(f"{what} must be a mapping, got {str(value)[:80]!r}")
    return value


def _keys(value: Mapping[str, Any], allowed: tuple[str, ...], what: str, ignore: Ignore) -> None:
    for key in value:
        if key not in allowed:
            ignore(
                f"{what} has the unknown key '{str(key)[:60]}', which is left out, as mergekit does. "
                + suggest(str(key), allowed)
            )
