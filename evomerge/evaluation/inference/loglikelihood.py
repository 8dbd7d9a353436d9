"""Runs plans on a live model: log-likelihoods of continuations, the same numbers as one request at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from evomerge.evaluation.inference import kv_cache, loglikelihood_plan
from evomerge.evaluation.inference.forward import LOGITS, Forward
from evomerge.evaluation.inference.loglikelihood_plan import (
    OPTIMIZATIONS,
    Facts,
    Optimization,
    Plan,
    Reads,
    Step,
)
from evomerge.evaluation.inference.requests import Request, Verification
from evomerge.evaluation.inference.selected_logits import RowHead

Rounding = Literal["float32", "model"]
_PIECE = 512  # rows whose float32 logits are held at once


@dataclass(frozen=True, slots=True)
class Scores:
    """sums [n]: log-likelihood of each continuation, in nats, float64; greedy [n]: whether each of its tokens is the likeliest."""

    sums: Tensor
    greedy: Tensor


class Engine:
    """Scores requests on one model, whose weights may change between two runs. A context manager: leaving it takes its hook off."""

    def __init__(
        self,
        model: nn.Module,
        *,
        pad_id: int = 0,
        tokens: int | None = None,
        launch: int | None = None,
        verdicts: Mapping[str, Verification] | None = None,
    ) -> None:
        """tokens: most inputs of one forward (None: 1,024 on a CPU, where more is no faster, else 16,384); launch: what a
        forward costs, in tokens (None: the default); verdicts: of the probe.

        Without verdicts only plain rows are used unless a technique is asked for.
        """
        self.model, self.head, self.verdicts = model, RowHead(model), verdicts or {}
        self.forward = forward = Forward(model, self.head, pad_id)
        tokens = tokens or (1024 if forward.device.type == "cpu" else 16384)
        rows = max(64, LOGITS // forward.vocabulary)
        self.facts = Facts(
            forward.dtype, forward.device, forward.limits, forward.takes_positions, pad_id, tokens, rows
        )
        if launch is not None:
            self.facts = replace(self.facts, launch=launch)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.head.close()

    @property
    def best(self) -> Optimization:
        """The allowed technique that shares most."""
        return next(
            t for t in OPTIMIZATIONS if t == "plain" or (t in self.verdicts and self.verdicts[t].allowed)
        )

    def compile(self, requests: Sequence[Request], technique: Optimization | None = None) -> Plan:
        """The plan for requests: with None by the best technique that the verdicts allow."""
        return loglikelihood_plan.make(requests, technique or self.best, self.facts)

    @torch.inference_mode()
    def run(self, todo: Plan, rounding: Rounding = "float32") -> Scores:
        """Scores the requests of a plan, in the order asked.

        rounding: 'float32' sums log-probabilities of the model's logits in full; 'model' rounds each and their sum to the
        logits' type, as lm-eval's HFLM does by default. Raises whatever the model raises.
        """
        device = self.facts.device
        sums = torch.zeros(todo.size, dtype=torch.float64, device=device)
        wrong = torch.zeros(todo.size, dtype=torch.long, device=device)
        kept: dict[int, Any] = {}
        dtype = torch.float32
        for step in todo.steps:
            logits = self._forward(step, kept)
            if step.reads is not None:
                dtype = logits.dtype
                chosen, likeliest = _chosen(logits, step.reads, rounding)
                sums.index_add_(0, step.reads.request, chosen.double())
                wrong.index_add_(0, step.reads.request, (likeliest != step.reads.target).long())
            for number in step.drop:
                del kept[number]
        if rounding == "model":
            sums = sums.to(dtype).double()
        places = todo.places.to(device)
        return Scores(sums[places].cpu(), (wrong == 0)[places].cpu())

    def score(
        self,
        requests: Sequence[Request],
        technique: Optimization | None = None,
        rounding: Rounding = "float32",
    ) -> Scores:
        """Compiles and runs at once."""
        return self.run(self.compile(requests, technique), rounding)

    def _forward(self, step: Step, kept: dict[int, Any]) -> Tensor:
        """Logits [N, V] of the rows that a step reads; of its first row where it reads none."""
        past = None
        if step.source is not None:
            past = kv_cache.fork(kept[step.source], rows=step.spread, index=step.index)
        elif step.keep is not None:
            past = kv_cache.new_cache(self.model, windowed=step.windowed)
        rows = step.reads.rows if step.reads is not None else self.forward.first
        logits = self.forward(rows, step.ids, past, positions=step.positions, mask=step.mask)
        if step.keep is not None:
            kept[step.keep] = past
        return logits


def _chosen(logits: Tensor, reads: Reads, rounding: Rounding) -> tuple[Tensor, Tensor]:
    """(log-probability of each target, likeliest token at its row), both [M]."""
    if rounding == "model":
        rounded = torch.cat([torch.log_softmax(piece, -1) for piece in torch.split(logits, _PIECE)])
        return rounded[reads.row, reads.target], rounded.argmax(-1)[
            reads.row
        ]  # rounding makes ties, and the first of them wins
    whole = torch.cat([torch.logsumexp(piece.float(), -1) for piece in torch.split(logits, _PIECE)])
    return logits[reads.row, reads.target].float() - whole[reads.row], logits.argmax(-1)[reads.row]
