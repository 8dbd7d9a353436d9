"""When a text stops: the same token at which lm-eval's HFLM stops at batch size 1.

HFLM (lm-eval 0.4.13, `MultiTokenEOSCriteria`) decodes, after every token, as many of the last generated tokens as the stop
string has by itself plus two, and stops if the string is in them. Decoding is dear, so it is done only after a token whose
text holds the last character of a stop string. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BROKEN = "\ufffd"  # a part of a character: what it completes is known only from the tokens before it
_KNOWN = 1 << 16  # most endings whose answer is kept


class Stops:
    """Stop strings as a tokenizer writes them. Answers are remembered: greedy texts of many candidates end alike."""

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        """strings: an empty one stops after the first token, as in HFLM."""
        self.strings, self._tokenizer = tuple(strings), tokenizer
        self._looks: dict[int, list[str]] = {}  # how many tokens are looked at -> for which strings
        for string in self.strings:
            self._looks.setdefault(len(tokenizer.encode(string, add_special_tokens=False)) + 2, []).append(
                string
            )
        self._longest = max(self._looks, default=0)
        rewrites = bool(
            getattr(tokenizer, "clean_up_tokenization_spaces", False)
        )  # then later tokens change earlier text
        self._any = rewrites or "" in self.strings
        self._last = {string[-1] for string in self.strings if string} | {_BROKEN}
        self._may: dict[int, bool] = {}
        self._known: dict[tuple[int, ...], bool] = {}

    def hit(self, tokens: Sequence[int]) -> bool:
        """Whether a text that was not stopped before its last token is now. tokens: all generated ones."""
        if not self.strings:
            return False
        last = tokens[-1]
        may = self._may.get(last)
        if may is None:
            text = self._tokenizer.decode([last, last])  # how it reads at the beginning of a text, and later
            may = self._may[last] = self._any or not text or not self._last.isdisjoint(text)
        if not may:
            return False
        ending = tuple(tokens[-self._longest :])
        if (known := self._known.get(ending)) is None:
            if len(self._known) >= _KNOWN:
                self._known.clear()
            known = self._known[ending] = any(
                self._in(ending[-look:], strings) for look, strings in self._looks.items()
            )
        return known

    def _in(self, tokens: tuple[int, ...], strings: Sequence[str]) -> bool:
        text = self._tokenizer.decode(list(tokens))
        return any(string in text for string in strings)
