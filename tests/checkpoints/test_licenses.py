"""What a model folder says of its license, and that nothing is guessed."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomerge.checkpoints.licenses import PERMISSIVE, License, is_repository_name, read_card

MIT = """MIT License

Copyright (c) 2026 Somebody

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without
limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the
Software, and to permit persons to whom the Software is furnished to do so, subject to the following
conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions
of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED
TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL
THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF
CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER
DEALINGS IN THE SOFTWARE.
"""
BOMB = "a0: &a0 [x, x]\n" + "\n".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 20))


def folder(path: Path, **files: str) -> Path:
    """A folder with text files; 'README' is README.md."""
    path.mkdir(exist_ok=True)
    for name, text in files.items():
        (path / ("README.md" if name == "README" else name)).write_text(text)
    return path


def identifier(path: Path) -> str | None:
    found = read_card(path).license
    return None if found is None else found.identifier


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("license: apache-2.0", "apache-2.0"),
        ("license: 'MIT'", "mit"),
        ("license: [mit, apache-2.0]", "mit and apache-2.0"),
        ("license: other\nlicense_name: qwen-research", "other"),
        ("license: unknown", None),
        ("license:", None),
        ("license: {a: b}", None),
        ("license: [mit, 3]", None),
        ("license: 'see the file'", None),
        ("tags: [merge]", None),
        ("license: mit\nlicense: apache-2.0", None),  # a key twice
        ("license: [mit", None),
        (BOMB, None),
    ],
)
def test_the_card_says_its_license_or_nothing_is_known(
    front: str, expected: str | None, tmp_path: Path
) -> None:
    path = folder(tmp_path / "m", README=f"---\n{front}\n---\n# A model\nlicense: gpl-3.0\n")
    assert identifier(path) == expected
    if expected is None:
        assert read_card(path).shown.startswith("unknown (")


@pytest.mark.parametrize("text", ["", "# no front matter\nlicense: mit\n", "---\nlicense: mit\n", "\n\n"])
def test_a_card_without_front_matter_says_nothing(text: str, tmp_path: Path) -> None:
    assert identifier(folder(tmp_path / "m", README=text)) is None


def test_a_license_file_counts_where_the_card_says_nothing(tmp_path: Path) -> None:
    assert identifier(folder(tmp_path / "text", LICENSE=MIT)) == "mit"
    assert identifier(folder(tmp_path / "copy", COPYING=MIT)) == "mit"
    assert identifier(folder(tmp_path / "card", LICENSE=MIT, README="---\nlicense: gemma\n---\n")) == "gemma"
    assert identifier(folder(tmp_path / "none", NOTICE=MIT)) is None


def test_a_text_with_added_terms_is_not_the_license_that_it_begins_like(tmp_path: Path) -> None:
    added = MIT + "Whoever has more than a hundred million users shows the name of the model. " * 2
    found = read_card(folder(tmp_path / "m", LICENSE=added)).license
    assert found is not None
    assert (found.identifier, found.name) == ("other", None)
    assert not found.is_among(PERMISSIVE)


def test_two_licenses_called_other_are_the_same_by_name_or_by_text_only(tmp_path: Path) -> None:
    named = [License("other", name) for name in ("qwen", "qwen", "falcon")]
    assert named[0].terms == named[1].terms != named[2].terms
    texts = [read_card(folder(tmp_path / t, LICENSE=f"Terms {t[0]}")).license for t in ("a1", "a2", "b1")]
    one, same, other = (found.terms for found in texts if found is not None)
    assert one == same != other


def test_a_license_of_several_is_allowed_where_all_are() -> None:
    assert License("mit and apache-2.0").is_among(PERMISSIVE)
    assert not License("mit and gpl-3.0").is_among(PERMISSIVE)
    assert License("other", "qwen").is_among(("qwen",))
    assert not License("other").is_among(("other",))


def test_a_card_that_is_a_link_out_of_its_folder_is_not_followed(tmp_path: Path) -> None:
    outside = folder(tmp_path / "outside", README="---\nlicense: mit\n---\n", LICENSE=MIT)
    path = folder(tmp_path / "m")
    for name in ("README.md", "LICENSE"):
        (path / name).symlink_to(outside / name)
    card = read_card(path)
    assert (card.license, card.files) == (None, ())
    assert "link" in card.fault


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("org/model", True),
        ("gpt2", True),
        ("a/b/c", False),
        ("/home/me/model", False),
        ("./model", False),
        ("org/../model", False),
        ("org/a--b", False),
        ("", False),
    ],
)
def test_what_can_be_a_repository(name: str, is_one: bool) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    assert is_repository_name(name) == is_one
    try:
        validate_repo_id(name)
    except HFValidationError:
        assert not is_one
