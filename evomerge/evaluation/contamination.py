"""Which texts a training corpus gives away: word n-grams that both hold. Streams the corpus; knows nothing of tasks.

The check of Brown et al. 2020, "Language Models are Few-Shot Learners", arXiv:2005.14165, appendix C: lowercased words
without punctuation, 13 in a row; a text that is shorter is compared whole, down to 8 words. Below that a match says
nothing, and the text is counted as too short. Scripts without spaces between words are read a character a word
(Chinese, Japanese); Thai, Lao and Khmer are not told apart into words, so that little of them is found. One core reads about
5 MB of text a second against 4 000 items.
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

NGRAM, LEAST = 13, 8
_CJK = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")


@dataclass(frozen=True, slots=True)
class Overlaps:
    """found: number of a text -> the first of its n-grams that the corpus holds. short: texts of too few words to tell."""

    found: Mapping[int, str]
    short: tuple[int, ...]


def words(text: str) -> list[str]:
    """The words of a text, lowercased, without punctuation."""
    return _WORD.findall(text.lower())


def overlaps(texts: Sequence[str], documents: Iterable[Iterable[str]], ngram: int = NGRAM) -> Overlaps:
    """Compares texts with a corpus, read once. documents: each an iterable of pieces whose words run on from one to the next.

    ngram: words in a row that are an overlap, at least 1; a text of LEAST <= w < ngram words is one n-gram. An n-gram of
    several texts counts for each.
    """
    holders: dict[int, dict[str, list[int]]] = defaultdict(
        lambda: defaultdict(list)
    )  # length -> n-gram -> texts
    short = []
    for number, text in enumerate(texts):
        own = words(text)
        length = min(ngram, len(own))
        if length < min(LEAST, ngram):
            short.append(number)
            continue
        for gram in dict.fromkeys(_grams(own, length)):
            holders[length][gram].append(number)
    ends = {
        length: {(gram.split(" ", 1)[0], gram.rsplit(" ", 1)[-1]) for gram in grams}
        for length, grams in holders.items()
    }
    seen: set[tuple[int, str]] = set()
    for document in documents:
        for run in _runs(document, max(holders, default=1)):
            for length, grams in holders.items():
                border = ends[length]
                for i, pair in enumerate(zip(run, run[length - 1 :], strict=False)):
                    if pair in border and (gram := " ".join(run[i : i + length])) in grams:
                        seen.add((length, gram))
    found: dict[int, str] = {}
    for length, grams in holders.items():
        for gram, numbers in grams.items():  # in the order of the texts' words
            if (length, gram) in seen:
                for number in numbers:
                    found.setdefault(number, gram)
    return Overlaps(dict(sorted(found.items())), tuple(short))


def read(paths: Sequence[Path]) -> Iterator[Iterator[str]]:
    """The documents of text files: a .jsonl file holds one a line (all strings of its JSON), any other file is one.

    Raises ConfigError for a file that is missing or a line that is no JSON. Bytes that are no UTF-8 are skipped over.
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
        whole = rest + block
        end = max(whole.rfind(" "), whole.rfind("\n")) + 1
        if end:
            yield whole[:end]
        rest = whole[end:]
    yield rest


def _runs(document: Iterable[str], longest: int) -> Iterator[list[str]]:
    """The words of a document in overlapping runs, so that no n-gram of up to `longest` words is cut."""
    carried: list[str] = []
    for piece in document:
        run = carried + words(piece)
        yield run
        carried = run[len(run) - longest + 1 :] if len(run) >= longest else run


def _grams(own: Sequence[str], length: int) -> Iterator[str]:
    return (" ".join(own[i : i + length]) for i in range(len(own) - length + 1))


def _strings(value: object) -> Iterator[str]:
    """Every string inside a JSON value; keys are none."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
