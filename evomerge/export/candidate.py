"""A stored candidate -> a folder for others: mergekit recipe, card, lineage, and the weights if asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from evomerge import __version__
from evomerge._escaping import markdown
from evomerge.checkpoints import Parent
from evomerge.errors import RecipeError
from evomerge.export import citation, commands, open_route
from evomerge.export.fine_tuning import fine_tuning_note
from evomerge.export.licenses import MergedLicense, merged_license, write_licenses
from evomerge.export.lineage import candidate_lineage
from evomerge.export.merge_card import CONFIG
from evomerge.export.model_card import render_card
from evomerge.export.route_mergekit import NO_MERGEKIT_FILE
from evomerge.export.stored_candidate import StoredCandidate
from evomerge.merging import atomic_folder, checkpoint_writer, merge
from evomerge.methods import method
from evomerge.recipes import mergekit_yaml
from evomerge.store import Store, Trial


def export_candidate(
    store: Store,
    trial: Trial,
    parents: Mapping[str, Parent],
    directory: Path,
    *,
    weights: bool = False,
    progress: checkpoint_writer.Progress | None = None,
) -> tuple[str, ...]:
    """Writes recipes, lineage, card, licenses and commands, and the merged checkpoint if `weights`.

    Of a route recipe.yaml is written with the shell folder that it needs, for architectures where mergekit
    was seen to do the same; where it is not, README.md says why. The checkpoint of a route is loaded in a
    fresh process and compared.

    Args:
        store: The store of the candidate's study.
        trial: The candidate.
        parents: The study's models, open.
        directory: Folder to make; it appears whole or not at all.
        weights: Write the merged checkpoint too.
        progress: Called with the numbers of tensors written and to write.

    Returns:
        What a publisher has to see to, such as a license that is not known, each a sentence.

    Raises:
        SetupError: If the folder exists.
        NothingToExport: If the candidate failed, or its checkpoint would not compute what was scored.
    """
    candidate = StoredCandidate.of(store, trial, parents)
    with atomic_folder.new_folder(directory) as staging:
        if candidate.is_route:
            notes = _write_route(candidate, staging, weights)
        else:
            notes = _write_merge(candidate, staging, weights, progress)
        (staging / "recipe.json").write_text(candidate.recipe.canonical() + "\n", encoding="utf-8")
        lineage = candidate_lineage(store, candidate.study, trial, candidate.models)
        (staging / "lineage.json").write_text(json.dumps(lineage, indent=2) + "\n", encoding="utf-8")
        license = merged_license(candidate.models)
        write_licenses(staging, candidate.models, license)
        recipe = staging / "recipe.yaml"
        text = recipe.read_text(encoding="utf-8") if recipe.is_file() else None
        if text is not None and weights:
            (staging / CONFIG).write_text(text, encoding="utf-8")
        _write_companions(candidate, staging, license, weights)
        (staging / "README.md").write_text(render_card(candidate, notes, text), encoding="utf-8")
    return license.warnings


def recipe_yaml(candidate: StoredCandidate) -> str:
    """The mergekit YAML of a candidate, with where it comes from as a comment.

    Args:
        candidate: A merge, no route.

    Returns:
        The text of the file.

    Raises:
        RecipeError: If mergekit cannot express it.
    """
    layout = candidate.parents[candidate.recipe.base].layout
    named = mergekit_yaml.with_outer_filters(
        candidate.recipe, layout.outer_names("embeddings"), layout.outer_names("head")
    )
    return mergekit_yaml.dump(named, candidate.references, _header(candidate))


def _write_companions(
    candidate: StoredCandidate, directory: Path, license: MergedLicense, weights: bool
) -> None:
    """Writes what a user does next: commands, Ollama's file, citation and versions."""
    has_recipe = (directory / "recipe.yaml").is_file()
    texts = {
        commands.SCRIPT: commands.script(commands.steps(candidate, weights, has_recipe)),
        commands.MODELFILE: commands.modelfile(candidate, license, weights),
        citation.BIBLIOGRAPHY: citation.bibliography(candidate),
        citation.ENVIRONMENT: citation.environment(candidate),
    }
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")


def _write_route(candidate: StoredCandidate, directory: Path, weights: bool) -> list[str]:
    """Writes the files of a route; returns sentences about them for the model card."""
    notes = []
    route = open_route.load_route(candidate.recipe, candidate.parents)
    if weights:
        agreement = route.write_checkpoint_files(directory)
        notes.append(f"Loaded in a process of its own, beside the route that was scored: {agreement}.")
    reason = route.write_mergekit(directory, candidate.references, _header(candidate))
    return [*notes, reason] if reason else notes


def _write_merge(
    candidate: StoredCandidate,
    directory: Path,
    weights: bool,
    progress: checkpoint_writer.Progress | None,
) -> list[str]:
    """Writes the files of a merge; returns sentences about them for the model card."""
    if weights:
        merged = merge.Merge(candidate.recipe, candidate.parents)
        checkpoint_writer.write_into(merged, directory, progress)
    try:
        (directory / "recipe.yaml").write_text(recipe_yaml(candidate), encoding="utf-8")
    except RecipeError as error:  # such as one model's layers between another's embeddings and head
        advice = "`evomerge merge` of recipe.json makes the model."
        note = fine_tuning_note(candidate)
        return [*([note] if note else []), f"{NO_MERGEKIT_FILE}: {markdown(str(error))}. {advice}"]
    return []


def _header(candidate: StoredCandidate) -> list[str]:
    """Comment lines of a recipe.yaml: where it comes from and how to merge it."""
    study, trial = candidate.study, candidate.trial
    origin = f"study {study.name}, candidate {trial.id}, recipe {candidate.recipe.id}, seed {study.seed}"
    score = f"objective on search items {trial.reported:.4f}; more in lineage.json"
    header = [
        f"evomerge {__version__}, {origin}",
        f"{score}. For mergekit 0.1.5: {candidate.mergekit_command}",
    ]
    if any(method(name).randomized for name in candidate.methods):
        header.append(
            "mergekit draws its own random masks: its model is like the scored one, not equal; "
            "`evomerge merge` of recipe.json is."
        )
    return header
