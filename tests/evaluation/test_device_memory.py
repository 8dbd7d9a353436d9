"""What a card has no room for is computed once more with less, after the first has let go of its tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch

from evomerge.evaluation.device_memory import free_unused, tried_again


class Card:
    """Has no room for the first forwards. Remembers what they held, and whether it is still there later."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.held: list[weakref.ref[torch.Tensor]] = []
        self.alive: list[int] = []

    def forward(self) -> str:
        self.alive.append(sum(reference() is not None for reference in self.held))
        activations = torch.zeros(3)
        self.held.append(weakref.ref(activations))
        if len(self.held) <= self.failures:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return "scores"


def arranged(calls: list[int], can: bool) -> Callable[[], bool]:
    def take_less() -> bool:
        calls.append(1)
        return can

    return take_less


def test_the_second_time_begins_without_the_tensors_of_the_first() -> None:
    card, calls = Card(1), list[int]()
    assert tried_again(card.forward, arranged(calls, True)) == "scores"
    assert (len(calls), card.alive) == (1, [0, 0])


def test_torch_gives_back_what_it_keeps_before_the_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    card, emptied = Card(1), list[int]()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(len(card.held)))
    tried_again(card.forward, arranged([], True))
    assert emptied == [1], "after the first forward"


@pytest.mark.parametrize(("failures", "can", "tries"), [(2, True, 2), (1, False, 1)])
def test_what_does_not_fit_with_less_either_is_an_error(failures: int, can: bool, tries: int) -> None:
    card = Card(failures)
    with pytest.raises(torch.OutOfMemoryError):
        tried_again(card.forward, arranged([], can))
    assert len(card.held) == tries


def test_other_errors_are_not_tried_again() -> None:
    calls: list[int] = []

    def broken() -> str:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        tried_again(broken, arranged(calls, True))
    assert not calls


def test_without_a_card_there_is_nothing_to_give_back() -> None:
    free_unused()
