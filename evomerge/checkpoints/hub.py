"""Where a model's files are: a local folder, a GGUF file, a snapshot in the cache of the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from evomerge.checkpoints.foreign_formats import check_kind
from evomerge.checkpoints.gguf import is_gguf, unpacked
from evomerge.checkpoints.hub_access import work_offline_where_needed
from evomerge.errors import CheckpointError

_TERMS = ("README.md", "LICEN[SC]E*", "licen[sc]e*", "COPYING*", "NOTICE*", "*USE_POLICY*")
"""What a repository says of its license, see `evomerge.checkpoints.licenses`."""
_SHOWN = 6  # revisions that a message names


def locate(reference: str, revision: str | None = None) -> Path:
    """Finds the folder of a model, and downloads a repository that is not in the cache.

    Args:
        reference: A local folder, which is taken as it is, a GGUF file, or a Hugging Face repository.
        revision: Branch, tag or commit of a repository; None: its main branch.

    Returns:
        The folder; of a GGUF file the one that it is dequantised into.

    Raises:
        CheckpointError: There is no such folder and no such repository, or it cannot be fetched or
            dequantised.
    """
    shown = f"'{reference[:200]}'" if reference.isprintable() else ascii(reference[:200])
    try:
        path = Path(reference).expanduser()
        if reference and path.is_dir():
            return path.resolve()
        if is_gguf(path):
            return unpacked(path.resolve())
        if reference and path.is_file():
            check_kind(path)
            raise CheckpointError(f"{shown} is a file; give the folder of the model, {path.resolve().parent}")
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{shown} cannot be a folder: {reason}; give the folder of a model") from None
    is_repository = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", reference)
    if path.is_absolute() or reference.startswith(".") or not is_repository:
        raise CheckpointError(f"there is no folder {shown} (looked from {Path.cwd()})")
    return snapshot(reference, revision)


def snapshot(repository: str, revision: str | None = None, cache: Path | None = None) -> Path:
    """Downloads what a merge and a search read of a repository, unless it is in the cache.

    Args:
        repository: Of the Hugging Face Hub.
        revision: Branch, tag or commit; None: its main branch.
        cache: The cache's folder; None for the user's.

    Returns:
        The folder of the files, whose name is the commit.

    Raises:
        CheckpointError: There is no such repository, or it cannot be fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    shown = f"'{repository[:200]}'" if repository.isprintable() else ascii(repository[:200])
    unreachable = work_offline_where_needed()
    patterns = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.jinja", *_TERMS]
    try:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=patterns, cache_dir=cache)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if unreachable is not None:
            reason = f"it is not in the cache, and the Hub cannot be reached from here ({unreachable})"
        is_missing = isinstance(error, LocalEntryNotFoundError)
    what = shown if revision is None else f"revision '{revision[:100]}' of {shown}"
    raise CheckpointError(
        f"{what} is neither a folder here (looked from {Path.cwd()}) nor a model that could be fetched: "
        f"{reason}{_way_out(repository, revision) if is_missing else ''}"
    )


def _way_out(repository: str, revision: str | None) -> str:
    """What to do about a revision that is not in the cache: what is there, and how to fetch it."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model")
    refs = folder / "refs"
    named = {file: file.relative_to(refs).as_posix() for file in sorted(refs.rglob("*")) if file.is_file()}
    commits = {file.read_text(encoding="utf-8").strip() for file in named}
    snapshots = {path.name for path in folder.glob("snapshots/*")}
    there = [*named.values(), *sorted(snapshots - commits)]
    command = f"hf download {repository}" + (f" --revision {revision[:100]}" if revision else "")
    found = f"; the cache has {', '.join(there[:_SHOWN])}" if there else ""
    return (
        f"{found}; run `{command}` where the Hub can be reached, and with another cache copy "
        f"{folder.name} from there to {folder.parent}; or `evomerge fetch` for all that a search needs"
    )
