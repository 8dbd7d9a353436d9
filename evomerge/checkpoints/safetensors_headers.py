"""What a model folder says before a weight is read: JSON files, shards, safetensors headers.

No file is trusted: a fault in it is one CheckpointError that names the file and
says what to do. Knows nothing of layers, and reads no weights.
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

from evomerge.checkpoints.foreign_formats import GGUF_ADVICE, PICKLE_ADVICE, check_kind
from evomerge.errors import CheckpointError

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "U8": 1, "BOOL": 1}
"""safetensors' name of a type that a merge can take -> bytes of an element."""
MAX_HEADER = 16_000_000
"""Bytes of a header; the format's own limit is 100 MB."""
MAX_TENSORS = 50_000
"""Tensors of a file; the largest public models have 90,000 in 160 files. Each takes some 20 microseconds."""
MAX_FOLDER = 200_000
"""Tensors of all files of a folder together."""
MAX_JSON = 32_000_000
"""Bytes of a JSON file."""
_AGAIN = "fetch or save the file again"
_OTHER_FORMATS = {  # suffix -> how to get safetensors from it
    ".gguf": GGUF_ADVICE,
    ".bin": PICKLE_ADVICE,
}
_OTHER_FORMATS |= dict.fromkeys((".pt", ".pth", ".ckpt", ".pkl"), _OTHER_FORMATS[".bin"])


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Header facts of one tensor.

    Attributes:
        shape: Its shape.
        dtype: safetensors' name of its type, such as 'BF16'.
        file: Name of the file that holds it, empty for one that is yet to be merged.
    """

    shape: tuple[int, ...]
    dtype: str
    file: str

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


def read_json_object(file: Path, advice: str) -> dict[str, Any]:
    """Reads the JSON object in a file of a model folder.

    Args:
        file: The file.
        advice: What to do if the file is missing; ends the error.

    Returns:
        The object.

    Raises:
        CheckpointError: The file is missing, too large (`MAX_JSON`), outside its folder, or holds no JSON
            object.
    """
    if os.path.lexists(file):
        check_file(file)
        size = file.stat().st_size
        if size > MAX_JSON:
            raise CheckpointError(f"{file} has {size:,} bytes, at most {MAX_JSON:,} are read; {_AGAIN}")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; {advice}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON ({_reason(error)}); {_AGAIN}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} must hold a JSON object, got {type(data).__name__}; {_AGAIN}")
    return data


def read_folder(path: Path) -> dict[str, TensorInfo]:
    """Reads the headers of all weight files of a model folder.

    Args:
        path: The folder; its single file is preferred to its index, as transformers does.

    Returns:
        Tensor name -> header facts.

    Raises:
        CheckpointError: A file is missing or broken, or index and files contradict each other.
    """
    index = path / "model.safetensors.index.json"
    if os.path.lexists(path / "model.safetensors") or not os.path.lexists(index):
        return _join([path / name for name in _weight_files(path)])
    weight_map = read_json_object(index, "an index is read").get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise CheckpointError(f"{index} must hold a weight_map from tensor names to file names; {_AGAIN}")
    files = sorted(set(weight_map.values()))
    for name in files:
        _check_shard_name(name, index)
    infos = _join([path / name for name in files])
    for name, file in weight_map.items():
        if name not in infos or infos[name].file != file:
            raise CheckpointError(
                f"{index} says that {file} holds the tensor {name[:200]!a}, which it does not; "
                "fetch the model again"
            )
    return infos


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Reads the header of one safetensors file, and checks every number in it against the file's size.

    Args:
        file: The file.

    Returns:
        Tensor name -> header facts.

    Raises:
        CheckpointError: The header is broken or too large, or a tensor has a type that cannot be merged.
    """
    check_file(file)
    size = file.stat().st_size
    text = _header_text(file, size)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError(f"a mapping was expected, got {type(header).__name__}")
        header.pop("__metadata__", None)
        if len(header) > MAX_TENSORS:
            raise ValueError(f"it has {len(header):,} tensors, at most {MAX_TENSORS:,} are read of a file")
        spans = [_span(name, entry) for name, entry in header.items()]
        _check_cover(spans, size - 8 - len(text))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} has a broken header ({_reason(error)}); {_AGAIN}") from None
    for name, entry in header.items():
        if entry["dtype"] not in ITEM_BYTES:
            raise CheckpointError(
                f"{file} holds {name!r} as {entry['dtype'][:20]!r}, which cannot be merged; "
                "dequantise the model to bfloat16 first"
            )
    return {
        name: TensorInfo(tuple(entry["shape"]), entry["dtype"], file.name) for name, entry in header.items()
    }


def read_spans(file: Path) -> dict[str, tuple[int, int]]:
    """Where the tensors of a safetensors file lie, whose header `read_header` has found good.

    Args:
        file: The file.

    Returns:
        Tensor name -> (first byte, end) in the file, in that order; they follow one another without a gap.
    """
    text = _header_text(file, file.stat().st_size)
    header = json.loads(text.decode())
    header.pop("__metadata__", None)
    start = 8 + len(text)
    spans = sorted((*entry["data_offsets"], name) for name, entry in header.items())
    return {name: (start + first, start + end) for first, end, name in spans}


def check_file(file: Path) -> None:
    """Checks that a file is a regular one in its folder, or in the blobs of a Hugging Face cache.

    Args:
        file: The file, perhaps a link.

    Raises:
        CheckpointError: It is not regular, cannot be opened, or is a link that leaves the folder.
    """
    try:
        target, folder = file.resolve(strict=True), file.parent.resolve()
        regular = stat.S_ISREG(target.stat().st_mode)
    except (OSError, RuntimeError) as error:  # a link to nothing, or to itself
        raise CheckpointError(f"{file} cannot be opened ({_reason(error)}); fetch the model again") from None
    if not regular:
        raise CheckpointError(f"{file} is not a regular file; put the file itself there")
    cached = folder.parent.name == "snapshots" and target.is_relative_to(folder.parent.parent / "blobs")
    if not target.is_relative_to(folder) and not cached:
        raise CheckpointError(
            f"{file} is a link that leaves the model's folder, to {target}; put the file itself there, or "
            f"give the folder {target.parent}"
        )
    try:
        check_kind(target)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be opened ({_reason(error)}); fetch the model again") from None


def _check_shard_name(name: str, index: Path) -> None:
    """Raises CheckpointError unless an index names a .safetensors file of its own folder that is there."""
    in_folder = Path(name).name == name and name.isprintable() and len(name) <= 200
    if not in_folder or not name.endswith(".safetensors"):
        raise CheckpointError(
            f"{index} names {name[:200]!a}, which is no .safetensors file of its folder; {_AGAIN}"
        )
    if not os.path.lexists(index.parent / name):
        raise CheckpointError(
            f"{index.parent / name} is missing, but {index.name} names it; fetch the model again"
        )


def _header_text(file: Path, size: int) -> bytes:
    """The JSON text of a file's header; size: bytes of the file."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or 8 + length > size:
            header = f", and its header is said to take {length}" if size >= 8 else ""
            raise CheckpointError(
                f"{file} is truncated or no safetensors file: it has {size} bytes{header}; {_AGAIN}"
            )
        if length > MAX_HEADER:
            raise CheckpointError(
                f"{file} has a header of {length} bytes, at most {MAX_HEADER} are read; {_AGAIN}"
            )
        return stream.read(length)


def _weight_files(path: Path) -> list[str]:
    """Names of the weight files of a folder without an index."""
    if os.path.lexists(path / "model.safetensors"):
        return ["model.safetensors"]
    try:
        present = sorted(os.listdir(path))
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be listed ({_reason(error)}); give a folder that can be read"
        ) from None
    names = [
        name for name in present if name.endswith(".safetensors") and name != "adapter_model.safetensors"
    ]
    for name in names:
        numbered = re.fullmatch(r"(.*-)(\d{1,9})-of-(\d{1,9})\.safetensors", name)
        if numbered and sum(other.startswith(numbered[1]) for other in names) != int(numbered[3]):
            raise CheckpointError(
                f"{path / name} is one of {int(numbered[3])} shards, and some are missing; fetch the model "
                "again"
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
    """The header facts of several files, which must not share a tensor name."""
    infos: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(file).items():
            if name in infos:
                raise CheckpointError(
                    f"{file} and {infos[name].file} both hold the tensor {name!r}; remove the file that is "
                    "not part of the model"
                )
            infos[name] = info
        if len(infos) > MAX_FOLDER:
            raise CheckpointError(
                f"{file.parent} has more than {MAX_FOLDER:,} tensors; give the folder of one model"
            )
    return infos


def _span(name: str, entry: Any) -> tuple[int, int, str]:
    """(first byte, end, name) of a header's entry. Raises ValueError for one that contradicts itself."""
    if not name.isprintable() or not 0 < len(name) <= 1000:
        raise ValueError(f"{_shown(name)} is no name of a tensor")
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        raise ValueError(f"{_shown(name)} has no dtype")
    shape, offsets = _whole_numbers(entry.get("shape")), _whole_numbers(entry.get("data_offsets"))
    if shape is None or len(shape) > 64:
        raise ValueError(f"{_shown(name)} has a shape that is no list of whole numbers")
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{_shown(name)} has data_offsets that are no [first, end]")
    first, end = offsets
    item = ITEM_BYTES.get(entry["dtype"])
    if item and prod(shape) * item != end - first:
        raise ValueError(
            f"{_shown(name)}, {entry['dtype']} {str(shape)[:80]}, takes {end - first} bytes, which is not "
            "its size"
        )
    return first, end, name


def _check_cover(spans: list[tuple[int, int, str]], size: int) -> None:
    """Raises ValueError unless the spans, in order, take every byte of the data once."""
    position = 0
    for first, end, name in sorted(spans):
        if first != position:
            where = "inside the tensor before it" if first < position else f"not at {position}"
            raise ValueError(f"{_shown(name)} starts at byte {first} of the data, {where}")
        position = end
    if position != size:
        raise ValueError(f"the tensors take {position} bytes, the file has {size} for them")


def _shown(name: str) -> str:
    """A name from an untrusted file, in one line."""
    return ascii(name[:200])


def _whole_numbers(value: Any) -> list[int] | None:
    """The value if it is a list of whole numbers that are not negative, else None."""
    if not isinstance(value, list):
        return None
    return value if all(type(number) is int and 0 <= number < 2**63 for number in value) else None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name stands in it twice")
    return entries


def _reason(error: BaseException) -> str:
    """An error's text in one line, without the file name that the sentence around it has."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:300] or type(error).__name__
