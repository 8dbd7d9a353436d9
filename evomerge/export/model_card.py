"""The model card of an exported candidate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from evomerge import __version__
from evomerge.checkpoints import Parent
from evomerge.recipes import Recipe
from evomerge.reports.route_text import hops
from evomerge.store import Store, StudyRow, Trial


def references(study: StudyRow, parents: Mapping[str, Parent]) -> dict[str, str]:
    """Model name -> what a recipe file calls it: repository[@revision], or the absolute folder of a local one."""
    out = {}
    for name, fact in study.facts.parents.items():
        local = Path(fact.path).expanduser().is_dir()
        remote = fact.path + (f"@{fact.revision}" if fact.revision else "")
        out[name] = str(parents[name].path) if local else remote
    return out


def card(
    store: Store, study: StudyRow, trial: Trial, recipe: Recipe, is_route: bool, notes: Sequence[str] = ()
) -> str:
    """A model card: what it is, what it scored and on how many items, beside the parents. is_route: whether to say its layers in
    words, see `Recipe.is_route`; notes: sentences about its files."""
    rows = [
        "| model | role | objective | items | " + " | ".join(study.facts.tasks) + " |",
        "| --- " * (4 + len(study.facts.tasks)) + "|",
    ]
    shown = [("this model", trial.recipe_id)]
    shown += [(str(t.label), t.recipe_id) for t in store.trials() if t.origin == "parent"]
    for name, recipe_id in shown:
        for role, scored in store.evaluations(recipe_id):
            if role != "search" and scored.score is not None:
                values = " | ".join(
                    f"{scored.evaluation.metrics.get(task, float('nan')):.4f}" for task in study.facts.tasks
                )
                rows.append(
                    f"| {name} | {role} | {scored.score:.4f} | {len(scored.evaluation.items)} | {values} |"
                )
    models = "\n".join(
        f"- {name}: `{fact.path}`" + _at(fact.revision) for name, fact in study.facts.parents.items()
    )
    methods = ", ".join(
        sorted({m.method for r in (recipe, *(stage for _, stage in recipe.stages)) for m in r.mixes})
    )
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
    program = (
        "mergekit-multi recipe.yaml --out-path OUT -I STAGES"
        if recipe.stages
        else "mergekit-yaml recipe.yaml OUT"
    )
    return f"- `recipe.yaml`: for mergekit 0.1.5 (`{program}`, in this folder)\n"


def _at(revision: str | None) -> str:
    return f" at {revision}" if revision else ""
