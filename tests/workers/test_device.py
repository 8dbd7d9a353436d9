"""What a worker sets and asks of its device. No card is here: what torch.cuda answers is made up."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from evomerge.checkpoints import Checkpoint
from evomerge.merging.host_memory import available_memory
from evomerge.workers.device import card, compute_in_full_precision, tables_memory
from tests.support.logit_tasks import ITEMS, recipe, worker

MATMUL: Any = torch.backends.cuda.matmul


@pytest.fixture
def coarse() -> Iterator[None]:
    """A process in which another library has allowed every shortcut."""
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True
    MATMUL.allow_bf16_reduced_precision_reduction = True
    MATMUL.allow_fp16_reduced_precision_reduction = True
    yield
    compute_in_full_precision()


def shortcuts() -> list[bool]:
    """What is allowed: TF32 in products, TF32 in cuDNN, partial sums in bfloat16, in float16."""
    return [
        MATMUL.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        MATMUL.allow_bf16_reduced_precision_reduction,
        MATMUL.allow_fp16_reduced_precision_reduction,
    ]


@pytest.mark.usefixtures("coarse")
def test_no_shortcut_is_left_whatever_was_set_before() -> None:
    assert shortcuts() == [True] * 4
    compute_in_full_precision()
    assert shortcuts() == [False] * 4
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.usefixtures("coarse")
def test_a_worker_takes_all_shortcuts_away(parents: dict[str, Checkpoint]) -> None:
    worker(parents)
    assert shortcuts() == [False] * 4


def test_a_card_is_known_by_its_name_and_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = {"cuda": SimpleNamespace(name="NVIDIA H200", major=9, minor=0)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", cards.__getitem__)
    assert card("cuda") == {"card": "NVIDIA H200", "capability": "9.0"}
    assert card("cpu") == {}


def test_a_worker_that_leaves_its_device_holds_nothing_there(parents: dict[str, Checkpoint]) -> None:
    own = worker(parents)
    assert own.evaluate(recipe(), ITEMS).error is None
    held = [weakref.ref(own.builder), weakref.ref(own.tables)]
    own.leave_device()
    gc.collect()
    assert not own.is_open
    assert [reference() for reference in held] == [None, None]
    assert {parameter.device.type for parameter in own.model.parameters()} == {"cpu"}


def test_tables_lie_on_the_card_and_take_a_part_of_what_parents_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = {"cuda:1": (80 << 30, 96 << 30)}
    monkeypatch.setattr(torch.cuda, "mem_get_info", free.__getitem__)
    assert tables_memory("cuda:1", 60 << 30) == 5 << 30
    assert tables_memory("cuda:1", 90 << 30) == 0
    assert 0 < tables_memory("cpu", 0) <= available_memory()
