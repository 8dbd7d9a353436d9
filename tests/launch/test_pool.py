"""The pool of a search: which cards of this machine its processes share, and who holds models there."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace

import pytest

from evomerge.config import loading
from evomerge.launch.pool import process_devices, several_kinds
from evomerge.launch.prepare import prepare_study
from evomerge.launch.search_request import SearchRequest
from evomerge.search import Progress
from evomerge.workers.worker import Worker
from tests.support.toy import REPO, search_file


@pytest.mark.parametrize(
    ("named", "expected"),
    [("cuda", ("4", "6")), ("cuda:1", ()), ("cpu", ())],
)
def test_a_card_that_the_user_names_is_everybodys(
    named: str, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVOMERGE_DEVICE", named)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert process_devices() == expected


@pytest.mark.parametrize(
    ("names", "said"), [(["H200", "H200"], ""), (["H200", "A100"], "several kinds: A100, H200;")]
)
def test_cards_of_several_kinds_are_said(
    names: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = {f"cuda:{i}": SimpleNamespace(name=name, major=9, minor=0) for i, name in enumerate(names)}
    monkeypatch.setattr("torch.cuda.get_device_properties", cards.__getitem__)
    found = several_kinds(len(names))
    assert said in found
    assert bool(found) == bool(said)


class _PoolOpensError(Exception):
    """Everything is loaded, and the pool would be opened."""


@pytest.mark.parametrize(("workers", "expected"), [(1, 1), (2, 0)])
def test_the_driver_holds_no_model_on_a_device_that_other_processes_compute_on(
    workers: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVOMERGE_THREADS", "1")
    monkeypatch.chdir(REPO)
    open_workers: list[int] = []
    of_other_tests = [thing for thing in gc.get_objects() if type(thing) is Worker]

    def show(progress: Progress) -> None:
        if progress.note.startswith("parents: "):
            known = [thing for thing in gc.get_objects() if type(thing) is Worker]
            own = [worker for worker in known if not any(worker is other for other in of_other_tests)]
            open_workers.append(sum(worker.is_open for worker in own))
            raise _PoolOpensError

    settings, text = loading.load(str(search_file(tmp_path, "small", items=8)))
    with pytest.raises(_PoolOpensError):
        prepare_study(SearchRequest(settings, text), tmp_path / "root", workers=workers, show=show)
    assert open_workers == [expected]
