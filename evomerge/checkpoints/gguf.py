"""Parents in GGUF files: dequantised once, into a model folder in the user's cache.

transformers reads the file in a process of its own, so that the one that searches loads neither it nor a
second copy of the model. The folder is known by the file's place, size and time of change.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from evomerge import _cache_folder
from evomerge.errors import CheckpointError

log = logging.getLogger(__name__)

TYPE = "bfloat16"
"""torch's name of the type that weights are dequantised to."""
_ORIGINAL = "use the model that it was made from"


def is_gguf(file: Path) -> bool:
    """Whether a path is a GGUF file, by its name and its first bytes.

    Args:
        file: Any path.

    Returns:
        True if it is.
    """
    try:
        if file.suffix.lower() != ".gguf" or not file.is_file():
            return False
        with file.open("rb") as stream:
            return stream.read(4) == b"GGUF"
    except OSError:
        return False


def unpacked(file: Path) -> Path:
    """The model folder of a GGUF file: config, tokenizer and dequantised weights.

    Args:
        file: A GGUF file of a whole model.

    Returns:
        A folder in the user's cache, made at the first call.

    Raises:
        CheckpointError: The gguf package is missing, the file is a part of a model, or transformers cannot
            read its architecture, its types or its tokenizer.
    """
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", file.name):
        raise CheckpointError(
            f"{file} is one of several parts of a model; join them with llama-gguf-split --merge, or "
            f"{_ORIGINAL}"
        )
    above, is_trusted = _cache_folder.ours()
    target = above / "gguf" / f"{file.stem}-{_stamp(file)}"
    if is_trusted and _cache_folder.is_ours_alone(target, stat.S_ISDIR):
        return target
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(
            f'{file} is a GGUF file, which takes another package to read: pip install "evomerge[gguf]", or '
            f"{_ORIGINAL}"
        )
    target.parent.mkdir(mode=0o700, exist_ok=True)
    log.warning(
        "%s: dequantising it to %s, once, into %s; merges keep the rounding of its quantisation",
        *(file, TYPE, target),
    )
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=".part-"))
    try:
        _convert(file, scratch)
        try:
            os.replace(scratch, target)
        except OSError:  # another process was first
            if not _cache_folder.is_ours_alone(target, stat.S_ISDIR):
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _stamp(file: Path) -> str:
    """What changes with the file, and with how it is converted."""
    status = file.stat()
    facts = (str(file.resolve()), status.st_size, status.st_mtime_ns, status.st_ino, TYPE)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:24]


def _convert(file: Path, folder: Path) -> None:
    """Runs the conversion in a process of its own. Raises CheckpointError with its last line."""
    command = [sys.executable, "-P", "-m", "evomerge.checkpoints.gguf_conversion", str(file), str(folder)]
    quiet = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip()[:300] if lines else f"its process ended with {done.returncode}"
        raise CheckpointError(f"{file} cannot be dequantised by transformers ({reason}); {_ORIGINAL}")
