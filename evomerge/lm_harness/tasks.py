"""lm-eval tasks loaded for a search: which documents serve which role, their requests built once, in lm-eval's own words."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from lm_eval import utils as lm_utils
from lm_eval.tasks import TaskManager

from evomerge import data
from evomerge.errors import TaskError, suggest
from evomerge.evaluation import ROLES, Role

log = logging.getLogger(__name__)
# lm-eval compiles a task's templates anew for every document and every call; compiled once, they render the same text
lm_utils.env.from_string = functools.lru_cache(maxsize=4096)(lm_utils.env.from_string)
_SPLIT_SHARES: dict[Role, int] = {"search": 6, "validation": 2, "test": 2}  # tenths, for tasks with one split


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """What of a task is scored. metric: None for the task's first; filter: None for its first.

    splits: 'declared' takes the task's training, validation and test documents for the roles; 'hash' deals the
    documents that lm-eval would score (test, else validation) to the roles by hash: 6, 2 and 2 tenths.
    """

    task: str
    metric: str | None = None
    filter: str | None = None
    num_fewshot: int | None = None
    splits: Literal["declared", "hash"] = "hash"


@dataclass(slots=True)
class Loaded:
    """A task with the requests of its items. requests: item id -> lm-eval instances, in order."""

    spec: TaskSpec
    task: Any
    metric: str
    filter: str
    higher_is_better: bool
    items: dict[Role, tuple[str, ...]]
    requests: dict[str, list[Any]]


@dataclass(frozen=True, slots=True)
class Prompting:
    """How every task is asked. limits: role -> most items of each task, chosen by their hash."""

    tokenizer: Any
    chat: bool = False
    multiturn: bool = False
    limits: Mapping[Role, int] | None = None


def load(specs: Sequence[TaskSpec], prompting: Prompting, include: Sequence[Path] = ()) -> dict[str, Loaded]:
    """The tasks by name, in the order given. Raises TaskError for unknown tasks or metrics and for roles left without items."""
    folders = [data.evaluators(), *include]
    for folder in folders:
        if not folder.is_dir():
            raise TaskError(f"there is no task folder '{folder}'")
    quiet = logging.getLogger("lm_eval")
    quiet.setLevel(max(quiet.level, logging.ERROR))
    manager = TaskManager(include_path=[str(f) for f in folders], include_defaults=False)
    builtin: TaskManager | None = None
    tasks: dict[str, Loaded] = {}
    for spec in specs:
        if spec.task not in manager.all_subtasks and builtin is None:
            log.info("reading lm-eval's own task tree for '%s'", spec.task)
            builtin = TaskManager(include_path=[str(f) for f in folders])
        source = manager if spec.task in manager.all_subtasks else builtin
        assert source is not None
        if spec.task not in source.all_subtasks:
            raise TaskError(f"unknown task '{spec.task}'. {suggest(spec.task, source.all_subtasks)}")
        try:
            tasks[spec.task] = _load(spec, source, prompting)
        except TaskError:
            raise
        except Exception as error:  # a task's templates and data can raise anything
            raise TaskError(f"task '{spec.task}' cannot be loaded: {type(error).__name__}: {error}") from error
    return tasks


def _load(spec: TaskSpec, manager: TaskManager, prompting: Prompting) -> Loaded:
    task = build(manager, spec.task)
    if getattr(task, "UNSAFE_CODE", False) or getattr(task.config, "unsafe_code", False):
        raise TaskError(f"task '{spec.task}' executes code that models write; evomerge does not run it")
    if spec.num_fewshot is not None:
        task.set_config(key="num_fewshot", value=spec.num_fewshot)
    known = list(task.aggregation())
    metric = spec.metric or known[0]
    if metric not in known:
        raise TaskError(f"task '{spec.task}' reports no metric '{metric}'. {suggest(metric, known)}")
    filters = [f.name for f in task._filters]
    chosen = spec.filter or filters[0]
    if chosen not in filters:
        raise TaskError(f"task '{spec.task}' has no filter '{chosen}'. {suggest(chosen, filters)}")
    loaded = Loaded(spec, task, metric, chosen, bool(task.higher_is_better().get(metric, True)), {}, {})
    for role, docs in _documents(task, spec).items():
        if spec.splits == "declared" or not loaded.requests:
            task.set_fewshot_seed(seed=1234)  # lm-eval's own, for each run over a split
            ids = _requests(loaded, docs, prompting)
            everything = list(loaded.requests)
        else:
            ids = everything
        ids = [i for i in ids if spec.splits == "declared" or _dealt(i) == role]
        limit = (prompting.limits or {}).get(role)
        among = set(ids if limit is None else sorted(ids)[:limit])
        kept = tuple(i for i in ids if i in among)  # in the order of the documents, as lm-eval batches them
        if not kept:
            raise TaskError(f"task '{spec.task}' has no items left for {role}; give it more documents or other splits")
        loaded.items[role] = kept
    seen: dict[str, Role] = {}
    for role, role_ids in loaded.items.items():
        for item in role_ids:
            if seen.setdefault(item, role) != role:
                raise TaskError(f"task '{spec.task}' has an item in both {seen[item]} and {role}: {loaded.requests[item][0].doc}")
    needed = {i for ids in loaded.items.values() for i in ids}
    loaded.requests = {item: requests for item, requests in loaded.requests.items() if item in needed}
    return loaded


def _requests(loaded: Loaded, docs: Sequence[Any], prompting: Prompting) -> list[str]:
    """Builds the requests of documents in order, so that few-shot examples are those that lm-eval draws."""
    task, ids = loaded.task, []
    template = functools.partial(_chat_template, prompting.tokenizer) if prompting.chat else None
    for index, doc in enumerate(docs):
        item = _item_id(doc)
        context = task.fewshot_context(
            doc,
            num_fewshot=task.config.num_fewshot or 0,
            system_instruction=None,
            apply_chat_template=prompting.chat,
            fewshot_as_multiturn=prompting.multiturn,
            chat_template=template,
            gen_prefix=task.doc_to_prefix(doc),
        )
        made = task.construct_requests(
            doc=doc,
            ctx=context,
            metadata=(loaded.spec.task, index, task.config.repeats),
            apply_chat_template=prompting.chat,
            chat_template=template,
        )
        if item not in loaded.requests:
            _check_gold(task, doc)
            loaded.requests[item] = made if isinstance(made, list) else [made]
        ids.append(item)
    return list(dict.fromkeys(ids))


def _chat_template(tokenizer: Any, history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    text = tokenizer.apply_chat_template(
        history, tokenize=False, add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt
    )
    return str(text)


def fingerprint(loaded: Loaded) -> str:
    """SHA-256 of a task's settings, every item of every role and every request."""
    settings = {k: v for k, v in loaded.task.dump_config().items() if k not in ("dataset_path", "dataset_kwargs", "metadata")}
    text = json.dumps(settings, sort_keys=True, default=lambda value: getattr(value, "__name__", type(value).__name__))
    digest = hashlib.sha256(f"{loaded.metric}|{loaded.filter}|{text}".encode())
    for role in ROLES:
        digest.update(role.encode())
        for item in loaded.items[role]:
            digest.update(item.encode())
            for request in loaded.requests[item]:
                digest.update(repr(request.args).encode())
    return digest.hexdigest()


def build(manager: TaskManager, name: str) -> Any:
    """The lm-eval task object; data files named relative to the repository are found next to the shipped tasks."""
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = manager.task_index[name]
    if entry.yaml_path is not None and str(entry.yaml_path).startswith(str(data.evaluators())):
        config = load_yaml(entry.yaml_path)
        files = config.get("dataset_kwargs", {}).get("data_files", {})
        config["dataset_kwargs"] = {**config.get("dataset_kwargs", {}), "data_files": {k: str(data.root() / v) for k, v in files.items()}}
        return manager.load([config])["tasks"][name]
    return manager.load([name])["tasks"][name]


def _check_gold(task: Any, doc: Any) -> None:
    """lm-eval scores an item whose right answer is none of the choices as wrong, whatever the model says."""
    if task.OUTPUT_TYPE != "multiple_choice" or task.multiple_input:
        return
    options, gold = task.doc_to_choice(doc), task.doc_to_target(doc)
    for right in gold if isinstance(gold, list) else [gold]:
        if not ((isinstance(right, int) and 0 <= right < len(options)) or right in options):
            raise TaskError(f"task '{task.config.task}' has an item whose answer {right!r} is none of its choices: {doc}")


def _documents(task: Any, spec: TaskSpec) -> dict[Role, list[Any]]:
    if spec.splits == "hash":
        docs = list(task.eval_docs)
        return dict.fromkeys(ROLES, docs)
    found = {
        "search": task.has_training_docs() and task.training_docs(),
        "validation": task.has_validation_docs() and task.validation_docs(),
        "test": task.has_test_docs() and task.test_docs(),
    }
    missing = [role for role, docs in found.items() if not docs]
    if missing:
        raise TaskError(f"task '{spec.task}' declares no documents for {', '.join(missing)}; use splits: hash")
    return {role: list(found[role]) for role in ROLES}


def _item_id(doc: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of a document's canonical JSON."""
    return hashlib.sha256(json.dumps(doc, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _dealt(item: str) -> Role:
    tenth = int(item[:8], 16) % 10
    for role in ROLES:
        tenth -= _SPLIT_SHARES[role]
        if tenth < 0:
            return role
    raise AssertionError("shares sum to ten")
