"""Files read into arenas are the tensors of the files, whatever the size of a buffer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from evomerge.checkpoints import Checkpoint
from evomerge.checkpoints.safetensors_headers import read_spans
from evomerge.errors import CheckpointError
from evomerge.merging.arena import Arena, allocate_arena, arena_layout_of_headers
from evomerge.merging.parent_loading import fill_arenas


def arenas_of(parent: Checkpoint, parts: int = 1) -> list[Arena]:
    """Empty arenas on the CPU, the tensors dealt out among them."""
    names = list(parent.tensors)
    return [
        allocate_arena(arena_layout_of_headers({n: parent.tensors[n] for n in names[i::parts]}), "cpu")
        for i in range(parts)
    ]


@pytest.mark.parametrize("chunk", [101, 4096, 1 << 20])
@pytest.mark.parametrize("parts", [1, 3])
def test_every_tensor_is_that_of_the_files(tiny: dict[str, Path], chunk: int, parts: int) -> None:
    parent = Checkpoint(tiny["math"])
    arenas = arenas_of(parent, parts)
    fill_arenas("math", parent, arenas, chunk=chunk, threads=3)
    found = {name: view for arena in arenas for name, view in arena.view.items()}
    assert found.keys() == parent.tensors.keys()
    assert all(torch.equal(view, parent.tensor(name)) for name, view in found.items())


def test_types_of_all_sizes_in_several_files(tiny: dict[str, Path], tmp_path: Path) -> None:
    parent = Checkpoint(tiny["math"])
    names = sorted(parent.tensors)
    types = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    tensors = {name: parent.tensor(name).to(types[i % 4]) for i, name in enumerate(names)}
    half = len(names) // 2
    files = {"a.safetensors": names[:half], "b.safetensors": names[half:]}
    for file, of_file in files.items():
        save_file({name: tensors[name] for name in of_file}, tmp_path / file, metadata={"format": "pt"})
    weights = {name: file for file, of_file in files.items() for name in of_file}
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": ' + str(weights).replace("'", '"') + "}"
    )
    (tmp_path / "config.json").write_text((tiny["math"] / "config.json").read_text())
    mixed = Checkpoint(tmp_path)
    arenas = arenas_of(mixed)
    fill_arenas("mixed", mixed, arenas, chunk=1000, threads=2)
    assert all(torch.equal(arenas[0].view[name], tensor) for name, tensor in tensors.items())


def test_only_what_has_a_place_is_read(tiny: dict[str, Path]) -> None:
    parent = Checkpoint(tiny["math"])
    some = list(parent.tensors)[1::4]
    arena = allocate_arena(arena_layout_of_headers({name: parent.tensors[name] for name in some}), "cpu")
    fill_arenas("math", parent, [arena], chunk=64)
    assert all(torch.equal(arena.view[name], parent.tensor(name)) for name in some)


def test_a_parent_that_is_no_plain_checkpoint_is_read_tensor_by_tensor(tiny: dict[str, Path]) -> None:
    parent = Checkpoint(tiny["math"])

    class Doubled:
        def tensor(self, name: str) -> torch.Tensor:
            return parent.tensor(name) * 2

    arenas = arenas_of(parent)
    fill_arenas("doubled", Doubled(), arenas)  # type: ignore[arg-type]
    assert all(torch.equal(view, parent.tensor(name) * 2) for name, view in arenas[0].view.items())


@pytest.mark.parametrize(("value", "said"), [(float("nan"), "NaN"), (float("-inf"), "an infinite number")])
def test_numbers_that_are_none_are_refused_as_they_pass(
    tiny: dict[str, Path], tmp_path: Path, value: float, said: str
) -> None:
    parent = Checkpoint(tiny["math"])
    tensors = {name: parent.tensor(name).clone() for name in parent.tensors}
    broken = sorted(tensors)[7]
    tensors[broken].view(-1)[-1] = value
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((tiny["math"] / "config.json").read_text())
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=f"model 'math' holds {said} in tensor '{broken}'"):
        fill_arenas("math", checkpoint, arenas_of(checkpoint), chunk=512)


def test_a_file_that_was_cut_is_refused(tiny: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny["math"] / "config.json").read_text())
    file = tmp_path / "model.safetensors"
    file.write_bytes((tiny["math"] / "model.safetensors").read_bytes())
    parent = Checkpoint(tmp_path)
    arenas = arenas_of(parent)
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 100)
    with pytest.raises(CheckpointError, match="shorter than its header says"):
        fill_arenas("math", parent, arenas)


def test_spans_are_those_of_the_data(tiny: dict[str, Path]) -> None:
    file = tiny["math"] / "model.safetensors"
    spans, parent = read_spans(file), Checkpoint(tiny["math"])
    data = file.read_bytes()
    for name, (first, end) in spans.items():
        own = torch.frombuffer(bytearray(data[first:end]), dtype=torch.bfloat16)
        assert torch.equal(own.view(parent.tensor(name).shape), parent.tensor(name))
    assert max(end for _, end in spans.values()) == len(data)
