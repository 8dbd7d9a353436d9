"""Flags of `evomerge init` -> wishes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from evomerge.errors import ConfigError
from evomerge.launch.new_search.mergekit_evolve import read_evolve
from evomerge.launch.new_search.mergekit_recipe import read_recipe
from evomerge.launch.new_search.wishes import Wishes, named_models, read_task


@dataclass(frozen=True, slots=True)
class Requested:
    """What a command line says of a new search, as it is written there.

    Attributes:
        models: 'NAME=PATH' or 'PATH' each.
        base: Name or path of the base.
        tasks: 'TASK', 'TASK:METRIC' or 'TASK=WEIGHT' each.
        include: Folders of task files.
        method: Merge method.
        evaluations: Budget of candidates.
        gpu_hours: Budget of GPUs.
        study: Name of the study.
        gpus: GPUs of each worker.
        workers: Number of workers.
        from_evolve: File of mergekit-evolve to begin with.
        from_recipe: Recipe of mergekit to begin with.
    """

    models: tuple[str, ...] = ()
    base: str | None = None
    tasks: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    method: str | None = None
    evaluations: int | None = None
    gpu_hours: float | None = None
    study: str | None = None
    gpus: float | None = None
    workers: int | None = None
    from_evolve: Path | None = None
    from_recipe: Path | None = None

    @property
    def missing(self) -> list[str]:
        """The flags without which there is no search."""
        needed = []
        if not self.models and self.from_evolve is None and self.from_recipe is None:
            needed.append("--model for each parent")
        if not self.tasks and self.from_evolve is None:
            needed.append("--task")
        return needed


def wishes_of(requested: Requested) -> Wishes:
    """Reads flags, and the file to begin with.

    Args:
        requested: The flags; they win over the file.

    Returns:
        The wishes.

    Raises:
        ConfigError: A flag or the file cannot be used.
    """
    if requested.from_evolve is not None and requested.from_recipe is not None:
        raise ConfigError("--from-mergekit-evolve and --from-mergekit are two starts; give one of them")
    if requested.from_evolve is not None:
        wishes = read_evolve(requested.from_evolve)
    elif requested.from_recipe is not None:
        wishes = read_recipe(requested.from_recipe)
    else:
        wishes = Wishes({}, ())
    models = {**wishes.models, **named_models(requested.models)}
    base, models = _base(requested.base, wishes.base, models)
    given = {
        key: getattr(requested, key)
        for key in ("method", "evaluations", "gpu_hours", "study", "gpus", "workers")
        if getattr(requested, key) is not None
    }
    tasks = tuple(map(read_task, requested.tasks)) or wishes.tasks
    include = (*wishes.include, *requested.include)
    return replace(wishes, models=models, base=base, tasks=tasks, include=include, **given)


def _base(
    given: str | None, of_file: str | None, models: dict[str, str]
) -> tuple[str | None, dict[str, str]]:
    """(name of the base, models), where the base may be given by name, by path, or as one more model."""
    if given is None or given in models:
        return given or of_file, models
    named = named_models([given])
    ((name, reference),) = named.items()
    for known, path in models.items():
        if path == reference:
            return known, models
    if name in models:
        raise ConfigError(f"--base '{given}' is not model '{name}' at {models[name]}; write NAME=PATH")
    return name, {name: reference, **models}
