"""Where an exported candidate comes from, for programs: settings, parents, ancestors, scores."""

from __future__ import annotations

from typing import Any

from evomerge import __version__, _yaml
from evomerge._redaction import scrub_data
from evomerge.store import Store, StudyRow, Trial


def candidate_lineage(store: Store, study: StudyRow, trial: Trial) -> dict[str, Any]:
    """Everything needed to know how a candidate came about.

    Args:
        store: The store of its study.
        study: The study's row.
        trial: The candidate.

    Returns:
        Plain data without secrets: genome, parents and scores by role, the study's facts, and its settings;
        no comment of its search file.
    """
    lineage = {
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
            {
                "role": role,
                "objective": scored.reported,
                "metrics": dict(scored.evaluation.metrics),
                "items": len(scored.evaluation.items),
            }
            for role, scored in store.evaluations(trial.recipe_id)
        ],
        "facts": study.facts.to_json(),
        "config": _yaml.parse(study.config, f"{study.name} (stored)").data,
    }
    scrubbed: dict[str, Any] = scrub_data(lineage)
    return scrubbed
