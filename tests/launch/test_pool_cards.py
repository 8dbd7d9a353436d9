"""Which cards processes of this machine have, and how many of them share one."""

from __future__ import annotations

from typing import Any

import pytest

from evomerge.config import Config, loading
from evomerge.errors import ConfigError, SetupError
from evomerge.launch import opening, pool
from evomerge.launch.pool import grouped, workers_of_a_card


def search(**cluster: Any) -> Config:
    settings, _ = loading.load("qwen3-trio")
    return settings.model_copy(update={"cluster": settings.cluster.model_copy(update=cluster)})


@pytest.mark.parametrize(
    ("gpus", "groups"),
    [
        (None, ("0", "1", "2", "3", "4")),
        (0.5, ("0", "1", "2", "3", "4")),
        (2, ("0,1", "2,3")),
        (5, ("0,1,2,3,4",)),
    ],
)
def test_processes_have_as_many_cards_as_a_worker_needs(gpus: float | None, groups: tuple[str, ...]) -> None:
    assert grouped(("0", "1", "2", "3", "4"), gpus) == groups
    assert grouped((), gpus) == ()


def test_too_few_cards_are_refused() -> None:
    with pytest.raises(SetupError, match="a worker is to have 4 GPUs, and this machine has 2"):
        grouped(("0", "1"), 4)


@pytest.mark.parametrize(
    ("cluster", "workers", "sharing"),
    [
        ({}, 1, 1),
        ({}, 2, 1),
        ({}, 5, 3),
        ({"gpus": 2}, 1, 1),
        ({"gpus": 2}, 3, 3),
        ({"gpus": 0.25, "ray": "auto"}, 1, 4),
        ({"gpus": 2, "ray": "auto"}, 9, 1),
    ],
)
def test_how_many_workers_share_a_card(
    cluster: dict[str, Any], workers: int, sharing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "process_devices", lambda: ("0", "1"))
    assert workers_of_a_card(search(**cluster), workers) == sharing


def test_the_devices_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "device_name", lambda: "cuda")
    monkeypatch.setattr(opening.torch.cuda, "device_count", lambda: 4)
    assert opening.device_names(search()) == ("cuda",)
    assert opening.device_names(search(gpus=0.5)) == ("cuda",)
    assert opening.device_names(search(gpus=3)) == ("cuda:0", "cuda:1", "cuda:2")
    with pytest.raises(SetupError, match=r"cluster\.gpus is 8, and torch finds 4 GPUs here"):
        opening.device_names(search(gpus=8))
    monkeypatch.setattr(opening, "device_name", lambda: "cpu")
    assert opening.device_names(search(gpus=8)) == ("cpu",)


@pytest.mark.parametrize("gpus", [0, 0.3, 1, 2, 64])
def test_gpus_are_a_share_or_a_whole_number(gpus: float) -> None:
    given: dict[str, Any] = {"ray": None, "workers": None, "grace": None, "reuse": None}
    assert loading.placed(search(), gpus=gpus, **given).cluster.gpus == gpus
    for wrong in (1.5, 65, -1):
        with pytest.raises(ConfigError):
            loading.placed(search(), gpus=wrong, **given)
