"""Opens what a search needs: parents, space, tasks, objective; also what a stored study was searched with."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from evomerge.checkpoints import Parent, check_compatible, open_parent
from evomerge.checkpoints.comparison import twins
from evomerge.checkpoints.values import check_finite
from evomerge.config import Config
from evomerge.config.stage_kinds import STAGES
from evomerge.errors import CandidateError, ConfigError, SetupError, StudyError
from evomerge.evaluation import Evaluator, Objective, TaskSet
from evomerge.evaluation.task_set import check_losses
from evomerge.launch.license_policy import check_licenses
from evomerge.launch.objective import make_objective, task_terms
from evomerge.launch.retained_texts import RETAINED
from evomerge.launch.stored_models import places, stored_settings
from evomerge.launch.tasks import open_tasks
from evomerge.launch.threads import set_torch_threads
from evomerge.launch.weight_space import make_space
from evomerge.merging.vocabulary.alignment import check_rows
from evomerge.spaces import MergeSpace
from evomerge.store import Store, StudyFacts, study_facts
from evomerge.workers.worker import Worker
from evomerge.workers.worker_memory import WorkerMemory


@dataclass(frozen=True, slots=True)
class Allowed:
    """What a user permits the tasks of a search, which is code with all his rights.

    Attributes:
        python: Run the Python functions that the settings name as tasks.
        tasks: Load task folders that are not evomerge's own.
        code: Execute what models write in child processes, where a task scores it so.
        notify: Run the commands and call the addresses that the settings name under `notify`.
    """

    python: bool = False
    tasks: bool = False
    code: bool = False
    notify: bool = False


@dataclass(frozen=True, slots=True)
class Opened:
    """The models, tasks and space of a search, open; no weights are loaded.

    Attributes:
        settings: The settings of the search.
        parents: Model name -> its files.
        space: The space of weights.
        harness: The tasks.
        objective: What the search maximizes.
        warnings: What a user should know of the models, each a sentence.
    """

    settings: Config
    parents: Mapping[str, Parent]
    space: MergeSpace
    harness: TaskSet
    objective: Objective
    warnings: tuple[str, ...] = ()

    def load(
        self,
        evaluator: Evaluator | None = None,
        device: str | None = None,
        memory: Callable[[Opened], WorkerMemory] | None = None,
    ) -> Worker:
        """Loads the base model, which candidates are merged into.

        Args:
            evaluator: Scores the candidates; the tasks unless given.
            device: Where; None for the device of this process.
            memory: Plans where the models lie on cards; None for `evomerge.launch.memory.worker_memory`.

        Returns:
            A worker.

        Raises:
            SetupError: The models do not fit on the cards.
        """
        device = device_name() if device is None else device
        planned = None
        if device.startswith("cuda"):
            from evomerge.launch.memory import worker_memory  # which imports this module

            planned = (memory or worker_memory)(self)
        return Worker(
            self.parents,
            self.settings.base,
            self.harness if evaluator is None else evaluator,
            dtype=self.settings.out_dtype,
            device=device if planned is None else planned.devices[0],
            memory=planned,
        )


@dataclass(frozen=True, slots=True)
class LoadedSearch:
    """A search that is open, with a worker in this process, which may have left its device to others.

    Attributes:
        opened: Its models, tasks and space.
        evaluator: What scores the candidates: the tasks, or what replaces them.
        scorer: The worker.
        max_nats_per_token: The limit of the perplexity screen for routes; None without a screen.
    """

    opened: Opened
    evaluator: Evaluator
    scorer: Worker
    max_nats_per_token: float | None

    @property
    def is_replaced(self) -> bool:
        """Whether something else than the tasks scores the candidates; then only this process can."""
        return self.evaluator is not self.opened.harness


def open_search(
    settings: Config,
    allowed: Allowed | None = None,
    stored: StudyFacts | None = None,
    *,
    is_checked: bool = False,
) -> Opened:
    """Opens what a search needs.

    Args:
        settings: The settings of the search.
        allowed: What the tasks may do; nothing unless given.
        stored: What the study began with where it is resumed, so that it goes on as it was.
        is_checked: The weights were read and found good, as by the process that starts this one.

    Returns:
        The open search.

    Raises:
        CheckpointError: If the models do not fit each other.
        ConfigError: If the settings ask of the tasks what is not allowed, or do not fit the models.
        TaskError: If a task cannot be had.
    """
    parents = open_parents({name: (m.path, m.revision) for name, m in settings.models.items()})
    check_licenses(settings, parents)
    warnings = check_compatible(parents, settings.base, deeper=not settings.merges_weights)
    if not is_checked:
        for name, parent in parents.items():
            check_finite(name, parent)
        warnings = (*warnings, *twins(parents, settings.base))
    warning = check_rows(parents, settings.base)
    return _opened(settings, parents, (*warnings, *([warning] if warning else ())), allowed, stored)


def open_stored_search(store: Store, allowed: Allowed | None = None, given: Sequence[str] = ()) -> Opened:
    """Opens what a stored study was searched with.

    Args:
        store: The study's store.
        allowed: What the tasks may do; nothing unless given.
        given: 'NAME=PATH' of models that have moved.

    Returns:
        The open search.

    Raises:
        StudyError: If a model or a task is no longer what it was.
    """
    parents = stored_parents(store, given)
    study = store.study()
    assert study is not None
    settings = stored_settings(study, store.path.parent, given)
    opened = _opened(settings, parents, (), allowed, study.facts)
    for task, digest in opened.harness.fingerprint().items():
        if study.facts.tasks.get(task) != digest:
            raise StudyError(
                f"task '{task}' is not what {study.name} was searched with: "
                "its items, prompts or settings differ; bring those back"
            )
    sources = opened.harness.sources() if study.facts.sources else {}
    known = {task: dict(of) for task, of in study.facts.sources.items() if task != RETAINED}
    changed = study_facts.differences(known if sources else {}, sources)
    if changed:
        raise StudyError(
            f"the code of a task is not what {study.name} was searched with: {changed[0]}; bring that back"
        )
    return opened


def open_parents(models: Mapping[str, tuple[str, str | None]]) -> dict[str, Parent]:
    """Opens models by name.

    Args:
        models: Name -> (path or repository, revision or None).

    Returns:
        Name -> the open model.

    Raises:
        CheckpointError: If one is not there, or its files are broken.
    """
    return {
        name: open_parent(f"{path}@{revision}" if revision else path)
        for name, (path, revision) in models.items()
    }


def stored_parents(store: Store, given: Sequence[str] = ()) -> dict[str, Parent]:
    """Opens the parents of a stored study, also where they have moved.

    Args:
        store: The study's store.
        given: 'NAME=PATH' of models that have moved.

    Returns:
        Name -> the open model.

    Raises:
        StudyError: If nothing is stored, or a model is not the one that was searched with.
        CheckpointError: If a model is nowhere.
    """
    study = store.study()
    if study is None:
        raise StudyError(f"{store.path} holds no study yet")
    facts = study.facts.parents
    parents = open_parents(places(study, store.path.parent, given))
    for name, parent in parents.items():
        if parent.content_hash() != facts[name].sha256:
            raise StudyError(
                f"model '{name}' at {parent.path} is not the one that {study.name} was searched with; "
                f"bring that one back, or give --models {name}=PATH"
            )
    return parents


def backends(harness: TaskSet, model: nn.Module) -> dict[str, str]:
    """What answers each task with a model.

    Args:
        harness: The tasks.
        model: The live model.

    Returns:
        Task -> 'compiled', or 'lm-eval: ' and why; 'nothing: ' and why where the model cannot be asked at
        all.
    """
    try:
        return dict(harness.backends(model))
    except CandidateError as error:  # the search will say so of every candidate
        return dict.fromkeys(harness.items("search"), f"nothing: {error}")


def device_name() -> str:
    """$EVOMERGE_DEVICE, else the first CUDA device, else the CPU.

    Raises:
        ConfigError: $EVOMERGE_DEVICE is no name of a device.
        SetupError: There is no such GPU here.
    """
    named = os.environ.get("EVOMERGE_DEVICE")
    if not named:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(named)
    except RuntimeError:
        raise ConfigError(
            f"$EVOMERGE_DEVICE is '{named[:40]}'; write cpu, cuda or cuda:0, or unset it"
        ) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SetupError(f"$EVOMERGE_DEVICE is '{named[:40]}', and torch finds no such GPU here; unset it")
    return named


def device_names(settings: Config) -> tuple[str, ...]:
    """The devices of a worker: those of `cluster.gpus` where that is more than one, else `device_name`.

    Args:
        settings: The settings of the search.

    Returns:
        torch's names, the one that scores first.

    Raises:
        SetupError: There are fewer GPUs here.
    """
    first, gpus = device_name(), int(settings.cluster.gpus or 1)
    if gpus <= 1 or not first.startswith("cuda"):
        return (first,)
    start = torch.device(first).index or 0
    there = torch.cuda.device_count()
    if start + gpus > there:
        raise SetupError(
            f"cluster.gpus is {gpus}, and torch finds {there} GPUs here; ask for fewer, or join a cluster "
            "with --ray"
        )
    return tuple(f"cuda:{start + i}" for i in range(gpus))


def _opened(
    settings: Config,
    parents: Mapping[str, Parent],
    warnings: tuple[str, ...],
    allowed: Allowed | None,
    stored: StudyFacts | None,
) -> Opened:
    from evomerge.evaluation.inference import verification_cache

    base, allowed = parents[settings.base], allowed or Allowed()
    set_torch_threads(base)
    verification_cache.begin(stored.verifications if stored else {})
    space = make_space(settings, parents, stored.searched if stored else None)
    harness = open_tasks(
        settings,
        base,
        device=device_name(),
        allow_python=allowed.python,
        allow_tasks=allowed.tasks,
        allow_code=allowed.code,
        known=stored.terms if stored else None,
    )
    if settings.follows_gradients:
        for stage in settings.stages:
            if STAGES[stage.stage].is_learned or stage.method == "relaxed":
                warnings = (*warnings, *check_losses(harness, stage.labels))
    objective = make_objective(settings, task_terms(settings, harness), base.layout.num_layers)
    return Opened(settings, parents, space, harness, objective, warnings)
