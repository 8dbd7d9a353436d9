"""lm-eval tasks as an `Evaluator`: prompts, metrics and filters are lm-eval's own, the forward passes the engine's.

Tasks are loaded and their requests built once; a set of items is compiled once and replayed for every candidate. Knows
nothing of merging.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from evomerge.errors import CandidateError
from evomerge.evaluation.inference.requests import Verification
from evomerge.evaluation.lm_harness import truncation
from evomerge.evaluation.lm_harness.backends.base import Backend
from evomerge.evaluation.lm_harness.backends.compiled import CompiledBackend
from evomerge.evaluation.lm_harness.backends.hflm import HFLMBackend, hflm
from evomerge.evaluation.lm_harness.groups import Group, add_groups
from evomerge.evaluation.lm_harness.items import ItemRules
from evomerge.evaluation.lm_harness.prompts import Prompting
from evomerge.evaluation.lm_harness.results import (
    Outcomes,
    check,
    gold_requests,
    measures,
    number,
    remember_documents,
    soft,
)
from evomerge.evaluation.lm_harness.samples import Sample, passage, sample
from evomerge.evaluation.lm_harness.task_loading import Loaded, TaskSpec, load
from evomerge.evaluation.records import Items, ItemScore, Role

log = logging.getLogger(__name__)
_COMPILED = 8  # sets of items whose plans are kept
_MODELS = 8  # live models that are kept ready


@dataclass(slots=True)
class _Compiled:
    """Items ready to be asked. rows: by task, (item, its requests, requests of its right answers); prepared: of a backend."""

    rows: dict[str, list[tuple[str, list[Any], list[Any]]]]
    requests: list[Any]
    prepared: Any


@dataclass(slots=True)
class _Model:
    """A live model with what is ready for it."""

    model: nn.Module
    backend: Backend
    compiled: OrderedDict[tuple[Any, ...], _Compiled] = field(default_factory=OrderedDict)


class LmHarness:
    """Scores models on lm-eval tasks. Satisfies `evomerge.evaluation.evaluator.Evaluator`."""

    def __init__(
        self,
        specs: Sequence[TaskSpec],
        tokenizer: Any,
        *,
        batch_size: int = 64,
        include: Sequence[Path] = (),
        apply_chat_template: bool = False,
        fewshot_as_multiturn: bool = False,
        system_instruction: str | None = None,
        limits: Mapping[Role, int] | None = None,
        rules: ItemRules | None = None,
        backend: Literal["resident", "lm-eval"] = "resident",
    ) -> None:
        """Loads tasks and builds every request.

        include: folders of task YAML files besides the shipped ones. limits: role -> most items of each task, chosen
        by their hash. rules: which documents may become items. backend: 'resident' compiles the requests for the live
        model, 'lm-eval' hands all to HFLM. batch_size: of what goes through HFLM. Raises TaskError for unknown tasks or
        metrics, for roles left without items, and for what the rules refuse.
        """
        self.tokenizer, self.batch_size = tokenizer, batch_size
        found = load(
            specs,
            Prompting(tokenizer, apply_chat_template, fewshot_as_multiturn, system_instruction),
            include,
            rules,
            limits,
        )
        self.tasks, self.groups, self._found = found.leaves, found.groups, found
        self._outcomes = {name: Outcomes(loaded) for name, loaded in self.tasks.items()}
        self._searched = {
            (name, item) for name, loaded in self.tasks.items() for item in loaded.items["search"]
        }
        for loaded in self.tasks.values():
            remember_documents(loaded.task)
        self._kind = backend
        self._models: OrderedDict[int, _Model] = OrderedDict()
        self._backend: Backend

    def items(self, role: Role) -> Items:
        """Task name -> item ids of a role, in the order of the task's documents."""
        return {name: loaded.items[role] for name, loaded in self.tasks.items()}

    def sign(self, task: str) -> int:
        """+1 if higher values of the metric of a task or group are better, else -1."""
        return 1 if self._named(task).higher_is_better else -1

    def metric(self, task: str) -> str:
        """Name of the metric of a task or group that is scored."""
        return self._named(task).metric

    def subtasks(self, task: str) -> tuple[tuple[str, float], ...]:
        """(task with items, its share) of a group, shares summing to one; a task is its own leaf."""
        return self.groups[task].shares() if task in self.groups else ((task, 1.0),)

    def warnings(self, model: nn.Module | None = None) -> tuple[str, ...]:
        """Sentences about the items that a user should read: what occurs twice or is given away, and what the model truncates."""
        cut = (
            truncation.findings(self.tasks, hflm(model, self.tokenizer, self.batch_size))
            if model is not None
            else ()
        )
        return (*self._found.findings, *cut)

    def _named(self, task: str) -> Loaded | Group:
        return self.groups[task] if task in self.groups else self.tasks[task]

    def soft_metrics(self, task: str) -> tuple[str, ...]:
        """Soft scores that a task, or every task of a group, has beside its metric: of 'probability' and 'logprob'."""
        own = [measures(self.tasks[leaf]) for leaf, _ in self.subtasks(task)]
        return tuple(m for m in own[0] if all(m in others for others in own))

    def is_mean(self, task: str) -> bool:
        """Whether the metric of a task, or of every task of a group, is the mean of its items' values."""
        own = [self.tasks[leaf] for leaf, _ in self.subtasks(task)]
        return all(
            getattr(loaded.task.aggregation()[loaded.metric], "__name__", "") == "mean" for loaded in own
        )

    def fingerprint(self) -> dict[str, str]:
        """Name of a task or group -> SHA-256 of its settings, every item of every role and every request: what resume compares."""
        return {name: self._found.fingerprint(name) for name in self._found.terms}

    def backends(self, model: nn.Module) -> dict[str, str]:
        """Task name -> what answers it: 'compiled', or 'lm-eval: ' and why, in so far as its search items say."""
        found = {}
        for name, loaded in self.tasks.items():
            self._compile(model, {name: loaded.items["search"][:1]})
            reason = self._backend.fallback_reason(name)
            found[name] = "compiled" if reason is None else f"lm-eval: {reason}"
        return found

    def optimizations(self, model: nn.Module, items: Items) -> Mapping[str, Verification]:
        """Technique -> the numeric probe's verdict on this model, at the lengths of these items; none where lm-eval answers all."""
        self._compile(model, items)
        return self._backend.optimizations()

    def score(self, model: nn.Module, items: Items) -> tuple[tuple[ItemScore, ...], dict[str, float]]:
        """Per-item values and each task's metric as lm-eval computes them, and means of the soft scores as 'TASK:probability', 'TASK:logprob'.

        Items of the search are scored by float32 sums, which tie less; all others with lm-eval's rounding. Raises
        CandidateError for NaN log-likelihoods and for requests that the model cannot take.
        """
        compiled = self._answered(model, items)
        scores: list[ItemScore] = []
        metrics: dict[str, float] = {}
        for name, rows in compiled.rows.items():
            loaded = self.tasks[name]
            values = self._outcomes[name].values([(item, requests) for item, requests, _ in rows])
            metrics[name] = float(loaded.task.aggregation()[loaded.metric](list(values)))
            own = []
            for (item, requests, gold), value in zip(rows, values, strict=True):
                found = number(value, loaded.task.aggregation()[loaded.metric])
                if math.isnan(found):
                    raise CandidateError(f"task '{name}' gave {value!r} for item {item}")
                own.append(ItemScore(name, item, found, *soft(loaded, requests, gold, self._backend.tokens)))
            scores += own
            for measure in measures(loaded):
                known = [v for s in own if (v := getattr(s, measure)) is not None]
                if known:
                    metrics[f"{name}:{measure}"] = math.fsum(known) / len(known)
        add_groups(metrics, self.groups)
        return tuple(scores), metrics

    def samples(self, model: nn.Module, items: Items) -> list[Sample]:
        """Prompt, right answer, the model's output and its value, item by item."""
        found: list[Sample] = []
        for name, rows in self._answered(model, items).rows.items():
            values = self._outcomes[name].values([(item, requests) for item, requests, _ in rows])
            mean = self.tasks[name].task.aggregation()[self.tasks[name].metric]
            found += [
                sample(self.tasks[name], item, requests, number(value, mean))
                for (item, requests, _), value in zip(rows, values, strict=True)
            ]
        return found

    def _answered(self, model: nn.Module, items: Items) -> _Compiled:
        """Items whose requests hold the model's responses."""
        compiled = self._compile(model, items)
        searched = all(
            (name, item) in self._searched for name, rows in compiled.rows.items() for item, _, _ in rows
        )
        for request, answers in zip(
            compiled.requests,
            self._backend.answer(compiled.prepared, "float32" if searched else "model"),
            strict=True,
        ):
            request.resps, request.filtered_resps = answers, {}
        for name, rows in compiled.rows.items():
            for item, requests, gold in rows:
                check(self.tasks[name], item, [*requests, *gold])
        return compiled

    def prepare(self, model: nn.Module, items: Items) -> None:
        """Compiles the items' requests for a model, and probes it where it is new."""
        self._compile(model, items)

    def examples(self, count: int) -> list[tuple[str, str]]:
        """(prompt, right answer) of items of the search, `count` at most, of one task after the other."""
        rows = [
            [passage(loaded, loaded.requests[item]) for item in loaded.items["search"][:count]]
            for loaded in self.tasks.values()
        ]
        return [row for group in zip(*rows, strict=False) for row in group][:count]

    def _compile(self, model: nn.Module, items: Items) -> _Compiled:
        """The items' requests prepared for the model; the latest models and sets are kept."""
        own = self._models.get(id(model))
        if own is None or own.model is not model:
            kind = CompiledBackend if self._kind == "resident" else HFLMBackend
            own = self._models[id(model)] = _Model(model, kind(model, self.tokenizer, self.batch_size))
            if len(self._models) > _MODELS:
                self._models.popitem(last=False)[1].backend.close()
        self._models.move_to_end(id(model))
        self._backend = own.backend
        key = tuple((name, tuple(ids)) for name, ids in items.items() if ids)
        if key not in own.compiled:
            rows = {name: [self._row(name, item) for item in ids] for name, ids in key}
            requests = [r for found in rows.values() for _, asked, gold in found for r in (*asked, *gold)]
            own.compiled[key] = _Compiled(rows, requests, self._backend.prepare(requests))
            if len(own.compiled) > _COMPILED:
                own.compiled.popitem(last=False)
        own.compiled.move_to_end(key)
        return own.compiled[key]

    def _row(self, name: str, item: str) -> tuple[str, list[Any], list[Any]]:
        requests = self.tasks[name].requests[item]
        return item, requests, gold_requests(self.tasks[name], requests)
