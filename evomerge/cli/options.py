"""What the verbs share: flags, and references to studies and candidates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evomerge.errors import ConfigError

if TYPE_CHECKING:
    from evomerge.launch.opening import Allowed
    from evomerge.store import Store


Root = Annotated[
    Path | None,
    typer.Option("--root", help="Folder of the studies.", show_default="$EVOMERGE_ROOT or results"),
]
AllowPython = Annotated[
    bool,
    typer.Option(
        "--allow-python",
        help="Run the Python functions that the search names as tasks, with all your rights.",
    ),
]
AllowTasks = Annotated[
    bool,
    typer.Option(
        "--allow-tasks",
        help="Load the task folders that the search includes; a task file is code and runs with all your rights.",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        max=100_000,
        envvar="EVOMERGE_WORKERS",
        help="Processes that evaluate candidates, each with a model.",
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="local|auto|ADDRESS",
        help="Evaluate on a Ray cluster: one started here, this one, or that one.",
    ),
]
Gpus = Annotated[
    float | None,
    typer.Option(
        "--gpus",
        min=0,
        max=1,
        help="GPU of each Ray worker: 1 if there are any; a share lets several use one.",
    ),
]
Grace = Annotated[
    float | None,
    typer.Option(
        "--grace",
        min=0,
        help="Seconds that what is in flight has to end once a signal came.",
        show_default="600",
    ),
]
Reuse = Annotated[
    list[str] | None,
    typer.Option(
        "--reuse",
        metavar="STUDY",
        help="An earlier study whose evaluations are read where they are the same.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def open_store(study: str, root: Path | None, *, write: bool = False) -> Store:
    """Opens a stored study; raises StudyError if there is none of that name, or to write if another process does."""
    from evomerge.store import Store
    from evomerge.store.paths import root as studies_root
    from evomerge.store.paths import store_path

    return Store.open(store_path(study, studies_root(root)), write=write)


def split(candidate: str) -> tuple[str, str]:
    """STUDY/REFERENCE -> (study, reference)."""
    study, slash, reference = candidate.partition("/")
    if not slash or not study or not reference:
        raise ConfigError(f"'{candidate}' names no candidate; write STUDY/ID or STUDY/best")
    return study, reference


def allowed(python: bool, tasks: bool) -> Allowed:
    """What the flags let the tasks do."""
    from evomerge.launch.opening import Allowed

    return Allowed(python, tasks)
