"""Verbs that show a study as a page: report, dashboard."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evomerge.cli import completion
from evomerge.cli.options import Root, reading_store
from evomerge.cli.output import put, write_text
from evomerge.errors import ConfigError, SetupError


def report(
    study: Annotated[str, typer.Argument(help="Name of the study.", autocompletion=completion.studies)],
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
    write_text(file, text)
    put(f"{file}: report of {study}, {file.stat().st_size / 1e6:.2f} MB")


def dashboard(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="[ROOT]", help="Folder of the studies.", show_default="$EVOMERGE_ROOT or results"
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but a loopback address needs the token to read.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes any that is free.")] = 8377,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="EVOMERGE_TOKEN", help="What lets in and stops searches.", show_default="a new one"
        ),
    ] = None,
    prefix: Annotated[
        str, typer.Option(help="Path that a proxy leaves before every address, such as /proxy/8377.")
    ] = "",
) -> None:
    """Show studies as a page that follows running searches.

    Reads only, while searches write; a search is stopped with the token that is printed. Needs
    evomerge[dashboard].
    """
    from evomerge.store.paths import root as studies_root

    try:
        from evomerge.reports.dashboard.server import Listening, serve
    except ModuleNotFoundError as error:
        raise SetupError(
            f'the dashboard needs {error.name}, which is not installed; pip install "evomerge[dashboard]"'
        ) from None
    listening = Listening(host, port, token or "", prefix)
    serve(studies_root(folder), listening, lambda line: put(line, flush=True))
