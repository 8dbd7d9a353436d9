"""lm-eval items as texts with a differentiable loss: which texts are scored, and the loss of each item.

The texts of a multiple choice are its choices; of a generated answer, each right answer followed by each
text that may end it (the request's own stop strings and the tokenizer's end), so that their probabilities add
up to that of generating a right answer and stopping there. Labels take the place of the right answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from evomerge.errors import CandidateError, TaskError
from evomerge.evaluation import surrogates
from evomerge.evaluation.lm_harness.results import right_choices
from evomerge.evaluation.lm_harness.task_loading import LoadedTask
from evomerge.evaluation.records import Answer, GradientRequest, ItemScore
from evomerge.evaluation.surrogates import ItemLoss, Surrogate

_MOST_STOPS = 3  # stop strings of a request that an answer is scored with, beside the tokenizer's end


@dataclass(frozen=True, slots=True)
class TextItem:
    """An item as log-likelihood requests.

    Attributes:
        task: Name of its task.
        item: Its id.
        requests: lm-eval's requests.
        kind: What the requests are: choices, right answers, or one text.
        right: Indices of the right choices; empty for another kind.
    """

    task: str
    item: str
    requests: list[Any]
    kind: Literal["choices", "answers", "text"]
    right: tuple[int, ...] = ()

    def loss(
        self, sums: Sequence[float], surrogate: Surrogate, count_tokens: Callable[[Any], int]
    ) -> ItemLoss:
        """Computes the item's loss.

        Args:
            sums: Log-likelihood of each request.
            surrogate: What is climbed.
            count_tokens: Request -> number of tokens that it scores.

        Returns:
            The loss with its slopes.

        Raises:
            CandidateError: A log-likelihood is NaN or infinite.
        """
        if not all(-1e30 < s < 1e30 for s in sums):
            raise CandidateError(
                f"the model gives log-likelihoods that are not finite in task '{self.task}', item {self.item}"
            )
        if self.kind == "choices":
            return surrogates.of_choices(sums, self.right, surrogate)
        if self.kind == "answers":
            return surrogates.of_answers(sums, surrogate)
        return surrogates.of_text(sums[0], count_tokens(self.requests[0]))


@dataclass(frozen=True, slots=True)
class PreparedTexts:
    """Items whose texts are prepared for a model. prepared: what the backend made of their requests."""

    items: list[TextItem]
    prepared: Any


def backward(
    backend: Any, texts: PreparedTexts, request: GradientRequest
) -> tuple[tuple[ItemScore, ...], float]:
    """Scores prepared items by their loss and runs its backward pass, where derivatives are wanted.

    Args:
        backend: A `DifferentiableBackend`.
        texts: The items.
        request: The loss; its labels are in the texts.

    Returns:
        Per-item scores, and the weighted sum of their losses.
    """
    scores: list[ItemScore] = []
    losses: list[float] = []

    def slopes_of(sums: Sequence[float]) -> list[float]:
        slopes: list[float] = []
        for item in texts.items:
            first = len(slopes)
            own = item.loss(sums[first : first + len(item.requests)], request.surrogate, backend.tokens)
            weight = request.weights[item.task]
            slopes += [weight * slope for slope in own.slopes]
            losses.append(weight * own.loss)
            tokens = min(backend.tokens(text) for text in item.requests)
            value = math.exp(own.logprob) if own.probability is None else own.probability
            scores.append(ItemScore(item.task, item.item, value, own.probability, own.logprob / tokens))
        return slopes

    if request.derivatives:
        backend.backward(texts.prepared, slopes_of)
    else:
        slopes_of(backend.sums(texts.prepared))
    return tuple(scores), math.fsum(losses)


def text_item(
    loaded: LoadedTask, item: str, requests: Sequence[Any], end: str, labels: Sequence[Answer] = ()
) -> TextItem:
    """Finds the texts of an item.

    Args:
        loaded: Its task.
        item: Its id.
        requests: Its lm-eval requests.
        end: Text of the tokenizer's end-of-sequence token; '' for none.
        labels: Answers that stand for the right ones; none for the task's own.

    Returns:
        The item as texts.

    Raises:
        TaskError: The item has no text with a right answer.
    """
    task, name, first = loaded.task, loaded.spec.task, requests[0]
    kind = task.OUTPUT_TYPE
    if kind == "multiple_choice":
        right = [int(label) for label in labels] or right_choices(task, first.doc)
        if not right:
            raise TaskError(
                f"task '{name}': item {item} has no right choice, so a learned stage has no loss for it; "
                "leave the task out of the search or search weights instead"
            )
        # requests beyond the choices ask for choices without context
        count = len(task.doc_to_choice(first.doc))
        return TextItem(name, item, list(requests[:count]), "choices", tuple(right))
    if kind == "loglikelihood":
        texts = [str(label) for label in labels] or [first.args[1]]
        return TextItem(name, item, _continuations(loaded, first, texts), "answers")
    if kind == "loglikelihood_rolling":
        return TextItem(name, item, [first], "text")
    answers = [str(label) for label in labels] or _right_answers(loaded, item, first)
    return TextItem(name, item, _ended(loaded, first, answers, end), "answers")


def _right_answers(loaded: LoadedTask, item: str, request: Any) -> list[str]:
    """The right answers of a generated text."""
    target = loaded.task.doc_to_target(request.doc)
    answers = [str(answer) for answer in (target if isinstance(target, list) else [target])]
    answers = list(dict.fromkeys(answer for answer in answers if answer.strip()))
    if not answers:
        name = loaded.spec.task
        raise TaskError(
            f"task '{name}': item {item} has no right answer as text, so a learned stage has no loss for it; "
            f"write labels: {{{name}: samples}} for right answers of the models, or search weights instead"
        )
    return answers


def _ended(loaded: LoadedTask, request: Any, answers: Sequence[str], end: str) -> list[Any]:
    """Requests of each answer with each text that may end it."""
    delimiter = str(loaded.task.config.target_delimiter or "")
    texts = [answer if answer.startswith(delimiter) else f"{delimiter}{answer}" for answer in answers]
    until = request.args[1].get("until") or []
    stops = [until] if isinstance(until, str) else list(until)
    stops = list(dict.fromkeys([*stops[:_MOST_STOPS], end] if end else stops[:_MOST_STOPS])) or [""]
    # what ends at a stop string never reaches a longer one that begins with it
    stops = [s for s in stops if not any(s != other and s.startswith(other) for other in stops)]
    return _continuations(loaded, request, [f"{text}{stop}" for text in texts for stop in stops])


def _continuations(loaded: LoadedTask, request: Any, texts: Sequence[str]) -> list[Any]:
    """Requests of texts after the prompt of a request."""
    from lm_eval.api.instance import Instance

    return [
        Instance(
            request_type="loglikelihood",
            doc=request.doc,
            arguments=(request.args[0], text),
            idx=number,
            metadata=(loaded.spec.task, request.doc_id, 1),
        )
        for number, text in enumerate(texts)
    ]
