"""A learned stage with labels, then weights, then relaxed routes: killed anywhere, run by any workers, it has
the same rows.
"""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.killing import check, kill_after
from tests.support.sweeps import sweep
from tests.support.toy import Prepared, in_process, search_file, stored_rows

LABELS = {"zoo_arithmetic": "math", "zoo_lookup": "lang", "zoo_string": "string", "zoo_cross": "none"}


def staged_file(folder: Path, study: str) -> Path:
    """A search file of the three stages."""
    file = search_file(folder, study)
    document = json.loads(file.read_text())
    del document["search"]["evaluations"], document["search"]["population"]
    document["stages"] = [
        {"stage": "learned", "steps": 4, "items": 24, "labels": LABELS},  # 72 items: two shards a step
        {"stage": "weights", "evaluations": 8, "population": 4},
        {"stage": "routes", "method": "relaxed", "steps": 4, "items": 4, "evaluations": 4},
    ]
    document["search"]["population"] = 4
    document["routes"] = {"embeddings": "start", "models": ["math", "lang"]}
    file.write_text(json.dumps(document, indent=1))
    return file


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The rows of the search in one process that nobody killed."""
    root = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVOMERGE_THREADS", "1")
        code, _, err = in_process("run", staged_file(root, "staged"), "--root", root)
    assert code == 0, err
    rows = stored_rows(root / "staged" / "study.db")
    assert {trial["stage"] for trial in rows["trials"]} == {0, 1, 2}
    roles = [evaluation["role"] for evaluation in rows["evaluations"]]
    assert "labels" in roles
    assert roles.count("gradient") == 4 * (2 + 1) + 4, (
        "two shards and the whole of a learned step; relaxed steps"
    )
    return rows


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("kills", sweep([10, 4, 2], [2]))
def test_killed_at_random_moments_it_is_the_search_that_nobody_killed(
    kills: int, unbroken: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    rng = random.Random(16)
    file, store = staged_file(tmp_path, "staged"), tmp_path / "parts" / "staged" / "study.db"
    words = ("run", file, "--resume", "--root", tmp_path / "parts")
    rows: dict[str, list[dict[str, Any]]] = {}
    killed = 0
    total = len(unbroken["evaluations"])
    with Prepared(tmp_path) as prepared:
        for turn in range(kills):
            search = prepared.start(*words)
            if turn % 5 == 0:  # before anything new is stored
                kill_after(search, store, 0, rng.uniform(0.05, 2.5))
            else:  # spread over the search, which is not at its end before the last kill
                kill_after(search, store, rng.randint(1, total // kills), rng.uniform(0, 0.06))
            code = search.wait()
            assert code in (-signal.SIGKILL, 0), search.err.read_text()
            assert "Traceback" not in search.err.read_text()
            killed += code == -signal.SIGKILL
            rows = check(store, rows)
        last = prepared.start(*words)
        assert last.wait() == 0, last.err.read_text()
    assert killed >= 0.8 * kills, "most kills hit a running search"
    final = check(store, rows)
    assert final.keys() == unbroken.keys()
    for table, found in final.items():
        assert found == unbroken[table], table


@pytest.mark.parametrize(
    "workers",
    [
        pytest.param(("--workers", "2"), id="two processes"),
        pytest.param(("--ray", "local", "--workers", "2"), id="two Ray workers", marks=pytest.mark.cluster),
    ],
)
def test_whoever_evaluates_it_the_rows_are_one_process_s(
    workers: tuple[str, ...],
    unbroken: dict[str, list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EVOMERGE_THREADS", "1")
    code, _, err = in_process("run", staged_file(tmp_path, "staged"), "--root", tmp_path, *workers)
    assert code == 0, err
    found = stored_rows(tmp_path / "staged" / "study.db")
    for table in ("trials", "evaluations", "recipes", "item_sets"):
        assert found[table] == unbroken[table], table
