"""Log-likelihood plans replayed as CUDA graphs for every candidate.

A compiled plan is constant tensors, and a candidate's weights are written to the addresses of the one before:
what a run of a plan launches is the same every time. The second run of a plan captures each of its steps;
later ones replay them. A model whose replay differs from its run by a bit, and a plan that waits for the card
inside a forward, are run as before, and the log says so once.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from evomerge.evaluation.inference.cuda_graphs import (
    OTHER_BITS,
    Addresses,
    CudaGraphs,
    Graph,
    Step,
    addresses,
    captured,
    is_static,
)

log = logging.getLogger(__name__)
_PLANS = 16  # that are remembered; graphs of older ones are dropped
_MOVES = 2  # a model whose addresses changed more often is not captured again


@dataclass(frozen=True, slots=True)
class Program:
    """One run of a plan.

    Attributes:
        outputs: What the steps fill; the first step begins with setting them.
        steps: The work, in order.
    """

    outputs: tuple[Tensor, ...]
    steps: Sequence[Step]

    def run(self) -> tuple[Tensor, ...]:
        """Runs the steps.

        Returns:
            The outputs.
        """
        for step in self.steps:
            step()
        return self.outputs


@dataclass(slots=True)
class _Remembered:
    """A plan. owner: keeps its id from being used again; graphs: None before the second run."""

    owner: object
    refused: bool = False
    outputs: tuple[Tensor, ...] = ()
    graphs: Sequence[Graph] | None = None
    addresses: Addresses | None = None


class PlanReplay:
    """Runs programs on one model, from their second run on as graphs.

    Attributes:
        model: The live model.
        refusal: Why a plan, or any plan, is not captured: the first reason; None while all are.
    """

    def __init__(self, model: nn.Module, graphs: CudaGraphs) -> None:
        """Starts without graphs.

        Args:
            model: The live model.
            graphs: Of the card that it is on.
        """
        self.model = model
        self.refusal: str | None = None
        self._stopped = False
        self._graphs = graphs
        self._plans: OrderedDict[Hashable, _Remembered] = OrderedDict()
        self._moves = 0

    def run(self, owner: object, variant: Hashable, make: Callable[[], Program]) -> tuple[Tensor, ...]:
        """Runs a program.

        Args:
            owner: The plan; the same object stands for the same program.
            variant: What else the program depends on.
            make: Makes the program.

        Returns:
            The program's outputs, of the caller's own.
        """
        key = (id(owner), variant)
        remembered = self._plans.get(key)
        if remembered is None:
            self._remember(key, _Remembered(owner))
            return make().run()
        self._plans.move_to_end(key)
        if remembered.graphs is not None and not self._holds(remembered):
            remembered.graphs = None
            self._moved()
        if remembered.graphs is None:
            return self._captured(remembered, make())
        for graph in remembered.graphs:
            graph.replay()
        return tuple(output.clone() for output in remembered.outputs)

    def clear(self) -> None:
        """Drops all graphs and the memory that they hold; plans that run again are captured again."""
        self._plans.clear()

    def _captured(self, remembered: _Remembered, program: Program) -> tuple[Tensor, ...]:
        """Runs a program, and captures it on the way where that is not refused."""
        if not self._stopped and not is_static(self.model):
            self._stop("weights of the model are computed in its forward")
        if self._stopped or remembered.refused:
            return program.run()
        found = captured(self._graphs, program.outputs, program.steps)
        if found == OTHER_BITS:
            self._stop(found)
        elif isinstance(found, str):
            remembered.refused = True  # another plan may do without what this one needs
            self._log(found)
        else:
            remembered.graphs, remembered.outputs = found, program.outputs
            remembered.addresses = addresses(self.model)
        return tuple(output.clone() for output in program.outputs)

    def _holds(self, remembered: _Remembered) -> bool:
        return remembered.addresses is not None and remembered.addresses.hold(self.model)

    def _moved(self) -> None:
        self._moves += 1
        if self._moves > _MOVES:
            self._stop("the model's layers or weights are exchanged between candidates")

    def _stop(self, reason: str) -> None:
        """Captures nothing any more."""
        self._stopped = True
        for remembered in self._plans.values():
            remembered.graphs = None
        self._log(reason)

    def _log(self, reason: str) -> None:
        """Says once that there are no graphs."""
        if self.refusal is None:
            self.refusal = reason
            log.info("scoring without CUDA graphs: %s", reason)

    def _remember(self, key: Hashable, remembered: _Remembered) -> None:
        self._plans[key] = remembered
        if len(self._plans) > _PLANS:
            self._plans.popitem(last=False)
