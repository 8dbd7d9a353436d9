"""What a study began with decides which optimizations score its candidates, also where it is resumed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from evomerge.evaluation.inference import verification_cache
from evomerge.evaluation.lm_harness.backends import compiled
from evomerge.store import Store, StudyFacts
from tests.support.toy import in_process, search_file


def test_a_resumed_search_probed_the_model_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("EVOMERGE_THREADS", "1")
    verification_cache.begin({})
    file = search_file(tmp_path, "small", evaluations=8)
    code, _, err = in_process("run", file, "--root", tmp_path)
    assert code == 0, err
    with Store.open(tmp_path / "small" / "study.db") as store:
        study = store.study()
    assert study is not None
    kinds = {key.split()[0] for key in study.facts.verifications}
    assert kinds == {"optimizations", "decoders"}, "arithmetic generates, the others choose"

    verification_cache.begin({})  # another process, on a machine without the files
    shutil.rmtree(tmp_path / "cache")
    for probe in ("probe", "probe_decoders"):
        monkeypatch.setattr(compiled, probe, lambda *_, **__: pytest.fail("probed again"))
    code, _, err = in_process("resume", "small", "--root", tmp_path, "--evaluations", "12")
    assert code == 0, err
    verification_cache.begin({})


def test_verifications_and_filters_are_no_reason_to_refuse_a_resume() -> None:
    before = StudyFacts()
    now = StudyFacts(verifications={"decoders 1": {"slots": [True, "regret 0"]}}, filters={"a": "strict"})
    assert before.differences(now) == []
    assert StudyFacts.from_json(now.to_json()) == now
