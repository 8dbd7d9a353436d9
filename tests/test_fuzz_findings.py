"""What fuzzing found, each by its symptom: inputs that once took minutes, ended in a traceback or were misread."""

from __future__ import annotations

import pytest

from evomerge import documents
from evomerge.errors import ConfigError


@pytest.mark.parametrize(
    "text",
    [
        "a: [" + "1," * 400_000 + "1]",
        "a:\n" + "- 1\n" * 200_000,
        "---\n" * 200_000,
        "".join(f"k{i}: 1\n" for i in range(90_000)),
    ],
    ids=["flow list", "block list", "documents", "keys"],
)
def test_a_megabyte_of_small_values_is_refused_where_the_limit_is_passed(text: str) -> None:
    """Each took 16 to 34 seconds to be read; now no more than the first values are."""
    assert len(text) < documents.MAX_BYTES
    with pytest.raises(ConfigError, match=f"past the first {documents.MAX_VALUES:,} keys and values"):
        documents.parse_all(text, "large.yaml")


def test_a_file_with_as_many_values_as_are_allowed_is_read() -> None:
    text = "a: [" + "1," * (documents.MAX_VALUES - 5) + "1]"  # a document, a mapping, a key and a list beside them
    assert len(documents.parse(text, "large.yaml").data["a"]) == documents.MAX_VALUES - 4
