"""Verbs and the edge where an exception becomes one line and an exit code."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from evomerge._redaction import ScrubbedFormatter, scrub
from evomerge.cli import analysis, control, doctor, run
from evomerge.cli.options import Root, open_store, split
from evomerge.errors import ConfigError, EvomergeError, NoRoom

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
    os.environ.setdefault(
        "OPENBLAS_NUM_THREADS", "1"
    )  # numpy's, which the optimizers use: a replay has the same sums on any machine
    os.environ.setdefault(
        "OMP_WAIT_POLICY", "PASSIVE"
    )  # before torch: spinning threads starve the other processes of a node
    try:
        app()
    except EvomergeError as error:
        if _verbose:
            raise
        print(scrub(f"error[{error.code}] {error}" if error.exit_code else str(error)), file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if _verbose:
            raise
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            print(
                f"error[{NoRoom.code}] {error}; make room, or make it writable, and start again",
                file=sys.stderr,
            )
            raise SystemExit(NoRoom.exit_code) from None
        print(scrub(f"error[E000] {type(error).__name__}: {error} (a bug; -v shows where)"), file=sys.stderr)
        raise SystemExit(1) from None


@app.callback()
def _options(verbose: Verbose = False) -> None:
    global _verbose
    _verbose = verbose
    if verbose:
        import logging

        shown = logging.StreamHandler()
        shown.setFormatter(ScrubbedFormatter("%(asctime)s %(name)s: %(message)s"))
        logging.basicConfig(level=logging.INFO, handlers=[shown])


app.command(rich_help_panel="Plan")(analysis.plan)
app.command(rich_help_panel="Plan")(doctor.doctor)


app.command(rich_help_panel="Search")(run.run)
app.command(rich_help_panel="Search")(run.resume)
app.command(rich_help_panel="Search")(control.stop)
for verb in (control.status, analysis.show, analysis.compare, analysis.sensitivity):
    app.command(rich_help_panel="Look")(verb)


@app.command(rich_help_panel="Ship")
def export(
    candidate: Annotated[str, typer.Argument(help="STUDY/ID or STUDY/best.")],
    directory: Annotated[Path, typer.Argument(help="Folder to make.")],
    weights: Annotated[bool, typer.Option("--weights", help="Write the merged model too.")] = False,
    root: Root = None,
) -> None:
    """Write a candidate's mergekit recipe, card and lineage, and its weights if asked."""
    from evomerge import reports
    from evomerge.cli import progress as progress_module
    from evomerge.export import candidate as exporting
    from evomerge.launch import opening

    study, reference = split(candidate)
    with open_store(study, root) as store:
        trial = reports.resolve(store, reference)
        parents = opening.stored_parents(store)
        with progress_module.bar("tensors") as progress:
            exporting.export(store, trial, parents, directory, weights=weights, progress=progress)
    print(f"{directory}: candidate {trial.id} of {study}" + (", with weights" if weights else ""))
    if weights:
        print(
            f"try it: lm_eval --model hf --model_args pretrained={directory} --tasks …, or vllm serve {directory}"
        )
    else:
        print(
            f"build it: evomerge merge {directory}/recipe.json MODEL, or mergekit-yaml {directory}/recipe.yaml MODEL"
        )


@app.command(rich_help_panel="Ship")
def merge(
    recipe: Annotated[Path, typer.Argument(help="A mergekit YAML of any form, or an exported recipe.json.")],
    directory: Annotated[Path, typer.Argument(help="Folder to make.")],
    policy: Annotated[
        str,
        typer.Option(
            help="Arithmetic of a YAML: float32 (rounded once), or mergekit (its types and operations)."
        ),
    ] = "float32",
    memory: Annotated[
        str | None,
        typer.Option(help="Most memory to merge in, such as 8G; a recipe that needs more is refused."),
    ] = None,
    check_against: Annotated[
        Path | None, typer.Option(help="Virtual environment with mergekit: merge there too and compare.")
    ] = None,
) -> None:
    """Merge by a recipe file into a Hugging Face folder."""
    from evomerge.cli import progress as progress_module
    from evomerge.export import recipe_file
    from evomerge.merging import mergekit_check

    allowed = _bytes(memory)
    if check_against is not None and recipe.is_file():
        mergekit_check.program(recipe, check_against)  # before a long merge
    with progress_module.bar("tensors") as progress:
        warnings = recipe_file.merge_file(recipe, directory, progress, policy=policy, memory=allowed)
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)
    print(f"{directory}: merged by {recipe}")
    if check_against is not None:
        found = mergekit_check.against_mergekit(recipe, directory, check_against)
        print(f"against mergekit: {found}")
        if not found.agrees:
            raise typer.Exit(1)


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
