"""Verbs that show a study as a page: report, dashboard."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evomerge.cli.options import Root, reading_store
from evomerge.cli.output import put
from evomerge.errors import ConfigError, unwritable


def report(
    study: Annotated[str, typer.Argument(help="Name of the study.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", help="File to write: .html for one page that opens offline, .md for Markdown."
        ),
    ] = None,
    root: Root = None,
) -> None:
    """Write a study's report to a file.

    Of a search that still runs or is paused, .html shows how far it has come; .md is of finished ones.
    """
    from evomerge import reports
    from evomerge.reports.html import study_html

    file = out or Path(f"{study}.html")
    if file.suffix.lower() not in (".html", ".md"):
        raise ConfigError(f"'{file}' names no kind of report; end it with .html or .md")
    with reading_store(study, root) as store:
        text = reports.study_markdown(store) if file.suffix.lower() == ".md" else study_html(store)
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise unwritable(file, error) from None
    put(f"{file}: report of {study}, {file.stat().st_size / 1e6:.2f} MB")
