"""Parents on disk: what their files say, and that every file a stranger may have written is read or refused
in one line.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.checkpoints import (
    COMPONENTS,
    Checkpoint,
    TensorPlace,
    check_compatible,
    equal_tensors,
    locate,
    safetensors_headers,
    stored_dtype,
    total_bytes,
)
from evomerge.checkpoints.safetensors_headers import TensorInfo
from evomerge.errors import CheckpointError

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tiny: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the base, to be broken."""
    return Path(shutil.copytree(tiny["base"], tmp_path / "model"))


def header(file: Path) -> tuple[dict[str, Any], bytes]:
    raw = file.read_bytes()
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8:end]), raw[end:]


def write(file: Path, head: Any, data: bytes) -> None:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def shards(folder: Path, count: int = 2) -> Path:
    """Splits a folder's single file into shards with an index; returns the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {}
    for number in range(count):
        name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = {key: tensor for i, (key, tensor) in enumerate(sorted(tensors.items())) if i % count == number}
        save_file(part, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(part, name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index


def refused(folder: Path, said: str, named: str = "") -> None:
    """Opening raises one CheckpointError of one line that says `said` and names the folder and the file in
    it.
    """
    with pytest.raises(CheckpointError, match=said) as error:
        Checkpoint(folder)
    text = str(error.value)
    assert str(folder / named) in text
    assert "\n" not in text
    assert text.isprintable()
    assert len(text) < 900
    assert any(
        f" {word} " in f" {text} "
        for word in ("fetch", "give", "put", "convert", "use", "remove", "dequantise", "must", "name")
    )


# ---- what a good folder says


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_sizes_are_those_of_the_stored_tensors(
    dtype: torch.dtype, tiny: dict[str, Path], tmp_path: Path
) -> None:
    tensors = {
        name: tensor.to(dtype) for name, tensor in load_file(tiny["base"] / "model.safetensors").items()
    }
    model = Path(shutil.copytree(tiny["base"], tmp_path / "model"))
    save_file(tensors, model / "model.safetensors")
    parent = Checkpoint(model)
    assert total_bytes(parent) == sum(tensor.nbytes for tensor in tensors.values())
    assert (
        max(info.nbytes for info in parent.tensors.values())
        == max(tensor.nbytes for tensor in tensors.values())
        == 64 * 32 * dtype.itemsize
    )
    assert stored_dtype(parent) == str(dtype).removeprefix("torch.")


def test_headers_say_what_the_library_reads(tiny: dict[str, Path]) -> None:
    parent, tensors = Checkpoint(tiny["base"]), load_file(tiny["base"] / "model.safetensors")
    assert parent.tensors == {
        name: TensorInfo(tuple(tensor.shape), "BF16", "model.safetensors") for name, tensor in tensors.items()
    }
    assert all(torch.equal(parent.tensor(name), tensor) for name, tensor in tensors.items())
    assert parent.layout.place(Q) == TensorPlace("layer", 1, "attention", "self_attn.q_proj.weight")
    assert {parent.layout.place(name).component for name in tensors} == set(COMPONENTS)
    layers = [
        parent.layout.layer_name(i, suffix) for i in range(4) for suffix in parent.layout.layer_suffixes(i)
    ]
    assert sorted(tensors) == sorted(
        [*parent.layout.outer_names("embeddings"), *layers, *parent.layout.outer_names("head")]
    )


def test_shards_read_as_the_single_file(folder: Path, tiny: dict[str, Path]) -> None:
    shards(folder, 3)
    whole, parts = Checkpoint(tiny["base"]), Checkpoint(folder)
    assert set(equal_tensors(whole, parts)) == set(whole.tensors) == set(parts.tensors)
    assert total_bytes(whole) == total_bytes(parts)
    assert {info.file for info in parts.tensors.values()} == {
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    }


def test_buffers_that_are_whole_numbers_or_switches_are_read(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    extra = {
        "model.mask": torch.ones(2, 2, dtype=torch.bool),
        "model.ids": torch.arange(3),
        "model.bytes": torch.ones(2, dtype=torch.uint8),
    }
    save_file(tensors | extra, folder / "model.safetensors")
    parent = Checkpoint(folder)
    assert all(torch.equal(parent.tensor(name), tensor) for name, tensor in extra.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_no_matter_of_the_header(value: float, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[Q][0, 0] = value
    save_file(tensors, folder / "model.safetensors")
    parent = Checkpoint(folder)
    assert not bool(torch.isfinite(parent.tensor(Q)).all())
    assert len(parent.content_hash()) == 64
    assert (Q in set(equal_tensors(parent, parent))) == (value == value)


def test_an_empty_tensor_is_a_tensor(folder: Path) -> None:
    save_file(
        load_file(folder / "model.safetensors") | {"model.none": torch.zeros(0, 3)},
        folder / "model.safetensors",
    )
    assert Checkpoint(folder).tensor("model.none").shape == (0, 3)


# ---- headers


def damage(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Rewrites the header of a file after a change to it; the data stay."""

    def done(file: Path) -> None:
        head, data = header(file)
        change(head)
        write(file, head, data)

    return done


def moved(by: int) -> Callable[[dict[str, Any]], None]:
    """Shifts one tensor's bytes into its neighbour's."""

    def change(head: dict[str, Any]) -> None:
        first, end = head[Q]["data_offsets"]
        head[Q]["data_offsets"] = [first + by, end + by]

    return change


HEADERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda f: f.write_bytes(b""), "truncated or no safetensors file: it has 0 bytes;"),
    "seven bytes": (lambda f: f.write_bytes(b"\0" * 7), "it has 7 bytes;"),
    "cut in the header": (lambda f: f.write_bytes(f.read_bytes()[:500]), "is truncated"),
    "cut in the data": (lambda f: f.write_bytes(f.read_bytes()[:-1]),
        r"the tensors take \d+ bytes, the file has \d+"),
    "cut by half": (lambda f: f.write_bytes(f.read_bytes()[: f.stat().st_size // 2]), "broken header"),
    "bytes after the end": (lambda f: f.write_bytes(f.read_bytes() + b"\0"), r"the tensors take \d+ bytes"),
    "header longer than the file": (lambda f: f.write_bytes(struct.pack("<Q", 10**6) + b"{}"),
        "its header is said to take 1000000"),
    "header of an absurd length": (lambda f: f.write_bytes(b"\xff" * 64),
        "its header is said to take 18446744073709551615"),
    "header over the limit": (lambda f: os.truncate(f, 0) or sparse(f), "a header of 16000001 bytes"),
    "text": (lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"),
        "is a Git LFS pointer"),
    "not JSON": (lambda f: write(f, b"{'a': 1}", b""), "broken header"),
    "not UTF-8": (lambda f: write(f, b'{"\xff": 1}', b""), "broken header"),
    "a list": (lambda f: write(f, [], b""), "a mapping was expected, got list"),
    "deep": (lambda f: write(f, b"[" * 200_000, b""), "broken header"),
    "no tensors": (lambda f: write(f, {"__metadata__": {"format": "pt"}}, b""), "holds no tensors"),
    "a name twice": (lambda f: write(f, b'{"a": 1, "a": 2}', b""), "a name stands in it twice"),
    "a name with a line break": (damage(lambda h: h.update({"a\nb": h.pop(Q)})), r"'a\\nb' is no name"),
    "a name with half a character": (damage(lambda h: h.update({"\ud800": h.pop(Q)})),
        r"'\\ud800' is no name"),
    "an empty name": (damage(lambda h: h.update({"": h.pop(Q)})), "'' is no name"),
    "a long name": (damage(lambda h: h.update({"a" * 5000: h.pop(Q)})), "is no name"),
    "an entry that is a number": (damage(lambda h: h.update({Q: 3})), "has no dtype"),
    "no dtype": (damage(lambda h: h[Q].pop("dtype")), "has no dtype"),
    "an unknown dtype": (damage(lambda h: h[Q].update(dtype="F128")), "as 'F128', which cannot be merged"),
    "a dtype of another size": (damage(lambda h: h[Q].update(dtype="F32")), "which is not its size"),
    "no shape": (damage(lambda h: h[Q].pop("shape")), "has a shape that is no list"),
    "a shape of text": (damage(lambda h: h[Q].update(shape="32")), "has a shape that is no list"),
    "a negative shape": (damage(lambda h: h[Q].update(shape=[-32, -32])), "has a shape that is no list"),
    "a fractional shape": (damage(lambda h: h[Q].update(shape=[32.0, 32])), "has a shape that is no list"),
    "a true shape": (damage(lambda h: h[Q].update(shape=[True, 1024])), "has a shape that is no list"),
    "a nested shape": (damage(lambda h: h[Q].update(shape=[[32], 32])), "has a shape that is no list"),
    "a huge shape": (damage(lambda h: h[Q].update(shape=[2**62, 2**62])), "which is not its size"),
    "a wrong shape": (damage(lambda h: h[Q].update(shape=[32, 31])), "which is not its size"),
    "a number of 5000 digits": (lambda f: write(f,
        b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b"]}}", b""), "broken header"),
    "no offsets": (damage(lambda h: h[Q].pop("data_offsets")), r"no \[first, end\]"),
    "three offsets": (damage(lambda h: h[Q].update(data_offsets=[0, 1, 2])), r"no \[first, end\]"),
    "offsets backwards": (damage(lambda h: h[Q]["data_offsets"].reverse()), r"no \[first, end\]"),
    "overlapping": (damage(moved(-16)), "inside the tensor before it"),
    "with a hole": (damage(moved(16)), "starts at byte"),
    "outside the file": (damage(moved(10**9)), "starts at byte"),
    "a tensor left out": (damage(lambda h: h.pop(Q)), "starts at byte"),
    "F8": (damage(lambda h: h[Q].update(dtype="F8_E4M3", shape=[32, 64])),
        "as 'F8_E4M3', which cannot be merged; dequantise"),
    "I8": (damage(lambda h: h[Q].update(dtype="I8", shape=[32, 64])),
        "as 'I8', which cannot be merged; dequantise"),
}  # fmt: skip


def sparse(file: Path) -> None:
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", safetensors_headers.MAX_HEADER + 1))
        stream.truncate(safetensors_headers.MAX_HEADER + 100)


@pytest.mark.parametrize("name", HEADERS)
def test_a_broken_file_is_one_sentence_that_names_it(name: str, folder: Path) -> None:
    spoil, said = HEADERS[name]
    spoil(folder / "model.safetensors")
    refused(folder, said, "" if name == "no tensors" else "model.safetensors")


def test_a_file_that_is_none_is_refused_without_waiting(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    refused(folder, "not a regular file", "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    refused(folder, "not a regular file", "model.safetensors")


# ---- shards


INDEXES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no map": (lambda d: d.pop("weight_map"), "must hold a weight_map"),
    "an empty map": (lambda d: d["weight_map"].clear(), "must hold a weight_map"),
    "a list": (lambda d: d.update(weight_map=[1]), "must hold a weight_map"),
    "a number for a file": (lambda d: d["weight_map"].update({Q: 1}), "must hold a weight_map"),
    "a file outside": (lambda d: d["weight_map"].update({Q: "../model.safetensors"}),
        r"no \.safetensors file of its folder"),
    "a file of the root": (lambda d: d["weight_map"].update({Q: "/etc/x.safetensors"}),
        r"no \.safetensors file of its folder"),
    "a pickle": (lambda d: d["weight_map"].update({Q: "model.bin"}), r"no \.safetensors file of its folder"),
    "a name with a NUL": (lambda d: d["weight_map"].update({Q: "a\0.safetensors"}),
        r"no \.safetensors file of its folder"),
    "half a character": (lambda d: d["weight_map"].update({Q: "\ud800.safetensors"}),
        r"no \.safetensors file of its folder"),
    "a long name": (lambda d: d["weight_map"].update({Q: "a" * 4000 + ".safetensors"}),
        r"no \.safetensors file of its folder"),
    "a tensor that is in no shard": (
        lambda d: d["weight_map"].update({"x\n": "model-00001-of-00002.safetensors"}),
        "holds the tensor 'x",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_that_does_not_fit_its_shards_is_refused(name: str, folder: Path) -> None:
    change, said = INDEXES[name]
    index = shards(folder)
    data = json.loads(index.read_text())
    change(data)
    index.write_text(json.dumps(data))
    refused(folder, said, index.name)


def test_a_tensor_in_another_shard_than_the_index_says_is_refused(folder: Path) -> None:
    index = shards(folder)
    data = json.loads(index.read_text())
    swap = {1: 2, 2: 1}[int(data["weight_map"][Q][10])]
    data["weight_map"][Q] = f"model-0000{swap}-of-00002.safetensors"
    index.write_text(json.dumps(data))
    refused(folder, "which it does not", index.name)


def test_a_shard_that_is_missing_is_named_with_and_without_an_index(folder: Path) -> None:
    index = shards(folder, 3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(
        folder, "is missing, but model.safetensors.index.json names it", "model-00002-of-00003.safetensors"
    )
    index.unlink()
    refused(folder, "is one of 3 shards, and some are missing", "model-00001-of-00003.safetensors")


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    shards(folder)
    save_file(
        {Q: torch.zeros(32, 32)} | load_file(folder / "model-00002-of-00002.safetensors"),
        folder / "model-00002-of-00002.safetensors",
    )
    refused(folder, f"both hold the tensor '{Q}'", "model-00002-of-00002.safetensors")


def test_the_single_file_is_read_where_shards_lie_beside_it(folder: Path, tiny: dict[str, Path]) -> None:
    shards(folder)
    shutil.copy(tiny["base"] / "model.safetensors", folder)
    assert {info.file for info in Checkpoint(folder).tensors.values()} == {"model.safetensors"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pytorch_model.bin", "only pytorch_model.bin; convert it"),
        ("model.pt", "only model.pt; convert it"),
        ("model.pth", "only model.pth; convert it"),
        ("model-q4.gguf", "only model-q4.gguf; GGUF weights are quantised"),
        ("adapter_model.safetensors", r"has no \.safetensors file; fetch"),
        ("readme.txt", r"has no \.safetensors file; fetch"),
    ],
)
def test_a_folder_of_another_format_says_what_to_do(name: str, said: str, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / name)
    refused(folder, said)


# ---- links


def test_links_within_the_folder_and_into_a_hugging_face_cache_are_followed(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    snapshot, blobs = tmp_path / "models--org--x" / "snapshots" / "abc", tmp_path / "models--org--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate(("config.json", "model.safetensors")):
        shutil.copy(tiny["base"] / name, blobs / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    assert set(equal_tensors(Checkpoint(snapshot), Checkpoint(tiny["base"]))) == set(
        Checkpoint(tiny["base"]).tensors
    )
    (tmp_path / "short").symlink_to(snapshot)
    assert Checkpoint(tmp_path / "short").layout.num_layers == 4
    assert Checkpoint(locate(str(tmp_path / "short"))).layout.num_layers == 4


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_link_that_leaves_the_folder_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    refused(folder, "is a link that leaves the model's folder", name)
    (folder / name).unlink()
    (tmp_path / name).rename(folder / f"other-{name}")
    (folder / name).symlink_to(f"other-{name}")
    assert Checkpoint(folder).layout.num_layers == 4


@pytest.mark.parametrize("target", ["nowhere", "model.safetensors"])
def test_a_link_to_nothing_or_to_itself_is_refused(target: str, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(target)
    refused(folder, "cannot be opened", "model.safetensors")


# ---- config.json


CONFIGS: dict[str, tuple[bytes | dict[str, Any], str]] = {
    "empty": (b"", "cannot be read as JSON"),
    "not JSON": (b"{", "cannot be read as JSON"),
    "not UTF-8": (b'{"\xff": 1}', "cannot be read as JSON"),
    "deep": (b"[" * 200_000, "cannot be read as JSON"),
    "a list": (b"[]", "must hold a JSON object, got list"),
    "no depth": ({"num_hidden_layers": None}, "got None"),
    "text": ({"num_hidden_layers": "4"}, "whole number from 1 to 39, the number of tensors, got '4'"),
    "zero": ({"num_hidden_layers": 0}, "got 0"),
    "negative": ({"num_hidden_layers": -4}, "got -4"),
    "huge": ({"num_hidden_layers": 10**18}, "got 1000000000000000000"),
    "more than there are": ({"num_hidden_layers": 5}, "no stack of 5 layers"),
    "fewer than there are": ({"num_hidden_layers": 3}, "no stack of 3 layers"),
    "bool": ({"num_hidden_layers": True}, "got True"),
    "fraction": ({"num_hidden_layers": 4.0}, r"got 4\.0"),
    "nested": ({"num_hidden_layers": [[4]]}, r"got \[\[4\]\]"),
    "a list of a million": ({"num_hidden_layers": [4] * 10_000}, r"got \[4, 4"),
    "text_config": ({"text_config": [1]}, "text_config must be an object, got list"),
    "quantised": ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "dequantise the model first"),
    "quantised text": ({"text_config": {"num_hidden_layers": 4, "quantization_config": {"bits": 4}}},
        "dequantise the model first"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_cannot_be_used_is_refused(name: str, folder: Path) -> None:
    given, said = CONFIGS[name]
    file = folder / "config.json"
    file.write_bytes(
        given if isinstance(given, bytes) else json.dumps(json.loads(file.read_text()) | given).encode()
    )
    refused(folder, said, "" if "no stack" in said else "config.json")


def test_a_missing_config_or_folder_is_said(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, "is missing; give a Hugging Face model folder", "config.json")
    refused(tmp_path / "nowhere", "is missing; there is no such folder", "config.json")
    refused(folder / "model.safetensors", "cannot be read|is missing", "config.json")


def test_a_config_without_any_depth_is_counted_by_its_tensors(folder: Path) -> None:
    """Hub configs may leave out what is transformers' default."""
    (folder / "config.json").write_text('{"model_type": "x"}')
    assert Checkpoint(folder).layout.num_layers == 4


def test_layers_that_predict_further_tokens_are_no_part_of_the_stack(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"num_hidden_layers": 3, "num_nextn_predict_layers": 1})
    )
    checkpoint = Checkpoint(folder)
    assert checkpoint.layout.num_layers == 3
    assert {checkpoint.layout.place(name).part for name in checkpoint.tensors if ".layers.3." in name} == {
        "tower"
    }


@pytest.mark.parametrize(
    "config",
    [
        {"n_layer": 4},
        {"text_config": {"num_hidden_layers": 4}},
        {"text_config": None, "num_hidden_layers": 4},
    ],
)
def test_the_depth_stands_where_a_config_keeps_it(config: Mapping[str, Any], folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    assert Checkpoint(folder).layout.num_layers == 4


@pytest.mark.parametrize("part", ["²", "٣", "9" * 900])
def test_a_name_with_a_number_of_another_script_is_no_layer(part: str, folder: Path) -> None:
    name = f"model.layers.{part}.x"
    save_file(load_file(folder / "model.safetensors") | {name: torch.zeros(1)}, folder / "model.safetensors")
    if part.isascii():
        refused(folder, "no stack of 4 layers")
    else:
        assert Checkpoint(folder).layout.place(name) == TensorPlace("head", None, "other", name)


# ---- parents together


def test_vocabularies_of_other_sizes_are_found_before_a_tensor_is_read(
    folder: Path, tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = torch.zeros(65, 32, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    parents = {"base": Checkpoint(tiny["base"]), "wide": Checkpoint(folder)}
    monkeypatch.setattr(Checkpoint, "tensor", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(
        CheckpointError,
        match="model 'wide' and base 'base' have 65 and 64 embedding rows, so their vocabularies differ",
    ):
        check_compatible(parents, "base")


@pytest.mark.parametrize(
    "reference",
    ["", "a\nb", "\ud800/x", "a\0b", "x" * 5000, "~nobody-here/x", "/no/such", "./no", "a b", "\u2028"],
)
def test_a_reference_that_is_no_folder_is_one_short_line(reference: str) -> None:
    with pytest.raises(CheckpointError, match=r"there is no folder|cannot be a folder") as error:
        locate(reference)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 700
