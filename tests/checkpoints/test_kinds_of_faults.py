"""What is in a model's folder and is no model is named as what it is."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.checkpoints import Checkpoint, open_parent
from evomerge.checkpoints.foreign_formats import check_kind
from evomerge.config import loading
from evomerge.errors import CheckpointError, EvomergeError, SetupError
from evomerge.launch import opening
from evomerge.merging import model_loading
from tests.support.toy import in_process, search_file, zoo_folder

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4\n"


@pytest.fixture
def folder(tiny: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(tiny["math"], tmp_path / "model")


def poisoned(folder: Path, value: float, name: str = "model.layers.2.mlp.up_proj.weight") -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name][3, 5] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_found_when_a_parent_is_opened(value: float, tmp_path: Path) -> None:
    parent = shutil.copytree(zoo_folder() / "math", tmp_path / "math")
    name = next(n for n in Checkpoint(parent).tensors if "up_proj" in n)
    poisoned(parent, value, name)
    file = search_file(tmp_path, "poison")
    document = json.loads(file.read_text())
    document["models"]["math"] = str(parent)
    file.write_text(json.dumps(document))
    settings, _ = loading.load(str(file))
    kind = "NaN" if math.isnan(value) else "an infinite number"
    with pytest.raises(CheckpointError, match=rf"model 'math' holds {kind} in tensor '{name}'.*fetch"):
        opening.open_search(settings)


def test_a_merge_names_the_parent_whose_numbers_are_not_finite(folder: Path, tiny: dict[str, Path]) -> None:
    poisoned(folder, math.nan)
    recipe = folder.parent / "r.yaml"
    recipe.write_text(
        f"merge_method: linear\nmodels:\n  - {{model: {tiny['base']}, parameters: {{weight: 1}}}}\n"
        f"  - {{model: {folder}, parameters: {{weight: 1}}}}\ndtype: bfloat16\n"
    )
    code, _, err = in_process("merge", recipe, folder.parent / "out")
    assert code == CheckpointError.exit_code
    assert f"model '{folder}' holds NaN in tensor 'model.layers.2.mlp.up_proj.weight'" in err


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_pointer_of_git_lfs_is_named(name: str, folder: Path) -> None:
    (folder / name).write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
        open_parent(str(folder))


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (b"GGUF\x03\x00\x00\x00" + b"\0" * 40, "is a GGUF file.*the model that they were made from"),
        (b"PK\x03\x04" + b"\0" * 40, "is a zip file, as PyTorch's pickles are.*save_pretrained"),
        (b"<!DOCTYPE html><html>login</html>", "is a web page.*fetch the file again"),
    ],
)
def test_a_file_of_another_format_is_named(first: bytes, words: str, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(first)
    with pytest.raises(CheckpointError, match=words):
        open_parent(str(folder))


def test_a_header_whose_length_begins_as_a_pickle_does_is_read(tmp_path: Path) -> None:
    """Its length, of 640 bytes, is the first thing in the file."""
    file = tmp_path / "model.safetensors"
    for length in range(400, 640):
        save_file({"w": torch.zeros(1)}, file, metadata={"filler": "x" * length})
        if file.read_bytes()[:2] == b"\x80\x02":
            break
    assert file.read_bytes()[:8] == (640).to_bytes(8, "little")
    check_kind(file)


def test_a_file_in_place_of_a_folder_is_named(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors' is a file.*give the folder"):
        open_parent(str(folder / "model.safetensors"))
    (folder / "m.Q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"m\.Q4\.gguf cannot be dequantised.*that it was made from"):
        open_parent(str(folder / "m.Q4.gguf"))


def hub_cache(folder: Path, cache: Path) -> Path:
    """The same files as the Hub's cache lays them out: blobs, and a snapshot of links to them."""
    root = cache / "models--org--model"
    snapshot = root / "snapshots" / ("a" * 40)
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("a" * 40)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, root / "blobs" / str(i))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(i))
    return snapshot


def test_the_layout_of_the_hubs_cache_works(folder: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(folder, tmp_path / "cache")
    for path in (snapshot, _linked(tmp_path / "link", snapshot)):
        parent = open_parent(str(path))
        assert parent.content_hash() == open_parent(str(folder)).content_hash()
        assert model_loading.load_tokenizer(parent)("w1").input_ids
        assert not model_loading.load_model(parent.path, "float32").faults


def _linked(link: Path, target: Path) -> Path:
    link.symlink_to(target)
    return link


def test_the_root_of_a_cached_repository_is_named(folder: Path, tmp_path: Path) -> None:
    root = hub_cache(folder, tmp_path / "cache").parents[1]
    with pytest.raises(CheckpointError, match=rf"cache.*give {root}/snapshots/a+"):
        open_parent(str(root))


def test_a_folder_of_links_says_where_the_files_are(folder: Path, tmp_path: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    for file in folder.iterdir():
        (links / file.name).symlink_to(file)
    with pytest.raises(CheckpointError, match=rf"is a link that leaves.*give the folder {folder}"):
        open_parent(str(links))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", b'{"version": "1.0", "model": {"type": "Nonsense"}}'),
        ("tokenizer.json", b"{"),
        ("tokenizer.json", POINTER),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b"{"),
    ],
)
def test_a_broken_tokenizer_is_named(file: str, text: bytes, folder: Path) -> None:
    (folder / file).write_bytes(text)
    with pytest.raises(SetupError, match=r"tokenizer") as caught:
        model_loading.load_tokenizer(open_parent(str(folder)))
    assert isinstance(caught.value, EvomergeError)
    assert str(folder) in str(caught.value)
    if text == POINTER:
        assert "Git LFS pointer" in str(caught.value)


def test_finite_numbers_at_the_ends_of_a_type_are_no_fault(folder: Path) -> None:
    from evomerge.checkpoints.values import check_finite

    tensors = load_file(folder / "model.safetensors")
    for tensor, value in zip(tensors.values(), (torch.finfo(torch.bfloat16).max, -0.0), strict=False):
        tensor.view(-1)[0] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    check_finite("x", open_parent(str(folder)))
