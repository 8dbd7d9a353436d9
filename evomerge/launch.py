"""Configuration -> a running search: opens parents, builds space, tasks, worker and store, and starts the study."""

from __future__ import annotations

import functools
import logging
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from evomerge import __version__, config, placement, pooling, racing, staging, study_files, worker
from evomerge.baselines import soup
from evomerge.checkpoint import COMPONENTS, Parent, check_compatible
from evomerge.config import Config
from evomerge.errors import CandidateError, ConfigError, StudyError
from evomerge.evaluation import ROLES, Evaluator, Items, Objective, Term, missing
from evomerge.lora import open_parent
from evomerge.methods import method
from evomerge.several import TaskSet, digest
from evomerge.space import EMBEDDINGS, HEAD, Range, Space
from evomerge.stages import Plan, Progress
from evomerge.store import Store, StudyRow
from evomerge.study import Study
from evomerge.task_sets import open_tasks, scoring
from evomerge.vocabulary import check_rows

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
    earlier = pooling.earlier(settings, studies)
    path = study_files.store_path(settings.study, studies, new=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    store = Store.open(path, write=True)
    study_files.clear_stop(path.parent)  # one that comes from here on is seen
    if store.study() is not None and not resume:
        store.close()
        raise StudyError(f"study '{settings.study}' exists at {path.parent}; add --resume to go on, or choose another name")
    try:
        asked = config.override(settings, overrides or {})
        return _prepare(asked, text, store, overrides or {}, allowed or Allowed(), workers, earlier, show, wrap)
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
    for finding in harness.findings(scorer.model):
        log.warning(finding)
    search, stored = settings.search, store.study()
    routed = staging.check_routes(settings, parents, scorer, harness, stored.facts.get("gate") if stored else None)
    facts: dict[str, Any] = {
        "parents": {name: {"path": m.path, "revision": m.revision, "sha256": parents[name].content_hash()} for name, m in settings.models.items()},
        "tasks": harness.fingerprint(),
        "metrics": {t.task: harness.metric(t.task) for t in settings.tasks},
        "terms": _terms(settings, harness),
        "backends": backends(harness, scorer.model) if evaluator is harness else {},
        "items": {role: {task: len(ids) for task, ids in evaluator.items(role).items()} for role in ROLES},
        "item_sets": {role: {task: digest(ids) for task, ids in evaluator.items(role).items()} for role in ROLES},
        "axes": [axis.name for axis in space.axes] if settings.kinds[0] == "weights" else [],
        # a larger budget must not change the optimizer, nor when a stage ends
        "diagonal": stored.facts["diagonal"] if stored else is_diagonal(settings, space),
        "budgets": stored.facts["budgets"] if stored and "budgets" in stored.facts else list(settings.budgets),
        "scoring": scoring(settings, parents[settings.base], _device()),
        "gate": routed,
        "crew": stored.facts["crew"] if stored else pooling.crew(settings, workers),
        "depth": parents[settings.base].num_layers,
        "threads": torch.get_num_threads(),
        "versions": {"evomerge": __version__, "python": platform.python_version(), **{p: version(p) for p in _PACKAGES}},
    }
    _agree(store, settings, text, overrides, facts)
    plan = Plan(
        stages=staging.stages(settings, space, parents, facts["diagonal"], facts["budgets"], facts["crew"]),
        baselines=staging.references(settings, space, parents),
        soup=functools.partial(soup, space) if "weights" in settings.kinds else None,
        objective=opened.objective,
        items={role: evaluator.items(role) for role in ROLES},
        per_generation=per_generation(settings, opened.objective),
        finalists=search.finalists,
        seed=search.seed,
        race=_race(settings),
        islands=pooling.islands(settings, facts["crew"]),
        pipelined=search.pipelined,
    )

    def said(text: str) -> None:
        show(Progress("opening models and tasks", 0, 1, None, text))

    said(f"parents: {placement.said(scorer.places)}")
    make = functools.partial(_open_worker, settings, allowed, routed) if evaluator is harness else None
    pool = pooling.open_pool(settings, scorer, make, workers, facts, earlier, said)
    return Study(plan, store, pool, show, pooling.dispatch(settings, store, pool))


@dataclass(frozen=True, slots=True)
class Allowed:
    """What a user let the tasks do. python: run functions that the settings name; tasks: load task folders that are not shipped."""

    python: bool = False
    tasks: bool = False


def _open_worker(settings: Config, allowed: Allowed, gate: float | None) -> worker.Worker:
    """A worker of a search, in a process of its own. gate: what the driver found that a route may have of nats a token."""
    opened = open_search(settings, allowed)
    scorer = opened.load()
    scorer.gate = staging.gate(settings, opened.harness, scorer, gate)
    return scorer


def is_diagonal(settings: Config, space: Space) -> bool:
    """Whether CMA-ES learns a diagonal covariance: as asked, else where the budget is too small for a full one."""
    search = settings.search
    return search.diagonal if search.diagonal is not None else settings.budgets[0] < 20 * len(space.axes)


def per_generation(settings: Config, objective: Objective) -> dict[str, int]:
    """Task with items -> how many of them a generation is scored on."""
    return {leaf: settings.evaluation.items_of(t.task) for t in objective.terms for leaf, _ in t.strata}


def first_items(pool: Items, settings: Config, objective: Objective) -> dict[str, tuple[str, ...]]:
    """As many items of each task as a generation is scored on."""
    counts = per_generation(settings, objective)
    return {task: tuple(ids[: counts[task]]) for task, ids in pool.items()}


def backends(harness: Any, model: torch.nn.Module) -> dict[str, str]:
    """Task -> what answers it with this model: 'compiled', or 'lm-eval: ' and why; 'nothing: ' and why where it cannot be asked at all."""
    try:
        found: dict[str, str] = harness.backends(model)
    except CandidateError as error:  # the search will say so of every candidate
        return dict.fromkeys(harness.items("search"), f"nothing: {error}")
    return found


def _device() -> str:
    """$EVOMERGE_DEVICE, else the first CUDA device, else the CPU."""
    return os.environ.get("EVOMERGE_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")


def _set_threads(base: Parent) -> None:
    """$EVOMERGE_THREADS, else one for models too small to share out (under 20 M parameters), else every core.

    Scores are compared bit for bit at resume, and sums depend on the number of threads: it is one of the study's facts.
    """
    small = sum(math.prod(info.shape) for info in base.tensors.values()) < 20_000_000
    given = os.environ.get("EVOMERGE_THREADS", "")
    if given and not (given.isascii() and given.isdigit() and 0 < int(given) < 10_000):
        raise ConfigError(f"$EVOMERGE_THREADS must be a number of threads, got '{given}'; correct or unset it")
    threads = int(given) if given else 1 if small else os.cpu_count() or 1
    torch.set_num_threads(threads)


def _remove(path: Path) -> None:
    """Takes back a study that never began."""
    for file in path.parent.glob(path.name + "*"):
        file.unlink()
    if not any(path.parent.iterdir()):
        path.parent.rmdir()


def open_parents(models: Mapping[str, tuple[str, str | None]]) -> dict[str, Parent]:
    """Opens models by name: name -> (path or repository, revision)."""
    return {name: open_parent(f"{path}@{revision}" if revision else path) for name, (path, revision) in models.items()}


def stored_parents(store: Store) -> dict[str, Parent]:
    """The parents of a stored study; raises StudyError if their content is no longer what was searched."""
    study = store.study()
    if study is None:
        raise StudyError(f"{store.path} holds no study yet")
    facts = study.facts["parents"]
    parents = open_parents({name: (fact["path"], fact["revision"]) for name, fact in facts.items()})
    for name, parent in parents.items():
        if parent.content_hash() != facts[name]["sha256"]:
            raise StudyError(f"model '{name}' at {parent.path} is not the one that {study.name} was searched with; bring that one back")
    return parents


@dataclass(frozen=True, slots=True)
class Opened:
    """The models, tasks and space of a search, open. warnings: what a user should know of the models."""

    settings: Config
    parents: Mapping[str, Parent]
    space: Space
    harness: TaskSet
    objective: Objective
    warnings: tuple[str, ...] = ()

    def load(self, evaluator: Evaluator | None = None) -> worker.Worker:
        """Loads the base and merges into it; scores by `evaluator` where one is given."""
        own = self.harness if evaluator is None else evaluator
        return worker.Worker(self.parents, self.settings.base, own, dtype=self.settings.out_dtype, device=_device())


def open_search(settings: Config, allowed: Allowed | None = None) -> Opened:
    """Opens what a search needs; raises what `prepare` raises for models that do not fit each other and tasks that cannot be had."""
    parents = open_parents({name: (m.path, m.revision) for name, m in settings.models.items()})
    check_compatible(parents, settings.base)
    warning = check_rows(parents, settings.base)
    return _opened(settings, parents, (warning,) if warning else (), allowed)


def open_study(store: Store, allowed: Allowed | None = None) -> Opened:
    """Opens what a stored study was searched with; raises StudyError where a model or a task is no longer what it was."""
    parents = stored_parents(store)
    study = store.study()
    assert study is not None
    settings, _ = config.stored(study.name, study.config, study.overrides)
    opened = _opened(settings, parents, (), allowed)
    if changed := [task for task, digest in opened.harness.fingerprint().items() if study.facts["tasks"].get(task) != digest]:
        raise StudyError(f"task '{changed[0]}' is not what {study.name} was searched with: its items, prompts or settings differ; bring those back")
    return opened


def _opened(settings: Config, parents: Mapping[str, Parent], warnings: tuple[str, ...], allowed: Allowed | None) -> Opened:
    _set_threads(parents[settings.base])
    space = make_space(settings, parents)
    may = allowed or Allowed()
    harness = open_tasks(settings, parents[settings.base], device=_device(), allow_python=may.python, allow_tasks=may.tasks)
    return Opened(settings, parents, space, harness, _objective(settings, _terms(settings, harness), parents[settings.base].num_layers), warnings)


def make_space(settings: Config, parents: Mapping[str, Parent]) -> Space:
    """The search space of a configuration over open parents."""
    base = parents[settings.base]
    sizes = settings.space.groups
    groups = tuple(sizes) if isinstance(sizes, tuple) else _divide(base.num_layers, sizes)
    if sum(groups) != base.num_layers:
        raise ConfigError(f"space.groups add up to {sum(groups)} layers, '{settings.base}' has {base.num_layers}")
    rule = method(settings.method)
    ranges = {}
    for param in rule.params:
        given = settings.space.parameters.get(param.name)
        if isinstance(given, bool | int | float):
            ranges[param.name] = Range(float(given), float(given), float(given))
        elif given is not None:
            ranges[param.name] = Range(given.low, given.high, given.start)
        elif not param.flag and param.name in ("weight", "t"):
            ranges[param.name] = Range(param.low, param.high, 0.5 if param.name == "t" else 1.0 / len(settings.parents))
    space = Space(
        method=rule,
        base=settings.base,
        models=settings.parents,
        groups=groups,
        components=settings.space.components,
        segments=_segments(base),
        ranges=ranges,
        embeddings=settings.space.embeddings,
        head=settings.space.head,
        out_dtype=settings.out_dtype,
        seed=settings.search.seed,
        searchable=False,
    )
    dead = _dead(space, parents) if rule.needs_base else frozenset()
    return Space(**{f: getattr(space, f) for f in space.__dataclass_fields__ if f not in ("axes", "dead", "searchable")}, dead=dead)


def _terms(settings: Config, harness: Any) -> dict[str, dict[str, Any]]:
    """What the tasks say of themselves: a fact of the study, so that its scores are compared without loading tasks."""
    return {
        t.task: {
            "sign": harness.sign(t.task),
            "mean": harness.is_mean(t.task),
            "measures": list(harness.measures(t.task)),
            "leaves": [[leaf, share] for leaf, share in harness.leaves(t.task)],
        }
        for t in settings.tasks
    }


def _objective(settings: Config, said: Mapping[str, Mapping[str, Any]], depth: int = 0) -> Objective:
    """The objective of a configuration; said: `_terms`; depth: layers that cost nothing.

    Raises ConfigError where a task lacks a soft score it is to be searched by."""
    terms, tie = [], settings.search.tie_break
    for t in settings.tasks:
        own = said[t.task]
        search = tuple(t.search.items())
        asked = [*(m for m, _ in search if m != "metric"), *((tie,) if tie not in (None, "none") else ())]
        if lacking := [m for m in asked if m not in own["measures"]]:
            raise ConfigError(missing(t.task, str(lacking[0])))
        terms.append(Term(t.task, t.weight, own["sign"], search, tuple((leaf, share) for leaf, share in own["leaves"]), own["mean"]))
    keep, break_ties = tuple(settings.keep.items()), "probability" if tie is None else tie
    objective = Objective(tuple(terms), settings.objective, keep, break_ties, settings.routes.penalty, depth)
    if settings.search.race is not None:
        racing.check(objective)
    return objective


def _race(settings: Config) -> racing.Race | None:
    given = settings.search.race
    return None if given is None else racing.Race(given.rungs, given.error)


def stored_objective(study: StudyRow) -> Objective:
    """The objective of a stored study, from its rows alone; raises StudyError for one begun before tasks were described there."""
    settings, _ = config.stored(study.name, study.config, study.overrides)
    if "terms" not in study.facts:
        raise StudyError(f"{study.name} was begun with an evomerge that did not store what its tasks' metrics are; begin it anew to compare")
    return _objective(settings, study.facts["terms"], study.facts.get("depth", 0))


def _divide(layers: int, groups: int) -> tuple[int, ...]:
    """Sizes of `groups` groups that differ by at most one; the bottom ones are the larger."""
    groups = min(groups, layers)
    return tuple(layers // groups + (i < layers % groups) for i in range(groups))


def _segments(base: Parent) -> tuple[tuple[str, str], ...]:
    """(text, component) pairs: '.self_attn.' is attention, '.mlp.' is mlp; the rest is 'other'."""
    found: dict[str, str] = {}
    for layer in range(base.num_layers):
        for suffix in base.layer_suffixes(layer):
            component = base.place(base.layer_name(layer, suffix)).component
            text = f".{suffix.split('.', 1)[0]}."
            if component != "other":
                found[text] = component
    return tuple(sorted(found.items(), key=lambda pair: (COMPONENTS.index(pair[1]), pair[0])))


def _dead(space: Space, parents: Mapping[str, Parent]) -> frozenset[tuple[str, str | None, str]]:
    """Cells of the space where a parent equals the base in every tensor: its parameters there change nothing."""
    base = parents[space.base]
    spans = space.spans()
    listed = set(space.components)
    dead = []
    for name in space.models:
        same = set(base.equal_tensors(parents[name]))
        alive: set[tuple[str, str | None]] = set()
        for tensor in base.tensors:
            if tensor in same:
                continue
            place = base.place(tensor)
            if place.part == "tower":
                continue
            if place.layer is None:
                alive.add((EMBEDDINGS if place.part == "embeddings" else HEAD, None))
                continue
            group = next(g for g, span in spans if place.layer in span)
            alive.update((group, c) for c in ([place.component] if place.component in listed else listed))
        cells = [(EMBEDDINGS, None), *((g, c) for g, _ in spans for c in space.components), (HEAD, None)]
        dead += [(group, component, name) for group, component in cells if (group, component) not in alive]
    return frozenset(dead)


def _agree(store: Store, settings: Config, text: str, overrides: Mapping[str, int], facts: dict[str, Any]) -> None:
    """Begins a new study, or checks that the stored one is this one; only its budget and where it runs may differ."""
    stored = store.study()
    if stored is None:
        store.begin(settings.study, settings.search.seed, text, overrides, facts)
        return
    before, _ = config.stored(stored.name, stored.config, stored.overrides)
    differences = [*_diff(_comparable(before), _comparable(settings)), *_diff(stored.facts, facts)]
    if differences:
        shown = "; ".join(differences[:6]) + (f"; and {len(differences) - 6} more" if len(differences) > 6 else "")
        raise StudyError(f"study '{settings.study}' was begun with other settings, so this would be another search: {shown}")
    store.set_config(text, overrides)


def _comparable(settings: Config) -> dict[str, Any]:
    """Settings without the budget and the cluster, which may change between runs."""
    data = settings.model_dump(mode="json", exclude={"cluster", "budget", "reuse"})
    for key in ("evaluations", "finalists"):
        data["search"].pop(key)
    data["stages"][-1].pop("evaluations")
    data["stages"] = [{**stage, "evaluations": n} for stage, n in zip(data["stages"], settings.budgets[:-1], strict=False)] + data["stages"][-1:]
    return data


def _diff(before: Any, now: Any, path: str = "") -> list[str]:
    """'path was X, is Y' for every leaf that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(set(before) | set(now))
        return [line for k in keys for line in _diff(before.get(k), now.get(k), f"{path}.{k}" if path else str(k))]
    if before == now:
        return []
    short = [f"{str(v)[:40]}…" if len(str(v)) > 40 else str(v) for v in (before, now)]
    return [f"{path} was {short[0]}, is {short[1]}"]
