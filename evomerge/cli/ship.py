"""Verbs that write models for others: export, merge."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evomerge.cli.options import Models, Root, open_store
from evomerge.cli.output import put, tell
from evomerge.errors import ConfigError
from evomerge.launch.references import split_reference

if TYPE_CHECKING:
    from evomerge.export.stored_candidate import StoredCandidate


def export(
    candidate: Annotated[str, typer.Argument(help="STUDY/ID or STUDY/best.")],
    directory: Annotated[Path, typer.Argument(help="Folder to make.")],
    weights: Annotated[bool, typer.Option("--weights", help="Write the merged model too.")] = False,
    models: Models = None,
    root: Root = None,
) -> None:
    """Write a candidate into a folder.

    Its mergekit recipe, model card and lineage, and with --weights the merged model.
    """
    from evomerge import reports
    from evomerge.cli import progress as progress_module
    from evomerge.export.candidate import export_candidate
    from evomerge.export.stored_candidate import StoredCandidate
    from evomerge.launch import opening

    study, reference = split_reference(candidate)
    with open_store(study, root) as store:
        trial = reports.resolve(store, reference)
        parents = opening.stored_parents(store, models or ())
        with progress_module.bar("tensors") as progress:
            warnings = export_candidate(store, trial, parents, directory, weights=weights, progress=progress)
        stored = StoredCandidate.of(store, trial, parents)
        commands = _trial_commands(stored, directory) if weights else stored.build_commands(directory)
    for warning in warnings:
        tell(f"warning: {warning}")
    put(f"{directory}: candidate {trial.id} of {study}" + (", with weights" if weights else ""))
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
        comparison = mergekit_check.compare_with_mergekit(recipe, directory, check_against)
        put(f"against mergekit: {comparison}")
        if not comparison.agrees:
            raise typer.Exit(1)


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
