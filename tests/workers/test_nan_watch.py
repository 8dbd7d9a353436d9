"""NaN in logits is seen, whichever forward had it, and no forward waits for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evomerge.workers.nan_watch import NanWatch


class Small(nn.Module):
    """Embedding and head, as a language model has them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)

    def get_output_embeddings(self) -> Any:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embedding(ids))
        return logits


class Headless(Small):
    """A model whose head is no module."""

    def get_output_embeddings(self) -> None:
        return None


def broken(model: Small, row: int) -> None:
    with torch.no_grad():
        model.embedding.weight[row, 1] = float("nan")


IDS = torch.tensor([[0, 1], [2, 3]])


def test_a_nan_in_any_forward_is_seen_until_the_next_reset() -> None:
    model, watch = Small(), NanWatch()
    watch.add(model)
    broken(model, 4)
    model(IDS)
    assert not watch.has_seen()
    model(torch.tensor([[4]]))
    model(IDS)
    assert watch.has_seen()
    watch.reset()
    model(IDS)
    assert not watch.has_seen()


def test_the_flag_is_written_in_place_in_every_mode() -> None:
    model, watch = Small(), NanWatch()
    watch.add(model)
    places = {flag.data_ptr() for flag in watch._flags.values()}
    assert len(places) == 1
    broken(model, 0)
    with torch.inference_mode():
        model(IDS)
        assert watch.has_seen()
        watch.reset()
    model(IDS).nansum().backward()
    assert watch.has_seen()
    assert {flag.data_ptr() for flag in watch._flags.values()} == places


def test_a_forward_reads_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, watch = Small(), NanWatch()
    watch.add(model)

    def waits(tensor: Tensor) -> bool:
        raise AssertionError("a forward waits for its device")

    monkeypatch.setattr(Tensor, "__bool__", waits)
    monkeypatch.setattr(Tensor, "item", waits)
    model(IDS)


def test_a_model_is_watched_once_and_one_without_a_head_not_at_all() -> None:
    model, watch = Small(), NanWatch()
    watch.add(model)
    watch.add(model)
    assert len(model.head._forward_hooks) == 1
    watch.add(Headless())
    assert len(watch._watched) == 1
