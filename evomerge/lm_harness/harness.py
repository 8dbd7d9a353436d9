"""lm-eval tasks as an `Evaluator`: prompts, metrics and filters are lm-eval's own.

Tasks are loaded and their requests built once; a candidate costs forward passes, filters and metrics. Knows nothing
of merging.
"""

from __future__ import annotations

import functools
import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval.models.huggingface as hf
from torch import nn

from evomerge.errors import CandidateError, TaskError
from evomerge.evaluation import Items, ItemScore, Role
from evomerge.lm_harness.tasks import Loaded, Prompting, TaskSpec, fingerprint, load

log = logging.getLogger(__name__)


class LmHarness:
    """Scores models on lm-eval tasks. Satisfies `evomerge.evaluation.Evaluator`."""

    def __init__(
        self,
        specs: Sequence[TaskSpec],
        tokenizer: Any,
        *,
        batch_size: int = 64,
        include: Sequence[Path] = (),
        apply_chat_template: bool = False,
        fewshot_as_multiturn: bool = False,
        limits: Mapping[Role, int] | None = None,
    ) -> None:
        """Loads tasks and builds every request.

        include: folders of task YAML files besides the shipped ones. limits: role -> most items of each task, chosen
        by their hash. Raises TaskError for unknown tasks or metrics and for roles left without items.
        """
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self._tasks = load(specs, Prompting(tokenizer, apply_chat_template, fewshot_as_multiturn, limits), include)
        self._lm: Any = None

    def items(self, role: Role) -> Items:
        """Task name -> item ids of a role, in the order of the task's documents."""
        return {name: loaded.items[role] for name, loaded in self._tasks.items()}

    def sign(self, task: str) -> int:
        """+1 if higher values of the task's metric are better, else -1."""
        return 1 if self._tasks[task].higher_is_better else -1

    def metric(self, task: str) -> str:
        """Name of the metric of a task that is scored."""
        return self._tasks[task].metric

    def fingerprint(self) -> dict[str, str]:
        """Task name -> SHA-256 of its settings, every item of every role and every request: what resume compares."""
        return {name: fingerprint(loaded) for name, loaded in self._tasks.items()}

    def score(self, model: nn.Module, items: Items) -> tuple[tuple[ItemScore, ...], dict[str, float]]:
        """Per-item values and each task's metric as lm-eval computes them. Raises CandidateError for NaN log-likelihoods."""
        chosen = {name: [(item, self._tasks[name].requests[item]) for item in ids] for name, ids in items.items() if ids}
        self._respond(model, [request for rows in chosen.values() for _, requests in rows for request in requests])
        scores: list[ItemScore] = []
        metrics: dict[str, float] = {}
        for name, rows in chosen.items():
            loaded = self._tasks[name]
            values = self._values(loaded, rows)
            metrics[name] = float(loaded.task.aggregation()[loaded.metric](list(values)))
            for (item, _), value in zip(rows, values, strict=True):
                number = _number(value)
                if math.isnan(number):
                    raise CandidateError(f"task '{name}' gave {value!r} for item {item}")
                scores.append(ItemScore(name, item, number))
        return tuple(scores), metrics

    def _respond(self, model: nn.Module, requests: Sequence[Any]) -> None:
        """Puts the model's answers into the requests."""
        if self._lm is None or self._lm._model is not model:
            self._lm = hf.HFLM(pretrained=model, tokenizer=self.tokenizer, batch_size=self.batch_size)
            self._lm._encode_pair = functools.cache(self._lm._encode_pair)  # requests are the same for every candidate
        kinds: dict[str, list[Any]] = defaultdict(list)
        for request in requests:
            request.resps, request.filtered_resps = [], {}
            kinds[request.request_type].extend([request] * request.repeats)
        for kind, rows in kinds.items():
            for request, answer in zip(rows, getattr(self._lm, kind)(rows, disable_tqdm=True), strict=True):
                number = answer[0] if isinstance(answer, tuple) else answer if isinstance(answer, float) else 0.0
                if math.isnan(number):
                    raise CandidateError(f"the model gives NaN log-likelihoods in task '{request.task_name}'")
                request.resps.append(answer)

    @staticmethod
    def _values(loaded: Loaded, rows: Sequence[tuple[str, list[Any]]]) -> list[Any]:
        task = loaded.task
        task._instances = [request for _, requests in rows for request in requests]
        task.apply_filters()
        values = []
        for item, requests in rows:
            results = [request.filtered_resps[loaded.filter] for request in requests]
            outcome = task.process_results(requests[0].doc, results)
            if loaded.metric not in outcome:
                raise TaskError(f"task '{loaded.spec.task}' reports no '{loaded.metric}' for item {item}; it reports {sorted(outcome)}")
            values.append(outcome[loaded.metric])
        return values


def _number(value: Any) -> float:
    """One number for an item's value: itself; whether a (gold, predicted) pair agrees; a (sum, count) pair's ratio."""
    if isinstance(value, tuple) and len(value) == 2:
        first, second = value
        if isinstance(first, float) and second:
            return first / float(second)
        return float(bool(first == second))
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
