"""A search request -> a study ready to run: opened, loaded, checked against what is stored, planned."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evomerge.config import Config, loading
from evomerge.errors import StudyError, unwritable
from evomerge.evaluation import ROLES, Evaluator, Items, Objective, Role
from evomerge.launch import first_scores, listeners, memory, placement, route_screen, stages
from evomerge.launch import pool as pool_module
from evomerge.launch.facts import check_agreement, collect_facts
from evomerge.launch.objective import per_generation, race_settings
from evomerge.launch.opening import Allowed, LoadedSearch, open_search
from evomerge.launch.search_request import SearchRequest
from evomerge.methods.fused.table_files import TableFiles
from evomerge.search import Plan, Progress, Study
from evomerge.spaces import first_method, soup
from evomerge.store import Store, StudyFacts, paths, stop_request
from evomerge.workers import Pool
from evomerge.workers.machine_errors import is_worth_retrying
from evomerge.workers.worker import Worker

log = logging.getLogger(__name__)


def _silent(progress: Progress) -> None:
    """Shows no progress."""


def prepare_study(
    request: SearchRequest,
    studies: Path,
    *,
    allowed: Allowed | None = None,
    workers: int = 1,
    show: Callable[[Progress], None] = _silent,
    wrap: Callable[[Evaluator], Evaluator] | None = None,
    accept_floor: bool = False,
) -> Study:
    """Opens everything that a search needs and begins its study, or goes on with it.

        study = prepare_study(load("demo"), Path("results"))
        with study.store, contextlib.closing(study.pool):
            outcome = study.run()

    Args:
        request: The search.
        studies: Folder of the studies; the study is a folder of its name there.
        allowed: What the tasks may do; nothing unless given.
        workers: Processes of this machine that evaluate candidates, where the settings name no Ray; one is
            this process.
        show: Called with progress.
        wrap: Replaces the evaluator, for scoring by other means, in this process.
        accept_floor: Begin also where no parent has anything right in a task, or all answer it alike.

    Returns:
        The study, its store open for writing; the caller closes store and pool.

    Raises:
        StudyError: If the study exists and the request does not resume, if another process writes it, or if
            it was begun with other settings, models, tasks or versions.
        EvomergeError: If a model or a task cannot be opened.
    """
    settings = request.settings
    listeners.check_notify(settings, allowed or Allowed())
    on_cpu = placement.check_place(settings) if wrap is None else ""
    if on_cpu:
        show(Progress("opening models and tasks", 0, 1, None, on_cpu))
    earlier = pool_module.earlier(settings, studies)
    path = paths.store_path(settings.study, studies, new=True)
    before = _made(path.parent)
    try:
        store = Store.open(path, write=True)
    except BaseException:
        _leave(path.parent, before)
        raise
    try:
        stop_request.clear_stop(path.parent)  # one that comes from here on is seen
        if store.study() is not None and not request.resume:
            raise StudyError(
                f"study '{settings.study}' exists at {path.parent}; "
                "add --resume to go on, or choose another name"
            )
        _refuse_smaller_budget(store, request.effective_settings)
        return _prepare(
            request, store, _Execution(allowed or Allowed(), workers, earlier, show, wrap, accept_floor)
        )
    except BaseException:
        if path.name not in (before or ()) and store.study() is None:
            store.discard(keep=before or ())
            _leave(path.parent, before)
        store.close()
        raise


def _refuse_smaller_budget(store: Store, settings: Config) -> None:
    """Raises StudyError for a budget that is below what was done, and smaller than it was.

    The outcome would become that of the first candidates, and test items would be used for another winner.
    """
    stored = store.study()
    if stored is None:
        return
    before, _ = loading.stored(stored.name, stored.config, stored.overrides)
    budget, done = settings.budgets[-1], store.usage.searched(len(settings.budgets) - 1)
    if budget < min(done, before.budgets[-1]):
        raise StudyError(
            f"{done} evaluations are done in study '{stored.name}', and a budget of {budget} evaluations "
            f"would leave some of them out; give --evaluations {done} or more, or another study name"
        )


def _made(folder: Path) -> frozenset[str] | None:
    """Makes the folder of a study; the names in it where it was there already, None where it was not."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not folder.exists():
            folder.mkdir(exist_ok=True)
            return None
        return frozenset(path.name for path in folder.iterdir())
    except OSError as error:
        raise unwritable(folder, error) from None


def _leave(folder: Path, before: frozenset[str] | None) -> None:
    """Removes a folder that this start has made, where nothing is in it."""
    if before is None:
        with contextlib.suppress(OSError):
            folder.rmdir()


@dataclass(frozen=True, slots=True)
class _Execution:
    """How a search is run, no part of what it finds. earlier: stores whose evaluations are read."""

    allowed: Allowed
    workers: int
    earlier: Sequence[Path]
    show: Callable[[Progress], None]
    wrap: Callable[[Evaluator], Evaluator] | None
    accept_floor: bool


def _prepare(request: SearchRequest, store: Store, execution: _Execution) -> Study:
    settings, row = request.effective_settings, store.study()
    stored = None if row is None else row.facts
    loaded = _load(settings, execution, stored)
    facts = collect_facts(loaded, stored, pool_module.num_workers(settings, execution.workers))
    if stored is not None:
        check_agreement(store, request, facts)
        if request.retry_failed:
            _retry_failed(store, loaded.opened.objective, execution.show)
    else:
        first_scores.check_units(settings, loaded.opened.harness)
    plan = _plan(loaded, facts)
    if not loaded.is_replaced and pool_module.is_elsewhere(settings, execution.workers):
        loaded.scorer.leave_device()
    pool = _pool(loaded, facts, execution, stored)
    if stored is None:
        try:
            execution.show(Progress("scoring the parents", 0, 1))
            scores = first_scores.score_parents(plan, pool)
            first_scores.check_first_scores(settings, loaded, scores, accept_floor=execution.accept_floor)
        except BaseException:
            pool.close()
            raise
        check_agreement(store, request, facts)
        scores.record(store, plan.objective)
    return Study(plan, store, pool, execution.show, pool_module.dispatch(settings, store, pool))


def _load(settings: Config, execution: _Execution, stored: StudyFacts | None) -> LoadedSearch:
    """Opens models and tasks, loads the base, checks what routes need; logs what a user should know."""
    opened = open_search(settings, execution.allowed, stored)
    harness = opened.harness
    for warning in opened.warnings:
        log.warning(warning)
    planned = memory.check_memory(settings, opened.parents, memory.cards_here(), execution.workers)
    if planned:
        execution.show(Progress("opening models and tasks", 0, 1, None, planned))
    evaluator = execution.wrap(harness) if execution.wrap else harness
    # workers of other processes have the parents; this one looks at the base alone
    is_alone = execution.wrap is not None or not pool_module.is_elsewhere(settings, execution.workers)
    kept = functools.partial(memory.worker_memory, is_shared=False, holds_parents=is_alone)
    scorer = opened.load(evaluator, memory=kept)
    for warning in harness.warnings(scorer.model):
        log.warning(warning)
    limit = stored.max_nats_per_token if stored else None
    limit = route_screen.check_routes(settings, scorer, harness, limit)
    return LoadedSearch(opened, evaluator, scorer, limit)


def _retry_failed(store: Store, objective: Objective, show: Callable[[Progress], None]) -> None:
    """Takes out what failed by its machine, and says so."""
    done = store.retry.forget(is_worth_retrying, objective.task_values)
    if done is None:
        note = "no evaluation failed by its machine: nothing is scored anew"
    else:
        note = f"{done.evaluations} evaluations that failed by their machine are scored anew"
        if done.generation is not None:
            note += f", and {done.trials} candidates are asked for anew from generation {done.generation} on"
        note += f"; the study as it was: {done.copy}"
    show(Progress("opening models and tasks", 0, 1, None, note))


def _plan(loaded: LoadedSearch, facts: StudyFacts) -> Plan:
    opened = loaded.opened
    settings, space, parents = opened.settings, opened.space, opened.parents
    items: dict[Role, Items] = {role: loaded.evaluator.items(role) for role in ROLES}
    return Plan(
        stages=stages.open_stages(settings, space, parents, facts, items["search"]),
        baselines=stages.reference_recipes(settings, space, parents),
        soup=functools.partial(soup, first_method(space)) if settings.merges_weights else None,
        objective=opened.objective,
        items=items,
        per_generation=per_generation(settings, opened.objective),
        finalists=settings.search.finalists,
        seed=settings.search.seed,
        race=race_settings(settings),
        islands=pool_module.islands(settings, facts.num_workers),
        pipelined=settings.search.pipelined,
    )


def _pool(loaded: LoadedSearch, facts: StudyFacts, execution: _Execution, stored: StudyFacts | None) -> Pool:
    settings = loaded.opened.settings

    def note(text: str) -> None:
        execution.show(Progress("opening models and tasks", 0, 1, None, text))

    note(f"parents: {loaded.scorer.placed.description}")
    hashes = {name: fact.sha256 for name, fact in facts.parents.items()}
    if loaded.scorer.is_open:  # else the processes that evaluate keep them
        loaded.scorer.tables.keep_on_disk(TableFiles(hashes))
    make = None
    if not loaded.is_replaced:
        sharing = pool_module.workers_of_a_card(settings, execution.workers)
        limit = loaded.max_nats_per_token
        known = (settings, execution.allowed, limit, stored, sharing, hashes)
        make = functools.partial(_open_worker, *known)
    pool = pool_module.open_pool(settings, loaded.scorer, make, execution.workers, note)
    return pool_module.reuse(pool, execution.earlier, facts)


def _open_worker(
    settings: Config,
    allowed: Allowed,
    max_nats_per_token: float | None,
    stored: StudyFacts | None,
    sharing: int,
    hashes: Mapping[str, str],
) -> Worker:
    """A worker in a process of its own.

    max_nats_per_token: the limit of routes that the driver found; sharing: workers of a card; hashes: of the
    content of each parent.
    """
    opened = open_search(settings, allowed, stored, is_checked=True)
    scorer = opened.load(memory=functools.partial(memory.worker_memory, is_shared=True, workers=sharing))
    scorer.tables.keep_on_disk(TableFiles(hashes))
    scorer.screen = route_screen.open_screen(settings, opened.harness, scorer, max_nats_per_token)
    return scorer
