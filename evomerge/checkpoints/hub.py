"""Where a model's files lie: a local folder, or a snapshot in the Hub's cache."""

from __future__ import annotations

import re
from pathlib import Path

from evomerge.checkpoints.safetensors_headers import TensorInfo as TensorInfo
from evomerge.errors import CheckpointError


def locate(reference: str, revision: str | None = None) -> Path:
    """Folder of a model: a local path as it is, else a Hugging Face repository, downloaded or from the cache."""
    shown = f"'{reference[:200]}'" if reference.isprintable() else ascii(reference[:200])
    try:
        path = Path(reference).expanduser()
        if reference and path.is_dir():
            return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{shown} cannot be a folder: {' '.join(str(error).split())[:300]}; give the folder of a model"
        ) from None
    if path.is_absolute() or reference.startswith(".") or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", reference):
        raise CheckpointError(f"there is no folder {shown} (looked from {Path.cwd()})")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(reference, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{shown} is neither a folder here (looked from {Path.cwd()}) nor a model that could be fetched: {reason}"
        ) from None
