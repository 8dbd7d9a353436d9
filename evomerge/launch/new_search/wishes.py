"""What a new search is asked for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evomerge.checkpoints.reference import split_reference
from evomerge.config.schema import STUDY_NAME
from evomerge.errors import ConfigError

DEFAULT_EVALUATIONS = 500
_LONGEST_NAME = 40  # characters of a model's name that is made from its path


@dataclass(frozen=True, slots=True)
class TaskWish:
    """A task of the objective.

    Attributes:
        task: Name of an lm-eval task, group or tag.
        weight: Its weight.
        metric: Its metric; None for the task's first.
        filter: lm-eval's filter of its answers; None for the task's first.
        num_fewshot: Examples in a prompt; None for the task's own.
    """

    task: str
    weight: float = 1.0
    metric: str | None = None
    filter: str | None = None
    num_fewshot: int | None = None


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a new search is asked for; what is None is proposed.

        Wishes(models={"base": "models/base", "math": "models/math"}, tasks=(TaskWish("gsm8k"),))

    Attributes:
        models: Name -> folder, GGUF file or repository, with revision and adapter.
        tasks: Tasks of the objective.
        base: Name of the base.
        method: Merge method.
        study: Name of the study.
        evaluations: Budget of candidates.
        gpu_hours: Hours of GPUs after which the search ends early.
        include: Folders of task files.
        gpus: GPUs of each worker.
        workers: Number of workers.
        blocks: Keys of the search file that a converted file decides, block -> its content.
        reasons: Key path in `blocks` -> the sentence that stands above it.
        notes: What a converted file says and this search cannot hold.
        layer_granularity: Layers of a group, as mergekit-evolve counts them; None where nothing is said.
        chat_template: Whether prompts take the base's chat template where it has one; None where nothing is
            said.
    """

    models: Mapping[str, str]
    tasks: Sequence[TaskWish]
    base: str | None = None
    method: str | None = None
    study: str | None = None
    evaluations: int | None = None
    gpu_hours: float | None = None
    include: Sequence[str] = ()
    gpus: float | None = None
    workers: int | None = None
    blocks: Mapping[str, Any] = field(default_factory=dict)
    reasons: Mapping[tuple[str | int, ...], str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    layer_granularity: int | None = None
    chat_template: bool | None = None


def named_models(given: Iterable[str]) -> dict[str, str]:
    """Reads the models of a command line.

    Args:
        given: 'NAME=PATH' or 'PATH' each; a model without a name takes the last part of its path.

    Returns:
        Name -> reference, in order.

    Raises:
        ConfigError: A name stands there twice, or a reference cannot be parsed.
    """
    models: dict[str, str] = {}
    for text in given:
        name, reference = _split_name(text)
        split_reference(reference)
        if name is None:
            name = _free_name(_short_name(reference), models)
        if name in models:
            raise ConfigError(f"--model names '{name}' twice; write NAME=PATH with another name")
        models[name] = reference
    return models


def _split_name(text: str) -> tuple[str | None, str]:
    """(name, reference) of NAME=PATH; a path may hold '=' where it begins like one."""
    name, equals, path = text.partition("=")
    if not equals or "/" in name or Path(text).expanduser().exists():
        return None, text
    if not name.strip() or not path:
        raise ConfigError(f"--model takes NAME=PATH or PATH, got '{text}'")
    return name.strip(), path


def _short_name(reference: str) -> str:
    parts = split_reference(reference)
    last = Path(parts.adapter or parts.model).name
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", last.removesuffix(".gguf")).strip(".-_")
    return name[:_LONGEST_NAME] or "model"


def _free_name(name: str, taken: Iterable[str]) -> str:
    names = set(taken)
    number = 2
    free = name
    while free in names:
        free, number = f"{name}-{number}", number + 1
    return free


def read_task(text: str) -> TaskWish:
    """Reads a task of a command line.

    Args:
        text: 'TASK', 'TASK=WEIGHT', with ':METRIC' after the name.

    Returns:
        The task.

    Raises:
        ConfigError: It has another form, or the weight is not above 0.
    """
    name, equals, number = text.partition("=")
    name, _, metric = name.strip().partition(":")
    try:
        weight = float(number) if equals else 1.0
    except ValueError:
        weight = 0.0
    if not name or not 0 < weight < 1e9:
        raise ConfigError(
            f"--task takes TASK, TASK:METRIC or TASK=WEIGHT with a weight above 0, got '{text}'"
        )
    return TaskWish(name, weight, metric or None)


def study_name(names: Iterable[str]) -> str:
    """Proposes the name of a study.

    Args:
        names: Names of the models that are merged.

    Returns:
        Their names joined, in the form and length that a study may have.
    """
    joined = "-".join(re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.") for name in names)[:60].strip("-.")
    return joined if re.fullmatch(STUDY_NAME, joined) else "search"
