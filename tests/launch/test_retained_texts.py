"""Files of texts to be retained: lines, paragraphs, JSON lines, and what is none of these."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomerge.errors import ConfigError
from evomerge.launch.retained_texts import read_texts


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.txt", "one\ntwo \n one\n", ["one", "two"]),
        ("a.txt", "one\nstill one\n\n\ntwo\n", ["one\nstill one", "two"]),
        ("a.jsonl", '{"text": "one\\n\\nof it"}\n\n{"text": "two", "more": 1}\n', ["one\n\nof it", "two"]),
    ],
)
def test_texts_are_lines_paragraphs_or_json_lines(
    name: str, content: str, texts: list[str], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    found = read_texts(str(tmp_path / name))
    assert list(found.values()) == texts
    assert len(found) == len(texts)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", None, "there is no file"),
        ("a.txt", b" \n\n ", "holds no text"),
        ("a.txt", b"\xff\xfe", "no text in UTF-8"),
        ("a.jsonl", b'{"text": "one"}\n{"prompt": "two"}', "line 2 of"),
        ("a.jsonl", b"[1]", "line 1 of"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(
    name: str, content: bytes | None, words: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        read_texts(str(tmp_path / name))
