"""lm-eval tasks loaded for a search: groups expanded, items assigned to roles, requests built once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from evomerge.errors import TaskError, suggest
from evomerge.evaluation.contamination import find_overlaps, read_documents
from evomerge.evaluation.lm_harness import items as item_sets
from evomerge.evaluation.lm_harness import sandbox, splits
from evomerge.evaluation.lm_harness.groups import Group, GroupMetric, choose_group_metric
from evomerge.evaluation.lm_harness.items import ItemRules, TaskDocument
from evomerge.evaluation.lm_harness.load_errors import explained
from evomerge.evaluation.lm_harness.prompts import Prompting, build_requests
from evomerge.evaluation.lm_harness.splits import Splits
from evomerge.evaluation.lm_harness.task_catalogue import TaskCatalogue
from evomerge.evaluation.records import ROLES, Role

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_Documents = dict[Role, list[TaskDocument]]


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """What is scored of a task, group or tag.

    Attributes:
        task: Its name.
        metric: Name of the metric; None for the task's first.
        filter: Name of the filter; None for the task's first.
        num_fewshot: Number of few-shot examples; None for the task's own.
        splits: 'declared' takes the task's training, validation and test documents for the roles; 'hash'
            assigns the documents that lm-eval would score (test, else validation) to the roles by hash: 6, 2
            and 2 tenths; 'hash-train' assigns the training documents; 'validation' takes the test documents
            for the test and assigns the validation documents to search and validation, 6 and 4 tenths.
        soft: Whether to compute soft metrics of generated texts too, which costs one more request an item.
        items: Role -> numbers or ids of exactly its documents.
        higher_is_better: Direction of a metric that says none of its own; None where the user says none.
        known_direction: Direction that an earlier run of the same study took; used where nobody says one.
    """

    task: str
    metric: str | None = None
    filter: str | None = None
    num_fewshot: int | None = None
    splits: Splits = "hash"
    soft: bool = False
    items: Mapping[Role, Sequence[int | str]] | None = None
    higher_is_better: bool | None = None
    known_direction: bool | None = None


@dataclass(slots=True)
class LoadedTask:
    """A task with the requests of its items.

    Attributes:
        spec: What is scored of it.
        task: lm-eval's task.
        metric: Name of the metric.
        filter: Name of the filter.
        higher_is_better: Direction of the metric.
        items: Role -> item ids.
        requests: Item id -> lm-eval requests, in order.
        size: Number of test items before any limit.
        code: Hash of its Python; None for a task without.
        warnings: Sentences about its items that a user should read.
    """

    spec: TaskSpec
    task: Any
    metric: str
    filter: str
    higher_is_better: bool
    items: dict[Role, tuple[str, ...]]
    requests: dict[str, list[Any]]
    size: int = 0
    code: str | None = None
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class LoadedTasks:
    """The tasks of a search.

    Attributes:
        tasks: Name -> task with items, those of groups included.
        groups: Name -> group that some of them make up.
        terms: Names of both that the user wrote, in order.
        warnings: Sentences about items that a user should read.
    """

    tasks: dict[str, LoadedTask]
    groups: dict[str, Group]
    terms: tuple[str, ...]
    warnings: tuple[str, ...]

    def fingerprint(self, name: str) -> str:
        """Hashes a task, see `fingerprint`, or a group's members and their weights.

        Args:
            name: Name of a task or group.

        Returns:
            SHA-256 in hexadecimal.
        """
        group = self.groups.get(name)
        if group is None:
            return fingerprint(self.tasks[name])
        members = [
            (member, size, fingerprint(self.tasks[member]))
            for member, size in zip(group.members, group.sizes, strict=True)
        ]
        return hashlib.sha256(repr(members).encode()).hexdigest()


_LONGEST_NAME = 200  # characters


def load(
    specs: Sequence[TaskSpec],
    prompting: Prompting,
    include: Sequence[Path] = (),
    rules: ItemRules | None = None,
    limits: Mapping[Role, int] | None = None,
    *,
    allow_code: bool = False,
) -> LoadedTasks:
    """Loads tasks.

    Args:
        specs: What is scored, in order.
        prompting: How prompts are made.
        include: Folders of task YAML files besides the shipped ones.
        rules: Which documents may become items; None for the defaults.
        limits: Role -> most items of each task, chosen by their hash; None for all.
        allow_code: Whether tasks may have what models write executed, in child processes.

    Returns:
        The tasks. What the rules allow but a user should know is in the warnings.

    Raises:
        TaskError: A task or metric is unknown, a role is left without items, or the rules refuse something.
    """
    rules = rules or ItemRules()
    catalogue = TaskCatalogue(include, allow_code=allow_code)
    loaded: dict[str, tuple[LoadedTask, _Documents]] = {}
    group_members: dict[str, tuple[tuple[str, ...], GroupMetric]] = {}
    entries: dict[str, str] = {}  # task with items -> the entry that it is part of
    warnings: list[str] = []
    for spec in specs:
        try:
            members, group = _expand(spec, catalogue, warnings)
            for name, (task_spec, task) in members.items():
                if not name.isprintable() or len(name) > _LONGEST_NAME:
                    raise TaskError(
                        f"a task of '{spec.task}' is called {ascii(name)[:_LONGEST_NAME]}; give it printable "
                        f"text of at most {_LONGEST_NAME} characters for a name"
                    )
                _check_once(name, spec.task, entries)
                sandbox.check_task(task_spec.task, task, allow_code=allow_code)
                benchmark = catalogue.is_benchmark(task, spec.task)
                loaded[name] = _load_task(task_spec, task, prompting, rules, benchmark)
                loaded[name][0].code = sandbox.code_hash(task, include)
        except TaskError:
            raise
        except Exception as error:  # a task's templates and data can raise anything
            raise TaskError(explained(spec.task, error)) from error
        if group is not None:
            group_members[spec.task] = group
    if rules.training_texts:
        _compare_with_training_texts(loaded, rules)
    for task, documents in loaded.values():
        _set_items(task, documents, limits or {})
    tasks = {name: task for name, (task, _) in loaded.items()}
    groups = {
        name: _make_group(name, members, metric, tasks) for name, (members, metric) in group_members.items()
    }
    warnings += [warning for task in tasks.values() for warning in task.warnings]
    return LoadedTasks(tasks, groups, tuple(spec.task for spec in specs), tuple(warnings))


def _check_once(name: str, entry: str, entries: dict[str, str]) -> None:
    """Notes that a task is part of an entry. Raises TaskError where it was part of an earlier one."""
    if name not in entries:
        entries[name] = entry
        return
    groups = [f"'{group}'" for group in (entries[name], entry) if group != name]
    listed = f"listed, and part of {groups[0]} too" if groups else "listed twice"
    place = f"part of {' and of '.join(groups)}" if len(groups) == 2 else listed
    raise TaskError(f"task '{name}' is {place}; list it once")


def longest_request(loaded: LoadedTask) -> Any | None:
    """Finds the longest request of a task, by characters, among the items of all roles.

    Args:
        loaded: The task.

    Returns:
        lm-eval's `Instance`; None for a task without requests of text.
    """
    requests = (request for of_item in loaded.requests.values() for request in of_item)
    return max(requests, key=_characters, default=None)


def _characters(request: Any) -> int:
    return sum(len(part) for part in request.args if isinstance(part, str))


# ---- groups ------------------------------------------------------------------------------------------------


def _expand(
    spec: TaskSpec, catalogue: TaskCatalogue, warnings: list[str]
) -> tuple[dict[str, tuple[TaskSpec, Any]], tuple[tuple[str, ...], GroupMetric] | None]:
    """Builds what a spec names.

    Returns (name -> what is scored of it and lm-eval's task, of a group or tag its members and which number
    is wanted).
    """
    tasks, group, is_tag = catalogue.build(spec.task)
    if group is None and not is_tag:
        return {spec.task: (spec, tasks[spec.task])}, None
    if spec.items:
        raise TaskError(
            f"'{spec.task}' is a group of {len(tasks)} tasks; items are listed for a task, "
            "so name its tasks one by one"
        )
    wanted = choose_group_metric(spec.task, group, spec.metric, spec.filter)
    names = [task.task_name for task in group.get_all_tasks()] if group is not None else list(tasks)
    members = tuple(name for name in names if _reports(tasks[name], wanted))
    if not members:
        raise TaskError(
            f"none of the {len(names)} tasks of '{spec.task}' reports '{wanted.metric}'; name another metric"
        )
    silent = [name for name in names if name not in members]
    if silent:
        warnings.append(
            f"group '{spec.task}': {', '.join(silent)} report no '{wanted.metric}' and count for "
            "nothing, as in lm-eval"
        )
    if not wanted.aggregated:
        warnings.append(
            f"lm-eval reports no number for '{spec.task}'; here it is the plain mean of its "
            f"{len(members)} tasks"
        )
    specs = {
        name: (replace(spec, task=name, metric=wanted.metric, filter=wanted.filter), tasks[name])
        for name in members
    }
    return specs, (members, wanted)


def _reports(task: Any, wanted: GroupMetric) -> bool:
    """Whether a task has the metric and filter that are wanted of its group."""
    return wanted.metric in (None, *task.aggregation()) and wanted.filter in (None, *_filter_names(task))


def _make_group(
    name: str, members: tuple[str, ...], wanted: GroupMetric, tasks: Mapping[str, LoadedTask]
) -> Group:
    directions = {tasks[member].higher_is_better for member in members}
    if len(directions) > 1:
        raise TaskError(
            f"in some tasks of '{name}' a higher metric is better, in others a lower one; "
            "name a metric, or the tasks one by one"
        )
    sizes = tuple(tasks[member].size if wanted.by_size else 1 for member in members)
    return Group(name, members, sizes, wanted.metric or tasks[members[0]].metric, directions.pop())


# ---- one task ----------------------------------------------------------------------------------------------


def _load_task(
    spec: TaskSpec, task: Any, prompting: Prompting, rules: ItemRules, benchmark: bool
) -> tuple[LoadedTask, _Documents]:
    """(a task without items yet, the documents of each role)."""
    is_benchmark = benchmark and not rules.allow_benchmark_test
    splits.check(task, spec.task, spec.splits, is_benchmark=is_benchmark)
    warnings = _set_fewshot(spec, task)
    metric, filter_name = _choose_metric(spec, task)
    higher_is_better = _direction(spec, task, metric)
    dealt, declared = build_requests(task, spec.task, spec.splits, prompting)
    roles = item_sets.assign_roles(spec.task, dealt, declared, spec.items or {})
    refuse = spec.splits == "declared" and rules.duplicates == "refuse"
    roles, duplicates = item_sets.remove_duplicates(spec.task, roles, refuse=refuse)
    warnings += duplicates
    return LoadedTask(spec, task, metric, filter_name, higher_is_better, {}, {}, warnings=warnings), roles


def _set_fewshot(spec: TaskSpec, task: Any) -> list[str]:
    """Sets the number of few-shot examples; returns warnings."""
    warnings = []
    if spec.num_fewshot is not None:
        if task.config.num_fewshot == 0 and spec.num_fewshot:
            warnings.append(
                f"task '{spec.task}' fixes num_fewshot: 0, which lm-eval's --num_fewshot would not change; "
                f"it is asked with {spec.num_fewshot}"
            )
        task.set_config(key="num_fewshot", value=spec.num_fewshot)
    return warnings


def _choose_metric(spec: TaskSpec, task: Any) -> tuple[str, str]:
    """(metric, filter) that are scored."""
    metrics, filters = list(task.aggregation()), _filter_names(task)
    metric, filter_name = spec.metric or metrics[0], spec.filter or filters[0]
    if metric not in metrics:
        raise TaskError(f"task '{spec.task}' reports no metric '{metric}'. {suggest(metric, metrics)}")
    if filter_name not in filters:
        raise TaskError(f"task '{spec.task}' has no filter '{filter_name}'. {suggest(filter_name, filters)}")
    return metric, filter_name


def _direction(spec: TaskSpec, task: Any, metric: str) -> bool:
    """Whether higher values of a metric are better: as it says itself, else as the user says."""
    own = task.higher_is_better().get(metric)
    if own is None:
        given = spec.known_direction if spec.higher_is_better is None else spec.higher_is_better
        if given is None:
            raise TaskError(
                f"task '{spec.task}' does not say whether higher values of its metric '{metric}' are better; "
                "write higher_is_better: true or false in its entry of the search file"
            )
        return given
    if spec.higher_is_better not in (None, bool(own)):
        raise TaskError(
            f"task '{spec.task}' says itself that of its metric '{metric}' {'higher' if own else 'lower'} is "
            "better, and the search file says the contrary; remove higher_is_better from its entry"
        )
    return bool(own)


def _filter_names(task: Any) -> list[str]:
    return [ensemble.name for ensemble in task._filters]


# ---- items -------------------------------------------------------------------------------------------------


def _compare_with_training_texts(
    tasks: Mapping[str, tuple[LoadedTask, _Documents]], rules: ItemRules
) -> None:
    """Finds, and perhaps drops, items that the training texts contain. The texts are read once."""
    places = [
        (name, role, document)
        for name, (_, roles) in tasks.items()
        for role in ROLES
        for document in roles[role]
    ]
    texts = [document.text for _, _, document in places]
    result = find_overlaps(texts, read_documents(rules.training_texts), rules.overlap_ngram)
    drop = rules.overlap == "drop"
    for name, (loaded, roles) in tasks.items():
        for role in ROLES:
            here = {i for i, (owner, of_role, _) in enumerate(places) if owner == name and of_role == role}
            shared = [places[i][2] for i in result.matches if i in here]
            too_short = sum(1 for i in result.too_short if i in here)
            total = len(roles[role])
            if shared:
                left_out = " and are left out" if drop else ""
                loaded.warnings.append(
                    f"task '{name}': {len(shared)} of {total} items of {role} share "
                    f"{rules.overlap_ngram} words "
                    f"in a row with the training texts{left_out}: {item_sets.describe(shared)}"
                )
            if too_short:
                loaded.warnings.append(
                    f"task '{name}': {too_short} of {total} items of {role} are too short to compare "
                    "with training texts"
                )
            if drop:
                dropped = {document.item for document in shared}
                roles[role] = [document for document in roles[role] if document.item not in dropped]


def _set_items(
    loaded: LoadedTask, roles: Mapping[Role, Sequence[TaskDocument]], limits: Mapping[Role, int]
) -> None:
    """Gives a task its items and their requests."""
    loaded.size = len(roles["test"])
    for role in ROLES:
        listed = bool(loaded.spec.items) and role in (loaded.spec.items or {})
        documents = item_sets.limited(roles[role], None if listed else limits.get(role))
        if not documents:
            raise TaskError(
                f"task '{loaded.spec.task}' has no items left for {role}; give it more documents or "
                "other splits"
            )
        loaded.items[role] = tuple(document.item for document in documents)
        loaded.requests |= {document.item: document.requests for document in documents}


def fingerprint(loaded: LoadedTask) -> str:
    """Hashes a task's settings, its code, every item of every role and every request.

    Args:
        loaded: The task.

    Returns:
        SHA-256 in hexadecimal: what resume compares.
    """
    settings = {
        key: value
        for key, value in loaded.task.dump_config().items()
        if key not in ("dataset_path", "dataset_kwargs", "metadata")
    }
    text = json.dumps(
        settings, sort_keys=True, default=lambda value: getattr(value, "__name__", type(value).__name__)
    )
    digest = hashlib.sha256(f"{loaded.metric}|{loaded.filter}|{text}".encode())
    digest.update((loaded.code or "").encode())
    for role in ROLES:
        digest.update(role.encode())
        for item in loaded.items[role]:
            digest.update(item.encode())
            for request in loaded.requests[item]:
                digest.update(repr(request.args).encode())
    return digest.hexdigest()
