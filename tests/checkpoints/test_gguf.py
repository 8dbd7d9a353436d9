"""Parents in GGUF files: dequantised once, to what the gguf package gives; what cannot be read is said."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evomerge.checkpoints import gguf, open_parent
from evomerge.checkpoints.licenses import cards_of
from evomerge.errors import CheckpointError
from tests.support import gguf_models

Values = dict[str, np.ndarray[Any, Any]]
needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs the gguf package")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Values]:
    """(a GGUF file in a folder with a '+' in its name, its tensors)."""
    folder = tmp_path_factory.mktemp("of+parts")
    return folder / "tiny-Q8_0.gguf", gguf_models.write(folder / "tiny-Q8_0.gguf")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache folder of the module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@needs_gguf
def test_a_parent_is_what_the_file_dequantises_to(written: tuple[Path, Values]) -> None:
    file, values = written
    parent = open_parent(str(file))
    assert set(parent.tensors) == set(values)
    for name, own in values.items():
        assert torch.equal(parent.tensor(name), torch.from_numpy(own).to(torch.bfloat16)), name
    assert parent.config["model_type"] == "qwen2"
    assert (parent.path / "tokenizer.json").is_file()


@needs_gguf
def test_the_license_in_a_files_metadata_is_that_of_the_model(written: tuple[Path, Values]) -> None:
    (card,) = cards_of(open_parent(str(written[0])))
    assert card.license is not None
    assert card.license.identifier == "apache-2.0"
    assert card.base_models == ("org/start",)


@needs_gguf
def test_a_file_is_dequantised_once_and_again_where_it_changed(
    written: tuple[Path, Values], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, _ = written
    first = open_parent(str(file)).path
    ways: list[Path] = []
    convert = gguf._convert
    monkeypatch.setattr(gguf, "_convert", lambda *paths: (ways.append(paths[0]), convert(*paths)))
    assert open_parent(str(file)).path == first
    assert ways == []
    os.utime(file, ns=(1, 1))
    assert open_parent(str(file)).path != first
    assert ways == [file]
    assert not [path for path in first.parent.iterdir() if path.name.startswith(".part-")]


@needs_gguf
def test_what_transformers_cannot_read_is_said_with_its_reason(tmp_path: Path) -> None:
    gguf_models.write(tmp_path / "odd.gguf", architecture="nobody")
    with pytest.raises(CheckpointError, match=r"odd.gguf cannot be dequantised.*nobody.*made from"):
        open_parent(str(tmp_path / "odd.gguf"))


def test_a_part_of_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(CheckpointError, match="one of several parts"):
        open_parent(str(tmp_path / "m-00001-of-00002.gguf"))


def test_without_the_package_the_sentence_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(64))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r'pip install "evomerge\[gguf\]"'):
        open_parent(str(tmp_path / "m.gguf"))


def test_a_web_page_with_that_suffix_is_still_called_one(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"<!doctype html>" + bytes(64))
    with pytest.raises(CheckpointError, match="a web page"):
        open_parent(str(tmp_path / "m.gguf"))
