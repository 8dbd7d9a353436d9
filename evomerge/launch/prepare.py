"""Configuration -> a running search: opens parents, builds space, tasks, worker and store, and starts the study."""

from __future__ import annotations

import functools
import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from evomerge import __version__
from evomerge.config import Config, loading
from evomerge.errors import StudyError
from evomerge.evaluation import ROLES, Evaluator
from evomerge.evaluation.task_set import items_digest
from evomerge.launch import pool as pool_module
from evomerge.launch import route_stages, stages
from evomerge.launch.facts import check_agreement
from evomerge.launch.objective import per_generation, race_settings, task_terms
from evomerge.launch.opening import Allowed, backends, device_name, open_search
from evomerge.launch.tasks import scoring
from evomerge.launch.weight_space import is_diagonal
from evomerge.merging import parent_placement
from evomerge.search import Plan, Progress, Study
from evomerge.spaces import soup
from evomerge.store import ParentFacts, Store, StudyFacts, paths, stop_request
from evomerge.workers import worker

log = logging.getLogger(__name__)
_PACKAGES = ("torch", "transformers", "lm_eval", "cma", "safetensors", "numpy")


def prepare(
    settings: Config,
    text: str,
    studies: Path,
    *,
    overrides: Mapping[str, int] | None = None,
    resume: bool = False,
    allowed: Allowed | None = None,
    workers: int = 1,
    show: Callable[[Progress], None] = lambda progress: None,
    wrap: Callable[[Evaluator], Evaluator] = lambda evaluator: evaluator,
) -> Study:
    """A study ready to `run`, with its store open for writing; `study.store.close()` when done.

    text: the YAML of the settings; overrides: budget or seed that replace the YAML's. resume: go on with a study that
    exists. allowed: what the user let the tasks do. workers: processes of this machine that candidates are evaluated in, where
    the settings name no Ray; one is this one. wrap: replaces the evaluator, for scoring by other means, in this process. Raises
    StudyError if the study exists and resume is not asked, if another process writes it, or if it was begun with other
    settings, models, tasks or versions.
    """
    earlier = pool_module.earlier(settings, studies)
    path = paths.store_path(settings.study, studies, new=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    store = Store.open(path, write=True)
    stop_request.clear_stop(path.parent)  # one that comes from here on is seen
    if store.study() is not None and not resume:
        store.close()
        raise StudyError(
            f"study '{settings.study}' exists at {path.parent}; add --resume to go on, or choose another name"
        )
    try:
        asked = loading.override(settings, overrides or {})
        return _prepare(
            asked, text, store, overrides or {}, allowed or Allowed(), workers, earlier, show, wrap
        )
    except BaseException:
        empty = store.study() is None
        store.close()
        if empty:
            _remove(path)
        raise


def _prepare(
    settings: Config,
    text: str,
    store: Store,
    overrides: Mapping[str, int],
    allowed: Allowed,
    workers: int,
    earlier: Sequence[Path],
    show: Callable[[Progress], None],
    wrap: Callable[[Evaluator], Evaluator],
) -> Study:
    opened = open_search(settings, allowed)
    parents, space, harness = opened.parents, opened.space, opened.harness
    for warning in opened.warnings:
        log.warning(warning)
    evaluator = wrap(harness)
    scorer = opened.load(evaluator)
    for finding in harness.warnings(scorer.model):
        log.warning(finding)
    search, stored = settings.search, store.study()
    routed = route_stages.check_routes(
        settings, parents, scorer, harness, stored.facts.max_nats_per_token if stored else None
    )
    facts = StudyFacts(
        parents={
            name: ParentFacts(m.path, m.revision, parents[name].content_hash())
            for name, m in settings.models.items()
        },
        tasks=harness.fingerprint(),
        metrics={t.task: harness.metric(t.task) for t in settings.tasks},
        terms=task_terms(settings, harness),
        backends=backends(harness, scorer.model) if evaluator is harness else {},
        items={role: {task: len(ids) for task, ids in evaluator.items(role).items()} for role in ROLES},
        item_sets={
            role: {task: items_digest(ids) for task, ids in evaluator.items(role).items()} for role in ROLES
        },
        axes=tuple(axis.name for axis in space.axes) if settings.kinds[0] == "weights" else (),
        # a larger budget must not change the optimizer, nor when a stage ends
        diagonal=stored.facts.diagonal if stored else is_diagonal(settings, space),
        budgets=(stored.facts.budgets if stored else ()) or settings.budgets,
        scoring=scoring(settings, parents[settings.base], device_name()),
        max_nats_per_token=routed,
        num_workers=stored.facts.num_workers if stored else pool_module.num_workers(settings, workers),
        base_layers=parents[settings.base].layout.num_layers,
        threads=torch.get_num_threads(),
        versions={
            "evomerge": __version__,
            "python": platform.python_version(),
            **{p: version(p) for p in _PACKAGES},
        },
    )
    check_agreement(store, settings, text, overrides, facts)
    plan = Plan(
        stages=stages.stages(settings, space, parents, facts.diagonal, facts.budgets, facts.num_workers),
        baselines=stages.references(settings, space, parents),
        soup=functools.partial(soup, space) if "weights" in settings.kinds else None,
        objective=opened.objective,
        items={role: evaluator.items(role) for role in ROLES},
        per_generation=per_generation(settings, opened.objective),
        finalists=search.finalists,
        seed=search.seed,
        race=race_settings(settings),
        islands=pool_module.islands(settings, facts.num_workers),
        pipelined=search.pipelined,
    )

    def said(text: str) -> None:
        show(Progress("opening models and tasks", 0, 1, None, text))

    said(f"parents: {parent_placement.describe(scorer.placements)}")
    make = functools.partial(_open_worker, settings, allowed, routed) if evaluator is harness else None
    pool = pool_module.open_pool(settings, scorer, make, workers, facts, earlier, said)
    return Study(plan, store, pool, show, pool_module.dispatch(settings, store, pool))


def _open_worker(settings: Config, allowed: Allowed, gate: float | None) -> worker.Worker:
    """A worker of a search, in a process of its own. gate: what the driver found that a route may have of nats a token."""
    opened = open_search(settings, allowed)
    scorer = opened.load()
    scorer.screen = route_stages.gate(settings, opened.harness, scorer, gate)
    return scorer


def _remove(path: Path) -> None:
    """Takes back a study that never began."""
    for file in path.parent.glob(path.name + "*"):
        file.unlink()
    if not any(path.parent.iterdir()):
        path.parent.rmdir()
