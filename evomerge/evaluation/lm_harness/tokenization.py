"""Token ids of log-likelihood requests, by HFLM's own rules. Knows nothing of models' weights."""

from __future__ import annotations

from typing import Any

from lm_eval import utils as lm_utils

from evomerge.errors import CandidateError
from evomerge.evaluation.inference.requests import Request
from evomerge.evaluation.lm_harness.lm_eval_patches import captured_token_pairs


class RequestTokenizer:
    """Tokenises each different request once."""

    def __init__(self, lm: Any) -> None:
        """Wraps a model of lm-eval's.

        Args:
            lm: An `HFLM`, whose tokenizer and rules are used.
        """
        self._lm = lm
        self._cache: dict[tuple[str, ...], list[Request]] = {}

    def __call__(self, request: Any) -> list[Request]:
        """Tokenises a request.

        Args:
            request: lm-eval's log-likelihood request.

        Returns:
            Its pieces: one, or the windows of a rolling log-likelihood.

        Raises:
            CandidateError: No model of that length can score it.
        """
        key = (request.request_type, *request.args)
        if key not in self._cache:
            rolling = request.request_type == "loglikelihood_rolling"
            try:
                pairs = _windows(self._lm, request.args[0]) if rolling else [token_pair(self._lm, request)]
                if not all(continuation for _, continuation in pairs):
                    raise ValueError("it has no tokens to score")
                self._cache[key] = [
                    Request(tuple(context), tuple(continuation)).fitted(self._lm.max_length)
                    for context, continuation in pairs
                ]
            except (ValueError, IndexError) as error:
                raise CandidateError(
                    f"a request of task '{request.task_name}' cannot be scored: {error}"
                ) from None
        return self._cache[key]

    def tokens(self, request: Any) -> int:
        """Counts the tokens that a request scores.

        Args:
            request: lm-eval's log-likelihood request.

        Returns:
            Their number.
        """
        return sum(len(piece.continuation) for piece in self(request))


def token_pair(lm: Any, request: Any) -> tuple[list[int], list[int]]:
    """Tokenises a request as lm-eval's own `loglikelihood` does.

    Args:
        lm: An `HFLM`.
        request: A log-likelihood request.

    Returns:
        Token ids of (context, continuation).
    """
    _, context, continuation = captured_token_pairs(lm, request)[0]
    return context, continuation


def _windows(lm: Any, text: str) -> list[tuple[list[int], list[int]]]:
    """The windows of a rolling log-likelihood, as HFLM cuts them."""
    windows = lm_utils.get_rolling_token_windows(
        token_list=lm.tok_encode(text),
        prefix_token=lm.prefix_token_id,
        max_seq_len=lm.max_length,
        context_len=1,
    )
    return [lm_utils.make_disjoint_window(window) for window in windows]
