"""Token ids of log-likelihood requests, by HFLM's own rules. Knows nothing of models' weights."""

from __future__ import annotations

from typing import Any

from lm_eval import utils as lm_utils

from evomerge.errors import CandidateError
from evomerge.evaluation.inference.requests import Request


class Encoding:
    """Tokenises each different request once. lm: an HFLM, whose tokenizer and rules are used."""

    def __init__(self, lm: Any) -> None:
        self._lm = lm
        self._known: dict[tuple[str, ...], list[Request]] = {}

    def __call__(self, request: Any) -> list[Request]:
        """The request's pieces: one, or the windows of a rolling one. Raises CandidateError for what no model of that length can score."""
        key = (request.request_type, *request.args)
        if key not in self._known:
            rolling = request.request_type == "loglikelihood_rolling"
            try:
                pairs = _windows(self._lm, request.args[0]) if rolling else [token_pair(self._lm, request)]
                if not all(continuation for _, continuation in pairs):
                    raise ValueError("it has no tokens to score")
                self._known[key] = [Request(tuple(c), tuple(k)).fitted(self._lm.max_length) for c, k in pairs]
            except (ValueError, IndexError) as error:
                raise CandidateError(
                    f"a request of task '{request.task_name}' cannot be scored: {error}"
                ) from None
        return self._known[key]

    def tokens(self, request: Any) -> int:
        """How many tokens of the request are scored."""
        return sum(len(piece.continuation) for piece in self(request))


def token_pair(lm: Any, request: Any) -> tuple[list[int], list[int]]:
    """(context, continuation) as lm-eval's own `loglikelihood` tokenises them."""
    found: list[Any] = []

    def caught(pairs: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        found.extend(pairs)
        return [(0.0, False)] * len(pairs)

    lm._loglikelihood_tokens = caught
    try:
        lm.loglikelihood([request], disable_tqdm=True)
    finally:
        del lm._loglikelihood_tokens
    return found[0][1], found[0][2]


def _windows(lm: Any, text: str) -> list[tuple[list[int], list[int]]]:
    """The windows of a rolling log-likelihood, as HFLM cuts them."""
    windows = lm_utils.get_rolling_token_windows(
        token_list=lm.tok_encode(text),
        prefix_token=lm.prefix_token_id,
        max_seq_len=lm.max_length,
        context_len=1,
    )
    return [lm_utils.make_disjoint_window(window) for window in windows]
