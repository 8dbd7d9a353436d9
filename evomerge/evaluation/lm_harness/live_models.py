"""Live models that are ready to answer: each with its backend, and the sets of items prepared for it."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from evomerge.evaluation.device_memory import tried_again
from evomerge.evaluation.lm_harness.backends.base import Backend, ShrinkableBackend
from evomerge.evaluation.lm_harness.gradients import PreparedTexts

log = logging.getLogger(__name__)
_PREPARED = 8  # sets of items that stay prepared for a model
_MODELS = 8  # live models that stay ready
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Row:
    """An item with its requests.

    Attributes:
        item: Its id.
        requests: lm-eval's.
        right_answers: Those of its right answers, where a generated text has soft metrics.
    """

    item: str
    requests: list[Any]
    right_answers: list[Any]


@dataclass(slots=True)
class PreparedItems:
    """Items ready to be answered.

    Attributes:
        rows: By task.
        requests: Those of all rows.
        prepared: What the backend made of them.
    """

    rows: dict[str, list[Row]]
    requests: list[Any]
    prepared: Any


@dataclass(slots=True)
class LiveModel:
    """A live model.

    Attributes:
        model: The model.
        backend: What answers with it.
        prepared: Sets of items, by tasks and ids, the one used last at the end.
        texts: Those of the last gradient.
    """

    model: nn.Module
    backend: Backend
    prepared: OrderedDict[tuple[Any, ...], PreparedItems] = field(default_factory=OrderedDict)
    texts: dict[tuple[Any, ...], PreparedTexts] = field(default_factory=dict)

    def keep(self, key: tuple[Any, ...], items: PreparedItems) -> None:
        """Keeps a set of items prepared; of too many the one used longest ago is dropped.

        Args:
            key: Of the set.
            items: The set.
        """
        self.prepared[key] = items
        if len(self.prepared) > _PREPARED:
            self.prepared.popitem(last=False)


class LiveModels:
    """The models that were used last.

    Where a card has too little memory for a forward, all of them answer by forwards of half the size from
    then on, and so do those to come: a process changes its plans once.
    """

    def __init__(self, open_backend: Callable[[nn.Module], Backend]) -> None:
        """None are there.

        Args:
            open_backend: Makes the backend of a live model.
        """
        self._open_backend = open_backend
        self._models: OrderedDict[int, LiveModel] = OrderedDict()
        self._is_halved = False

    def get(self, model: nn.Module) -> LiveModel:
        """Finds a live model; of too many the one used longest ago is closed.

        Args:
            model: The model.

        Returns:
            What is ready for it.
        """
        state = self._models.get(id(model))
        if state is None or state.model is not model:
            backend = self._open_backend(model)
            if self._is_halved and isinstance(backend, ShrinkableBackend):
                backend.halve_budgets()
            state = self._models[id(model)] = LiveModel(model, backend)
            if len(self._models) > _MODELS:
                self._models.popitem(last=False)[1].backend.close()
        self._models.move_to_end(id(model))
        return state

    def within_memory(self, compute: Callable[[], _Result]) -> _Result:
        """Computes something with a model; where a card lacks memory, once more with smaller forwards.

        Args:
            compute: What to compute, from the preparation of items on.

        Returns:
            What is computed.

        Raises:
            torch.OutOfMemoryError: Smaller forwards do not fit either.
        """
        return tried_again(compute, self._halve_budgets)

    def _halve_budgets(self) -> bool:
        """Has all models answer by smaller forwards, prepared anew; False where they do already."""
        backends = [s.backend for s in self._models.values() if isinstance(s.backend, ShrinkableBackend)]
        if self._is_halved or not backends:
            return False
        for state in self._models.values():
            state.prepared.clear()
            state.texts.clear()
        for backend in backends:
            backend.halve_budgets()
        self._is_halved = True
        log.warning(
            "the device has too little memory: forwards have half as many tokens from now on, in this process"
        )
        return True
