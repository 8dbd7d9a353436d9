"""The pool of a search: which cards of this machine its processes share."""

from __future__ import annotations

import pytest

from evomerge.launch.pool import process_devices


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
