"""The model card of an exported candidate: where it comes from, for people."""

from __future__ import annotations

from collections.abc import Sequence

from evomerge import __version__
from evomerge._escaping import markdown, markdown_code
from evomerge.export import choice
from evomerge.export.merge_card import front_matter
from evomerge.export.route_mergekit import NO_MERGEKIT_FILE
from evomerge.export.stored_candidate import StoredCandidate
from evomerge.reports.route_text import hops


def render_card(candidate: StoredCandidate, notes: Sequence[str] = ()) -> str:
    """The card: what the model is, what it scored and on how many items, beside the parents.

    Args:
        candidate: The candidate.
        notes: Sentences about its files.

    Returns:
        Markdown, with the front matter that the Hugging Face hub reads.
    """
    study, trial, recipe = candidate.study, candidate.trial, candidate.recipe
    origin = f"study `{study.name}`, seed {study.seed}. Recipe id `{recipe.id}`"
    models = [_model_line(name, fact.path, fact.revision) for name, fact in study.facts.parents.items()]
    route = ["", f"Route: {markdown(hops(recipe))}."] if candidate.is_route else []
    files = []
    if not any(note.startswith(NO_MERGEKIT_FILE) for note in notes):
        command = candidate.mergekit_command
        files.append(f"- `recipe.yaml`: for mergekit 0.1.5 (`{command}`, in this folder)")
    lines = [
        *front_matter(candidate.references.values()),
        f"# {study.name}: candidate {trial.id}",
        "",
        f"A merge ({', '.join(candidate.methods)}) found by evomerge {__version__}, {origin}.",
        "The license is not set: it follows from those of the models merged, which are",
        "",
        *models,
        *route,
        "",
        "## Scores",
        "",
        *_score_rows(candidate),
        "",
        " ".join(choice.sentences(candidate)),
        "",
        "## Files",
        "",
        *files,
        "- `recipe.json`: exact, for `evomerge merge recipe.json OUT`",
        "- `lineage.json`: genome, ancestors, hashes of models and tasks, the settings",
        *(line for note in notes for line in ("", note)),
    ]
    return "\n".join(lines) + "\n"


def _model_line(name: str, path: str, revision: str | None) -> str:
    at = f" at {markdown(revision)}" if revision else ""
    return f"- {markdown(name)}: {markdown_code(path)}{at}"


def _score_rows(candidate: StoredCandidate) -> list[str]:
    """A Markdown table: a row for each role of this model and of each parent."""
    store, tasks = candidate.store, list(candidate.study.facts.tasks)
    rows = [
        "| model | role | objective | items | " + " | ".join(map(markdown, tasks)) + " |",
        "| --- " * (4 + len(tasks)) + "|",
    ]
    models = [("this model", candidate.trial.recipe_id)]
    models += [(str(t.label), t.recipe_id) for t in store.trials() if t.origin == "parent"]
    for name, recipe_id in models:
        for role, scored in store.evaluations(recipe_id):
            if role == "search" or scored.score is None:
                continue
            metrics, count = scored.evaluation.metrics, len(scored.evaluation.items)
            values = " | ".join(f"{metrics.get(task, float('nan')):.4f}" for task in tasks)
            rows.append(f"| {markdown(name)} | {role} | {scored.score:.4f} | {count} | {values} |")
    return rows
