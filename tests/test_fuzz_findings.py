"""What fuzzing found, each by its symptom: inputs that once took minutes, ended in a traceback or were misread."""

from __future__ import annotations

import json

import pytest
from toy import weight_space

from evomerge import documents, mergekit_yaml
from evomerge.baselines import baselines
from evomerge.errors import ConfigError, RecipeError
from evomerge.recipe import Recipe


@pytest.mark.parametrize(
    "text",
    [
        "a: [" + "1," * 200_000 + "1]",
        "a:\n" + "- 1\n" * 100_000,
        "---\n" * 100_000,
        "".join(f"k{i}: 1\n" for i in range(45_000)),
    ],
    ids=["flow list", "block list", "documents", "keys"],
)
def test_a_file_of_small_values_is_refused_where_the_limit_is_passed(text: str) -> None:
    """Each took 8 to 17 seconds to be read; now no more than the first values are."""
    assert len(text) < documents.MAX_BYTES
    with pytest.raises(ConfigError, match=f"past the first {documents.MAX_VALUES:,} keys and values"):
        documents.parse_all(text, "large.yaml")


def test_a_file_with_as_many_values_as_are_allowed_is_read() -> None:
    text = "a: [" + "1," * (documents.MAX_VALUES - 5) + "1]"  # a document, a mapping, a key and a list beside them
    assert len(documents.parse(text, "large.yaml").data["a"]) == documents.MAX_VALUES - 4


def test_an_error_about_a_recipe_is_one_line_of_bounded_length() -> None:
    """A text of the file was quoted whole, with its line ends."""
    plain = json.loads(baselines(weight_space())[0].recipe.canonical())
    for dtype in ("a\nb", "9" * 100_000):
        with pytest.raises(RecipeError) as caught:
            Recipe.from_json(json.dumps(plain | {"dtype": dtype}))
        assert len(str(caught.value).splitlines()) == 1
        assert len(str(caught.value)) < 1000
    text = f"merge_method: linear\nmodels: [{{model: a, parameters: {{weight: 1}}}}]\ndtype: x{'9' * 5000}\n"
    with pytest.raises(RecipeError, match=r"^recipe\.yaml:3:1 unknown dtype 'x999") as caught:
        mergekit_yaml.load(documents.parse(text, "recipe.yaml"), lambda reference: 4)
    assert len(str(caught.value)) < 1000
