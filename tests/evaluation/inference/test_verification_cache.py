"""Verifications of optimizations are measured once on a machine and kept by a study."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from evomerge.evaluation.inference import verification_cache
from evomerge.evaluation.inference.requests import Verification
from evomerge.evaluation.inference.verification_cache import span_bucket, verified
from tests.support.text_architectures import build


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    verification_cache.begin({})
    yield tmp_path / "evomerge" / "verifications"
    verification_cache.begin({})


class Probe:
    """Counts how often it is asked."""

    def __init__(self, name: str = "slots", reason: str = "regret 0.0e+00", allowed: bool = True) -> None:
        self.calls = 0
        self.found = {name: Verification(allowed, reason)}

    def __call__(self) -> dict[str, Verification]:
        self.calls += 1
        return dict(self.found)


def ask(model: torch.nn.Module, probe: Probe, span: int = 64, pad_id: int = 0) -> dict[str, Verification]:
    return verified("decoders", model, span, {"pad_id": pad_id}, probe)


def test_a_probe_ran_again_in_every_process_and_at_every_resume() -> None:
    probe = Probe()
    first = ask(build("llama"), probe)
    verification_cache.begin({})  # another process
    assert ask(build("llama"), probe) == first
    assert ask(build("llama"), probe) == first
    assert probe.calls == 1


def test_what_a_verification_depends_on_is_measured_apart() -> None:
    probe = Probe()
    base = build("llama")
    deeper = build("mistral")
    for model, span, pad in ((base, 64, 0), (base, 72, 0), (base, 64, 1), (deeper, 64, 0)):
        ask(model, probe, span, pad)
    ask(build("llama", torch.bfloat16), probe)
    assert probe.calls == 5


def test_other_weights_of_the_same_architecture_are_not_measured_again() -> None:
    probe, model = Probe(), build("llama")
    ask(model, probe)
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    verification_cache.begin({})
    ask(model, probe)
    assert probe.calls == 1


@pytest.mark.parametrize(
    "probe",
    [
        Probe(reason="OutOfMemoryError: a card", allowed=False),
        Probe(reason="regret nan, logits differ by nan", allowed=False),
        Probe(name="whole"),
    ],
)
def test_what_a_broken_candidate_or_a_full_card_shows_is_not_kept(probe: Probe) -> None:
    ask(build("llama"), probe)
    ask(build("llama"), probe)
    assert probe.calls == 2


def test_a_damaged_file_is_measured_again(cache: Path) -> None:
    probe = Probe()
    for damage in ("", "{", "[]", '{"key": 1}', None):
        ask(build("llama"), probe)
        verification_cache.begin({})
        (file,) = cache.glob("*.json")
        if damage is None:
            data = json.loads(file.read_text())
            damage = json.dumps(data | {"found": {"slots": ["yes", 1]}})
        file.write_text(damage)
    ask(build("llama"), probe)
    assert probe.calls == 6


def test_a_study_goes_on_with_what_it_began_with(cache: Path) -> None:
    refused = Probe(allowed=False)
    refused.found["padded"] = Verification(True, "regret 0.0e+00")
    model = build("llama")
    began = ask(model, refused)
    stored = json.loads(json.dumps(verification_cache.known()))
    verification_cache.begin({})
    for file in cache.glob("*.json"):
        file.unlink()
    verification_cache.begin(stored)
    other = Probe()
    assert ask(model, other) == began
    assert other.calls == 0


def test_a_study_stored_what_another_study_of_its_process_had_found(cache: Path) -> None:
    ask(build("llama"), Probe())
    verification_cache.begin({})
    probe = Probe("padded")
    ask(build("mistral"), probe)
    assert [list(found) for found in verification_cache.known().values()] == [["padded"]]


def test_a_strangers_study_changes_no_file_of_the_user(cache: Path) -> None:
    model, probe = build("llama"), Probe()
    ask(model, probe)
    forged = {key: {"slots": [False, "forged"]} for key in verification_cache.known()}
    verification_cache.begin({**forged, "other": 3, "more": {"slots": 1}})
    verification_cache.begin({})
    assert ask(model, probe)["slots"].allowed


def test_without_a_folder_a_process_still_measures_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    probe = Probe()
    ask(build("llama"), probe)
    ask(build("llama"), probe)
    assert probe.calls == 1


def test_neighbouring_lengths_share_a_verification() -> None:
    assert [span_bucket(n) for n in (1, 64, 65, 128, 129, 1100, 2048, 2049)] == [
        *(64, 64, 72, 128, 144, 1152, 2048, 2304)
    ]
    for span in range(1, 5000):
        assert span <= span_bucket(span) <= max(64, span * 1.13)
