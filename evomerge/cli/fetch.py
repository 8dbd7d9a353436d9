"""The verb that brings models and data to nodes without internet: fetch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evomerge.cli import completion
from evomerge.cli.options import AllowTasks
from evomerge.cli.output import put, tell


def fetch(
    config: Annotated[
        str,
        typer.Argument(
            help="Search file, or the name of a shipped search space.", autocompletion=completion.search_files
        ),
    ],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Folder that the nodes can read.")],
    allow_tasks: AllowTasks = False,
) -> None:
    """Bring a search's models and data to nodes without internet.

    Downloads what is of the Hugging Face Hub into a folder, and prints the variables that the nodes need.
    """
    from evomerge.config import loading
    from evomerge.launch import fetch as fetching

    settings, text = loading.load(config)
    loading.check_tasks(settings, text, config)
    found = fetching.fetch(settings, to, allow_tasks=allow_tasks, show=tell)
    for name, repository, commit in found.models:
        put(f"model {name}: {repository}, revision {commit}")
    for name, folder in found.local:
        put(f"model {name}: {folder} is a folder here and is not copied; the nodes need it at the same path")
    put(f"tasks: {', '.join(found.tasks) or 'none of the Hub'}")
    put(f"{found.folder}: {found.size / 1e9:.2f} GB")
    put(f"on the nodes (or source {found.folder / fetching.ENVIRONMENT}):")
    put("\n".join(f"  {line}" for line in found.exports()))
