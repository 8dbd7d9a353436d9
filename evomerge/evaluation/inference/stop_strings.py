"""When a generated text stops: the same token at which lm-eval's HFLM stops at batch size 1.

HFLM (lm-eval 0.4.13, `MultiTokenEOSCriteria`) decodes, after every token, as many of the last generated
tokens as the stop string has by itself plus two, and stops if the string is in them. Decoding is expensive,
so it is done only after a token whose text contains the last character of a stop string. Knows nothing of
models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BROKEN = "\ufffd"  # a part of a character: what it completes is known only from the tokens before it
_CACHE_SIZE = 1 << 16  # most endings whose answer is cached


class Stops:
    """Stop strings of one tokenizer. Answers are cached: greedy texts of many candidates end alike."""

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        """Prepares stop strings.

        Args:
            tokenizer: A transformers tokenizer.
            strings: The stop strings; an empty one stops after the first token, as in HFLM.
        """
        self.strings, self._tokenizer = tuple(strings), tokenizer
        self._by_lookback: dict[
            int, list[str]
        ] = {}  # number of last tokens to decode -> strings sought in them
        for string in self.strings:
            lookback = len(tokenizer.encode(string, add_special_tokens=False)) + 2
            self._by_lookback.setdefault(lookback, []).append(string)
        self._longest = max(self._by_lookback, default=0)
        # with clean-up later tokens change earlier text, so that every token has to be checked
        rewrites = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self._check_every_token = rewrites or "" in self.strings
        self._last_characters = {string[-1] for string in self.strings if string} | {_BROKEN}
        self._can_end: dict[int, bool] = {}  # token -> whether a stop string may end in it
        self._cache: dict[tuple[int, ...], bool] = {}

    def hit(self, tokens: Sequence[int]) -> bool:
        """Returns whether a text stops at its last token, given that it did not stop before.

        Args:
            tokens: All generated token ids, at least one.

        Returns:
            True if a stop string is found.
        """
        if not self.strings or not self._may_end_in(tokens[-1]):
            return False
        ending = tuple(tokens[-self._longest :])
        hit = self._cache.get(ending)
        if hit is None:
            if len(self._cache) >= _CACHE_SIZE:
                self._cache.clear()
            hit = any(self._contains(ending[-n:], strings) for n, strings in self._by_lookback.items())
            self._cache[ending] = hit
        return hit

    def _may_end_in(self, token: int) -> bool:
        may = self._can_end.get(token)
        if may is None:
            text = self._tokenizer.decode(
                [token, token]
            )  # how it reads at the beginning of a text, and later
            may = self._check_every_token or not text or not self._last_characters.isdisjoint(text)
            self._can_end[token] = may
        return may

    def _contains(self, tokens: tuple[int, ...], strings: Sequence[str]) -> bool:
        text = self._tokenizer.decode(list(tokens))
        return any(string in text for string in strings)
