"""A stored candidate -> a folder others can use: mergekit recipe, card, lineage, and the weights if asked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge import __version__, folder, merge, mergekit_yaml, route_files
from evomerge.checkpoint import Parent
from evomerge.errors import NothingToExport, RecipeError
from evomerge.methods import method
from evomerge.recipe import Recipe
from evomerge.report.routes import hops
from evomerge.store import Store, StudyRow, Trial


def export(
    store: Store,
    trial: Trial,
    parents: Mapping[str, Parent],
    directory: Path,
    *,
    weights: bool = False,
    progress: folder.Progress | None = None,
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
    is_route = recipe.is_route({name: parent.num_layers for name, parent in parents.items()})
    with folder.whole(directory) as staging:
        notes = []
        if is_route:
            route = route_files.open_route(recipe, parents)
            if weights:
                notes.append(f"Loaded in a process of its own, beside the route that was scored: {route.checkpoint_into(staging)}.")
            notes.append(route.mergekit(staging, references(study, parents), _header(recipe, study, trial)))
        else:
            if weights:
                folder.write_into(merge.Merge(recipe, parents), staging, progress)
            try:
                (staging / "recipe.yaml").write_text(recipe_yaml(recipe, study, trial, parents))
            except RecipeError as error:  # such as one model's layers between another's embeddings and head
                notes.append(f"There is no recipe.yaml for mergekit: {error}. `evomerge merge` of recipe.json makes the model.")
        (staging / "recipe.json").write_text(recipe.canonical() + "\n")
        (staging / "lineage.json").write_text(json.dumps(lineage(store, study, trial), indent=2) + "\n")
        (staging / "README.md").write_text(card(store, study, trial, recipe, is_route, [note for note in notes if note]))


def recipe_yaml(recipe: Recipe, study: StudyRow, trial: Trial, parents: Mapping[str, Parent]) -> str:
    """The mergekit YAML of a candidate, with where it comes from as a comment."""
    shell = parents[recipe.base]
    named = mergekit_yaml.with_outer_filters(recipe, shell.outer_names("embeddings"), shell.outer_names("head"))
    return mergekit_yaml.dump(named, references(study, parents), _header(recipe, study, trial))


def _header(recipe: Recipe, study: StudyRow, trial: Trial) -> list[str]:
    program = "mergekit-multi recipe.yaml --out-path OUT -I STAGES" if recipe.stages else "mergekit-yaml recipe.yaml OUT"
    header = [
        f"evomerge {__version__}, study {study.name}, candidate {trial.id}, recipe {recipe.id}, seed {study.seed}",
        f"objective on search items {trial.reported:.4f}; more in lineage.json. For mergekit 0.1.5: {program}",
    ]
    if any(method(m.method).randomized for r in (recipe, *(stage for _, stage in recipe.stages)) for m in r.mixes):
        header.append("mergekit draws its own random masks: its model is like the scored one, not equal; `evomerge merge` of recipe.json is.")
    return header


def references(study: StudyRow, parents: Mapping[str, Parent]) -> dict[str, str]:
    """Model name -> what a recipe file calls it: repository[@revision], or the absolute folder of a local one."""
    out = {}
    for name, fact in study.facts["parents"].items():
        local = Path(fact["path"]).expanduser().is_dir()
        remote = fact["path"] + (f"@{fact['revision']}" if fact["revision"] else "")
        out[name] = str(parents[name].path) if local else remote
    return out


def lineage(store: Store, study: StudyRow, trial: Trial) -> dict[str, Any]:
    """Everything needed to know how a candidate came about."""
    return {
        "evomerge": __version__,
        "study": study.name,
        "seed": study.seed,
        "candidate": trial.id,
        "recipe": trial.recipe_id,
        "origin": trial.origin,
        "label": trial.label,
        "generation": trial.generation,
        "slot": trial.slot,
        "genome": trial.genome,
        "parents": list(trial.parents),
        "scores": [
            {"role": role, "objective": s.reported, "metrics": dict(s.evaluation.metrics), "items": len(s.evaluation.items)}
            for role, s in store.evaluations(trial.recipe_id)
        ],
        "facts": study.facts,
        "config": study.config,
    }


def card(store: Store, study: StudyRow, trial: Trial, recipe: Recipe, is_route: bool, notes: Sequence[str] = ()) -> str:
    """A model card: what it is, what it scored and on how many items, beside the parents. is_route: whether to say its layers in
    words, see `Recipe.is_route`; notes: sentences about its files."""
    rows = ["| model | role | objective | items | " + " | ".join(study.facts["tasks"]) + " |", "| --- " * (4 + len(study.facts["tasks"])) + "|"]
    shown = [("this model", trial.recipe_id)]
    shown += [(str(t.label), t.recipe_id) for t in store.trials() if t.origin == "parent"]
    for name, recipe_id in shown:
        for role, scored in store.evaluations(recipe_id):
            if role != "search" and scored.score is not None:
                values = " | ".join(f"{scored.evaluation.metrics.get(task, float('nan')):.4f}" for task in study.facts["tasks"])
                rows.append(f"| {name} | {role} | {scored.score:.4f} | {len(scored.evaluation.items)} | {values} |")
    models = "\n".join(f"- {name}: `{fact['path']}`" + _at(fact["revision"]) for name, fact in study.facts["parents"].items())
    methods = ", ".join(sorted({m.method for r in (recipe, *(stage for _, stage in recipe.stages)) for m in r.mixes}))
    route = f"\nRoute: {hops(recipe)}.\n" if is_route else ""
    said = "".join(f"\n{note}\n" for note in notes)
    return f"""---
tags:
- merge
- evomerge
---
# {study.name}: candidate {trial.id}

A merge ({methods}) found by evomerge {__version__}, study `{study.name}`, seed {study.seed}. Recipe id `{recipe.id}`.
The license is not set: it follows from those of the models merged, which are

{models}
{route}
## Scores

{chr(10).join(rows)}

Validation items chose this candidate among the finalists; test items were used once, after the choice.

## Files

{_yaml(recipe, notes)}- `recipe.json`: exact, for `evomerge merge recipe.json OUT`
- `lineage.json`: genome, ancestors, hashes of models and tasks, the search file
{said}"""


def _yaml(recipe: Recipe, notes: Sequence[str]) -> str:
    if any(note.startswith("No mergekit file") for note in notes):
        return ""
    program = "mergekit-multi recipe.yaml --out-path OUT -I STAGES" if recipe.stages else "mergekit-yaml recipe.yaml OUT"
    return f"- `recipe.yaml`: for mergekit 0.1.5 (`{program}`, in this folder)\n"


def _at(revision: str | None) -> str:
    return f" at {revision}" if revision else ""
