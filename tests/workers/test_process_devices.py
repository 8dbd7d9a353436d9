"""Each process of a pool sees a card of its own, from its first moment on."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest

from evomerge.errors import SetupError
from evomerge.evaluation import Evaluation, Items
from evomerge.recipes import Mix, Recipe, params
from evomerge.workers import Job, Limits, Pool, ProcessPool
from evomerge.workers.process_devices import VARIABLE, device_of, visible_devices

UUIDS = "GPU-8932f937,MIG-05bd1f2a"


@pytest.mark.parametrize(
    ("given", "count", "expected"),
    [
        (None, 0, ()),
        (None, 3, ("0", "1", "2")),
        ("", 0, ()),
        ("-1", 0, ()),
        ("2,5", 2, ("2", "5")),
        (" 2 , 5 ", 2, ("2", "5")),
        (UUIDS, 2, ("GPU-8932f937", "MIG-05bd1f2a")),
        ("3,9,1", 1, ("3",)),  # the driver stops at the first that is not there
    ],
)
def test_visible_cards_are_those_that_the_variable_names(
    given: str | None, count: int, expected: tuple[str, ...]
) -> None:
    environment = {} if given is None else {VARIABLE: given}
    assert visible_devices(environment, count) == expected


@pytest.mark.parametrize("workers", range(1, 9))
@pytest.mark.parametrize("devices", [("0",), ("2", "5"), tuple("0123"), tuple(UUIDS.split(","))])
def test_workers_are_spread_over_cards_as_evenly_as_they_can_be(
    workers: int, devices: tuple[str, ...]
) -> None:
    shares = [device_of(worker, devices) for worker in range(workers)]
    counts = [shares.count(device) for device in devices]
    assert sum(counts) == workers
    assert max(counts) - min(counts) <= 1


def test_without_a_card_nothing_is_set() -> None:
    assert device_of(3, ()) is None


class Told:
    """A worker that writes down which cards its process was started with."""

    def __init__(self, folder: Path, broken: str = "") -> None:
        words = Path("/proc/self/environ").read_bytes().decode().split("\0")
        cards = [word.partition("=")[2] for word in words if word.startswith(f"{VARIABLE}=")]
        (folder / f"cards.{os.getpid()}").write_text(str(cards))
        if broken and os.environ[VARIABLE] == broken:
            raise SetupError("this card is broken")

    def evaluate(self, recipe: Recipe, items: Items) -> Evaluation:
        return Evaluation(recipe.id, (), {}, {})


def told(folder: Path) -> list[str]:
    return sorted(file.read_text() for file in folder.glob("cards.*"))


def devices_of_jobs(pool: Pool, count: int) -> set[str]:
    """The devices that jobs were done at."""
    mix = Mix("linear", (("a", 0),), params({"weight": (1.0,)}))
    recipes = [Recipe("a", (mix,), mix, mix, seed=i) for i in range(count)]
    pool.submit([Job(i, recipe, {"first": ("x",)}) for i, recipe in enumerate(recipes)])
    while pool.out:
        pool.result()
    return {attempt.device for attempt in pool.attempts()}


def test_a_process_is_started_with_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, UUIDS)
    cards = visible_devices(os.environ, 2)
    with ProcessPool(functools.partial(Told, tmp_path), 3, devices=cards) as pool:
        while len(told(tmp_path)) < 3:
            pool._step(0.05)
        assert devices_of_jobs(pool, 6) <= {"cuda:GPU-8932f937", "cuda:MIG-05bd1f2a"}
    assert told(tmp_path) == ["['GPU-8932f937']", "['GPU-8932f937']", "['MIG-05bd1f2a']"]
    assert os.environ[VARIABLE] == UUIDS


def test_without_cards_a_process_has_the_variable_of_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "7")
    with ProcessPool(functools.partial(Told, tmp_path), 1):
        assert told(tmp_path) == ["['7']"]


def test_a_card_that_cannot_be_opened_is_not_the_others_failure(tmp_path: Path) -> None:
    limits = Limits(backoff=0.01, longest_backoff=0.05)
    with ProcessPool(functools.partial(Told, tmp_path, "1"), 2, limits, ("0", "1")) as pool:
        assert devices_of_jobs(pool, 4) == {"cuda:0"}
