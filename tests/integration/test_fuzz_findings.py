"""What fuzzing found, each by its symptom: inputs that once took minutes, ended in a traceback or were
misread.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from evomerge import _yaml
from evomerge.checkpoints import safetensors_headers
from evomerge.config import loading
from evomerge.errors import CheckpointError, ConfigError, RecipeError
from evomerge.recipes import Recipe, mergekit_yaml
from evomerge.spaces import baselines
from tests.support.toy import weight_space


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
    assert len(text) < _yaml.MAX_BYTES
    with pytest.raises(ConfigError, match=f"past the first {_yaml.MAX_VALUES:,} keys and values"):
        _yaml.parse_all(text, "large.yaml")


def test_a_file_with_as_many_values_as_are_allowed_is_read() -> None:
    text = (
        "a: [" + "1," * (_yaml.MAX_VALUES - 5) + "1]"
    )  # a document, a mapping, a key and a list beside them
    assert len(_yaml.parse(text, "large.yaml").data["a"]) == _yaml.MAX_VALUES - 4


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
        mergekit_yaml.load(_yaml.parse(text, "recipe.yaml"), lambda reference: 4)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("given", "broken"),
    [
        ("base: a", r'base: "x\ny"'),
        ("method: linear", r'method: "x\ny"'),
        ("{task: sorting}", r'{task: "x\ny"}, {task: "x\ny"}'),
        ("study: s", '"x\\ny": 1\nstudy: s'),
    ],
)
def test_a_name_with_a_line_end_makes_an_error_of_one_line(given: str, broken: str) -> None:
    """It was quoted as it stood."""
    text = (
        "study: s\nmodels: {a: {path: m}, b: {path: m}}\nbase: a\nmethod: linear\ntasks: [{task: sorting}]\n"
    )
    with pytest.raises(ConfigError, match=r"x( |\\n)y") as caught:
        loading.check(_yaml.parse(text.replace(given, broken), "search.yaml"))
    assert len(str(caught.value).splitlines()) == 1


def header(names: int) -> bytes:
    """A safetensors file of that many empty tensors."""
    text = json.dumps(
        {f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(names)},
        separators=(",", ":"),
    ).encode()
    return struct.pack("<Q", len(text)) + text


def test_a_header_of_very_many_tensors_is_refused_before_they_are_looked_at(tmp_path: Path) -> None:
    """A quarter of a million fit into 16 MB, and took five seconds to be checked one by one."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(header(safetensors_headers.MAX_TENSORS))
    assert len(safetensors_headers.read_header(file)) == safetensors_headers.MAX_TENSORS
    file.write_bytes(header(safetensors_headers.MAX_TENSORS + 1))
    with pytest.raises(CheckpointError, match=r"it has 50,001 tensors, at most 50,000 are read of a file"):
        safetensors_headers.read_header(file)


def test_a_folder_of_very_many_tensors_and_a_huge_json_file_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_headers, "MAX_FOLDER", 5)
    for shard in range(3):
        text = json.dumps(
            {f"t{shard}.{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(2)}
        ).encode()
        (tmp_path / f"{shard}.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(CheckpointError, match="more than 5 tensors"):
        safetensors_headers.read_folder(tmp_path)
    monkeypatch.setattr(safetensors_headers, "MAX_FOLDER", 6)
    assert len(safetensors_headers.read_folder(tmp_path)) == 6
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(safetensors_headers.MAX_JSON + 1)  # a hole: it takes no room on the disk
    with pytest.raises(CheckpointError, match="32,000,001 bytes, at most 32,000,000"):
        safetensors_headers.read_json_object(tmp_path / "config.json", "")
