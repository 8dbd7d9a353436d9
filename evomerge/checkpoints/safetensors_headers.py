"""What a model folder says about itself before a weight is read: its JSON files, shards and safetensors headers.

Every file is taken to be written by a stranger: a fault in it is one CheckpointError that names the file and says what
to do. Knows nothing of layers, and reads no weights.
"""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from evomerge.errors import CheckpointError

ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "U8": 1,
    "BOOL": 1,
}  # what a merge can take
MAX_HEADER = 16_000_000  # bytes; the format's own limit is 100 MB
MAX_TENSORS = 50_000  # of a file: the largest public models have ninety thousand in 160 files; each takes some 20 microseconds
MAX_FOLDER = 200_000  # tensors of all files together
MAX_JSON = 32_000_000  # bytes of a JSON file
_AGAIN = "fetch or save the file again"
_OTHER_FORMATS = {  # suffix -> how to get safetensors from it
    ".gguf": "GGUF weights are quantised; use the model that they were made from",
    ".bin": "convert it with from_pretrained(...).save_pretrained(...), on a machine where its pickle may run",
}
_OTHER_FORMATS |= dict.fromkeys((".pt", ".pth", ".ckpt", ".pkl"), _OTHER_FORMATS[".bin"])


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Header facts of one tensor. dtype: safetensors' name, such as 'BF16'; file: the shard that holds it."""

    shape: tuple[int, ...]
    dtype: str
    file: str

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


def json_object(file: Path, why: str) -> dict[str, Any]:
    """The JSON object in a file of a model folder. why: ends the error for a file that is missing."""
    if os.path.lexists(file):
        check_file(file)
        if (size := file.stat().st_size) > MAX_JSON:
            raise CheckpointError(f"{file} has {size:,} bytes, at most {MAX_JSON:,} are read; {_AGAIN}")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; {why}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON ({_line(error)}); {_AGAIN}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} must hold a JSON object, got {type(data).__name__}; {_AGAIN}")
    return data


def tensors(path: Path) -> dict[str, TensorInfo]:
    """Tensor name -> header facts, over all weight files of a model folder. Raises CheckpointError."""
    index = path / "model.safetensors.index.json"
    if os.path.lexists(path / "model.safetensors") or not os.path.lexists(
        index
    ):  # transformers, too, prefers the single file
        return _join([path / name for name in _alone(path)])
    where = json_object(index, "an index is read").get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise CheckpointError(f"{index} must hold a weight_map from tensor names to file names; {_AGAIN}")
    for name in sorted(set(where.values())):
        if (
            Path(name).name != name
            or not name.isprintable()
            or len(name) > 200
            or not name.endswith(".safetensors")
        ):
            raise CheckpointError(
                f"{index} names {name[:200]!a}, which is no .safetensors file of its folder; {_AGAIN}"
            )
        if not os.path.lexists(path / name):
            raise CheckpointError(
                f"{path / name} is missing, but {index.name} names it; fetch the model again"
            )
    found = _join([path / name for name in sorted(set(where.values()))])
    for name, file in where.items():
        if name not in found or found[name].file != file:
            raise CheckpointError(
                f"{index} says that {file} holds the tensor {name[:200]!a}, which it does not; fetch the model again"
            )
    return found


def read(file: Path) -> dict[str, TensorInfo]:
    """Tensor name -> header facts of one safetensors file, every number in it checked against the file's size."""
    check_file(file)
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or 8 + length > size:
            said = f", and its header is said to take {length}" if size >= 8 else ""
            raise CheckpointError(
                f"{file} is truncated or no safetensors file: it has {size} bytes{said}; {_AGAIN}"
            )
        if length > MAX_HEADER:
            raise CheckpointError(
                f"{file} has a header of {length} bytes, at most {MAX_HEADER} are read; {_AGAIN}"
            )
        text = stream.read(length)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError(f"a mapping was expected, got {type(header).__name__}")
        header.pop("__metadata__", None)
        if len(header) > MAX_TENSORS:
            raise ValueError(f"it has {len(header):,} tensors, at most {MAX_TENSORS:,} are read of a file")
        spans = [_span(name, entry) for name, entry in header.items()]
        _check_cover(spans, size - 8 - length)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} has a broken header ({_line(error)}); {_AGAIN}") from None
    for name, entry in header.items():
        if entry["dtype"] not in ITEM_BYTES:
            raise CheckpointError(
                f"{file} holds {name!r} as {entry['dtype'][:20]!r}, which cannot be merged; dequantise the model to bfloat16 first"
            )
    return {
        name: TensorInfo(tuple(entry["shape"]), entry["dtype"], file.name) for name, entry in header.items()
    }


def check_file(file: Path) -> None:
    """Raises CheckpointError unless it is a regular file that lies in its folder, or in the blobs of a Hugging Face cache."""
    try:
        target, folder = file.resolve(strict=True), file.parent.resolve()
        regular = stat.S_ISREG(target.stat().st_mode)
    except (OSError, RuntimeError) as error:  # a link to nothing, or to itself
        raise CheckpointError(f"{file} cannot be opened ({_line(error)}); fetch the model again") from None
    if not regular:
        raise CheckpointError(f"{file} is not a regular file; put the file itself there")
    cached = folder.parent.name == "snapshots" and target.is_relative_to(folder.parent.parent / "blobs")
    if not target.is_relative_to(folder) and not cached:
        raise CheckpointError(
            f"{file} is a link that leaves the model's folder, to {target}; put the file itself there"
        )


def _alone(path: Path) -> list[str]:
    """Weight files of a folder without an index."""
    if os.path.lexists(path / "model.safetensors"):
        return ["model.safetensors"]
    try:
        present = sorted(os.listdir(path))
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be listed ({_line(error)}); give a folder that can be read"
        ) from None
    names = [
        name for name in present if name.endswith(".safetensors") and name != "adapter_model.safetensors"
    ]
    for name in names:
        numbered = re.fullmatch(r"(.*-)(\d{1,9})-of-(\d{1,9})\.safetensors", name)
        if numbered and sum(other.startswith(numbered[1]) for other in names) != int(numbered[3]):
            raise CheckpointError(
                f"{path / name} is one of {int(numbered[3])} shards, and some are missing; fetch the model again"
            )
    if names:
        return names
    for suffix, advice in _OTHER_FORMATS.items():
        for name in present:
            if name.endswith(suffix) and name != "training_args.bin":
                raise CheckpointError(f"{path} has no .safetensors file, only {name}; {advice}")
    raise CheckpointError(
        f"{path} has no .safetensors file; fetch the model again or give the folder that holds its weights"
    )


def _join(files: list[Path]) -> dict[str, TensorInfo]:
    found: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read(file).items():
            if name in found:
                raise CheckpointError(
                    f"{file} and {found[name].file} both hold the tensor {name!r}; remove the file that is not part of the model"
                )
            found[name] = info
        if len(found) > MAX_FOLDER:
            raise CheckpointError(
                f"{file.parent} has more than {MAX_FOLDER:,} tensors; give the folder of one model"
            )
    return found


def _span(name: str, entry: Any) -> tuple[int, int, str]:
    """(first byte, end, name) of a header's entry. Raises ValueError for one that contradicts itself."""
    if not name.isprintable() or not 0 < len(name) <= 1000:
        raise ValueError(f"{_shown(name)} is no name of a tensor")
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        raise ValueError(f"{_shown(name)} has no dtype")
    shape, offsets = _whole(entry.get("shape")), _whole(entry.get("data_offsets"))
    if shape is None or len(shape) > 64:
        raise ValueError(f"{_shown(name)} has a shape that is no list of whole numbers")
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{_shown(name)} has data_offsets that are no [first, end]")
    first, end = offsets
    item = ITEM_BYTES.get(entry["dtype"])
    if item and prod(shape) * item != end - first:
        raise ValueError(
            f"{_shown(name)}, {entry['dtype']} {str(shape)[:80]}, takes {end - first} bytes, which is not its size"
        )
    return first, end, name


def _check_cover(spans: list[tuple[int, int, str]], size: int) -> None:
    """Raises ValueError unless the spans, in order, take every byte of the data once."""
    at = 0
    for first, end, name in sorted(spans):
        if first != at:
            where = "inside the tensor before it" if first < at else f"not at {at}"
            raise ValueError(f"{_shown(name)} starts at byte {first} of the data, {where}")
        at = end
    if at != size:
        raise ValueError(f"the tensors take {at} bytes, the file has {size} for them")


def _shown(name: str) -> str:
    """A name that a stranger gave, in one line."""
    return ascii(name[:200])


def _whole(value: Any) -> list[int] | None:
    """The value if it is a list of whole numbers that are not negative."""
    return (
        value
        if isinstance(value, list) and all(type(number) is int and 0 <= number < 2**63 for number in value)
        else None
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _line(error: BaseException) -> str:
    """An error's text in one line, without the file name that the sentence around it has."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:300] or type(error).__name__
