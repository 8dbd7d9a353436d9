"""What a merged model's tokenizer is made of: mergekit's `tokenizer_source` and `tokenizer` keys.

Frozen, JSON-able; knows no files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from evomerge.errors import RecipeError

ZERO = "zero"
WHOLE = ("base", "union")
"""Sources of a tokenizer that are no model name."""


@dataclass(frozen=True, slots=True)
class TokenDonor:
    """Which row a token gets in the models that lack it; with `force`, in every model.

    Attributes:
        source: Model name (its row of the same token), 'zero' (a row of zeros), (model, other token), (model,
            row), or None for the row that it would get unlisted: being listed then only adds the token.
        force: Whether models that have the token get the row too.
    """

    source: str | tuple[str, str | int] | None
    force: bool = False

    def __post_init__(self) -> None:
        match self.source:
            case None if self.force:
                raise RecipeError("a forced token needs a source; name a model, a model's token or 'zero'")
            case None:
                pass
            case str(name) | (str(name), str()) if name:
                pass
            case (str(name), int(row)) if name and not isinstance(row, bool) and row >= 0:
                pass
            case _:
                raise RecipeError(
                    "a token's source is a model, 'zero', or a model with a token or a row of at least 0, "
                    f"got {self.source!r}"
                )
        if not isinstance(self.force, bool):
            raise RecipeError(f"force must be true or false, got {self.force!r}")

    @property
    def model(self) -> str | None:
        """The model whose row it is, if there is one."""
        if isinstance(self.source, tuple):
            return self.source[0]
        return None if self.source == ZERO else self.source


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """The tokenizer of a merged model.

    Attributes:
        source: 'base' (the base's), 'union' (the base's and every parent's further tokens) or the name of a
            model (that model's).
        tokens: ((token, donor), ...), tokens that the output has in any case; new ones get the next rows in
            this order.
        pad_to_multiple_of: The number of rows is rounded up to a multiple of it; None leaves one row a token.
    """

    source: str = "union"
    tokens: tuple[tuple[str, TokenDonor], ...] = ()
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.source, str) or not self.source:
            raise RecipeError(f"a tokenizer's source is 'base', 'union' or a model, got {self.source!r}")
        multiple = self.pad_to_multiple_of
        if multiple is not None and (
            not isinstance(multiple, int) or isinstance(multiple, bool) or multiple < 1
        ):
            raise RecipeError(f"pad_to_multiple_of must be a whole number of at least 1, got {multiple!r}")
        listed = [token for token, _ in self.tokens]
        for token in listed:
            if not isinstance(token, str) or not token:
                raise RecipeError(f"a token is a text that is not empty, got {token!r}")
            if listed.count(token) > 1:
                raise RecipeError(f"token '{token}' is listed {listed.count(token)} times; list it once")

    @property
    def models(self) -> tuple[str, ...]:
        """Every model named, in order, without repeats; merging reads their tokenizers."""
        named = [None if self.source in WHOLE else self.source, *(donor.model for _, donor in self.tokens)]
        return tuple(dict.fromkeys(name for name in named if name is not None))

    def to_plain(self) -> dict[str, Any]:
        """The spec as plain data for JSON; tokens are pairs in a list, because their order counts."""
        pairs = [
            [
                token,
                {
                    "source": list(donor.source) if isinstance(donor.source, tuple) else donor.source,
                    "force": donor.force,
                },
            ]
            for token, donor in self.tokens
        ]
        return {"source": self.source, "tokens": pairs, "pad_to_multiple_of": self.pad_to_multiple_of}

    @classmethod
    def from_plain(cls, data: Any) -> TokenizerSpec:
        """The spec of a plain form.

        Args:
            data: What `to_plain` returned.

        Returns:
            An equal spec.

        Raises:
            RecipeError: It is anything else.
        """
        given = _fields(data, ("source", "tokens", "pad_to_multiple_of"))
        if not isinstance(given["tokens"], list):
            raise RecipeError(f"tokens must be a list of [token, donor], got {str(given['tokens'])[:80]}")
        return cls(
            given["source"], tuple(_listed(pair) for pair in given["tokens"]), given["pad_to_multiple_of"]
        )


def _listed(pair: Any) -> tuple[str, TokenDonor]:
    if not isinstance(pair, list) or len(pair) != 2:
        raise RecipeError(f"tokens must be a list of [token, donor], got {str(pair)[:80]} in it")
    given = _fields(pair[1], ("source", "force"))
    source = given["source"]
    return pair[0], TokenDonor(tuple(source) if isinstance(source, list) else source, given["force"])


def _fields(data: Any, names: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(data, dict) or set(data) != set(names):
        raise RecipeError(f"expected a mapping with {', '.join(names)}, got {str(data)[:80]}")
    return data
