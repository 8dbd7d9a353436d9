"""The model card of an exported candidate: where it comes from, for people and for the Hub."""

from __future__ import annotations

from collections.abc import Sequence

from evomerge import __version__
from evomerge._escaping import markdown
from evomerge._redaction import scrub
from evomerge.export import card_scores, choice
from evomerge.export.front_matter import front_matter
from evomerge.export.licenses import merged_license
from evomerge.export.merge_card import fenced, license_section, model_table
from evomerge.export.route_mergekit import NO_MERGEKIT_FILE
from evomerge.export.stored_candidate import StoredCandidate
from evomerge.methods import method
from evomerge.reports.route_text import hops
from evomerge.reports.summary import lost_skills, metric_names, study_summary

_LONGEST_RECIPE = 150  # lines of a recipe that a card shows
VERIFICATION = "## Verification"
"""Heading of the section that `evomerge.export.verification` writes."""


def render_card(candidate: StoredCandidate, notes: Sequence[str] = (), recipe: str | None = None) -> str:
    """The card: what the model is, what it scored and on how many items, beside the parents.

    Args:
        candidate: The candidate.
        notes: Sentences about its files.
        recipe: The mergekit recipe that lies beside the card, None without one.

    Returns:
        Markdown, with the front matter that the Hugging Face hub reads.
    """
    study, trial = candidate.study, candidate.trial
    origin = f"study `{study.name}`, seed {study.seed}. Recipe id `{candidate.recipe.id}`"
    models = candidate.models
    license = merged_license(models)
    title = f"{study.name}: candidate {trial.id}"
    route = ["", f"Route: {markdown(hops(candidate.recipe))}."] if candidate.is_route else []
    lines = [
        *front_matter(models, license, f"{study.name}-{trial.id}", card_scores.test_results(candidate)),
        f"# {title}",
        "",
        f"A merge ({', '.join(candidate.methods)}) found by evomerge {__version__}, {origin}.",
        "",
        *model_table(models),
        *route,
        "",
        *license_section(license, models),
        "",
        "## Scores",
        "",
        *card_scores.score_table(candidate),
        "",
        " ".join(choice.sentences(candidate)),
        "",
        "## What was searched",
        "",
        *_searched(candidate),
        "",
        "## Limits",
        "",
        *(f"- {line}" for line in _limits(candidate)),
        "",
        *_recipe_lines(recipe),
        "## Files",
        "",
        *_file_lines(candidate, notes),
        *(line for note in notes for line in ("", note)),
    ]
    return "\n".join(lines) + "\n"


def _searched(candidate: StoredCandidate) -> list[str]:
    """The space, the tasks with their items, and the work of the search."""
    store, facts = candidate.store, candidate.study.facts
    summary = study_summary(store, check=False)
    settings = candidate.settings
    metrics = metric_names(facts)
    tasks = "; ".join(
        f"{markdown(task)} by {markdown(metrics.get(task, 'its score'))}" for task in facts.tasks
    )
    axes = f", {len(facts.axes)} coefficients" if facts.axes else ""
    stages = ", then ".join(markdown(str(row["stage"])) for row in summary["stages"]) or "weights"
    kind = facts.objective.get("kind", "mean")
    counts = {role: sum(of.values()) for role, of in facts.items.items()}
    items = ", ".join(f"{count} for {role}" for role, count in counts.items())
    return [
        f"- Space: {markdown(str(settings.get('method', 'unknown')))}{axes}; stages: {stages}.",
        f"- Objective: {markdown(str(kind))} of {tasks or 'its tasks'}.",
        f"- Work: {summary['evaluations']} candidates in {summary['generations']} generations, "
        f"{summary['failed']} failed evaluations.",
        *([f"- Items: {items}."] if items else []),
    ]


def _limits(candidate: StoredCandidate) -> list[str]:
    """What the scores do not say."""
    outcome = candidate.study.outcome
    tested = any(
        row.role == "test" for row in card_scores.role_scores(candidate) if row.model == card_scores.OWN
    )
    lines = [
        "The scores are of the tasks above and their items; other abilities, languages and safety were not "
        "measured, and a merge may lose what its models were trained or aligned to do.",
    ]
    if not tested:
        lines.append(
            "No score of this candidate is on test items: those above are of items it was chosen by."
        )
    if outcome is not None and outcome.best.get("recipe") == candidate.trial.recipe_id:
        lost = lost_skills(outcome.retention)
        lines += [f"Against its models on the test items: {markdown(lost)}."] if lost else []
    if any(method(name).randomized for name in candidate.methods):
        lines.append(
            "Its method draws random masks: evomerge makes these weights again, mergekit others like them."
        )
    return lines


def _recipe_lines(recipe: str | None) -> list[str]:
    if recipe is None:
        return []
    text = scrub(recipe)
    if text.count("\n") > _LONGEST_RECIPE:
        return ["## Recipe", "", f"`recipe.yaml`, {text.count(chr(10)):,} lines.", ""]
    return ["## Recipe", "", *fenced(text, "yaml"), ""]


def _file_lines(candidate: StoredCandidate, notes: Sequence[str]) -> list[str]:
    lines = []
    if not any(note.startswith(NO_MERGEKIT_FILE) for note in notes):
        command = candidate.mergekit_command
        lines.append(f"- `recipe.yaml`: for mergekit 0.1.5 (`{command}`, in this folder)")
    return [
        *lines,
        "- `recipe.json`: exact, for `evomerge merge recipe.json OUT`",
        "- `lineage.json`: genome, ancestors, hashes of models and tasks, the settings",
        "- `LICENSES/`: licenses of the models merged, with their files",
        "- `commands.sh`: merge, score, serve and upload it; `Modelfile`: for Ollama",
        "- `CITATION.bib`, `environment.txt`: what to cite, and the versions that it was scored with",
    ]
