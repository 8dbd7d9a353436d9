"""Which items a model sees only in part: lm-eval silently cuts what is too long from the left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs

from evomerge.evaluation.lm_harness.task_loading import LoadedTask
from evomerge.evaluation.lm_harness.tokenization import token_pair
from evomerge.evaluation.records import ROLES

_SPECIAL = 4  # most tokens that a tokenizer adds to a text
_NAMED = 3  # items that a sentence names


def truncated_items(loaded: LoadedTask, lm: Any) -> dict[str, int]:
    """Finds the items that do not fit a model.

    Rolling log-likelihoods are read in windows and never cut. A text has no more tokens than bytes (and those
    that a tokenizer adds), so that short ones are not tokenised.

    Args:
        loaded: The task.
        lm: An `HFLM`, whose rules count.

    Returns:
        Item -> tokens that are cut off its longest request.
    """
    truncated: dict[str, int] = {}
    for item, requests in loaded.requests.items():
        excess = max(_excess(request, lm) for request in requests)
        if excess > 0:
            truncated[item] = excess
    return truncated


def truncation_warnings(tasks: Mapping[str, LoadedTask], lm: Any) -> tuple[str, ...]:
    """Words the warnings about truncated items.

    Args:
        tasks: Name -> task.
        lm: An `HFLM`, whose rules count.

    Returns:
        A sentence for each task and role with truncated items.
    """
    warnings = []
    for name, loaded in tasks.items():
        truncated = truncated_items(loaded, lm)
        for role in ROLES:
            items = [item for item in loaded.items[role] if item in truncated]
            if not items:
                continue
            some = ", ".join(f"{item} by {truncated[item]}" for item in items[:_NAMED])
            if len(items) > _NAMED:
                some += ", …"
            warnings.append(
                f"task '{name}': {len(items)} of {len(loaded.items[role])} items of {role} are "
                "truncated, longer "
                f"than the model's {lm.max_length} tokens and cut from the left as lm-eval does: "
                f"{some} tokens"
            )
    return tuple(warnings)


def _excess(request: Any, lm: Any) -> int:
    """Tokens by which a request is too long; 0 or less for one that fits."""
    if request.request_type == "generate_until":
        settings = normalize_gen_kwargs(dict(request.args[1]), lm.max_gen_toks)
        room = int(lm.max_length) - int(settings["max_gen_toks"])
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
