"""What evomerge's harness and lm-eval's own `simple_evaluate` say of the same weights, item by item, and
where they differ.

lm-eval runs HFLM with batches of one, unless told otherwise. Knows nothing of which architectures or tasks.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from evomerge.evaluation.lm_harness.harness import LmHarness
from evomerge.evaluation.lm_harness.task_loading import TaskSpec
from tests.support.equality_tasks import Score

RELATIVE = 1e-4  # of a log-likelihood in float32
Answer = tuple[float, bool | None] | str


@dataclass(frozen=True, slots=True)
class Results:
    """answers: (task, item) -> of each request the responses; values: (score, item) -> number; metrics: score
    -> number.
    """

    answers: dict[tuple[str, str], list[list[Answer]]]
    values: dict[tuple[Score, str], float]
    metrics: dict[Score, float]

    def of(self, task: str) -> Results:
        """Those of one task."""
        return Results(
            {key: found for key, found in self.answers.items() if key[0] == task},
            {key: found for key, found in self.values.items() if key[0].task == task},
            {score: found for score, found in self.metrics.items() if score.task == task},
        )


@dataclass(slots=True)
class Differences:
    """Counts over requests, items and metrics; worst: the largest relative difference of a log-likelihood;
    said: the first few of each.
    """

    requests: int = 0
    texts: int = 0
    items: int = 0
    metrics: int = 0
    other_flags: int = 0
    other_texts: int = 0
    other_sums: int = 0
    other_items: int = 0
    other_metrics: int = 0
    worst: float = 0.0
    said: list[str] = field(default_factory=list)

    @property
    def none(self) -> bool:
        """Whether nothing differs."""
        return not (
            self.other_flags or self.other_texts or self.other_sums or self.other_items or self.other_metrics
        )

    def add(self, other: Differences) -> None:
        """Counts of another comparison are added to these."""
        for name in (
            "requests",
            "texts",
            "items",
            "metrics",
            "other_flags",
            "other_texts",
            "other_sums",
            "other_items",
            "other_metrics",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.worst = max(self.worst, other.worst)
        self.said += other.said


def item_id(doc: Mapping[str, Any]) -> str:
    """16 digits of the SHA-256 of a document's canonical JSON."""
    return hashlib.sha256(json.dumps(doc, sort_keys=True, default=str).encode()).hexdigest()[:16]


def theirs(
    model: nn.Module,
    tokenizer: Any,
    folder: Path,
    scores: Sequence[Score],
    *,
    batch_size: int = 1,
    chat: bool = False,
    **more: Any,
) -> Results:
    """lm-eval's own. more: of `simple_evaluate`, as `limit` or `samples`."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = list(dict.fromkeys(score.task for score in scores))
    found: Any = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=tasks,
        log_samples=True,
        bootstrap_iters=0,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        **more,
    )
    out = Results({}, {}, {})
    for score in scores:
        for row in found["samples"][score.task]:
            if row["filter"] == score.filter:
                key = item_id(row["doc"])
                out.answers[score.task, key] = [[_answer(a) for a in answers] for answers in row["resps"]]
                out.values[score, key] = number(row[score.metric])
        out.metrics[score] = float(found["results"][score.task][f"{score.metric},{score.filter}"])
    return out


def their_group(
    model: nn.Module, tokenizer: Any, folder: Path, name: str, metrics: Sequence[str], *, chat: bool = False
) -> list[float]:
    """lm-eval's metrics of a group of tasks."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found: Any = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1),
        tasks=[name],
        bootstrap_iters=0,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )
    return [float(found["groups"][name][f"{metric},none"]) for metric in metrics]


def our_group(
    model: nn.Module, tokenizer: Any, folder: Path, name: str, metrics: Sequence[str], *, chat: bool = False
) -> list[float]:
    """Ours."""
    out = []
    for metric in metrics:
        spec = TaskSpec(name, metric, splits="declared")
        harness = LmHarness(
            [spec], tokenizer, include=[folder], apply_chat_template=chat, fewshot_as_multiturn=chat
        )
        out.append(harness.score(model, harness.items("test"))[1][name])
    return out


def load(tokenizer: Any, folder: Path, scores: Sequence[Score], *, chat: bool = False) -> LmHarness:
    """Our harness over the twins of the tasks, each with one metric and filter."""
    specs = [TaskSpec(score.twin, score.metric, score.filter, splits="declared") for score in scores]
    return LmHarness(specs, tokenizer, include=[folder], apply_chat_template=chat, fewshot_as_multiturn=chat)


def ours(
    harness: LmHarness,
    model: nn.Module,
    scores: Sequence[Score],
    *,
    ids: Mapping[Score, Sequence[str]] | None = None,
) -> Results:
    """Our own, of the test items, or of some of them."""
    items = {score.twin: tuple(ids[score]) if ids else harness.items("test")[score.twin] for score in scores}
    found, metrics = harness.score(model, items)
    values = {(s.task, s.item): s.value for s in found}
    out = Results({}, {}, {})
    for score in scores:
        for item in items[score.twin]:
            requests = harness.tasks[score.twin].requests[
                item
            ]  # the harness shows no responses but in the requests
            out.answers[score.task, item] = [[_answer(a) for a in request.resps] for request in requests]
            out.values[score, item] = values[score.twin, item]
        out.metrics[score] = metrics[score.twin]
    return out


def compare(wanted: Results, found: Results, *, exact: bool = True) -> Differences:
    """Where two disagree. exact: log-likelihoods must agree to RELATIVE; else only flags, texts, items and
    metrics count.
    """
    out = Differences()
    if wanted.answers.keys() != found.answers.keys():
        raise AssertionError(f"other items: {sorted(set(wanted.answers) ^ set(found.answers))[:4]}")
    for (task, item), requests in wanted.answers.items():
        own = found.answers[task, item]
        if [len(answers) for answers in own] != [len(answers) for answers in requests]:
            raise AssertionError(f"{task}, item {item}: other numbers of requests or responses")
        for request, other in zip(requests, own, strict=True):
            for a, b in zip(request, other, strict=True):
                _count(out, f"{task} {item}", a, b, exact)
    for (score, item), value in wanted.values.items():
        out.items += 1
        if not _near(value, found.values[score, item], exact or score.metric.startswith("acc")):
            out.other_items += 1
            _say(out, f"{score.twin} {item}: {value} against {found.values[score, item]}")
    for score, value in wanted.metrics.items():
        out.metrics += 1
        other, is_exact = found.metrics[score], exact or score.metric.startswith("acc")
        near = _near(value, other, is_exact)
        if not is_exact and "perplexity" in score.metric:  # the exponential of a mean, which is rounded
            near = near or math.isclose(math.log(value), math.log(other), rel_tol=2**-8)
        if not near:
            out.other_metrics += 1
            _say(out, f"{score.twin}: {value} against {other}")
    return out


def _count(out: Differences, where: str, wanted: Answer, found: Answer, exact: bool) -> None:
    if isinstance(wanted, str) or isinstance(found, str):
        out.texts += 1
        if wanted != found:
            out.other_texts += 1
            _say(out, f"{where}: {wanted!r} against {found!r}")
        return
    out.requests += 1
    apart = abs(wanted[0] - found[0]) / max(1.0, abs(wanted[0]))
    out.worst = max(out.worst, apart)
    if wanted[1] != found[1]:
        out.other_flags += 1
        _say(out, f"{where}: greedy {wanted[1]} against {found[1]}")
    if exact and not apart <= RELATIVE:
        out.other_sums += 1
        _say(out, f"{where}: {wanted[0]} against {found[0]}")


def _say(out: Differences, text: str) -> None:
    if len(out.said) < 8:
        out.said.append(text)


def _near(a: float, b: float, exact: bool) -> bool:
    """Equal but for rounding. exact: float32's; else bfloat16's, of what is no count."""
    return math.isclose(a, b, rel_tol=RELATIVE if exact else 3e-2, abs_tol=1e-6) or (math.isinf(a) and a == b)


def _answer(given: Any) -> Answer:
    if isinstance(given, list | tuple):
        return float(given[0]), str(given[1]) == "True"  # lm-eval logs some of its responses as text
    return given if isinstance(given, str) else (float(given), None)


def number(value: Any) -> float:
    """One number of what lm-eval logs for an item: itself, a sum over a count, whether two agree, the Brier
    score of a distribution.
    """
    import numpy as np

    if isinstance(value, list | tuple) and len(value) == 2:
        first, second = value
        if isinstance(second, list | tuple | np.ndarray):
            wanted = np.zeros(len(second))
            wanted[int(first)] = 1.0
            return float(((np.asarray(second, dtype=np.float64) - wanted) ** 2).sum())
        return float(first) / float(second) if isinstance(first, float) else float(first == second)
    return float(value)
