"""Where an exported candidate comes from, for programs: settings, parents, ancestors, scores."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from evomerge import __version__, _yaml
from evomerge._redaction import scrub_data
from evomerge.export.source_models import SourceModel
from evomerge.store import Store, StudyRow, Trial


def candidate_lineage(
    store: Store, study: StudyRow, trial: Trial, models: Sequence[SourceModel] = ()
) -> dict[str, Any]:
    """Everything needed to know how a candidate came about.

    Args:
        store: The store of its study.
        study: The study's row.
        trial: The candidate.
        models: The models that its recipe reads, with their cards.

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
        "models": [
            {
                "name": model.name,
                "repository": model.repository,
                "revision": model.revision,
                "license": None if model.card.license is None else model.card.license.shown,
                "base_models": list(model.card.base_models),
            }
            for model in models
        ],
        "facts": study.facts.to_json(),
        "config_sha256": hashlib.sha256(study.config.encode()).hexdigest(),
        "config": _settings(study),
    }
    scrubbed: dict[str, Any] = scrub_data(lineage)
    return scrubbed


def _settings(study: StudyRow) -> Any:
    """The search file without addresses of people and chats, which may let anybody write there."""
    settings = _yaml.parse(study.config, f"{study.name} (stored)").data
    return {key: value for key, value in settings.items() if key != "notify"}
