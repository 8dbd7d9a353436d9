"""Which items a model sees only in part: lm-eval cuts what is longer than the model from the left, and says nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs

from evomerge.evaluation.lm_harness.task_loading import Loaded
from evomerge.evaluation.lm_harness.tokenization import token_pair
from evomerge.evaluation.records import ROLES

_SPECIAL = 4  # tokens that a tokenizer may add to a text
_NAMED = 3


def truncated(loaded: Loaded, lm: Any) -> dict[str, int]:
    """Item -> tokens that are cut off its longest request, for items that do not fit. lm: an HFLM, whose rules count.

    Rolling log-likelihoods are read in windows and never cut. A text has no more tokens than bytes (and those a tokenizer
    adds), so that short ones are not tokenised.
    """
    found: dict[str, int] = {}
    for item, requests in loaded.requests.items():
        over = max(_over(request, lm) for request in requests)
        if over > 0:
            found[item] = over
    return found


def findings(tasks: Mapping[str, Loaded], lm: Any) -> tuple[str, ...]:
    """A sentence for each task and role with truncated items."""
    sentences = []
    for name, loaded in tasks.items():
        cut = truncated(loaded, lm)
        for role in ROLES:
            own = [item for item in loaded.items[role] if item in cut]
            if own:
                some = ", ".join(f"{item} by {cut[item]}" for item in own[:_NAMED]) + (
                    ", …" if len(own) > _NAMED else ""
                )
                sentences.append(
                    f"task '{name}': {len(own)} of {len(loaded.items[role])} items of {role} are truncated, longer than the "
                    f"model's {lm.max_length} tokens and cut from the left as lm-eval does: {some} tokens"
                )
    return tuple(sentences)


def _over(request: Any, lm: Any) -> int:
    """Tokens by which a request is too long."""
    if request.request_type == "generate_until":
        room: int = lm.max_length - int(
            normalize_gen_kwargs(dict(request.args[1]), lm.max_gen_toks)["max_gen_toks"]
        )
        if _surely_fits(request.args[0], room):
            return 0
        ids, _ = lm.tok_batch_encode([request.args[0]])
        return int(ids.shape[1]) - room
    if request.request_type == "loglikelihood":
        room = int(lm.max_length) + 1  # the last token is predicted, not read
        if _surely_fits("".join(request.args), room):
            return 0
        return sum(len(part) for part in token_pair(lm, request)) - room
    return 0


def _surely_fits(text: str, room: int) -> bool:
    return len(text.encode()) + _SPECIAL <= room
