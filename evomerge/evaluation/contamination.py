"""Contamination check: which texts share word n-grams with a training corpus.

Streams the corpus; knows nothing of tasks.

The check of Brown et al. 2020, "Language Models are Few-Shot Learners", arXiv:2005.14165, appendix C:
lowercased words without punctuation, 13 in a row. A shorter text is compared whole, down to 8 words; below
that a match says nothing, and the text is counted as too short. Scripts without spaces between words are read
one character a word (Chinese, Japanese); Thai, Lao and Khmer are not segmented into words, so that few
overlaps are found in them. One core reads about 5 MB of text a second against 4 000 items.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from evomerge.errors import ConfigError

NGRAM = 13
"""Words in a row that count as an overlap."""
MIN_WORDS = 8
"""Texts of fewer words are too short to compare."""
_CJK = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")

_Holders = dict[int, dict[str, list[int]]]
"""Length of an n-gram -> n-gram -> numbers of the texts that contain it."""


@dataclass(frozen=True, slots=True)
class Overlaps:
    """Result of `find_overlaps`.

    Attributes:
        matches: Number of a text -> the first of its n-grams that the corpus contains.
        too_short: Numbers of the texts that have too few words to tell.
    """

    matches: Mapping[int, str]
    too_short: tuple[int, ...]


def words(text: str) -> list[str]:
    """Splits a text into words.

    Args:
        text: Any text.

    Returns:
        Its words, lowercased, without punctuation.
    """
    return _WORD.findall(text.lower())


def find_overlaps(texts: Sequence[str], documents: Iterable[Iterable[str]], ngram: int = NGRAM) -> Overlaps:
    """Compares texts with a corpus, which is read once.

    Args:
        texts: Texts to look for, such as a task's items.
        documents: The corpus. Each document is an iterable of pieces whose words run on from one piece to the
            next.
        ngram: Words in a row that are an overlap, at least 1. A text of w words, MIN_WORDS <= w < ngram, is
            one n-gram.

    Returns:
        The texts that overlap and those too short to compare. An n-gram of several texts counts for each of
        them.
    """
    holders: _Holders = defaultdict(lambda: defaultdict(list))
    too_short = []
    for number, text in enumerate(texts):
        text_words = words(text)
        length = min(ngram, len(text_words))
        if length < min(MIN_WORDS, ngram):
            too_short.append(number)
            continue
        for gram in dict.fromkeys(_ngrams(text_words, length)):
            holders[length][gram].append(number)
    seen = _ngrams_in_corpus(holders, documents)
    matches: dict[int, str] = {}
    for length, grams in holders.items():
        for gram, numbers in grams.items():  # in the order of the texts' words
            if (length, gram) in seen:
                for number in numbers:
                    matches.setdefault(number, gram)
    return Overlaps(dict(sorted(matches.items())), tuple(too_short))


def _ngrams_in_corpus(holders: _Holders, documents: Iterable[Iterable[str]]) -> set[tuple[int, str]]:
    """(length, n-gram) pairs of the texts' n-grams that the corpus contains."""
    borders = {
        length: {(gram.split(" ", 1)[0], gram.rsplit(" ", 1)[-1]) for gram in grams}
        for length, grams in holders.items()
    }  # first and last word: comparing these first spares joining most n-grams of the corpus
    longest = max(holders, default=1)
    seen: set[tuple[int, str]] = set()
    for document in documents:
        for run in _runs(document, longest):
            for length, grams in holders.items():
                border = borders[length]
                for i, pair in enumerate(zip(run, run[length - 1 :], strict=False)):
                    if pair in border:
                        gram = " ".join(run[i : i + length])
                        if gram in grams:
                            seen.add((length, gram))
    return seen


def read_documents(paths: Sequence[Path]) -> Iterator[Iterator[str]]:
    """Reads the documents of text files.

    Args:
        paths: Files. A .jsonl file holds one document a line (all strings of its JSON); any other file is one
            document.

    Yields:
        The pieces of each document. Bytes that are no UTF-8 are skipped.

    Raises:
        ConfigError: A file is missing, or a line of a .jsonl file is no JSON.
    """
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"there is no training text '{path}'; correct evaluation.training_texts")
    for path in paths:
        with path.open(encoding="utf-8", errors="replace") as lines:
            if path.suffix != ".jsonl":
                yield _pieces(lines)
                continue
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    yield _strings(json.loads(line))
                except ValueError:
                    raise ConfigError(f"{path}:{number}: a line of a .jsonl file must be JSON") from None


def _pieces(file: TextIO, size: int = 1 << 20) -> Iterator[str]:
    """A file in pieces of about `size` characters that end between words."""
    rest = ""
    while block := file.read(size):
        text = rest + block
        end = max(text.rfind(" "), text.rfind("\n")) + 1
        if end:
            yield text[:end]
        rest = text[end:]
    yield rest


def _runs(document: Iterable[str], longest: int) -> Iterator[list[str]]:
    """The words of a document in overlapping runs, so that no n-gram of up to `longest` words is cut."""
    carried: list[str] = []
    for piece in document:
        run = carried + words(piece)
        yield run
        carried = run[len(run) - longest + 1 :] if len(run) >= longest else run


def _ngrams(text_words: Sequence[str], length: int) -> Iterator[str]:
    return (" ".join(text_words[i : i + length]) for i in range(len(text_words) - length + 1))


def _strings(value: object) -> Iterator[str]:
    """Every string inside a JSON value; keys are left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
