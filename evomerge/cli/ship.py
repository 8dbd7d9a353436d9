"""Verbs that write models for others: export, merge."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evomerge.cli import completion
from evomerge.cli.options import (
    AllowCode,
    AllowPython,
    AllowTasks,
    Models,
    Root,
    allowed,
    open_store,
    reading_store,
)
from evomerge.cli.output import put, tell
from evomerge.errors import ConfigError, NothingToExport
from evomerge.launch.references import split_reference

if TYPE_CHECKING:
    from evomerge.export.stored_candidate import StoredCandidate
    from evomerge.launch.exporting import Exported

Environment = Annotated[
    Path | None,
    typer.Argument(
        help="With --verify: virtual environment with mergekit.",
        show_default="$EVOMERGE_MERGEKIT_ENV or .venv-mergekit",
    ),
]
Top = Annotated[
    int | None, typer.Option("--top", min=1, max=1000, help="The best so many, a folder for each.")
]
To = Annotated[
    str | None,
    typer.Option("--to", metavar="optuna", help="Write the whole study as a database of optuna."),
]


def export(
    candidate: Annotated[
        str,
        typer.Argument(
            help="STUDY/ID, STUDY/best, STUDY/pareto, or STUDY with --top.",
            autocompletion=completion.candidates,
        ),
    ],
    directory: Annotated[Path, typer.Argument(help="Folder to make; with --to the file.")],
    environment: Environment = None,
    weights: Annotated[bool, typer.Option("--weights", help="Write the merged model too.")] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Merge it again with mergekit, compare, and score both folders again."),
    ] = False,
    top: Top = None,
    to: To = None,
    models: Models = None,
    allow_python: AllowPython = False,
    allow_tasks: AllowTasks = False,
    allow_code: AllowCode = False,
    root: Root = None,
) -> None:
    """Write a candidate into a folder, or the best or the Pareto front into a folder for each.

    Its mergekit recipe, model card, licenses, lineage and commands, and with --weights the merged model.
    """
    from evomerge.cli import progress as progress_module
    from evomerge.launch import exporting
    from evomerge.launch.verification import mergekit_environment

    if environment is not None and not verify:
        raise ConfigError(f"'{environment}' is an environment to verify with; add --verify, or leave it out")
    study, _, reference = candidate.partition("/")
    if to is not None:
        _export_study(study, to, directory, root)
        return
    if top is None:
        study, reference = split_reference(candidate)
    request = exporting.ExportRequest(
        weights,
        mergekit_environment(environment) if verify else None,
        models or (),
        allowed(allow_python, allow_tasks, allow_code),
    )
    with open_store(study, root) as store:
        trials, several = exporting.named_trials(store, reference, top)
        found = exporting.export_trials(
            store, trials, directory, request, several=several, bar=progress_module.bar, note=tell
        )
    warnings = dict.fromkeys(warning for one in found for warning in one.warnings)
    for warning in warnings:
        tell(f"warning: {warning}")
    for one in found:
        _say(one, study, weights)
    failed = [one for one in found if one.verification is not None and not one.verification.passes]
    if failed:
        raise NothingToExport(
            f"{failed[0].directory} is there and is not what it should be; its verify.json says what differs"
        )


def _export_study(study: str, to: str, file: Path, root: Path | None) -> None:
    """Writes a whole study in the form of another program."""
    from evomerge.export.optuna_study import export_optuna

    if to != "optuna":
        raise ConfigError(f"--to writes for optuna, got '{to[:40]}'")
    with reading_store(study, root) as store:
        number = export_optuna(store, file)
    put(f"{file}: {number} trials of {study}")
    put(f"open it: optuna-dashboard sqlite:///{shlex.quote(str(file.absolute()))}")


def _say(exported: Exported, study: str, weights: bool) -> None:
    """Prints what was written, and what can be done with it."""
    directory, stored = exported.directory, exported.candidate
    put(f"{directory}: candidate {stored.trial.id} of {study}" + (", with weights" if weights else ""))
    if exported.verification is not None:
        put(exported.verification.sentence)
    commands = _trial_commands(stored, directory) if weights else stored.build_commands(directory)
    for number, command in enumerate(commands):
        put(f"{('try it' if weights else 'build it') if number == 0 else 'or'}: {command}")
    put(f"more: {directory / 'commands.sh'}")


def _trial_commands(stored: StoredCandidate, directory: Path) -> list[str]:
    """The commands that score or serve an exported model."""
    from evomerge.export.commands import score_command

    score = score_command(stored, shlex.quote(str(directory.absolute())))
    return [*([score] if score else []), f"vllm serve {shlex.quote(str(directory))}"]


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
    """Merge by a recipe file into a folder."""
    from evomerge.cli import progress as progress_module
    from evomerge.export.mergekit_agreement import compare_with_mergekit
    from evomerge.export.recipe_file import merge_recipe_file
    from evomerge.merging import mergekit_check

    memory_bytes = _bytes(memory)
    if check_against is not None and recipe.is_file():
        mergekit_check.find_program(
            recipe, check_against
        )  # fails before a long merge where there is no mergekit
    with progress_module.bar("tensors") as progress:
        warnings = merge_recipe_file(recipe, directory, progress, policy=policy, memory=memory_bytes)
    for warning in warnings:
        tell(f"warning: {warning}")
    put(f"{directory}: merged by {recipe}")
    if check_against is not None:
        agreement = compare_with_mergekit(recipe, directory, check_against, policy, memory_bytes)
        put(f"against mergekit: {agreement.folder}")
        if agreement.agrees and agreement.explanation:
            put(agreement.explanation)
        if not agreement.agrees:
            reason = f" ({agreement.explanation})" if agreement.explanation else ""
            raise NothingToExport(f"{directory} is not what mergekit makes of {recipe}{reason}")


def _bytes(size: str | None) -> int | None:
    """8G, 500M, 1.5GB or a plain number of bytes."""
    if size is None:
        return None
    number, unit = size.strip().upper().removesuffix("B").removesuffix("I"), 1
    if number and number[-1] in "KMGT":
        unit = 1000 ** ("KMGT".index(number[-1]) + 1)
        number = number[:-1]
    try:
        value = float(number) * unit
    except ValueError:
        value = -1
    if not 0 < value < 1e18:
        raise ConfigError(f"--memory takes a size such as 8G or 500M, got '{size}'")
    return int(value)
