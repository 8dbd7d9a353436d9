"""The facts of a study: collected when it is opened, and compared with the stored ones when it is resumed."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from evomerge import __version__
from evomerge.config import Config, loading, locations
from evomerge.errors import StudyError
from evomerge.evaluation import ROLES
from evomerge.evaluation.budgets import budgets_of
from evomerge.evaluation.task_set import items_digest
from evomerge.launch.objective import task_terms
from evomerge.launch.opening import LoadedSearch, backends, device_name
from evomerge.launch.retained_texts import retained_sources
from evomerge.launch.search_request import SearchRequest
from evomerge.launch.tasks import scoring_facts
from evomerge.launch.weight_space import is_diagonal, searched_unnamed
from evomerge.store import ParentFacts, Store, StudyFacts, score_check, study_facts
from evomerge.workers.device import card

_PACKAGES = ("torch", "transformers", "lm_eval", "cma", "safetensors", "numpy")
_SHOWN = 6  # differences that an error names


def collect_facts(loaded: LoadedSearch, stored: StudyFacts | None, num_workers: int) -> StudyFacts:
    """The facts of a search that is open and loaded.

    Args:
        loaded: The search.
        stored: Of the study that is resumed, None for a new one: what it began with stays.
        num_workers: Workers that a new study begins with.

    Returns:
        Everything beside the settings that must not change between start and resume.
    """
    from evomerge.evaluation.inference import verification_cache

    opened, evaluator = loaded.opened, loaded.evaluator
    settings, parents, harness = opened.settings, opened.parents, opened.harness
    items = {role: evaluator.items(role) for role in ROLES}
    axes = tuple(axis.name for axis in opened.space.axes) if settings.kinds[0] == "weights" else ()
    return StudyFacts(
        parents={
            name: ParentFacts(model.path, model.revision, parents[name].content_hash())
            for name, model in settings.models.items()
        },
        tasks=harness.fingerprint(),
        # what an older version began knows of no sources, and goes on without
        sources={} if stored and not stored.sources else {**harness.sources(), **retained_sources(settings)},
        metrics={t.task: harness.metric(t.task) for t in settings.tasks},
        filters={t.task: name for t in settings.tasks if (name := harness.filter(t.task)) is not None},
        terms=task_terms(settings, harness),
        backends={} if loaded.is_replaced else backends(harness, loaded.scorer.model),
        items={role: {task: len(ids) for task, ids in of.items()} for role, of in items.items()},
        item_sets={role: {task: items_digest(ids) for task, ids in of.items()} for role, of in items.items()},
        axes=axes,
        searched=stored.searched if stored else searched_unnamed(settings),
        # a larger budget must not change the optimizer, nor when a stage ends
        diagonal=stored.diagonal if stored else is_diagonal(settings, opened.space),
        budgets=(stored.budgets if stored else ()) or settings.budgets,
        scoring=scoring_facts(settings, parents[settings.base], device_name()) | _card_facts(device_name()),
        max_nats_per_token=loaded.max_nats_per_token,
        num_workers=stored.num_workers if stored else num_workers,
        base_layers=parents[settings.base].layout.num_layers,
        threads=torch.get_num_threads(),
        objective=score_check.objective_facts(opened.objective),
        files={key: paths for key, paths in locations.files(settings).items() if paths and key != "reuse"},
        versions=_versions(),
        limits=_limits(settings),
        verifications=(stored.verifications if stored else {}) or verification_cache.known(),
    )


def check_agreement(store: Store, request: SearchRequest, facts: StudyFacts) -> None:
    """Begins a new study, or checks that the stored one is this one.

    Only its budget and where it runs may differ.

    Args:
        store: Open for writing.
        request: The search; its YAML and overrides are stored.
        facts: Of the search as it is now.

    Raises:
        StudyError: If the stored study has other settings or facts; names the first differences.
    """
    settings, stored = request.effective_settings, store.study()
    if stored is None:
        store.begin(settings.study, settings.search.seed, request.text, request.overrides, facts)
        return
    before, _ = loading.stored(stored.name, stored.config, stored.overrides)
    mixes = request.mix_engines
    differences = study_facts.differences(_comparable(before, mixes), _comparable(settings, mixes))
    if mixes:
        differences += _without_engine(stored.facts).differences(_without_engine(facts))
    else:
        differences += stored.facts.differences(facts)
    if differences:
        shown = "; ".join(differences[:_SHOWN])
        if len(differences) > _SHOWN:
            shown += f"; and {len(differences) - _SHOWN} more"
        raise StudyError(
            f"study '{settings.study}' was begun with other settings, "
            f"so this would be another search: {shown}"
        )
    moved = replace(
        stored.facts,
        parents=facts.parents,
        files=facts.files,
        objective=facts.objective,
        limits=facts.limits,
    )
    if mixes:
        moved = replace(moved, backends=_mixed(stored.facts.backends, facts.backends))
    store.set_config(settings.study, request.text, request.overrides, moved)


def _card_facts(device: str) -> dict[str, Any]:
    """What scores depend on where a card computes them: its kind, and the budgets that plans follow from.

    Nothing for a CPU, whose budgets are the same for all studies.
    """
    if torch.device(device).type == "cpu":
        return {}
    return {**card(device), "budgets": budgets_of(torch.device(device)).to_json()}


def _limits(settings: Config) -> dict[str, Any]:
    """What the search may use up, as `evomerge.reports.tally.Limits` reads it."""
    budget = settings.budget.model_dump(mode="json", exclude_none=True)
    return {**budget, "budgets": list(settings.budgets), "gpus": settings.cluster.gpus or 1.0}


def _versions() -> dict[str, str]:
    versions = {"evomerge": __version__, "python": platform.python_version()}
    return versions | {package: version(package) for package in _PACKAGES}


def _without_engine(facts: StudyFacts) -> StudyFacts:
    """Facts without what says which engine generated texts."""
    scoring = {key: value for key, value in facts.scoring.items() if key != "backend"}
    return replace(facts, backends={}, scoring=scoring)


def _mixed(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """What answers each task, where the engine was changed by request: all that did, in their order."""
    return {
        task: before[task]
        if answered in before[task].split(", then ")
        else f"{before[task]}, then {answered}"
        for task, answered in now.items()
        if task in before
    }


_THEN = ", then "
_ENGINE_PLACES = {"process", "push", "cache_gb", "threads"}
"""Keys of `evaluation.engine` that texts do not depend on."""


def _comparable(settings: Config, mixes_engines: bool = False) -> dict[str, Any]:
    """Settings without the budget and the cluster, which may change between runs, and without places.

    The folder names the study; models are compared by their content, and so are the tasks of a folder.

    The budgets of all stages but the last must not change: they say where the next stage begins.
    """
    data = settings.model_dump(
        mode="json", exclude={"cluster", "budget", "reuse", "trackers", "notify", "license"}
    )
    del data["study"]
    data["models"] = {name: {} for name in data["models"]}
    del data["evaluation"]["include"]
    for key in _ENGINE_PLACES:
        del data["evaluation"]["engine"][key]
    if mixes_engines:
        del data["evaluation"]["engine"], data["evaluation"]["backend"]
    data["evaluation"]["training_texts"] = [Path(text).name for text in settings.evaluation.training_texts]
    data["hand_recipes"] = {label: Path(file).name for label, file in settings.hand_recipes.items()}
    for key in ("evaluations", "finalists"):
        data["search"].pop(key)
    for stage in data["stages"]:
        if stage["retain"] is not None:  # by its content, see `evomerge.launch.retained_texts`
            stage["retain"] = Path(stage["retain"]).name
    *earlier, last = data["stages"]
    last.pop("evaluations")
    budgets = settings.budgets[:-1]
    fixed = [{**stage, "evaluations": n} for stage, n in zip(earlier, budgets, strict=True)]
    data["stages"] = [*fixed, last]
    return data
