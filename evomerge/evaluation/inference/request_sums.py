"""Sums of log-probabilities by request that depend on no order: in fixed point, with all bits of float32.

On a GPU the terms of a sum are added by atomic operations, in whatever order blocks come to run. Integers
have the same sum in every order. A sum in float64 is nearly always exact too, and then the same number: it is
not where a token is almost certain and another all but impossible.
"""

from __future__ import annotations

import torch
from torch import Tensor

_COARSE, _FINE = float(1 << 20), float(1 << 68)  # units in a nat: of a term's whole part, of what is left
_LARGEST = float(1 << 20)  # nats of a term that is counted in units: 2^16 of them fit into both


class RequestSums:
    """Sums that grow from step to step of a plan.

    sums = RequestSums(plan.size, device)
    sums.add(step.reads.request, logprobs)
    loglikelihoods = sums.total()
    """

    def __init__(self, size: int, device: torch.device) -> None:
        """Sums of nothing.

        Args:
            size: Number of requests.
            device: Where terms are.
        """
        self._coarse = torch.zeros(size, dtype=torch.long, device=device)
        self._fine = torch.zeros(size, dtype=torch.long, device=device)
        self._others = torch.zeros(size, dtype=torch.float64, device=device)

    def clear(self) -> None:
        """Begins with sums of nothing again, in place."""
        for sums in (self._coarse, self._fine, self._others):
            sums.zero_()

    def add(self, request: Tensor, terms: Tensor) -> None:
        """Adds terms to the sums of their requests.

        Args:
            request: [M] index of each term's request.
            terms: [M] in nats, in float32 or less; NaN, infinities and what is beyond 2^20 nats are added in
                float64.
        """
        terms = terms.double()
        counted = torch.where(terms.abs() < _LARGEST, terms, 0.0)  # NaN is not less
        coarse = (counted * _COARSE).round()
        fine = ((counted - coarse / _COARSE) * _FINE).round()
        self._coarse.index_add_(0, request, coarse.long())
        self._fine.index_add_(0, request, fine.long())
        self._others.index_add_(0, request, torch.where(terms.abs() < _LARGEST, 0.0, terms))

    def total(self) -> Tensor:
        """[size] of float64, the sum of each request in nats."""
        return self._coarse.double() / _COARSE + self._fine.double() / _FINE + self._others
