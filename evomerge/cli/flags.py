"""What the verbs share: flags, and references to studies and candidates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evomerge.errors import ConfigError

if TYPE_CHECKING:
    from evomerge.store import Store

Root = Annotated[Path | None, typer.Option("--root", help="Folder of the studies.", show_default="$EVOMERGE_ROOT or results")]
AllowPython = Annotated[bool, typer.Option("--allow-python", help="Run the Python functions that the search names as tasks, with all your rights.")]
Workers = Annotated[
    int,
    typer.Option(
        "--workers", min=1, max=256, envvar="EVOMERGE_WORKERS", help="Processes of this machine that evaluate candidates, each with a model."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def open_store(study: str, root: Path | None, *, write: bool = False) -> Store:
    """Opens a stored study; raises StudyError if there is none of that name, or to write if another process does."""
    from evomerge.store import Store
    from evomerge.study_files import root as studies_root
    from evomerge.study_files import store_path

    return Store.open(store_path(study, studies_root(root)), write=write)


def split(candidate: str) -> tuple[str, str]:
    """STUDY/REFERENCE -> (study, reference)."""
    study, slash, reference = candidate.partition("/")
    if not slash or not study or not reference:
        raise ConfigError(f"'{candidate}' names no candidate; write STUDY/ID or STUDY/best")
    return study, reference
