"""Verbs that run a search: run, resume."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evomerge.cli import completion
from evomerge.cli.options import RunOptions, open_store, takes_run_options
from evomerge.cli.output import put
from evomerge.errors import ConfigError, Paused

if TYPE_CHECKING:
    from evomerge.launch.search_request import SearchRequest


@takes_run_options
def run(
    config: Annotated[
        str,
        typer.Argument(
            help="Search file, or the name of a shipped search space.", autocompletion=completion.search_files
        ),
    ],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the study if it exists.")] = False,
    evaluations: Annotated[
        int | None, typer.Option(help="Budget of the search, or of its last stage, instead of the file's.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the search, instead of the file's.")] = None,
    study: Annotated[str | None, typer.Option(help="Name of the study, instead of the file's.")] = None,
    accept_floor: Annotated[
        bool,
        typer.Option(
            "--accept-floor",
            help="Begin also where no parent has anything right in a task, or all answer it alike.",
        ),
    ] = False,
    *,
    options: RunOptions,
) -> None:
    """Start a search, or go on with it."""
    from evomerge.config import loading
    from evomerge.launch.search_request import SearchRequest

    settings, text = loading.load(config)
    loading.check_tasks(settings, text, config)
    if study is not None:
        text = loading.rename(text, study)[1]
        settings = settings.model_copy(update={"study": study})
    given = (("evaluations", evaluations), ("seed", seed))
    overrides = {key: value for key, value in given if value is not None}
    _search(SearchRequest(options.apply_to(settings), text, overrides, resume), options, accept_floor)


@takes_run_options
def resume(
    study: Annotated[str, typer.Argument(help="Name of the study.", autocompletion=completion.studies)],
    evaluations: Annotated[str | None, typer.Option(help="New budget; '+200' adds to the old one.")] = None,
    retry_failed: Annotated[
        bool,
        typer.Option(
            "--retry-failed",
            help="Score anew what failed by its machine or was timed out, and search anew from there.",
        ),
    ] = False,
    backend: Annotated[
        str | None,
        typer.Option(help="Go on with another evaluation backend, although scores may then differ by it."),
    ] = None,
    mix_engines: Annotated[
        bool,
        typer.Option(
            "--mix-engines",
            help="Go on although another version of the engine generates texts now.",
        ),
    ] = False,
    *,
    options: RunOptions,
) -> None:
    """Go on with a stored study."""
    from evomerge.config import loading
    from evomerge.launch import stored_models as opening
    from evomerge.launch.search_request import SearchRequest

    with open_store(study, options.root) as store:
        row, path = store.study(), store.path
    if row is None:
        raise ConfigError(f"'{study}' holds no study yet; start it with run")
    settings = opening.stored_settings(row, path.parent, options.models or ())
    text = loading.renamed(row.config, row.name)
    overrides = dict(row.overrides)
    if evaluations is not None:
        if not re.fullmatch(r"\+?[0-9]{1,10}", evaluations):
            raise ConfigError(
                f"--evaluations must be a number such as 1000 or +200, got '{evaluations[:40]}'"
            )
        before = settings.budgets[-1] if evaluations.startswith("+") else 0
        overrides["evaluations"] = int(evaluations) + before
    if backend is not None:
        settings = loading.with_backend(settings, backend)
    request = SearchRequest(
        options.apply_to(settings),
        text,
        overrides,
        resume=True,
        retry_failed=retry_failed,
        mix_engines=mix_engines or backend is not None,
    )
    _search(request, options)


def _search(request: SearchRequest, options: RunOptions, accept_floor: bool = False) -> None:
    """Runs a search to its end with progress on the screen, writes its report and prints its table."""
    from evomerge.cli import progress
    from evomerge.cli.screen import open_screen

    with open_screen(request.settings.study, quiet=options.quiet, as_json=options.as_json) as screen:
        with progress.stop_while_opening():
            from evomerge import reports
            from evomerge.launch.listeners import open_listeners
            from evomerge.launch.prepare import prepare_study
            from evomerge.launch.running import run_study
            from evomerge.search import StopRequest
            from evomerge.store import paths, stop_request

            study = prepare_study(
                request,
                paths.root(options.root),
                allowed=options.allowed,
                workers=options.workers or 1,
                show=screen.show,
                accept_floor=accept_floor,
            )
        folder = study.store.path.parent
        with study.store, contextlib.closing(study.pool):
            try:
                with progress.stop_while_running(study):
                    run_study(study, [screen, *open_listeners(request.effective_settings, study.store)])
            except KeyboardInterrupt:
                if study.dispatch.stop is not StopRequest.DROP:
                    raise
                study.store.set_state("paused")
                raise Paused(
                    "stopped by a signal, what was in flight is dropped; "
                    "run the same command with --resume to go on"
                ) from None
            finally:
                stop_request.clear_stop(folder)
            path = study.store.path.with_name("report.md")
            path.write_text(reports.study_markdown(study.store), encoding="utf-8")
            data = reports.study_summary(study.store)
    _print_end(data, path, options)


def _print_end(data: Mapping[str, Any], report: Path, options: RunOptions) -> None:
    """Prints what a search found: its table, its verdict alone, or a line of JSON."""
    from evomerge.cli import study_tables

    if options.as_json:
        put(json.dumps({"event": "summary", "report": str(report), **data}))
        return
    if options.quiet:
        put(data["verdict"]["sentence"])
        return
    put(study_tables.study_table(data))
    where = f" --root {options.root}" if options.root else ""
    put(f"report: {report}")
    if not data["alike"]:
        put(f"next:   evomerge export {data['study']}/best OUT --weights{where}")
