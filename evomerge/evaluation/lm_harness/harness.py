"""lm-eval tasks as a task set.

Prompts, metrics and filters are lm-eval's own, the forward passes a backend's.

Tasks are loaded and their requests built once; a set of items is prepared once and answered for every
candidate. Knows nothing of merging.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from evomerge.errors import CandidateError, TaskError
from evomerge.evaluation.engines.engine import EngineSettings
from evomerge.evaluation.inference.divergence import Distributions
from evomerge.evaluation.inference.requests import Verification
from evomerge.evaluation.inference.target_logprobs import Rounding
from evomerge.evaluation.lm_harness import gradients
from evomerge.evaluation.lm_harness.backends import DEFAULT_BACKEND, find_backend
from evomerge.evaluation.lm_harness.backends.base import (
    Backend,
    BackendFactory,
    DifferentiableBackend,
    EngineBackend,
    RetainingBackend,
    SpanningBackend,
)
from evomerge.evaluation.lm_harness.backends.hflm import make_hflm
from evomerge.evaluation.lm_harness.groups import Group, add_group_metrics
from evomerge.evaluation.lm_harness.items import ItemRules
from evomerge.evaluation.lm_harness.labels import check_source, given_answers
from evomerge.evaluation.lm_harness.live_models import LiveModels, PreparedItems, Row
from evomerge.evaluation.lm_harness.lm_eval_patches import cache_document_rendering
from evomerge.evaluation.lm_harness.prompts import Prompting
from evomerge.evaluation.lm_harness.results import (
    TaskValues,
    check_not_nan,
    item_value,
    metric_unit,
    right_answer_requests,
    soft_metrics,
    soft_scores,
)
from evomerge.evaluation.lm_harness.samples import Sample, example, sample
from evomerge.evaluation.lm_harness.task_loading import LoadedTask, TaskSpec, load, longest_request
from evomerge.evaluation.lm_harness.truncation import truncation_warnings
from evomerge.evaluation.records import (
    GOLD,
    Answer,
    GradientRequest,
    Items,
    ItemScore,
    Role,
    soft_metric_name,
)

if TYPE_CHECKING:
    from evomerge.evaluation.lm_harness.backends.base import EngineBackendFactory

log = logging.getLogger(__name__)


class LmHarness:
    """Scores models on lm-eval tasks. Satisfies `evomerge.evaluation.task_set.TaskSet`.

        harness = LmHarness([TaskSpec("gsm8k", splits="hash-train")], tokenizer)
        scores, metrics = harness.score(model, harness.items("search"))

    Attributes:
        tokenizer: The models' tokenizer.
        batch_size: Batch size of what goes through HFLM.
        tasks: Name -> task with items.
        groups: Name -> group.
    """

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
        backend: str = DEFAULT_BACKEND,
        engine: EngineSettings | None = None,
        allow_code: bool = False,
    ) -> None:
        """Loads tasks and builds every request.

        Args:
            specs: What is scored.
            tokenizer: The models' tokenizer.
            batch_size: Batch size of what goes through HFLM.
            include: Folders of task YAML files besides the shipped ones.
            apply_chat_template: Whether prompts are rendered by the tokenizer's chat template.
            fewshot_as_multiturn: Whether few-shot examples are turns of a conversation.
            system_instruction: Text before every prompt; None for none.
            limits: Role -> most items of each task, chosen by their hash; None for all.
            rules: Which documents may become items; None for the defaults.
            backend: What answers the requests, a key of `evomerge.evaluation.lm_harness.backends.BACKENDS`.
            engine: How a backend that has one opens its engine; None for the defaults.
            allow_code: Whether tasks may have what models write executed, in child processes.

        Raises:
            ConfigError: There is no such backend.
            TaskError: A task or metric is unknown, a role is left without items, or the rules refuse
                something.
        """
        self._backend_entry, self._engine = find_backend(backend), engine
        self.tokenizer, self.batch_size = tokenizer, batch_size
        prompting = Prompting(tokenizer, apply_chat_template, fewshot_as_multiturn, system_instruction)
        self._loaded = load(specs, prompting, include, rules, limits, allow_code=allow_code)
        self.tasks, self.groups = self._loaded.tasks, self._loaded.groups
        self._values = {name: TaskValues(loaded) for name, loaded in self.tasks.items()}
        self._search_items = {
            (name, item) for name, loaded in self.tasks.items() for item in loaded.items["search"]
        }
        for loaded in self.tasks.values():
            cache_document_rendering(loaded.task)
        self._models = LiveModels(self._open_backend)

    # ---- what the tasks are --------------------------------------------------------------------------------

    def items(self, role: Role) -> Items:
        """See `Evaluator.items`. Ids are in the order of the task's documents."""
        return {name: loaded.items[role] for name, loaded in self.tasks.items()}

    def sign(self, task: str) -> int:
        """See `TaskSet.sign`."""
        return 1 if self._task_or_group(task).higher_is_better else -1

    def metric(self, task: str) -> str:
        """See `TaskSet.metric`."""
        return self._task_or_group(task).metric

    def filter(self, task: str) -> str | None:
        """See `TaskSet.filter`. lm-eval calls 'none' what changes nothing."""
        names = {self.tasks[subtask].filter for subtask, _ in self.subtasks(task)}
        name = names.pop() if len(names) == 1 else "none"
        return None if name == "none" else name

    def unit(self, task: str) -> str | None:
        """See `TaskSet.unit`: by lm-eval's own metrics and aggregations; None for those of a task's own."""
        units = {
            metric_unit(self.tasks[subtask].metric, self._aggregation(subtask))
            for subtask, _ in self.subtasks(task)
        }
        return units.pop() if len(units) == 1 else None

    def subtasks(self, task: str) -> tuple[tuple[str, float], ...]:
        """See `TaskSet.subtasks`."""
        return self.groups[task].shares() if task in self.groups else ((task, 1.0),)

    def warnings(self, model: nn.Module | None = None) -> tuple[str, ...]:
        """See `TaskSet.warnings`.

        Items that occur twice or are in training texts, and those that the model truncates.
        """
        if model is None:
            return self._loaded.warnings
        lm = make_hflm(model, self.tokenizer, self.batch_size)
        return (*self._loaded.warnings, *truncation_warnings(self.tasks, lm))

    def soft_metrics(self, task: str) -> tuple[str, ...]:
        """See `TaskSet.soft_metrics`: those that every task of a group has."""
        by_task = [soft_metrics(self.tasks[subtask]) for subtask, _ in self.subtasks(task)]
        return tuple(name for name in by_task[0] if all(name in names for names in by_task))

    def is_mean(self, task: str) -> bool:
        """See `TaskSet.is_mean`: of a group, whether that holds for every task."""
        return all(
            getattr(self._aggregation(subtask), "__name__", "") == "mean"
            for subtask, _ in self.subtasks(task)
        )

    def fingerprint(self) -> dict[str, str]:
        """Task or group -> SHA-256 of its settings, every item of every role and every request.

        What resume compares.
        """
        return {name: self._loaded.fingerprint(name) for name in self._loaded.terms}

    def sources(self) -> dict[str, dict[str, str]]:
        """See `TaskSet.sources`. None: the code of a task is in its fingerprint."""
        return {}

    def examples(self, count: int) -> list[tuple[str, str]]:
        """See `TaskSet.examples`. Items of one task after the other."""
        by_task = [
            [example(loaded, loaded.requests[item]) for item in loaded.items["search"][:count]]
            for loaded in self.tasks.values()
        ]
        return [pair for pairs in zip(*by_task, strict=False) for pair in pairs][:count]

    def _task_or_group(self, task: str) -> LoadedTask | Group:
        return self.groups[task] if task in self.groups else self.tasks[task]

    def _aggregation(self, task: str) -> Any:
        """The function by which lm-eval aggregates a task's metric over items."""
        loaded = self.tasks[task]
        return loaded.task.aggregation()[loaded.metric]

    # ---- scoring -------------------------------------------------------------------------------------------

    def backends(self, model: nn.Module) -> dict[str, str]:
        """Describes what answers each task, in so far as its first search item shows.

        Args:
            model: The live model.

        Returns:
            Task with items -> 'compiled', an engine with its version, or 'lm-eval: ' and why.
        """
        answered_by = {}
        for name, loaded in self.tasks.items():
            backend, _ = self._prepared(model, {name: loaded.items["search"][:1]})
            reason = backend.fallback_reason(name)
            answered_by[name] = "compiled" if reason is None else f"lm-eval: {reason}"
            if isinstance(backend, EngineBackend):
                answered_by[name] = backend.answered_by(name) or answered_by[name]
        return answered_by

    def optimizations(self, model: nn.Module, items: Items) -> Mapping[str, Verification]:
        """See `TaskSet.optimizations`. None where lm-eval answers all."""
        backend, _ = self._prepared(model, items)
        return backend.optimizations()

    def prepare(self, model: nn.Module, items: Items) -> None:
        """See `Preparing.prepare`.

        Plans the items' requests, verifies optimizations where the model is new, and opens an engine.
        """
        backend, prepared = self._models.within_memory(lambda: self._prepared(model, items))
        if isinstance(backend, EngineBackend):
            backend.ready(prepared.prepared)

    def score(self, model: nn.Module, items: Items) -> tuple[tuple[ItemScore, ...], dict[str, float]]:
        """Scores a model. Items of the search are scored by float32 sums, which tie less.

        All others with lm-eval's rounding, which in half precision is its numbers but for near-ties.

        Args:
            model: The live model.
            items: Task -> ids of the items to score.

        Returns:
            Per-item scores, and each task's metric as lm-eval computes it, with means of the soft metrics.

        Raises:
            CandidateError: A log-likelihood is NaN, or the model cannot take a request.
        """
        backend, prepared = self._answered(model, items)
        scores: list[ItemScore] = []
        metrics: dict[str, float] = {}
        for name, rows in prepared.rows.items():
            values = self._values[name].values([(row.item, row.requests) for row in rows])
            metrics[name] = float(self._aggregation(name)(list(values)))
            task_scores = self._item_scores(name, rows, values, backend)
            scores += task_scores
            for soft_metric in soft_metrics(self.tasks[name]):
                present = [v for score in task_scores if (v := getattr(score, soft_metric)) is not None]
                if present:
                    metrics[soft_metric_name(name, soft_metric)] = math.fsum(present) / len(present)
        add_group_metrics(metrics, self.groups)
        return tuple(scores), metrics

    def _item_scores(
        self, name: str, rows: Sequence[Row], values: Sequence[Any], backend: Backend
    ) -> list[ItemScore]:
        """The scores of a task's answered items."""
        loaded, aggregate = self.tasks[name], self._aggregation(name)
        scores = []
        for row, value in zip(rows, values, strict=True):
            number = item_value(value, aggregate)
            if math.isnan(number):
                raise CandidateError(f"task '{name}' gave {value!r} for item {row.item}")
            soft = soft_scores(loaded, row.requests, row.right_answers, backend.tokens)
            scores.append(ItemScore(name, row.item, number, *soft))
        return scores

    def check_losses(self, labels: Mapping[str, str]) -> tuple[str, ...]:
        """See `Differentiable.check_losses`."""
        return tuple(
            warning
            for name, loaded in self.tasks.items()
            for warning in check_source(loaded, labels.get(name, GOLD), self._end)
        )

    def backward(
        self, model: nn.Module, items: Items, request: GradientRequest
    ) -> tuple[tuple[ItemScore, ...], float]:
        """See `Differentiable.backward`.

        Raises:
            TaskError: An item has no text with a right answer, or the backend has no gradients.
        """
        state = self._models.get(model)
        backend = state.backend
        if not isinstance(backend, DifferentiableBackend):
            raise TaskError(
                "this evaluation backend gives no gradients, which a learned stage needs; "
                "use evaluation.backend: compiled"
            )
        labelled = [
            (name, item, tuple(request.labels.get(name, {}).get(item, ())))
            for name, ids in items.items()
            for item in ids
        ]
        key = ("gradients", *labelled)
        texts = state.texts.get(key)
        if texts is None:
            rows = [
                gradients.text_item(
                    self.tasks[name], item, self.tasks[name].requests[item], self._end, labels
                )
                for name, item, labels in labelled
            ]
            requests = [text for row in rows for text in row.requests]
            texts = gradients.PreparedTexts(rows, backend.prepare_gradients(requests))
            state.texts.clear()  # a step's items are used once
            state.texts[key] = texts
        return gradients.backward(backend, texts, request)

    def answers(
        self, model: nn.Module, items: Items
    ) -> tuple[tuple[ItemScore, ...], dict[str, float], tuple[Answer | None, ...]]:
        """See `Answering.answers`. The text of a log-likelihood task is generated greedily."""
        scores, metrics = self.score(model, items)
        backend, prepared = self._prepared(model, items)
        rows = [(self.tasks[name], row.requests) for name, own in prepared.rows.items() for row in own]
        answers = given_answers(backend, rows, self._end, self._count)
        return scores, metrics, answers

    @property
    def _end(self) -> str:
        return str(self.tokenizer.eos_token or "")

    def _count(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def distributions(self, model: nn.Module, texts: Sequence[str]) -> Distributions:
        """See `Retaining.distributions`."""
        return self._retaining(model).distributions(texts)

    def backward_divergence(
        self, model: nn.Module, teacher: Distributions, weights: Sequence[float]
    ) -> list[float]:
        """See `Retaining.backward_divergence`."""
        return self._retaining(model).backward_divergence(teacher, weights)

    def _retaining(self, model: nn.Module) -> RetainingBackend:
        backend = self._models.get(model).backend
        if not isinstance(backend, RetainingBackend):
            raise TaskError(
                "this evaluation backend gives no gradients, which retain needs; "
                "use evaluation.backend: compiled"
            )
        return backend

    def samples(self, model: nn.Module, items: Items) -> list[Sample]:
        """See `TaskSet.samples`."""
        _, prepared = self._answered(model, items)
        samples: list[Sample] = []
        for name, rows in prepared.rows.items():
            values = self._values[name].values([(row.item, row.requests) for row in rows])
            aggregate = self._aggregation(name)
            filtered = self._values[name].filtered([(row.item, row.requests) for row in rows])
            samples += [
                sample(self.tasks[name], row.item, row.requests, item_value(value, aggregate), text)
                for row, value, text in zip(rows, values, filtered, strict=True)
            ]
        return samples

    def _answered(self, model: nn.Module, items: Items) -> tuple[Backend, PreparedItems]:
        """Items whose requests hold the model's responses."""
        return self._models.within_memory(lambda: self._answer(model, items))

    def _answer(self, model: nn.Module, items: Items) -> tuple[Backend, PreparedItems]:
        backend, prepared = self._prepared(model, items)
        only_search = all(
            (name, row.item) in self._search_items for name, rows in prepared.rows.items() for row in rows
        )
        rounding: Rounding = "float32" if only_search else "model"
        answers = backend.answer(prepared.prepared, rounding)
        for request, responses in zip(prepared.requests, answers, strict=True):
            request.resps, request.filtered_resps = responses, {}
        for name, rows in prepared.rows.items():
            for row in rows:
                check_not_nan(self.tasks[name], row.item, [*row.requests, *row.right_answers])
        return backend, prepared

    def _prepared(self, model: nn.Module, items: Items) -> tuple[Backend, PreparedItems]:
        """The model's backend, and the items' requests prepared for it.

        The latest models and sets stay ready.
        """
        state = self._models.get(model)
        key = tuple((name, tuple(ids)) for name, ids in items.items() if ids)
        if key not in state.prepared:
            rows = {name: [self._row(name, item) for item in ids] for name, ids in key}
            requests = [
                request
                for of_task in rows.values()
                for row in of_task
                for request in (*row.requests, *row.right_answers)
            ]
            state.keep(key, PreparedItems(rows, requests, state.backend.prepare(requests)))
        state.prepared.move_to_end(key)
        return state.backend, state.prepared[key]

    def _open_backend(self, model: nn.Module) -> Backend:
        """A backend that knows how long requests become: its plans must not depend on which come first."""
        backend = self._factory()(model, self.tokenizer, self.batch_size)
        if isinstance(backend, SpanningBackend):
            longest = [longest_request(loaded) for loaded in self.tasks.values()]
            backend.expect([request for request in longest if request is not None])
        return backend

    def _factory(self) -> BackendFactory:
        factory = self._backend_entry.load()
        if not self._backend_entry.has_engine:
            return factory
        with_engine = cast("EngineBackendFactory", factory)
        prompts = {name: len(loaded.items["search"]) for name, loaded in self.tasks.items()}
        return functools.partial(with_engine, engine=self._engine, prompts=prompts)

    def _row(self, name: str, item: str) -> Row:
        requests = self.tasks[name].requests[item]
        return Row(item, requests, right_answer_requests(self.tasks[name], requests))
