"""What `evomerge init` asks on a terminal."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import typer

from evomerge.cli.output import tell

if TYPE_CHECKING:
    from evomerge.launch.new_search.requested import Requested

_CLUSTERS = ("none", "slurm", "ray", "kuberay")


def ask(requested: Requested, kinds: tuple[str, ...]) -> tuple[Requested, tuple[str, ...]]:
    """Asks for what the flags leave open; an empty answer takes what stands in brackets.

    Args:
        requested: The flags.
        kinds: The cluster jobs that are asked for.

    Returns:
        (the flags with the answers, the cluster jobs).
    """
    try:
        return _ask(requested, kinds)
    except typer.Abort:  # Ctrl-C, or the input's end
        raise KeyboardInterrupt from None


def _ask(requested: Requested, kinds: tuple[str, ...]) -> tuple[Requested, tuple[str, ...]]:
    from evomerge.launch.new_search.wishes import DEFAULT_EVALUATIONS

    is_converted = requested.from_evolve is not None or requested.from_recipe is not None
    if not requested.models and not is_converted:
        tell("Models to merge: folders, GGUF files or Hub repositories, one a line; an empty line ends them.")
        requested = replace(requested, models=_several("model", least=2))
        base = _optional("base (name or path; empty to find it by the models' cards and distances)")
        method = _optional("merge method (empty to have one proposed)")
        requested = replace(requested, base=requested.base or base, method=requested.method or method)
    if not requested.tasks and requested.from_evolve is None:
        tell("Tasks to score by: lm-eval tasks, TASK[:METRIC][=WEIGHT], one a line; an empty line ends them.")
        tasks = _several("task", least=1)
        folder = _optional("folder of your own task files (empty for none)")
        include = (*requested.include, *([folder] if folder else []))
        requested = replace(requested, tasks=tasks, include=include)
    if requested.evaluations is None:
        evaluations = typer.prompt("candidates to evaluate", default=DEFAULT_EVALUATIONS, type=int, err=True)
        requested = replace(requested, evaluations=max(1, evaluations))
    if not kinds:
        question = f"job file for a cluster ({', '.join(_CLUSTERS)})"
        kind = typer.prompt(question, default="none", show_default=True, err=True)
        while kind not in _CLUSTERS:
            kind = typer.prompt(question, default="none", show_default=True, err=True)
        kinds = () if kind == "none" else (kind,)
    return requested, kinds


def _optional(question: str) -> str | None:
    answer: str = typer.prompt(question, default="", show_default=False, err=True)
    return answer.strip() or None


def _several(what: str, *, least: int) -> tuple[str, ...]:
    answers: list[str] = []
    while True:
        answer = _optional(f"{what} {len(answers) + 1}")
        if answer is None and len(answers) >= least:
            return tuple(answers)
        if answer is not None:
            answers.append(answer)
