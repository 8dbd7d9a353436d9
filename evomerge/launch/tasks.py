"""Configuration -> tasks: lm-eval's and the user's Python functions, ready to score models."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge import _resources
from evomerge.checkpoints import Parent
from evomerge.config import Config
from evomerge.config.schema import TaskConfig
from evomerge.errors import ConfigError
from evomerge.evaluation import CombinedTasks, Role, TaskSet
from evomerge.evaluation.lm_harness.backends import RENAMED_BACKENDS
from evomerge.merging import model_loading
from evomerge.store import TermFacts

if TYPE_CHECKING:
    from evomerge.evaluation.engines.engine import EngineSettings

_STORED_BACKENDS = {new: old for old, new in RENAMED_BACKENDS.items()}
_TOKENIZER = (
    *("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "*.model", "added_tokens.json"),
    *("*.jinja", "chat_template.json"),
)
"""Files of a tokenizer and its chat template, digested in stored studies: others would be another study."""


def open_tasks(
    settings: Config,
    base: Parent,
    *,
    device: str = "cpu",
    allow_python: bool = False,
    allow_tasks: bool = False,
    allow_code: bool = False,
    known: Mapping[str, TermFacts] | None = None,
) -> TaskSet:
    """Opens the tasks of a configuration: their items learnt and their prompts built.

    Args:
        settings: The settings of the search.
        base: Its base model, whose tokenizer builds the prompts.
        device: Where a Python task gets a model to try.
        allow_python: Run the Python functions that the configuration names.
        allow_tasks: Read its folders of lm-eval tasks, whose files are code too.
        allow_code: Have what models write executed in child processes, where a task asks for that.
        known: What the tasks' metrics were when a stored study began; None for a new one.

    Returns:
        The tasks as one set.

    Raises:
        ConfigError: If the configuration has Python functions or task folders that are not allowed.
        TaskError: If a task cannot be had.
    """
    python_tasks = [t for t in settings.tasks if t.python is not None]
    if python_tasks and not allow_python:
        first = python_tasks[0]
        raise ConfigError(
            f"task '{first.task}' runs the Python function {first.python} in this process, "
            "with all your rights; read it, then allow that with --allow-python"
        )
    check_task_folders(settings, allow_tasks=allow_tasks)
    tokenizer = model_loading.load_tokenizer(base)
    sets: list[TaskSet] = []
    if len(python_tasks) < len(settings.tasks):
        sets.append(_harness_tasks(settings, tokenizer, known or {}, allow_code))
    if python_tasks:
        sets.append(_python_tasks(settings, tokenizer, base, device))
    return sets[0] if len(sets) == 1 else CombinedTasks(sets)


def check_task_folders(settings: Config, *, allow_tasks: bool) -> None:
    """Checks that the task folders of a search may be read, whose files are code.

    Args:
        settings: The settings of the search.
        allow_tasks: Whether folders that are not evomerge's own may be.

    Raises:
        ConfigError: One is named and not allowed.
    """
    foreign = [folder for folder in settings.evaluation.include if not _shipped(folder)]
    if foreign and not allow_tasks:
        raise ConfigError(
            f"evaluation.include names '{foreign[0]}': task files there can run Python in this process, "
            "with all your rights; read them, then allow that with --allow-tasks"
        )


def _harness_tasks(
    settings: Config, tokenizer: Any, known: Mapping[str, TermFacts], allow_code: bool
) -> TaskSet:
    """The tasks that lm-eval knows, or finds in the folders that the configuration includes."""
    from evomerge.evaluation.lm_harness.harness import LmHarness
    from evomerge.evaluation.lm_harness.items import ItemRules
    from evomerge.evaluation.lm_harness.task_loading import TaskSpec

    e = settings.evaluation
    specs = [
        TaskSpec(
            t.task,
            t.metric,
            t.filter,
            t.num_fewshot,
            e.splits,
            _soft(settings, t),
            listed_items(t),
            t.higher_is_better,
            known[t.task].sign > 0 if t.task in known else None,
        )
        for t in settings.tasks
        if t.python is None
    ]
    rules = ItemRules(
        e.duplicates,
        e.allow_benchmark_test,
        tuple(Path(p) for p in e.training_texts),
        e.overlap_ngram,
        e.overlap,
    )
    return LmHarness(
        specs,
        tokenizer,
        batch_size=e.batch_size,
        backend=e.backend,
        engine=engine_settings(settings),
        include=[Path(p) for p in e.include],
        apply_chat_template=e.apply_chat_template,
        fewshot_as_multiturn=e.fewshot_as_multiturn,
        system_instruction=e.system_instruction,
        limits=_limits(settings),
        rules=rules,
        allow_code=allow_code,
    )


def engine_settings(settings: Config) -> EngineSettings:
    """Reads how an engine is opened.

    Args:
        settings: The settings of the search.

    Returns:
        The same with its memory in bytes, and the interpreter that this process's environment names.
    """
    from evomerge.evaluation.engines.engine import EngineSettings

    engine = settings.evaluation.engine
    return EngineSettings(
        python=os.environ.get("EVOMERGE_VLLM_PYTHON") or None,  # a search file names no program
        process=engine.process,
        push=engine.push,
        rows=engine.rows,
        cache=int(engine.cache_gb * 1e9),
        tensor_parallel=engine.tensor_parallel,
        threads=engine.threads,
        options={str(name): value for name, value in engine.options.items()},
    )


def _python_tasks(settings: Config, tokenizer: Any, base: Parent, device: str) -> TaskSet:
    """The tasks that are Python functions, each tried on the base."""
    from evomerge.evaluation.python_tasks import PythonSpec, PythonTasks

    model = model_loading.load_base(base, settings.out_dtype).to(device)
    specs = [
        PythonSpec(t.task, t.python, t.higher_is_better is not False, t.loss)
        for t in settings.tasks
        if t.python is not None
    ]
    return PythonTasks(specs, tokenizer, model, limits=_limits(settings))


def _limits(settings: Config) -> dict[Role, int]:
    """Role -> most items of each task, where the configuration limits them."""
    e = settings.evaluation
    counts: dict[Role, int | None] = {"search": e.search, "validation": e.validation, "test": e.test}
    return {role: count for role, count in counts.items() if count is not None}


def scoring_facts(settings: Config, base: Parent, device: str) -> dict[str, Any]:
    """How scores are computed beside tasks, models and versions: a fact of a study.

    Args:
        settings: The settings of the search.
        base: Its base model. The tokenizer is its files, which are not among the model's hashed ones.
        device: The device, by its kind, and by its name where numbers differ by that.

    Returns:
        Plain data.
    """
    digest = hashlib.sha256()
    files = {file for pattern in _TOKENIZER for file in base.path.glob(pattern) if file.is_file()}
    for file in sorted(files):
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return {
        "base": settings.base,
        "dtype": settings.out_dtype,
        "device": device,
        "backend": _STORED_BACKENDS.get(settings.evaluation.backend, settings.evaluation.backend),
        "batch_size": settings.evaluation.batch_size,
        "tokenizer": digest.hexdigest(),
    }


def listed_items(task: TaskConfig) -> dict[Role, Sequence[int | str]] | None:
    """The items that a configuration lists for a task, files read.

    Args:
        task: The task's entry.

    Returns:
        Role -> document numbers or item ids; None where it lists none.

    Raises:
        ConfigError: If a file is missing or empty.
    """
    if task.items is None:
        return None
    items: dict[Role, Sequence[int | str]] = {}
    for role, given in task.items.items():
        items[role] = _read_items(task.task, role, given) if isinstance(given, str) else given
    return items


def _read_items(task: str, role: Role, file: str) -> list[int | str]:
    """The items that a file lists, one a line."""
    if not Path(file).is_file():
        raise ConfigError(
            f"task '{task}': there is no file '{file}' with the items of {role}; correct tasks.items"
        )
    words = Path(file).read_text(encoding="utf-8").split()
    if not words:
        raise ConfigError(
            f"task '{task}': '{file}' lists no item for {role}; "
            "an empty list is not all of them, so leave it out for that"
        )
    # an id has 16 digits, a document number fewer
    return [int(word) if word.isdecimal() and len(word) < 16 else word for word in words]


def _shipped(folder: str) -> bool:
    """Whether a folder is one of evomerge's own."""
    return Path(folder).resolve().is_relative_to(_resources.evaluators().resolve())


def _soft(settings: Config, task: TaskConfig) -> bool:
    """Whether the search sees a soft metric of a task."""
    return tuple(task.search) != ("metric",) or settings.search.tie_break in ("probability", "logprob")
