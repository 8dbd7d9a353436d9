"""What plan says of a search is what the search then is."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evomerge.store import Store
from tests.support.toy import REPO, in_process, search_file, stored_rows

TASKS = ("zoo_arithmetic", "zoo_lookup", "zoo_string", "zoo_cross")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVOMERGE_THREADS", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(REPO)


def test_what_is_planned_is_what_was_run(finished: Path) -> None:
    code, out, err = in_process("plan", finished / "small.yaml", "--json")
    assert code == 0, err
    data = json.loads(out)
    with Store.open(finished / "small" / "study.db") as store:
        study = store.study()
        assert study is not None
        facts, trials = study.facts, store.trials()
    assert data["study"] == study.name
    assert {word.split()[0] for model in data["models"] for word in model["licenses"]} == {"unknown"}
    assert data["space"]["axes"] == len(facts.axes)
    assert data["space"]["first"] == list(facts.axes[:4])
    assert {t["task"]: t["metric"] for t in data["tasks"]} == facts.metrics
    for task in data["tasks"]:
        assert task["items"] == {
            role: facts.items[role][task["task"]] for role in ("search", "validation", "test")
        }
        assert task["soft"] == list(facts.terms[task["task"]].soft_metrics)
    assert {m["name"]: m["path"] for m in data["models"]} == {
        name: parent.path for name, parent in facts.parents.items()
    }
    stages = {s["stage"]: s for s in data["work"]["stages"]}
    searched = Counter(t.generation for t in trials if t.origin != "mean")
    assert stages["parents, hand recipes and soups"]["candidates"] == searched.pop(0)
    assert data["optimizer"]["population"] == searched[1]
    assert stages["search"]["candidates"] == sum(searched.values())
    assert data["work"]["generations"] == len(searched)
    rows = stored_rows(finished / "small" / "study.db")
    items = {s["id"]: sum(len(ids) for _, ids in json.loads(s["body"])) for s in rows["item_sets"]}
    for role in ("search", "validation", "test"):
        assert {items[e["item_set"]] for e in rows["evaluations"] if e["role"] == role} == {
            stages[role]["items"]
        }
        scored = sum(e["role"] == role for e in rows["evaluations"])
        if role != "search":  # equal recipes are scored once
            assert scored <= stages[role]["candidates"] <= scored + 3


def test_a_plan_writes_nothing_and_names_what_a_probe_adds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVOMERGE_ROOT", str(tmp_path / "results"))
    file = search_file(tmp_path, "trial")
    code, out, err = in_process("plan", file)
    assert code == 0, err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["trial.yaml"]
    for task in TASKS:
        assert any(line.startswith(task) for line in out.splitlines()), task
    assert "--probe" in out
    assert "14 axes in 2 layer groups" in out
    axes = [line for line in out.splitlines() if line.endswith(": -0.5 to 2.5, start 0.8")]
    assert len(axes) == 14, "every axis has a line with its bounds and start"


def test_a_plan_without_a_probe_says_that_vllm_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVOMERGE_VLLM_PYTHON", "/no/such/python")
    for backend, count in (("vllm", 1), ("auto", 0)):
        file = search_file(tmp_path, "trial", backend=backend)
        code, out, err = in_process("plan", file, "--json")
        assert code == 0, err
        findings = [line for line in json.loads(out)["findings"] if "'/no/such/python' does not run" in line]
        assert len(findings) == count, backend


def test_a_probe_times_a_candidate_and_says_what_answers(tmp_path: Path) -> None:
    file = search_file(tmp_path, "trial")
    code, out, err = in_process("plan", file, "--probe", "--json")
    assert code == 0, err
    data = json.loads(out)
    probe = data["probe"]
    assert probe["backends"] == dict.fromkeys(TASKS, "compiled")
    assert probe["techniques"]["plain"]["allowed"]
    assert all(isinstance(v["allowed"], bool) and v["reason"] for v in probe["techniques"].values())
    assert probe["items"] == 32
    assert 0 < probe["seconds_merge"] < probe["seconds_first"]
    whole = sum(
        s["candidates"] * (probe["seconds_merge"] + probe["seconds_score"] / 32 * s["items"])
        for s in data["work"]["stages"]
    )
    assert probe["seconds_search"] == pytest.approx(whole)


def _gone(s: dict[str, Any]) -> None:
    s["models"]["math"] = "/nowhere/model"


def _metric(s: dict[str, Any]) -> None:
    s["tasks"][1]["metric"] = "ac"


def _groups(s: dict[str, Any]) -> None:
    s["space"]["groups"] = [2, 2]


WRONG: dict[str, tuple[Callable[[dict[str, Any]], None], int, str, str]] = {
    "a model that is not there": (_gone, 3, "E210", "/nowhere/model"),
    "a metric that the task lacks": (_metric, 3, "E220", "Did you mean 'acc'"),
    "groups that do not add up": (_groups, 2, "E100", "add up to 4 layers"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_would_stop_the_search_stops_the_plan(case: str, tmp_path: Path) -> None:
    change, number, name, sentence = WRONG[case]
    file = search_file(tmp_path, "trial")
    settings = json.loads(file.read_text())
    change(settings)
    file.write_text(json.dumps(settings))
    code, out, err = in_process("plan", file)
    assert (code, out) == (number, "")
    assert err.startswith(f"error[{name}] ")
    assert len(err.splitlines()) == 1
    assert sentence in err


def test_a_search_file_that_is_none_is_code_two() -> None:
    code, out, err = in_process("plan", "dmeo")
    assert (code, out) == (2, "")
    assert "Did you mean 'demo'" in err


def test_show_says_what_answered_and_lists_the_front(finished: Path) -> None:
    code, out, err = in_process("show", "small/best", "--root", finished, "--json")
    assert code == 0, err
    assert json.loads(out)["backends"] == dict.fromkeys(TASKS, "compiled")
    assert (
        "answered by compiled requests: zoo_arithmetic"
        in in_process("show", "small/best", "--root", finished)[1]
    )
    assert in_process("show", "small/math", "--root", finished) == in_process(
        "show", "small/2", "--root", finished
    )
    code, out, err = in_process("show", "small/pareto", "--root", finished, "--json")
    assert code == 0, err
    front = {c["id"]: c["metrics"] for c in json.loads(out)["candidates"]}
    everyone = {}
    with Store.open(finished / "small" / "study.db") as store:
        for trial in store.trials():
            for role, scored in store.evaluations(trial.recipe_id):
                if role == "validation":
                    everyone[trial.id] = {t: scored.evaluation.metrics[t] for t in TASKS}

    def beaten(one: dict[str, float]) -> bool:
        return any(all(o[t] >= one[t] for t in TASKS) and o != one for o in everyone.values())

    best = [m for m in everyone.values() if not beaten(m)]
    assert {tuple(m[t] for t in TASKS) for m in front.values()} == {tuple(m[t] for t in TASKS) for m in best}
    text = in_process("show", "small/pareto", "--root", finished)[1]
    for trial_id in front:
        assert f"\n{trial_id:>6}  " in text
