"""Where an exported candidate comes from: settings, parents, ancestors, scores."""

from __future__ import annotations

from typing import Any

from evomerge import __version__
from evomerge.store import Store, StudyRow, Trial


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
            {
                "role": role,
                "objective": s.reported,
                "metrics": dict(s.evaluation.metrics),
                "items": len(s.evaluation.items),
            }
            for role, s in store.evaluations(trial.recipe_id)
        ],
        "facts": study.facts.to_json(),
        "config": study.config,
    }
