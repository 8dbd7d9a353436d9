"""What a shell offers after the Tab key: studies, their candidates, search files.

`evomerge --install-completion` sets it up. Imports nothing heavy, and never fails: a shell has no place for
an error.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path

import typer

from evomerge.errors import EvomergeError

_REFERENCES = ("best", "pareto")


def studies(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of studies.

    Args:
        ctx: Of the command line so far, which may name the root.
        incomplete: What is typed.

    Returns:
        Those that begin so.
    """
    return [name for name in _names(ctx) if name.startswith(incomplete)]


def candidates(ctx: typer.Context, incomplete: str) -> list[str]:
    """References to candidates: STUDY/best, STUDY/pareto and the labels of parents and hand recipes.

    Args:
        ctx: Of the command line so far, which may name the root.
        incomplete: What is typed.

    Returns:
        Those that begin so; of several studies their names with '/best'.
    """
    study, slash, _ = incomplete.partition("/")
    if not slash:
        return [f"{name}/best" for name in _names(ctx) if name.startswith(incomplete)]
    found = (f"{study}/{reference}" for reference in (*_REFERENCES, *_labels(ctx, study)))
    return [reference for reference in found if reference.startswith(incomplete)]


def search_files(incomplete: str) -> list[str]:
    """Shipped search spaces, and paths of YAML files.

    Args:
        incomplete: What is typed.

    Returns:
        Those that begin so; folders end in '/'.
    """
    from evomerge import _resources

    shipped = [name for name in _resources.search_spaces() if name.startswith(incomplete)]
    return [*shipped, *_paths(incomplete)]


def _paths(incomplete: str) -> Iterator[str]:
    for path in sorted(glob.glob(glob.escape(incomplete) + "*")):
        if Path(path).is_dir():
            yield f"{path}/"
        elif path.endswith((".yaml", ".yml")):
            yield path


def _root(ctx: typer.Context) -> Path:
    from evomerge.store import paths

    given = ctx.params.get("root")
    return paths.root(Path(given) if given else None)


def _names(ctx: typer.Context) -> list[str]:
    from evomerge.store import paths

    try:
        return paths.studies(_root(ctx))
    except (EvomergeError, OSError):
        return []


def _labels(ctx: typer.Context, study: str) -> list[str]:
    """Labels of a study's parents and hand recipes, without spaces, which a shell would take apart."""
    from evomerge.store import Store, paths

    try:
        with Store.open(paths.store_path(study, _root(ctx))) as store:
            labels = [trial.label for trial in store.trials() if trial.origin in ("parent", "hand")]
    except (EvomergeError, OSError):
        return []
    return [label for label in labels if label and " " not in label]
