"""A search whose texts an engine generates: what answered is a fact; engines are mixed by request only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evomerge.evaluation.engines import live_engine
from evomerge.evaluation.lm_harness.backends import vllm
from evomerge.store import Store
from tests.support import toy_engine
from tests.support.lm_eval_tasks import GENERATE, sums, write_task
from tests.support.toy import in_process, zoo_folder


def search_file(folder: Path) -> Path:
    docs = {"search": sums(6), "validation": sums(4, 10), "test": sums(4, 20)}
    write_task(folder / "tasks", "texts", GENERATE, docs)
    document = {
        "study": "texts",
        "models": {name: str(zoo_folder() / name) for name in ("base", "math", "lang")},
        "base": "base",
        "method": "task_arithmetic",
        "out_dtype": "float32",
        "space": {"groups": 1, "parameters": {"weight": {"low": -0.5, "high": 2.5, "start": 0.8}}},
        "tasks": [{"task": "texts", "filter": "number"}],
        "evaluation": {
            "splits": "declared",
            "items": 4,
            "include": [str(folder / "tasks")],
            "backend": "vllm",
            "engine": {"process": "worker"},
        },
        "search": {"evaluations": 4, "population": 4, "finalists": 1},
    }
    file = folder / "texts.yaml"
    file.write_text(json.dumps(document))  # JSON is YAML
    return file


def facts(root: Path) -> Any:
    with Store.open(root / "texts" / "study.db") as store:
        study = store.study()
        assert study is not None
        return study.facts


def test_a_study_goes_on_with_another_engine_only_by_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_engine, "VLLM", toy_engine.PATH)
    monkeypatch.setattr(vllm, "vllm_version", lambda python: "1.0")
    root = tmp_path / "studies"
    code, out, err = in_process("run", search_file(tmp_path), "--root", root, "--allow-tasks")
    assert code == 0, out + err
    assert facts(root).backends == {"texts": "vllm 1.0: greedy, at most 256 at once"}

    def resume(*more: str) -> tuple[int, str]:
        words = ("resume", "texts", "--evaluations", "8", "--root", root, "--allow-tasks", *more)
        code, out, err = in_process(*words)
        return code, " ".join((out + err).split())

    monkeypatch.setattr(vllm, "vllm_version", lambda python: "2.0")
    code, said = resume()
    assert code == 2
    assert "vllm 1.0" in said
    assert "vllm 2.0" in said
    code, said = resume("--backend", "fast")
    assert code == 2
    assert "unknown evaluation backend 'fast'" in said
    code, said = resume("--backend", "compiled")
    assert code == 0, said
    assert facts(root).backends == {"texts": "vllm 1.0: greedy, at most 256 at once, then compiled"}
