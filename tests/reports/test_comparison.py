"""Candidates beside one another: numbers against loops over the stored rows, outputs against their values."""

from __future__ import annotations

import json
import math
import shutil
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from evomerge.errors import ConfigError, StudyError
from evomerge.evaluation import ItemScore, Objective, Term
from evomerge.launch import opening
from evomerge.reports import comparison
from evomerge.reports.comparison import Contender
from evomerge.reports.outputs import stored_outputs
from evomerge.store import Store, Trial
from tests.support.landscape import uniform
from tests.support.toy import REPO, in_process, stored_rows, weight_space, zoo_folder

SPACE = weight_space()


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVOMERGE_THREADS", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(REPO)


def invented(name: str, values: Mapping[tuple[str, str], float]) -> Contender:
    """A candidate with given item values."""
    recipe = SPACE.decode([0.1 * len(name)] * len(SPACE.axes))
    trial = Trial(1, 0, 0, "sampled", None, None, (), recipe.id, None, None, {}, {})
    return Contender(name, "s", trial, recipe, {key: ItemScore(*key, value) for key, value in values.items()})


def values(name: str, sizes: Mapping[str, int], p: float = 0.5) -> dict[tuple[str, str], float]:
    return {(task, str(i)): float(uniform(name, task, i) < p) for task, n in sizes.items() for i in range(n)}


# ---- numbers ---------------------------------------------------------------------------------------------


def test_a_task_is_compared_as_a_paired_t_test_does() -> None:
    sizes = {"one": 40, "two": 25}
    a, b, c = (values(name, sizes, p) for name, p in (("a", 0.4), ("b", 0.6), ("c", 0.9)))
    objective = Objective((Term("one", 2.0), Term("two", 1.0, sign=-1)))
    data = comparison.compare([invented("a", a), invented("b", b), invented("c", c)], objective)
    assert [row["task"] for row in data["rows"]] == ["one", "two", "objective"]
    raw = []
    for row in data["rows"][:2]:
        keys = [key for key in a if key[0] == row["task"]]
        assert row["items"] == len(keys)
        assert row["scores"] == pytest.approx([np.mean([x[k] for k in keys]) for x in (a, b, c)])
        for other, found in zip((b, c), row["differences"], strict=True):
            theirs = stats.ttest_rel([other[k] for k in keys], [a[k] for k in keys])
            d = np.array([other[k] - a[k] for k in keys])
            assert found["mean"] == pytest.approx(d.mean())
            assert found["error"] == pytest.approx(d.std(ddof=1) / math.sqrt(len(d)))
            assert found["p"] == pytest.approx(theirs.pvalue)
        raw += [d["p"] for d in row["differences"]]
    whole = data["rows"][2]
    for i, x in enumerate((a, b, c)):
        one, two = (np.mean([v for (t, _), v in x.items() if t == task]) for task in sizes)
        assert whole["scores"][i] == pytest.approx((2 * one - two) / 3)
    assert whole["differences"][0]["mean"] == pytest.approx(whole["scores"][1] - whole["scores"][0])
    raw += [d["p"] for d in whole["differences"]]
    corrected = [d["p_holm"] for row in data["rows"] for d in row["differences"]]
    for p, adjusted in zip(raw, corrected, strict=True):  # Holm by its definition
        below = sorted(q for q in raw if q <= p)
        assert adjusted == pytest.approx(max(min(1.0, (len(raw) - i) * q) for i, q in enumerate(below)))


def test_only_items_that_all_have_count() -> None:
    a = values("a", {"one": 30, "two": 10})
    b = {key: v for key, v in values("b", {"one": 30}).items() if int(key[1]) >= 12}
    data = comparison.compare([invented("a", a), invented("b", b)], Objective((Term("one"), Term("two"))))
    shared = [key for key in a if key in b]
    first, whole = data["rows"]
    assert first["items"] == len(shared) == data["items"] == 18
    assert first["scores"][0] == pytest.approx(np.mean([a[k] for k in shared]))
    assert whole["scores"] == [None, None]  # nothing is known of task two
    with pytest.raises(StudyError, match="b lacks 30; add --score"):
        comparison.common_items([invented("a", values("a", {"one": 30})), invented("b", {})])


def test_a_metric_that_is_no_mean_is_shown_where_it_was_reported_and_has_no_error() -> None:
    from dataclasses import replace

    from evomerge.evaluation import Evaluation

    a, b = (values(name, {"text": 12}) for name in "ab")
    stored = [
        replace(c, evaluations=(Evaluation(c.recipe.id, tuple(c.scores.values()), {"text": metric}, {}),))
        for c, metric in ((invented("a", a), 7.5), (invented("b", b), 6.25))
    ]
    row, whole = comparison.compare(stored, Objective((Term("text", sign=-1, mean=False),)))["rows"]
    assert (row["scores"], row["differences"]) == ([7.5, 6.25], [None])
    assert (whole["scores"], whole["differences"]) == ([-7.5, -6.25], [None])
    part = replace(stored[1], scores={k: s for k, s in stored[1].scores.items() if k[1] != "3"})
    assert comparison.compare([stored[0], part], Objective((Term("text", sign=-1, mean=False),)))["rows"][0][
        "scores"
    ] == [None, None]


def test_items_that_tell_candidates_apart_are_shown_first() -> None:
    a = values("a", {"one": 40, "two": 40})
    b = values("b", {"one": 40, "two": 40})
    contenders = [invented("a", a), invented("b", b)]
    items = comparison.common_items(contenders)
    differing = {key for key in a if a[key] != b[key]}
    chosen = {
        (t, i)
        for t, ids in comparison.most_different_items(contenders, items, len(differing)).items()
        for i in ids
    }
    assert chosen == differing
    few = {(t, i) for t, ids in comparison.most_different_items(contenders, items, 5).items() for i in ids}
    assert len(few) == 5
    assert few < differing
    with pytest.raises(ConfigError, match="from 1"):
        comparison.most_different_items(contenders, items, 0)


# ---- the command line ------------------------------------------------------------------------------------


def stored_values(root: Path, trial: int, role: str) -> dict[tuple[str, str], float]:
    """Item values of a candidate, read from the file by hand."""
    rows = stored_rows(root / "small" / "study.db")
    recipe = next(t["recipe"] for t in rows["trials"] if t["id"] == trial)
    found = {}
    for e in rows["evaluations"]:
        if (e["recipe"], e["role"]) == (recipe, role):
            sets = json.loads(next(s["body"] for s in rows["item_sets"] if s["id"] == e["item_set"]))
            found |= dict(
                zip(
                    [(task, item) for task, ids in sets for item in ids], json.loads(e["scores"]), strict=True
                )
            )
    return found


def test_what_is_printed_is_what_the_rows_say(finished: Path) -> None:
    code, out, err = in_process(
        "compare", "small/best", "small/math", "small/lang", "--root", finished, "--json"
    )
    assert code == 0, err
    data = json.loads(out)
    assert [c["label"] for c in data["candidates"]][1:] == ["math", "lang"]
    best, math_, lang = (stored_values(finished, c["id"], "test") for c in data["candidates"])
    assert len(best) == data["items"] == 32
    for row in data["rows"][:-1]:
        keys = [k for k in best if k[0] == row["task"]]
        for other, found in zip((math_, lang), row["differences"], strict=True):
            assert found["mean"] == pytest.approx(np.mean([other[k] - best[k] for k in keys]))
    code, out, _ = in_process("compare", "small/best", "small/math", "small/lang", "--root", finished)
    assert code == 0
    for row in data["rows"]:
        assert f"{row['scores'][0]:.4f}" in next(
            line for line in out.splitlines() if line.startswith(row["task"])
        )


def test_what_is_missing_is_named_and_scored_only_if_asked(finished: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(finished, tmp_path / "root"))
    with Store.open(root / "small" / "study.db") as store:
        trial = next(
            t
            for t in store.trials()
            if t.origin == "sampled" and len({r for r, _ in store.evaluations(t.recipe_id)}) == 1
        )
        before = stored_rows(store.path)
        code, out, err = in_process("compare", "small/math", f"small/{trial.id}", "--root", root)
        assert (code, out) == (2, "")
        assert (
            "error[E300] there are no items of this role that all were scored on: "
            f"small/{trial.id} lacks 32; add --score" in err
        )
        code, out, err = in_process(
            "compare", "small/math", f"small/{trial.id}", "--root", root, "--score", "--json"
        )
        assert code == 0, err
        opened = opening.open_stored_search(store)
        own = opened.load().evaluate(store.recipe(trial.recipe_id), opened.harness.items("test"))
        after = stored_rows(store.path)
        looks = [row for row in after["evaluations"] if row["role"] == "look"]
        assert [(row["recipe"], row["score"]) for row in looks] == [(trial.recipe_id, None)]
        after["evaluations"] = [row for row in after["evaluations"] if row["role"] != "look"]
        after["item_sets"] = [row for row in after["item_sets"] if row in before["item_sets"]]
        assert after == before, "a look at test items is a row, and nothing else"
    for row in json.loads(out)["rows"][:-1]:
        assert row["scores"][1] == pytest.approx(own.metrics[row["task"]])


def test_outputs_agree_with_their_values(finished: Path) -> None:
    words = ("compare", "small/math", "small/lang", "--root", finished, "--samples", 12)
    code, out, err = in_process(*words, "--json")
    assert code == 0, err
    data = json.loads(out)
    held = [stored_values(finished, c["id"], "test") for c in data["candidates"]]
    assert len(data["samples"]) == 12
    assert {s["task"] for s in data["samples"]} >= {"zoo_arithmetic", "zoo_lookup"}
    for sample in data["samples"]:
        assert held[0][sample["task"], sample["item"]] != held[1][sample["task"], sample["item"]], (
            "those that differ come first"
        )
        assert sample["prompt"].strip()
        for answer, stored in zip(sample["answers"], held, strict=True):
            assert answer["value"] == stored[sample["task"], sample["item"]]
            if answer["options"]:
                assert math.fsum(o["probability"] for o in answer["options"]) == pytest.approx(1)
                (chosen,) = (o for o in answer["options"] if o["chosen"])
                assert chosen["probability"] == max(o["probability"] for o in answer["options"])
                assert chosen["right"] == (answer["value"] == 1)
                assert answer["output"] == chosen["text"]
            elif answer["output"].startswith(
                "log-likelihood"
            ):  # its accuracy is whether the answer is the likeliest text
                assert answer["output"].endswith("the likeliest text") == (answer["value"] == 1)
            else:
                assert (answer["output"].strip() == sample["target"].strip()) == (answer["value"] == 1)
    kept = [stored_outputs(finished / "small", candidate["recipe"]) for candidate in data["candidates"]]
    for sample in data["samples"]:  # for the page of the study
        for answer, outputs in zip(sample["answers"], kept, strict=True):
            assert outputs[sample["task"], sample["item"]]["output"] == answer["output"]
    text = in_process(*words)[1]
    for sample in data["samples"]:
        assert f"--- {sample['task']} {sample['item']}" in text
        assert f"right: {sample['target'].strip()}" in text


def test_studies_are_compared_where_their_tasks_are_the_same(finished: Path, tmp_path: Path) -> None:
    for name in ("small", "other"):
        shutil.copytree(finished / "small", tmp_path / name)
    code, out, err = in_process(
        "compare", "small/math", "other/lang", "--root", tmp_path, "--role", "validation", "--json"
    )
    assert code == 0, err
    same = json.loads(
        in_process(
            "compare", "small/math", "small/lang", "--root", finished, "--role", "validation", "--json"
        )[1]
    )
    assert json.loads(out)["rows"] == same["rows"]
    connection = sqlite3.connect(tmp_path / "other" / "study.db")
    facts = json.loads(connection.execute("SELECT facts FROM study").fetchone()[0])
    facts["tasks"]["zoo_cross"] = "changed"
    connection.execute("UPDATE study SET facts = ?", (json.dumps(facts),))
    connection.commit()
    code, out, err = in_process("compare", "small/math", "other/lang", "--root", tmp_path)
    assert code == 0, err
    assert "note: zoo_cross: items, prompts or settings of other are not those of small" in out
    facts["metrics"]["zoo_cross"] = "f1"
    connection.execute("UPDATE study SET facts = ?", (json.dumps(facts),))
    connection.commit()
    connection.close()
    code, out, err = in_process("compare", "small/math", "other/lang", "--root", tmp_path)
    assert (code, out) == (2, "")
    assert "small and other cannot be compared: they differ in zoo_cross" in err


WRONG: dict[str, tuple[tuple[object, ...], str, str]] = {
    "one candidate": (("small/best",), "E100", "two candidates or more, got 1"),
    "no study": (("small/best", "smal/best"), "E300", "Did you mean 'small'"),
    "no label": (("small/best", "small/maths"), "E300", "'maths' names no candidate"),
    "no task": (("small/best", "small/math", "--task", "zoo_lokup"), "E100", "Did you mean 'zoo_lookup'"),
    "no role": (("small/best", "small/math", "--role", "tests"), "E100", "got 'tests'"),
    "no samples": (("small/best", "small/math", "--samples", 0), "E100", "--samples"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_wish_is_one_line(case: str, finished: Path) -> None:
    words, name, sentence = WRONG[case]
    code, out, err = in_process("compare", *words, "--root", finished)
    assert (code, out) == (2, "")
    assert err.startswith(f"error[{name}] ")
    assert len(err.splitlines()) == 1
    assert sentence in err


def test_a_model_that_has_changed_is_not_asked_again(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "small", tmp_path / "small")
    connection = sqlite3.connect(tmp_path / "small" / "study.db")
    facts: dict[str, Any] = json.loads(connection.execute("SELECT facts FROM study").fetchone()[0])
    facts["parents"]["math"]["path"] = str(zoo_folder() / "lang")
    connection.execute("UPDATE study SET facts = ?", (json.dumps(facts),))
    connection.commit()
    connection.close()
    code, _, err = in_process("compare", "small/best", "small/math", "--samples", 1, "--root", tmp_path)
    assert code == 2
    assert "model 'math'" in err
    assert in_process("compare", "small/best", "small/math", "--root", tmp_path)[0] == 0, (
        "stored scores need no model"
    )
