"""Opens what a search needs: parents, space, tasks, objective; also of a stored study."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from evomerge.checkpoints import Parent, check_compatible, open_parent
from evomerge.config import Config, loading
from evomerge.errors import CandidateError, ConfigError, StudyError
from evomerge.evaluation import Evaluator, Objective, TaskSet
from evomerge.launch.objective import make_objective, task_terms
from evomerge.launch.tasks import open_tasks
from evomerge.launch.weight_space import make_space
from evomerge.merging.vocabulary.alignment import check_rows
from evomerge.spaces import WeightSpace
from evomerge.store import Store
from evomerge.workers import worker

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Allowed:
    """What a user let the tasks do. python: run functions that the settings name; tasks: load task folders that are not shipped."""

    python: bool = False
    tasks: bool = False


def backends(harness: Any, model: torch.nn.Module) -> dict[str, str]:
    """Task -> what answers it with this model: 'compiled', or 'lm-eval: ' and why; 'nothing: ' and why where it cannot be asked at all."""
    try:
        found: dict[str, str] = harness.backends(model)
    except CandidateError as error:  # the search will say so of every candidate
        return dict.fromkeys(harness.items("search"), f"nothing: {error}")
    return found


def device_name() -> str:
    """$EVOMERGE_DEVICE, else the first CUDA device, else the CPU."""
    return os.environ.get("EVOMERGE_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")


def _set_threads(base: Parent) -> None:
    """$EVOMERGE_THREADS, else one for models too small to share out (under 20 M parameters), else every core.

    Scores are compared bit for bit at resume, and sums depend on the number of threads: it is one of the study's facts.
    """
    small = sum(math.prod(info.shape) for info in base.tensors.values()) < 20_000_000
    given = os.environ.get("EVOMERGE_THREADS", "")
    if given and not (given.isascii() and given.isdigit() and 0 < int(given) < 10_000):
        raise ConfigError(
            f"$EVOMERGE_THREADS must be a number of threads, got '{given}'; correct or unset it"
        )
    threads = int(given) if given else 1 if small else os.cpu_count() or 1
    torch.set_num_threads(threads)


def open_parents(models: Mapping[str, tuple[str, str | None]]) -> dict[str, Parent]:
    """Opens models by name: name -> (path or repository, revision)."""
    return {
        name: open_parent(f"{path}@{revision}" if revision else path)
        for name, (path, revision) in models.items()
    }


def stored_parents(store: Store) -> dict[str, Parent]:
    """The parents of a stored study; raises StudyError if their content is no longer what was searched."""
    study = store.study()
    if study is None:
        raise StudyError(f"{store.path} holds no study yet")
    facts = study.facts.parents
    parents = open_parents({name: (fact.path, fact.revision) for name, fact in facts.items()})
    for name, parent in parents.items():
        if parent.content_hash() != facts[name].sha256:
            raise StudyError(
                f"model '{name}' at {parent.path} is not the one that {study.name} was searched with; bring that one back"
            )
    return parents


@dataclass(frozen=True, slots=True)
class Opened:
    """The models, tasks and space of a search, open. warnings: what a user should know of the models."""

    settings: Config
    parents: Mapping[str, Parent]
    space: WeightSpace
    harness: TaskSet
    objective: Objective
    warnings: tuple[str, ...] = ()

    def load(self, evaluator: Evaluator | None = None) -> worker.Worker:
        """Loads the base and merges into it; scores by `evaluator` where one is given."""
        own = self.harness if evaluator is None else evaluator
        return worker.Worker(
            self.parents, self.settings.base, own, dtype=self.settings.out_dtype, device=device_name()
        )


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
    settings, _ = loading.stored(study.name, study.config, study.overrides)
    opened = _opened(settings, parents, (), allowed)
    if changed := [
        task for task, digest in opened.harness.fingerprint().items() if study.facts.tasks.get(task) != digest
    ]:
        raise StudyError(
            f"task '{changed[0]}' is not what {study.name} was searched with: its items, prompts or settings differ; bring those back"
        )
    return opened


def _opened(
    settings: Config, parents: Mapping[str, Parent], warnings: tuple[str, ...], allowed: Allowed | None
) -> Opened:
    _set_threads(parents[settings.base])
    space = make_space(settings, parents)
    may = allowed or Allowed()
    harness = open_tasks(
        settings, parents[settings.base], device=device_name(), allow_python=may.python, allow_tasks=may.tasks
    )
    return Opened(
        settings,
        parents,
        space,
        harness,
        make_objective(settings, task_terms(settings, harness), parents[settings.base].layout.num_layers),
        warnings,
    )
