"""Facts of a study that must not change between start and resume."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from evomerge.config import Config, loading
from evomerge.errors import StudyError
from evomerge.store import Store, StudyFacts, study_facts

log = logging.getLogger(__name__)


def check_agreement(
    store: Store, settings: Config, text: str, overrides: Mapping[str, int], facts: StudyFacts
) -> None:
    """Begins a new study, or checks that the stored one is this one; only its budget and where it runs may differ."""
    stored = store.study()
    if stored is None:
        store.begin(settings.study, settings.search.seed, text, overrides, facts)
        return
    before, _ = loading.stored(stored.name, stored.config, stored.overrides)
    differing = [
        *study_facts.differences(_comparable(before), _comparable(settings)),
        *stored.facts.differences(facts),
    ]
    if differing:
        shown = "; ".join(differing[:6]) + (f"; and {len(differing) - 6} more" if len(differing) > 6 else "")
        raise StudyError(
            f"study '{settings.study}' was begun with other settings, so this would be another search: {shown}"
        )
    store.set_config(text, overrides)


def _comparable(settings: Config) -> dict[str, Any]:
    """Settings without the budget and the cluster, which may change between runs."""
    data = settings.model_dump(mode="json", exclude={"cluster", "budget", "reuse"})
    for key in ("evaluations", "finalists"):
        data["search"].pop(key)
    data["stages"][-1].pop("evaluations")
    data["stages"] = [
        {**stage, "evaluations": n} for stage, n in zip(data["stages"], settings.budgets[:-1], strict=False)
    ] + data["stages"][-1:]
    return data
