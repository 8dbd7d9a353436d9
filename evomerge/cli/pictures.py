"""The verb that draws a study: plot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evomerge.cli import completion
from evomerge.cli.options import Root, reading_store
from evomerge.cli.output import put
from evomerge.errors import ConfigError, suggest

_KINDS = ("history", "heatmap", "tasks", "sensitivity", "pareto", "routes")


def plot(
    study: Annotated[
        str,
        typer.Argument(
            help="Name of the study; STUDY/ID for the sensitivity of that candidate.",
            autocompletion=completion.studies,
        ),
    ],
    kind: Annotated[str, typer.Argument(help="history, heatmap, tasks, sensitivity, pareto or routes.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="Picture to write: .png, .svg or .pdf.",
            show_default="STUDY-KIND.png",
        ),
    ] = None,
    root: Root = None,
) -> None:
    """Draw a picture of a study.

    The score history, what the search believes, the tasks of the best, stored sensitivity scans, the
    trade-off between the first two tasks, or routes of layers; while the search runs too.
    """
    from evomerge import reports
    from evomerge.reports import study_plots
    from evomerge.reports.panels import Snapshot

    name, _, reference = study.partition("/")
    if kind not in _KINDS:
        raise ConfigError(f"there is no picture '{kind}'. {suggest(kind, _KINDS)}")
    if reference and kind != "sensitivity":
        raise ConfigError(f"'{kind}' is drawn of a whole study; write {name} in place of {study}")
    file = out or Path(f"{name}-{kind}.png")
    with reading_store(name, root) as store:
        trial = reports.resolve(store, reference or "best")
        study_plots.draw(Snapshot(store), kind, trial, file)
    put(f"{file}: {kind} of {name}")
