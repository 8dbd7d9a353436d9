"""Configuration -> tasks: lm-eval's and the user's Python functions, ready to score models."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evomerge import _resources
from evomerge.checkpoints import Parent
from evomerge.config import Config
from evomerge.config.schema import TaskConfig
from evomerge.errors import ConfigError
from evomerge.evaluation import CombinedTasks, Role, TaskSet
from evomerge.merging import model_loading
from evomerge.merging.companion_files import TOKENIZER


def open_tasks(
    settings: Config,
    base: Parent,
    *,
    device: str = "cpu",
    allow_python: bool = False,
    allow_tasks: bool = False,
) -> TaskSet:
    """The tasks of a configuration, their items learnt and their prompts built.

    allow_python: run the Python functions that the configuration names; allow_tasks: read its folders of lm-eval tasks,
    whose files are code too. Without them these are a ConfigError. Raises TaskError for tasks that cannot be had.
    """
    python = [t for t in settings.tasks if t.python is not None]
    if python and not allow_python:
        raise ConfigError(
            f"task '{python[0].task}' runs the Python function {python[0].python} in this process, with all your rights; "
            "read it, then allow that with --allow-python"
        )
    e = settings.evaluation
    if not allow_tasks and (foreign := [folder for folder in e.include if not _shipped(folder)]):
        raise ConfigError(
            f"evaluation.include names '{foreign[0]}': task files there can run Python in this process, with all your rights; "
            "read them, then allow that with --allow-tasks"
        )
    counts: dict[Role, int | None] = {"search": e.search, "validation": e.validation, "test": e.test}
    limits = {role: n for role, n in counts.items() if n is not None}
    tokenizer = model_loading.load_tokenizer(base)
    sets: list[TaskSet] = []
    if len(python) < len(settings.tasks):
        from evomerge.evaluation.lm_harness.harness import LmHarness
        from evomerge.evaluation.lm_harness.items import ItemRules
        from evomerge.evaluation.lm_harness.task_loading import TaskSpec

        sets.append(
            LmHarness(
                [
                    TaskSpec(
                        t.task, t.metric, t.filter, t.num_fewshot, e.splits, _soft(settings, t), _listed(t)
                    )
                    for t in settings.tasks
                    if t.python is None
                ],
                tokenizer,
                batch_size=e.batch_size,
                backend=e.backend,
                include=[Path(p) for p in e.include],
                apply_chat_template=e.apply_chat_template,
                fewshot_as_multiturn=e.fewshot_as_multiturn,
                system_instruction=e.system_instruction,
                limits=limits,
                rules=ItemRules(
                    e.duplicates,
                    e.allow_benchmark_test,
                    tuple(Path(p) for p in e.training_texts),
                    e.overlap_ngram,
                    e.overlap,
                ),
            )
        )
    if python:
        from evomerge.evaluation.python_tasks import PythonSpec, PythonTasks

        model = model_loading.load(base, settings.out_dtype).to(device)
        specs = [PythonSpec(t.task, str(t.python), t.higher_is_better) for t in python]
        sets.append(PythonTasks(specs, tokenizer, model, limits=limits))
    return sets[0] if len(sets) == 1 else CombinedTasks(sets)


def scoring(settings: Config, base: Parent, device: str) -> dict[str, Any]:
    """How scores are computed, beside tasks, models and versions: a fact of a study, compared where another's scores are reused.

    device: its kind, and its name where numbers differ by that. The tokenizer is its files, which are not among a model's hashed ones.
    """
    digest = hashlib.sha256()
    for file in sorted({file for pattern in TOKENIZER for file in base.path.glob(pattern) if file.is_file()}):
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    e = settings.evaluation
    return {
        "base": settings.base, "dtype": settings.out_dtype, "device": device, "backend": e.backend, "batch_size": e.batch_size,
        "tokenizer": digest.hexdigest(),
    }  # fmt: skip


def _shipped(folder: str) -> bool:
    """Whether a folder is one of evomerge's own."""
    return Path(folder).resolve().is_relative_to(_resources.evaluators().resolve())


def _soft(settings: Config, task: TaskConfig) -> bool:
    """Whether the search sees a soft score of a task."""
    return tuple(task.search) != ("metric",) or settings.search.tie_break in ("probability", "logprob")


def _listed(task: TaskConfig) -> dict[Role, Sequence[int | str]] | None:
    """The items that a configuration lists, files read. Raises ConfigError for a file that is missing or empty."""
    if task.items is None:
        return None
    found: dict[Role, Sequence[int | str]] = {}
    for role, given in task.items.items():
        if not isinstance(given, str):
            found[role] = given
            continue
        if not Path(given).is_file():
            raise ConfigError(
                f"task '{task.task}': there is no file '{given}' with the items of {role}; correct tasks.items"
            )
        words = Path(given).read_text(encoding="utf-8").split()
        if not words:
            raise ConfigError(
                f"task '{task.task}': '{given}' lists no item for {role}; an empty list is not all of them, so leave it out for that"
            )
        found[role] = [
            int(w) if w.isdecimal() and len(w) < 16 else w for w in words
        ]  # an id has 16 digits, a number fewer
    return found
