"""Verbs that run a search: run, resume."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer

from evomerge.cli.options import (
    AllowPython,
    AllowTasks,
    Gpus,
    Grace,
    Ray,
    Reuse,
    Root,
    Workers,
    allowed,
    open_store,
)
from evomerge.errors import ConfigError, Paused


def run(
    config: Annotated[str, typer.Argument(help="Search file, or the name of a shipped search space.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the study if it exists.")] = False,
    evaluations: Annotated[
        int | None, typer.Option(help="Budget of the search, or of its last stage, instead of the file's.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the search, instead of the file's.")] = None,
    study: Annotated[str | None, typer.Option(help="Name of the study, instead of the file's.")] = None,
    allow_python: AllowPython = False,
    allow_tasks: AllowTasks = False,
    workers: Workers = None,
    ray: Ray = None,
    gpus: Gpus = None,
    grace: Grace = None,
    reuse: Reuse = None,
    root: Root = None,
) -> None:
    """Start a search, or go on with it."""
    from evomerge.config import loading as configs

    settings, text = configs.load(config)
    if study is not None:
        settings, text = configs.rename(text, study)
    given = {key: value for key, value in (("evaluations", evaluations), ("seed", seed)) if value is not None}
    settings = configs.placed(settings, ray=ray, workers=workers, gpus=gpus, grace=grace, reuse=reuse)
    _search(settings, text, given, root, resume, (allow_python, allow_tasks), workers)


def resume(
    study: Annotated[str, typer.Argument(help="Name of the study.")],
    evaluations: Annotated[str | None, typer.Option(help="New budget; '+200' adds to the old one.")] = None,
    allow_python: AllowPython = False,
    allow_tasks: AllowTasks = False,
    workers: Workers = None,
    ray: Ray = None,
    gpus: Gpus = None,
    grace: Grace = None,
    reuse: Reuse = None,
    root: Root = None,
) -> None:
    """Go on with a stored study, perhaps with a larger budget."""
    from evomerge.config import loading as configs

    with open_store(study, root) as store:
        row = store.study()
    if row is None:
        raise ConfigError(f"'{study}' holds no study yet; start it with run")
    settings, text = configs.stored(row.name, row.config, row.overrides)
    given = dict(row.overrides)
    if evaluations is not None:
        if not evaluations.removeprefix("+").isdigit():
            raise ConfigError(f"--evaluations must be a number such as 1000 or +200, got '{evaluations}'")
        given["evaluations"] = int(evaluations) + (settings.budgets[-1] if evaluations.startswith("+") else 0)
    settings = configs.placed(settings, ray=ray, workers=workers, gpus=gpus, grace=grace, reuse=reuse)
    _search(settings, text, given, root, True, (allow_python, allow_tasks), workers)


def _search(
    settings: Any,
    text: str,
    overrides: dict[str, int],
    root: Path | None,
    resume: bool,
    allows: tuple[bool, bool],
    workers: int | None,
) -> None:
    from evomerge.cli import progress, study_tables

    with progress.Search(settings.study) as screen:
        with progress.opening():
            from evomerge import reports
            from evomerge.launch import prepare
            from evomerge.search import StopRequest
            from evomerge.store import paths, stop_request

            study = prepare.prepare(
                settings, text, paths.root(root), overrides=overrides, resume=resume, allowed=allowed(*allows), workers=workers or 1,
                show=screen.show,
            )  # fmt: skip
        folder = study.store.path.parent
        with study.store, contextlib.closing(study.pool):
            try:
                with progress.signals(study):
                    study.run()
            except KeyboardInterrupt:
                if study.dispatch.stop is not StopRequest.DROP:
                    raise
                study.store.set_state("paused")
                raise Paused(
                    "stopped by a signal, what was in flight is dropped; run the same command with --resume to go on"
                ) from None
            finally:
                stop_request.clear_stop(folder)
            path = study.store.path.with_name("report.md")
            path.write_text(reports.study_markdown(study.store))
            data = reports.study_summary(study.store)
    print(study_tables.study(data))
    where = f" --root {root}" if root else ""
    print(f"report: {path}\nnext:   evomerge export {settings.study}/best OUT --weights{where}")
