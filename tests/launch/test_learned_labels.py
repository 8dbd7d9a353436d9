"""Labels and the check of the surrogate on the zoo: in any worker, in reports, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evomerge.store import Agreement, Outcome, StageOutcome, Store, StudyFacts
from tests.support.learned_search import learned_file
from tests.support.toy import in_process, stored_rows

LABELS = {"zoo_arithmetic": "math", "zoo_lookup": "lang", "zoo_string": "string", "zoo_cross": "none"}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a finished study 'labelled', whose tasks have labels of their experts."""
    root = tmp_path_factory.mktemp("labelled")
    code, _, err = in_process("run", learned_file(root, "labelled", {"labels": LABELS}), "--root", root)
    assert code == 0, err
    return root


def test_steps_climb_the_experts_answers_and_the_task_without_one_is_left_out(labelled: Path) -> None:
    rows = stored_rows(labelled / "labelled" / "study.db")
    parents = {row["label"]: row["recipe"] for row in rows["trials"] if row["origin"] == "parent"}
    sets = {row["id"]: dict(json.loads(row["body"])) for row in rows["item_sets"]}
    labels = [row for row in rows["evaluations"] if row["role"] == "labels"]
    for row in labels:
        for task in sets[row["item_set"]]:
            assert parents[LABELS[task]] == row["recipe"]
        assert all(answer is not None for answer in json.loads(row["answers"]))
    steps = [row for row in rows["evaluations"] if row["role"] == "gradient"]
    assert {task for row in steps for task in sets[row["item_set"]]} == set(LABELS) - {"zoo_cross"}


def test_reports_say_whose_answers_were_climbed_and_whether_the_surrogate_follows(labelled: Path) -> None:
    code, out, err = in_process("status", "labelled", "--json", "--root", labelled)
    assert code == 0, err
    data = json.loads(out)
    assert {row["task"]: row["model"] for row in data["labels"]} == {
        task: model for task, model in LABELS.items() if model != "none"
    }
    with Store.open(labelled / "labelled" / "study.db") as store:
        study = store.study()
        assert study is not None
        assert {row["version"] for row in data["labels"]} <= set(study.facts.tasks.values())
    assert all(row["items"] == row["answers"] and row["made"].endswith("+00:00") for row in data["labels"])
    (agreement,) = data["agreements"]
    assert set(agreement["tasks"]) == set(LABELS) - {"zoo_cross"}
    assert agreement["correlation"] > 0.5
    line = f"rank correlation of surrogate and metric {agreement['correlation']:.2f}"
    code, out, _ = in_process("status", "labelled", "--root", labelled)
    assert line in out
    report = (labelled / "labelled" / "report.md").read_text()
    assert line in report
    assert "| zoo\\_string | string |" in report or "| zoo_string | string |" in report
    with Store.open(labelled / "labelled" / "study.db") as store:
        end = next(t for t in store.trials() if t.label == "end of the learned stage")
    code, out, _ = in_process("show", f"labelled/{end.id}", "--root", labelled)
    assert line in out


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({"zoo_sums": "math"}, "'zoo_sums' is not among the tasks"),
        ({"zoo_string": "maths"}, "Did you mean 'math'"),
        (dict.fromkeys(LABELS, "none"), "labels leave every task out"),
        ({"zoo_lookup": "samples"}, "knows its right answers as texts"),
    ],
)
def test_labels_that_cannot_be_had_are_refused_in_a_line(
    labels: dict[str, str], words: str, tmp_path: Path
) -> None:
    file = learned_file(tmp_path, "refused", {"labels": labels})
    code, out, err = in_process("run", file, "--root", tmp_path)
    assert (code, out) != (0, "")
    assert words in err
    assert sum(line.startswith("error[") for line in err.splitlines()) == 1
    assert not (tmp_path / "refused" / "study.db").exists()


def test_a_plan_counts_labels_and_the_comparison_of_the_surrogate(labelled: Path, tmp_path: Path) -> None:
    """As many items as the search then scores for them."""
    code, out, err = in_process("plan", learned_file(tmp_path, "labelled", {"labels": LABELS}), "--json")
    assert code == 0, err
    steps = {row["stage"]: row for row in json.loads(out)["work"]["stages"]}
    rows = stored_rows(labelled / "labelled" / "study.db")
    sizes = {row["id"]: sum(len(ids) for _, ids in json.loads(row["body"])) for row in rows["item_sets"]}
    scored = {
        role: [sizes[row["item_set"]] for row in rows["evaluations"] if row["role"] == role]
        for role in ("labels", "surrogate")
    }
    assert steps["answers that are labels"]["items"] == sum(scored["labels"])
    assert steps["surrogate and metric"]["candidates"] == len(scored["surrogate"])
    assert {steps["surrogate and metric"]["items"]} == set(scored["surrogate"])


def test_a_plan_says_what_a_study_of_its_name_has_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A surrogate that did not follow the metrics."""
    monkeypatch.setenv("EVOMERGE_ROOT", str(tmp_path))
    outcome: dict[str, Any] = {"best": {"id": 1, "recipe": None, "label": None}}
    found = Agreement(0.25, {"zoo_string": 0.25}, 16, 300, 0)
    (tmp_path / "planned").mkdir()
    with Store.open(tmp_path / "planned" / "study.db", write=True) as store:
        store.begin("planned", 0, "study: planned\n", {}, StudyFacts())
        store.finish(Outcome(**outcome, stages=(StageOutcome("learned", 1, 3, 1, found),)))
    code, out, err = in_process("plan", learned_file(tmp_path, "planned"))
    assert code == 0, err
    assert (
        "in study 'planned', stage 1: rank correlation of surrogate and metric 0.25 over 16 candidates" in out
    )
    assert "the surrogate does not follow the metric here: add a stage of weights" in out
