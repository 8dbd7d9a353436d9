"""lm-eval tasks loaded for a search: found by name, expanded if they are groups, their items dealt, their requests built once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from evomerge import _resources
from evomerge.errors import TaskError, suggest
from evomerge.evaluation.contamination import overlaps, read
from evomerge.evaluation.lm_harness import items as item_sets
from evomerge.evaluation.lm_harness import sandbox
from evomerge.evaluation.lm_harness.groups import Group, Wish, wish
from evomerge.evaluation.lm_harness.items import Asked, ItemRules, Splits
from evomerge.evaluation.lm_harness.prompts import Prompting, asked
from evomerge.evaluation.lm_harness.sandbox import TREE
from evomerge.evaluation.records import ROLES, Role

os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

log = logging.getLogger(__name__)
sandbox.harden()


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """What of a task, group or tag is scored. metric: None for the task's first; filter: None for its first.

    splits: 'declared' takes the task's training, validation and test documents for the roles; 'hash' deals the
    documents that lm-eval would score (test, else validation) to the roles by hash: 6, 2 and 2 tenths; 'hash-train'
    deals the training documents. items: role -> numbers or ids of exactly its documents. soft: score the right answers
    of generation tasks too, which costs one more request an item.
    """

    task: str
    metric: str | None = None
    filter: str | None = None
    num_fewshot: int | None = None
    splits: Splits = "hash"
    soft: bool = False
    items: Mapping[Role, Sequence[int | str]] | None = None


@dataclass(slots=True)
class Loaded:
    """A task with the requests of its items. requests: item id -> lm-eval instances, in order.

    size: test items before any limit. code: hash of its Python, None for a task without. findings: sentences about its
    items that a user should read.
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
    findings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Tasks:
    """Leaf tasks by name, the groups that some of them make up, and the names of both that the user wrote, in order."""

    leaves: dict[str, Loaded]
    groups: dict[str, Group]
    terms: tuple[str, ...]
    findings: tuple[str, ...]

    def fingerprint(self, name: str) -> str:
        """SHA-256 of a task, see `fingerprint`, or of a group's leaves and their weights."""
        group = self.groups.get(name)
        if group is None:
            return fingerprint(self.leaves[name])
        members = [
            (member, size, fingerprint(self.leaves[member]))
            for member, size in zip(group.members, group.sizes, strict=True)
        ]
        return hashlib.sha256(repr(members).encode()).hexdigest()


def load(
    specs: Sequence[TaskSpec],
    prompting: Prompting,
    include: Sequence[Path] = (),
    rules: ItemRules | None = None,
    limits: Mapping[Role, int] | None = None,
) -> Tasks:
    """The tasks, in the order given. limits: role -> most items of each leaf, chosen by their hash.

    Raises TaskError for unknown tasks or metrics, for roles left without items, and for what the rules refuse. What
    they allow but a user should know is in the findings.
    """
    rules = rules or ItemRules()
    catalogue = _Catalogue(include)
    leaves: dict[str, tuple[Loaded, dict[Role, list[Asked]]]] = {}
    wishes: dict[str, tuple[tuple[str, ...], Wish]] = {}
    findings: list[str] = []
    for spec in specs:
        try:
            members, wished = _expand(spec, catalogue, findings)
            for name, (own, task) in members.items():
                if name in leaves:
                    raise TaskError(
                        f"task '{name}' is part of '{spec.task}' and of an entry before it; list it once"
                    )
                leaves[name] = _load(own, task, prompting, rules, catalogue.is_benchmark(task, spec.task))
                leaves[name][0].code = sandbox.code_hash(task, include)
        except TaskError:
            raise
        except Exception as error:  # a task's templates and data can raise anything
            raise TaskError(
                f"task '{spec.task}' cannot be loaded: {type(error).__name__}: {error}"
            ) from error
        if wished is not None:
            wishes[spec.task] = wished
    if rules.training_texts:
        _compare(leaves, rules)
    for loaded, roles in leaves.values():
        _settle(loaded, roles, limits or {})
    tasks = {name: loaded for name, (loaded, _) in leaves.items()}
    groups = {name: _group(name, members, wished, tasks) for name, (members, wished) in wishes.items()}
    findings += [f for loaded in tasks.values() for f in loaded.findings]
    return Tasks(tasks, groups, tuple(spec.task for spec in specs), tuple(findings))


class _Catalogue:
    """Tasks by name: those shipped and included, and lm-eval's own tree once a name is in neither, for it takes seconds to read."""

    def __init__(self, include: Sequence[Path]) -> None:
        self.folders = [_resources.evaluators(), *include]
        for folder in self.folders:
            if not folder.is_dir():
                raise TaskError(f"there is no task folder '{folder}'")
        quiet = logging.getLogger("lm_eval")
        quiet.setLevel(max(quiet.level, logging.ERROR))
        self.own = self._manager(self.folders)
        self._all: TaskManager | None = None

    def everything(self) -> TaskManager:
        if self._all is None:
            log.info("reading lm-eval's own task tree")
            self._all = self._manager([TREE, *self.folders])
        return self._all

    def build(self, name: str) -> tuple[dict[str, Any], Any | None, bool]:
        """(leaf tasks by name, lm-eval's group of that name or None, whether it is a tag). Raises TaskError for unknown names."""
        manager = self.own if name in self.own.all_tasks else self.everything()
        if name not in manager.all_tasks:
            raise TaskError(f"unknown task '{name}'. {suggest(name, manager.all_tasks)}")
        several = name not in manager.all_subtasks
        sandbox.check_entry(name, manager.task_index)
        try:
            found = manager.load([name])
        except Exception:  # a group of the user's may hold tasks of lm-eval's
            if manager is not self.own or not several:
                raise
            sandbox.check_entry(name, self.everything().task_index)
            found = self.everything().load([name])
        return dict(found["tasks"]), found.get("groups", {}).get(name), several and name in manager.all_tags

    def is_benchmark(self, task: Any, asked_as: str) -> bool:
        """Whether a task comes from lm-eval's own tree and not from a folder of ours or the user's."""
        source = (getattr(task.config, "metadata", None) or {}).get("config_source", "inline")
        if source == "inline":  # shipped, of a group's own making, or written in Python
            if asked_as in self.own.all_tasks:
                return False
            entry = self.everything().task_index.get(task.task_name) or self.everything().task_index[asked_as]
            source = str(entry.yaml_path)
        path = Path(source).resolve()
        return path.is_relative_to(TREE) and not any(path.is_relative_to(f.resolve()) for f in self.folders)

    @staticmethod
    def _manager(folders: Sequence[Path]) -> TaskManager:
        """A manager in which the shipped tasks' data files, named from the repository's root, are found from anywhere."""
        manager = TaskManager(include_path=[str(f) for f in folders], include_defaults=False)
        for entry in manager.task_index.values():
            if entry.yaml_path is not None and Path(entry.yaml_path).is_relative_to(_resources.evaluators()):
                config = load_yaml(entry.yaml_path)
                files = config.get("dataset_kwargs", {}).get("data_files")
                if files:
                    absolute = {split: str(_resources.root() / file) for split, file in files.items()}
                    config["dataset_kwargs"] = {**config["dataset_kwargs"], "data_files": absolute}
                    entry.yaml_path, entry.cfg = None, config
        return manager


def _expand(
    spec: TaskSpec, catalogue: _Catalogue, findings: list[str]
) -> tuple[dict[str, tuple[TaskSpec, Any]], tuple[tuple[str, ...], Wish] | None]:
    """(leaf name -> what of it is scored and lm-eval's task, for a group or tag its members and what number it wants)."""
    tasks, group, tag = catalogue.build(spec.task)
    if group is None and not tag:
        return {spec.task: (spec, tasks[spec.task])}, None
    if spec.items:
        raise TaskError(
            f"'{spec.task}' is a group of {len(tasks)} tasks; items are listed for a task, so name its tasks one by one"
        )
    wished = wish(spec.task, group, spec.metric, spec.filter)
    names = [task.task_name for task in group.get_all_tasks()] if group is not None else list(tasks)
    reporting = {
        n
        for n in names
        if wished.metric in (None, *tasks[n].aggregation()) and wished.filter in (None, *_filters(tasks[n]))
    }
    members = tuple(n for n in names if n in reporting)
    if not members:
        raise TaskError(
            f"none of the {len(names)} tasks of '{spec.task}' reports '{wished.metric}'; name another metric"
        )
    if silent := [n for n in names if n not in reporting]:
        findings.append(
            f"group '{spec.task}': {', '.join(silent)} report no '{wished.metric}' and count for nothing, as in lm-eval"
        )
    if not wished.aggregated:
        findings.append(
            f"lm-eval reports no number for '{spec.task}'; here it is the plain mean of its {len(members)} tasks"
        )
    leaves = {
        n: (replace(spec, task=n, metric=wished.metric, filter=wished.filter), tasks[n]) for n in members
    }
    return leaves, (members, wished)


def _group(name: str, members: tuple[str, ...], wished: Wish, tasks: Mapping[str, Loaded]) -> Group:
    directions = {tasks[member].higher_is_better for member in members}
    if len(directions) > 1:
        raise TaskError(
            f"in some tasks of '{name}' a higher metric is better, in others a lower one; name a metric, or the tasks one by one"
        )
    sizes = tuple(tasks[member].size if wished.by_size else 1 for member in members)
    return Group(name, members, sizes, wished.metric or tasks[members[0]].metric, directions.pop())


def _load(
    spec: TaskSpec, task: Any, prompting: Prompting, rules: ItemRules, benchmark: bool
) -> tuple[Loaded, dict[Role, list[Asked]]]:
    """(a task without items yet, the documents of each role)."""
    sandbox.check_task(spec.task, task)
    if benchmark and spec.splits == "hash" and not rules.allow_benchmark_test:
        raise TaskError(_refusal(spec.task, task))
    findings = []
    if spec.num_fewshot is not None:
        if task.config.num_fewshot == 0 and spec.num_fewshot:
            findings.append(
                f"task '{spec.task}' fixes num_fewshot: 0, which lm-eval's --num_fewshot would not change; it is asked with {spec.num_fewshot}"
            )
        task.set_config(key="num_fewshot", value=spec.num_fewshot)
    known, filters = list(task.aggregation()), _filters(task)
    metric, chosen = spec.metric or known[0], spec.filter or filters[0]
    if metric not in known:
        raise TaskError(f"task '{spec.task}' reports no metric '{metric}'. {suggest(metric, known)}")
    if chosen not in filters:
        raise TaskError(f"task '{spec.task}' has no filter '{chosen}'. {suggest(chosen, filters)}")
    better = bool(task.higher_is_better().get(metric, True))
    roles = item_sets.deal(spec.task, asked(task, spec.task, spec.splits, prompting), spec.items or {})
    refuse = spec.splits == "declared" and rules.duplicates == "refuse"
    roles, twins = item_sets.without_twins(spec.task, roles, refuse=refuse)
    return Loaded(spec, task, metric, chosen, better, {}, {}, findings=[*findings, *twins]), roles


def _filters(task: Any) -> list[str]:
    return [f.name for f in task._filters]


def _refusal(name: str, task: Any) -> str:
    """Why a benchmark is not searched on, and what to do instead."""
    which = "test" if task.has_test_docs() else "validation"
    instead = (
        "write splits: hash-train, which deals its training items, or splits: declared"
        if task.has_training_docs()
        else "it has no training items, so take another task for the search"
    )
    return (
        f"task '{name}' is lm-eval's: with splits: hash the search would optimise on the benchmark's own {which} items, and its score there "
        f"would mean nothing any more; {instead}, or accept that with evaluation.allow_benchmark_test: true"
    )


def _compare(leaves: Mapping[str, tuple[Loaded, dict[Role, list[Asked]]]], rules: ItemRules) -> None:
    """Finds, and perhaps drops, items that the training texts hold; the texts are read once for all tasks."""
    rows = [(loaded, role, row) for loaded, roles in leaves.values() for role in ROLES for row in roles[role]]
    result = overlaps([row.text for _, _, row in rows], read(rules.training_texts), rules.overlap_ngram)
    drop = rules.overlap == "drop"
    for loaded, roles in leaves.values():
        for role in ROLES:
            shared = [
                row for at in result.found for owner, r, row in [rows[at]] if owner is loaded and r == role
            ]
            short = sum(1 for at in result.short if rows[at][0] is loaded and rows[at][1] == role)
            total = len(roles[role])
            if shared:
                how = f"share {rules.overlap_ngram} words in a row with the training texts{' and are left out' if drop else ''}"
                loaded.findings.append(
                    f"task '{loaded.spec.task}': {len(shared)} of {total} items of {role} {how}: {item_sets.named(shared)}"
                )
            if short:
                loaded.findings.append(
                    f"task '{loaded.spec.task}': {short} of {total} items of {role} are too short to compare with training texts"
                )
            if drop:
                gone = {row.item for row in shared}
                roles[role] = [row for row in roles[role] if row.item not in gone]


def _settle(loaded: Loaded, roles: Mapping[Role, Sequence[Asked]], limits: Mapping[Role, int]) -> None:
    """Gives a task its items and their requests."""
    loaded.size = len(roles["test"])
    for role in ROLES:
        most = None if loaded.spec.items and role in loaded.spec.items else limits.get(role)
        rows = item_sets.limited(roles[role], most)
        if not rows:
            raise TaskError(
                f"task '{loaded.spec.task}' has no items left for {role}; give it more documents or other splits"
            )
        loaded.items[role] = tuple(row.item for row in rows)
        loaded.requests |= {row.item: row.requests for row in rows}


def fingerprint(loaded: Loaded) -> str:
    """SHA-256 of a task's settings, its code, every item of every role and every request."""
    settings = {
        k: v
        for k, v in loaded.task.dump_config().items()
        if k not in ("dataset_path", "dataset_kwargs", "metadata")
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
