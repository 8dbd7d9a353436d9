"""A search whose parents are GGUF files, from the search file to an exported folder."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from evomerge.checkpoints import Checkpoint
from tests.support import gguf_models
from tests.support.toy import in_process

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs the gguf package")
TASK = """
def likes(model, tokenizer, items):
    names = [f"item {i}" for i in range(40)] if items is None else items
    ids = tokenizer("ABCD", return_tensors="pt").input_ids
    size = float(model(input_ids=ids).logits.float().pow(2).mean())
    return {name: size + len(name) for name in names}
"""


def test_a_search_of_gguf_files_ends_in_a_recipe_that_merges_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "gguf_likes.py").write_text(TASK)
    for seed, name in enumerate(("base", "a", "b")):
        gguf_models.write(tmp_path / f"{name}-Q8_0.gguf", seed)
    file = tmp_path / "search.yaml"
    file.write_text(
        json.dumps(
            {
                "study": "quantised",
                "models": {name: f"{name}-Q8_0.gguf" for name in ("base", "a", "b")},
                "base": "base",
                "method": "task_arithmetic",
                "space": {"groups": 1, "parameters": {"weight": {"low": 0.0, "high": 1.0, "start": 0.5}}},
                "tasks": [{"python": "gguf_likes:likes", "name": "likes"}],
                "search": {"evaluations": 6, "population": 6, "finalists": 1},
            }
        )
    )
    root = ["--root", str(tmp_path / "studies")]
    code, _, said = in_process("run", file, *root, "--allow-python", "--accept-floor")
    assert code == 0, said
    assert caplog.text.count("dequantising it to bfloat16, once") == 3
    out = tmp_path / "out"
    code, _, said = in_process("export", "quantised/best", out, "--weights", *root)
    assert code == 0, said
    again = tmp_path / "again"
    code, _, said = in_process("merge", out / "recipe.json", again)
    assert code == 0, said
    assert all(f"/{name}-Q8_0-" in (out / "recipe.yaml").read_text() for name in ("base", "a", "b"))
    one, other = Checkpoint(out), Checkpoint(again)
    assert set(one.tensors) == set(other.tensors)
    assert all(one.tensor(name).equal(other.tensor(name)) for name in one.tensors)
