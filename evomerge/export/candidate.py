"""A stored candidate -> a folder others can use: mergekit recipe, card, lineage, and the weights if asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from evomerge import __version__
from evomerge.checkpoints import Parent
from evomerge.errors import NothingToExport, RecipeError
from evomerge.export import open_route
from evomerge.export.lineage import lineage
from evomerge.export.model_card import card, references
from evomerge.merging import atomic_folder, checkpoint_writer, merge
from evomerge.methods import method
from evomerge.recipes import Recipe, mergekit_yaml
from evomerge.store import Store, StudyRow, Trial


def export_candidate(
    store: Store,
    trial: Trial,
    parents: Mapping[str, Parent],
    directory: Path,
    *,
    weights: bool = False,
    progress: checkpoint_writer.Progress | None = None,
) -> None:
    """Writes recipe.yaml, recipe.json, lineage.json and README.md, and the merged checkpoint if `weights`.

    Of a route recipe.yaml is written with the shell folder that it needs, for architectures where mergekit was seen to do
    the same; where it is not, README.md says why. The checkpoint of a route is loaded in a fresh process and compared. The
    folder appears whole or not at all. Raises SetupError if it exists, NothingToExport for a failed candidate.
    """
    if trial.score is None:
        raise NothingToExport(f"candidate {trial.id} failed ({trial.error}); choose another")
    study = store.study()
    assert study is not None
    recipe = store.recipe(trial.recipe_id)
    is_route = recipe.is_route({name: parent.layout.num_layers for name, parent in parents.items()})
    with atomic_folder.whole(directory) as staging:
        notes = []
        if is_route:
            route = open_route.open_route(recipe, parents)
            if weights:
                notes.append(
                    f"Loaded in a process of its own, beside the route that was scored: {route.checkpoint_into(staging)}."
                )
            notes.append(route.mergekit(staging, references(study, parents), _header(recipe, study, trial)))
        else:
            if weights:
                checkpoint_writer.write_into(merge.Merge(recipe, parents), staging, progress)
            try:
                (staging / "recipe.yaml").write_text(recipe_yaml(recipe, study, trial, parents))
            except RecipeError as error:  # such as one model's layers between another's embeddings and head
                notes.append(
                    f"There is no recipe.yaml for mergekit: {error}. `evomerge merge` of recipe.json makes the model."
                )
        (staging / "recipe.json").write_text(recipe.canonical() + "\n")
        (staging / "lineage.json").write_text(json.dumps(lineage(store, study, trial), indent=2) + "\n")
        (staging / "README.md").write_text(
            card(store, study, trial, recipe, is_route, [note for note in notes if note])
        )


def recipe_yaml(recipe: Recipe, study: StudyRow, trial: Trial, parents: Mapping[str, Parent]) -> str:
    """The mergekit YAML of a candidate, with where it comes from as a comment."""
    shell = parents[recipe.base]
    named = mergekit_yaml.with_outer_filters(
        recipe, shell.layout.outer_names("embeddings"), shell.layout.outer_names("head")
    )
    return mergekit_yaml.dump(named, references(study, parents), _header(recipe, study, trial))


def _header(recipe: Recipe, study: StudyRow, trial: Trial) -> list[str]:
    program = (
        "mergekit-multi recipe.yaml --out-path OUT -I STAGES"
        if recipe.stages
        else "mergekit-yaml recipe.yaml OUT"
    )
    header = [
        f"evomerge {__version__}, study {study.name}, candidate {trial.id}, recipe {recipe.id}, seed {study.seed}",
        f"objective on search items {trial.reported:.4f}; more in lineage.json. For mergekit 0.1.5: {program}",
    ]
    if any(
        method(m.method).randomized for r in (recipe, *(stage for _, stage in recipe.stages)) for m in r.mixes
    ):
        header.append(
            "mergekit draws its own random masks: its model is like the scored one, not equal; `evomerge merge` of recipe.json is."
        )
    return header
