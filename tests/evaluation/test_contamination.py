"""The overlap check against one that compares every window with every window, and its reading of files."""

from __future__ import annotations

import io
import json
from pathlib import Path
from random import Random

import pytest

from evomerge.errors import ConfigError
from evomerge.evaluation.contamination import MIN_WORDS, _pieces, find_overlaps, read_documents, words


def brute_force(texts: list[str], documents: list[list[str]], ngram: int) -> tuple[list[int], list[int]]:
    """(texts that share words in a row with a document, texts too short), by looking at every pair of
    windows.
    """
    found, short = [], []
    corpus = [words(" ".join(pieces)) for pieces in documents]
    for number, text in enumerate(texts):
        own = words(text)
        n = min(ngram, len(own))
        if n < min(8, ngram):
            short.append(number)
        elif any(
            own[i : i + n] == other[j : j + n]
            for other in corpus
            for i in range(len(own) - n + 1)
            for j in range(len(other) - n + 1)
        ):
            found.append(number)
    return found, short


@pytest.mark.parametrize("ngram", [1, 3, 8, 13])
@pytest.mark.parametrize("seed", range(8))
def test_finds_what_brute_force_finds(ngram: int, seed: int) -> None:
    rnd = Random(seed)
    alphabet = ["a", "bee", "C", "d,", "e.", "f"] + [f"w{i}" for i in range(20 if seed % 2 else 0)]

    def some(low: int, high: int) -> list[str]:
        return rnd.choices(alphabet, k=rnd.randint(low, high))

    texts = [" ".join(some(0, 40)) for _ in range(30)]
    documents = []
    for _ in range(6):
        stream = some(0, 60)
        for _ in range(rnd.randint(0, 2)):  # what is planted crosses the pieces' borders
            planted = rnd.choice(texts).split()
            start = rnd.randint(0, len(stream))
            stream[start:start] = planted[: rnd.randint(0, len(planted))]
        pieces, at = [], 0
        while at < len(stream):
            size = rnd.randint(1, 9)
            pieces.append(" ".join(stream[at : at + size]))
            at += size
        documents.append(pieces)
    result = find_overlaps(texts, documents, ngram)
    assert (list(result.matches), list(result.too_short)) == brute_force(texts, documents, ngram)
    for number, gram in result.matches.items():
        assert f" {gram} " in f" {' '.join(words(texts[number]))} "


def test_words_are_lowercased_without_punctuation_and_split_where_no_spaces_are() -> None:
    assert words("Don't STOP; 3.5 x_y — naïve!") == ["don", "t", "stop", "3", "5", "x", "y", "naïve"]
    assert words("私はGPUを2台") == ["私", "は", "gpu", "を", "2", "台"]


def test_a_document_ends_where_it_ends() -> None:
    text = "one two three four five six seven eight"
    halves = [["one two three four"], ["five six seven eight"]]
    assert len(text.split()) == MIN_WORDS
    assert not find_overlaps([text], halves).matches
    assert find_overlaps([text], [halves[0] + halves[1]]).matches == {0: text}
    assert find_overlaps([text.rpartition(" ")[0]], [[text]]).too_short == (0,)


def test_lines_of_text_run_on_and_lines_of_json_do_not(tmp_path: Path) -> None:
    first, second = "alpha beta gamma delta epsilon", "zeta eta theta iota kappa"
    text, rows = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_bytes(f"{first}\n{second}\n".encode() + b"\xff\xfe rest\n")
    rows.write_text(
        json.dumps({"text": first})
        + "\n\n"
        + json.dumps({"turns": [{"say": second}, "lambda"], "n": 3})
        + "\n"
    )
    both = f"{first} {second}"
    assert find_overlaps([both], read_documents([text])).matches == {0: both}
    assert not find_overlaps([both], read_documents([rows])).matches
    assert list(find_overlaps([first, second, f"{second} lambda"], read_documents([rows]), 3).matches) == [
        0,
        1,
        2,
    ]


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_a_file_is_read_in_pieces_that_cut_no_word(size: int) -> None:
    text = "one two\nthree  four five\n"
    assert "".join(_pieces(io.StringIO(text), size)) == text
    assert [w for piece in _pieces(io.StringIO(text), size) for w in words(piece)] == text.split()


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n{not json\n')
    with pytest.raises(ConfigError, match=r"broken\.jsonl:2"):
        find_overlaps(["a b c d e f g h"], read_documents([broken]))
    with pytest.raises(ConfigError, match="no training text"):
        list(read_documents([tmp_path / "none.txt"]))
