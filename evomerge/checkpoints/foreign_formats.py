"""Files of a model folder that are not what their name says, told by their first bytes."""

from __future__ import annotations

from pathlib import Path

from evomerge.errors import CheckpointError

GGUF_ADVICE = (
    "GGUF weights are quantised; use the model that they were made from, or name the .gguf file itself to "
    "merge what they dequantise to"
)
PICKLE_ADVICE = (
    "convert it with from_pretrained(...).save_pretrained(...), on a machine where its pickle may run"
)
_KINDS = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the file; run git lfs pull there or fetch the file again",
    ),
    (b"GGUF", "a GGUF file; " + GGUF_ADVICE),
    (b"PK\x03\x04", "a zip file, as PyTorch's pickles are; " + PICKLE_ADVICE),
    (b"\x80\x02", "a pickle; " + PICKLE_ADVICE),
    (b"<!doctype html", "a web page, as a site's refusal is; fetch the file again, signed in"),
    (b"<html", "a web page, as a site's refusal is; fetch the file again, signed in"),
)
"""(the first bytes in lower case or as they are, what the file is and what to do)."""


def check_kind(file: Path) -> None:
    """Checks that a file is not a known one of another kind.

    Args:
        file: A regular file.

    Raises:
        CheckpointError: It is a Git LFS pointer, a GGUF file, a pickle or a web page.
    """
    with file.open("rb") as stream:
        first = stream.read(32)
    if first[2:9] == b"\0" * 6 + b"{":  # a safetensors header of 640 bytes begins as a pickle does
        return
    for start, kind in _KINDS:
        if first.startswith(start) or first.lower().startswith(start):
            raise CheckpointError(f"{file} is {kind}")
