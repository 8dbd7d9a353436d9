"""Verbs and the edge where an exception becomes one line and an exit code."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from evomerge.cli import look
from evomerge.cli.flags import AllowPython, Root, Workers, open_store, split
from evomerge.errors import ConfigError, EvomergeError

app = typer.Typer(
    name="evomerge",
    help="Evolutionary search for merge recipes of language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
)
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show tracebacks and log lines.")]
_verbose = False


def main() -> None:
    """Runs the command line; every error is one line on standard error and an exit code."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads starve the other processes of a node
    try:
        app()
    except EvomergeError as error:
        if _verbose:
            raise
        print(f"error[{error.code}] {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if _verbose:
            raise
        print(f"error[E000] {type(error).__name__}: {error} (a bug; -v shows where)", file=sys.stderr)
        raise SystemExit(1) from None


@app.callback()
def _options(verbose: Verbose = False) -> None:
    global _verbose
    _verbose = verbose
    if verbose:
        import logging

        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")


app.command(rich_help_panel="Plan")(look.plan)


@app.command(rich_help_panel="Search")
def run(
    config: Annotated[str, typer.Argument(help="Search file, or the name of a shipped search space.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the study if it exists.")] = False,
    evaluations: Annotated[int | None, typer.Option(help="Budget of the search, or of its last stage, instead of the file's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the search, instead of the file's.")] = None,
    study: Annotated[str | None, typer.Option(help="Name of the study, instead of the file's.")] = None,
    allow_python: AllowPython = False,
    workers: Workers = 1,
    root: Root = None,
) -> None:
    """Start a search, or go on with it."""
    from evomerge import config as configs

    settings, text = configs.load(config)
    if study is not None:
        settings, text = configs.rename(text, study)
    given = {key: value for key, value in (("evaluations", evaluations), ("seed", seed)) if value is not None}
    _search(settings, text, given, root, resume, allow_python, workers)


@app.command(rich_help_panel="Search")
def resume(
    study: Annotated[str, typer.Argument(help="Name of the study.")],
    evaluations: Annotated[str | None, typer.Option(help="New budget; '+200' adds to the old one.")] = None,
    allow_python: AllowPython = False,
    workers: Workers = 1,
    root: Root = None,
) -> None:
    """Go on with a stored study, perhaps with a larger budget."""
    from evomerge import config as configs

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
    _search(settings, text, given, root, True, allow_python, workers)


for verb in (look.status, look.show, look.compare, look.sensitivity):
    app.command(rich_help_panel="Look")(verb)


@app.command(rich_help_panel="Ship")
def export(
    candidate: Annotated[str, typer.Argument(help="STUDY/ID or STUDY/best.")],
    directory: Annotated[Path, typer.Argument(help="Folder to make.")],
    weights: Annotated[bool, typer.Option("--weights", help="Write the merged model too.")] = False,
    root: Root = None,
) -> None:
    """Write a candidate's mergekit recipe, card and lineage, and its weights if asked."""
    from evomerge import export as exporting
    from evomerge import launch, report
    from evomerge.cli import screens

    study, reference = split(candidate)
    with open_store(study, root) as store:
        trial = report.resolve(store, reference)
        parents = launch.stored_parents(store)
        with screens.bar("tensors") as progress:
            exporting.export(store, trial, parents, directory, weights=weights, progress=progress)
    print(f"{directory}: candidate {trial.id} of {study}" + (", with weights" if weights else ""))
    if weights:
        print(f"try it: lm_eval --model hf --model_args pretrained={directory} --tasks …, or vllm serve {directory}")
    else:
        print(f"build it: evomerge merge {directory}/recipe.json MODEL, or mergekit-yaml {directory}/recipe.yaml MODEL")


@app.command(rich_help_panel="Ship")
def merge(
    recipe: Annotated[Path, typer.Argument(help="A mergekit YAML of any form, or an exported recipe.json.")],
    directory: Annotated[Path, typer.Argument(help="Folder to make.")],
    policy: Annotated[str, typer.Option(help="Arithmetic of a YAML: float32 (rounded once), or mergekit (its types and operations).")] = "float32",
    memory: Annotated[str | None, typer.Option(help="Most memory to merge in, such as 8G; a recipe that needs more is refused.")] = None,
    check_against: Annotated[Path | None, typer.Option(help="Virtual environment with mergekit: merge there too and compare.")] = None,
) -> None:
    """Merge by a recipe file into a Hugging Face folder."""
    from evomerge import merging, oracle
    from evomerge.cli import screens

    allowed = _bytes(memory)
    if check_against is not None and recipe.is_file():
        oracle.program(recipe, check_against)  # before a long merge
    with screens.bar("tensors") as progress:
        warnings = merging.merge_file(recipe, directory, progress, policy=policy, memory=allowed)
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)
    print(f"{directory}: merged by {recipe}")
    if check_against is not None:
        found = oracle.against_mergekit(recipe, directory, check_against)
        print(f"against mergekit: {found}")
        if not found.agrees:
            raise typer.Exit(1)


def _search(settings: Any, text: str, overrides: dict[str, int], root: Path | None, resume: bool, allow_python: bool, workers: int) -> None:
    from evomerge.cli import screens

    with screens.Search(settings.study) as screen:
        with screens.opening():
            from evomerge import launch, report
            from evomerge.study_files import root as studies_root

            study = launch.prepare(
                settings, text, studies_root(root), overrides=overrides, resume=resume, allow_python=allow_python, workers=workers, show=screen.show
            )
        with study.store, contextlib.closing(study.pool):
            with screens.signals(study):
                study.run()
            path = study.store.path.with_name("report.md")
            path.write_text(report.markdown(study.store))
            data = report.summary(study.store)
    print(screens.study(data))
    where = f" --root {root}" if root else ""
    print(f"report: {path}\nnext:   evomerge export {settings.study}/best OUT --weights{where}")


def _bytes(size: str | None) -> int | None:
    """8G, 500M, 1.5GB or a plain number of bytes."""
    if size is None:
        return None
    number, unit = size.strip().upper().removesuffix("B").removesuffix("I"), 1
    if number and number[-1] in "KMGT":
        number, unit = number[:-1], 1000 ** ("KMGT".index(number[-1]) + 1)
    try:
        found = float(number) * unit
    except ValueError:
        found = -1
    if not 0 < found < 1e18:
        raise ConfigError(f"--memory takes a size such as 8G or 500M, got '{size}'")
    return int(found)
