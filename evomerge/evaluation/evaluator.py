"""The protocols of what scores a live model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import nn
from evomerge.evaluation.records import Items, ItemScore, Role


class Evaluator(Protocol):
    """Scores a live model on items. Raises any exception where that is impossible; the worker makes it a value.

    A served backend (vLLM in a process of its own) fits behind the same two methods. Its `score` is called with the
    resident model freshly merged: it pushes that model's tensors, layer by layer and by their names on disk, into the
    serving process (shared memory or NCCL; nothing is reloaded from a folder), resets the server's prefix caches, whose
    keys hold no weights, sends token ids and takes back log-probabilities and generated ids. The server keeps its own
    numeric types and kernels, so that its scores are another evaluator's: a study keeps to one, and says which.
    """

    def items(self, role: Role) -> Items:
        """All items of a role, in a fixed order; roles share none."""
        ...

    def score(self, model: nn.Module, items: Items) -> tuple[tuple[ItemScore, ...], dict[str, float]]:
        """Per-item values and the metric of each task."""
        ...


@runtime_checkable
class Preparing(Protocol):
    """An evaluator that makes ready, once for a module, what scoring items needs: plans, and which techniques it trusts."""

    def prepare(self, model: nn.Module, items: Items) -> None:
        """The module may have other weights, and layers of the same kinds in another order, when it is scored."""
        ...
