"""The command line, from outside: exit codes, one-line errors, signals, and what it ships is what it
scored."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file

from evomerge.checkpoints import Checkpoint
from evomerge.cli.app import app
from evomerge.merging import merge, model_loading
from evomerge.merging.weight_map import WeightMap
from evomerge.store import Store
from tests.support.command_line import Call, one_line
from tests.support.toy import (
    REPO,
    Fork,
    Prepared,
    count_rows,
    evomerge,
    search_file,
    stored_rows,
    zoo_folder,
)

TASKS = ("zoo_arithmetic", "zoo_lookup", "zoo_string", "zoo_cross")


@dataclass(frozen=True)
class Small:
    """A finished small study, and the same one paused by a signal.

    paused: the root of the paused study; stopped: its process' exit code, output and error.
    """

    root: Path
    file: Path
    output: str
    weights: Path
    paused: Path
    stopped: tuple[int, str, str]
    prepared: Prepared


def wait_for(process: Fork, store: Path, count: int) -> None:
    """Returns once the process has stored that many candidates."""
    limit = time.monotonic() + 120
    while count_rows(store, "trials") < count:
        assert process.alive(), process.err.read_text()
        assert time.monotonic() < limit, "nothing is stored"
        time.sleep(0.01)


def positions(task: str) -> dict[str, int]:
    """Item id -> position of the test documents of a shipped task."""
    lines = (REPO / "evaluators" / "zoo" / f"{task}.test.jsonl").read_text().splitlines()
    return {
        hashlib.sha256(json.dumps(json.loads(line), sort_keys=True).encode()).hexdigest()[:16]: i
        for i, line in enumerate(lines)
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Small]:
    root = tmp_path_factory.mktemp("cli")
    file = search_file(root, "small")
    with Prepared(root) as prepared:
        whole = prepared.start("run", file, "--root", root / "results")
        signalled = prepared.start("run", file, "--root", root / "paused")
        wait_for(signalled, root / "paused" / "small" / "study.db", 5)
        os.kill(signalled.pid, signal.SIGTERM)
        stopped = (signalled.wait(), signalled.out.read_text(), signalled.err.read_text())
        assert whole.wait() == 0, whole.err.read_text()
        exported = evomerge("export", "small/best", root / "weights", "--weights", "--root", root / "results")
        assert exported.returncode == 0, exported.stderr
        output = whole.out.read_text()
        yield Small(root / "results", file, output, root / "weights", root / "paused", stopped, prepared)


# ---- help and errors ----------------------------------------


def test_help_lists_every_verb_in_its_group() -> None:
    done = evomerge("--help", timeout=30)
    assert done.returncode == 0
    for verb in (
        "plan",
        "doctor",
        "run",
        "resume",
        "stop",
        "status",
        "show",
        "compare",
        "sensitivity",
        "export",
        "merge",
    ):
        assert re.search(rf"^\W*{verb} +\w", done.stdout, re.M), verb
        assert verb in [c.callback.__name__ for c in app.registered_commands if c.callback]
    for group in ("Plan", "Search", "Inspect", "Export"):
        assert group in done.stdout


def test_errors_from_outside_are_one_line_and_a_code(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("study: x\nmethdo: ties\n")
    done = evomerge("run", bad, "--root", tmp_path / "results", timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    one_line(done.stderr, "E100")
    assert f"{bad}:2:1 unknown key 'methdo'. Did you mean 'method'?" in done.stderr
    assert not (tmp_path / "results").exists()


ERRORS: dict[str, tuple[tuple[str, ...], int, str, str]] = {
    "unknown search file": (("run", "dmeo"), 2, "E100", "Did you mean 'demo'"),
    "unknown study": (("status", "smal"), 2, "E300", "Did you mean 'small'"),
    "unknown study of a candidate": (("show", "smal/best"), 2, "E300", "Did you mean 'small'"),
    "study that is a path": (("status", "../small"), 2, "E300", "not the name of a study"),
    "candidate without a number": (("show", "small"), 2, "E100", "STUDY/ID"),
    "candidate without a study": (("show", "/best"), 2, "E100", "STUDY/ID"),
    "candidate that is not there": (("show", "small/9999"), 2, "E300", "no candidate 9999; it has 1 to"),
    "candidate zero": (("show", "small/0"), 2, "E300", "no candidate 0"),
    "candidate of a word": (("show", "small/last"), 2, "E300", "'last' names no candidate"),
    "candidate beyond numbers": (("show", "small/99999999999999999999"), 2, "E300", "no candidate"),
    "candidate of a strange digit": (("show", "small/²"), 2, "E300", "names no candidate"),
    "resume of nothing": (("resume", "smal"), 2, "E300", "Did you mean 'small'"),
    "resume with a word": (("resume", "small", "--evaluations", "many"), 2, "E100", "'many'"),
    "resume with nothing": (("resume", "small", "--evaluations", "0"), 2, "E100", "--evaluations"),
    "export into a folder that exists": (("export", "small/best", "."), 3, "E200", "exists"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_wrong_reference_is_one_line_and_a_code(case: str, small: Small, call: Call) -> None:
    words, code, name, sentence = ERRORS[case]
    found, out, err = call(*words, "--root", small.root)
    assert found == code, err
    assert out == ""
    one_line(err, name)
    assert sentence in err


@pytest.mark.parametrize(
    "words",
    [["runn"], ["run"], ["run", "x", "--evalutions", "5"], ["run", "x", "--evaluations", "many"], ["show"]],
)
def test_wrong_usage_is_code_two(words: list[str], call: Call) -> None:
    code, out, err = call(*words)
    assert code == 2
    assert out == ""
    one_line(err, "E100")
    assert "--help" in err
    assert "Input should" not in err, "no word of the validation library"


def test_a_recipe_that_is_none_is_code_two(tmp_path: Path, call: Call) -> None:
    for name, text in (
        ("bad.yaml", "merge_method: tise\nmodels: []\n"),
        ("bad.json", "{}"),
        ("none.yaml", None),
    ):
        if text is not None:
            (tmp_path / name).write_text(text)
        code, _, err = call("merge", tmp_path / name, tmp_path / "out")
        assert code == 2, err
        one_line(err, "E100" if text is None else "E110")
    assert not (tmp_path / "out").exists()


def test_a_missing_model_is_code_three_and_leaves_nothing(tmp_path: Path, call: Call) -> None:
    for gone in ("/nowhere/model", "./nowhere", "results/zoo/mth"):
        file = search_file(tmp_path, "trial")
        settings = json.loads(file.read_text())
        settings["models"]["math"] = gone
        file.write_text(json.dumps(settings))
        code, out, err = call("run", file, "--root", tmp_path / "results")
        assert code == 3, err
        assert out == ""
        one_line(err, "E210")
        assert gone in err
        assert not (tmp_path / "results" / "trial").exists(), "a study that never began leaves no trace"


def test_an_unknown_metric_is_code_three(tmp_path: Path, call: Call) -> None:
    file = search_file(tmp_path, "trial")
    settings = json.loads(file.read_text())
    settings["tasks"][1]["metric"] = "ac"
    file.write_text(json.dumps(settings))
    code, _, err = call("run", file, "--root", tmp_path / "results")
    assert code == 3
    one_line(err, "E220")
    assert "no metric 'ac'. Did you mean 'acc'" in err


def test_threads_that_are_no_number_are_code_two(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    for threads in ("two", "-1", "1.5"):
        monkeypatch.setenv("EVOMERGE_THREADS", threads)
        code, _, err = call("run", search_file(tmp_path, "trial"), "--root", tmp_path / "results")
        assert code == 2, err
        one_line(err, "E100")
        assert "EVOMERGE_THREADS" in err


def test_a_search_whose_candidates_all_fail_is_code_five(tmp_path: Path, call: Call) -> None:
    file = search_file(tmp_path, "trial", evaluations=8)
    settings = json.loads(file.read_text())
    settings["space"]["parameters"]["weight"] = {"low": 1e290, "high": 3e290, "start": 2e290}
    settings["tasks"] = settings["tasks"][1:2]
    file.write_text(json.dumps(settings))
    for words in (("run", file), ("resume", "trial")):
        code, out, err = call(*words, "--root", tmp_path / "results")
        assert code == 5, err
        assert out == ""
        last = err.splitlines()[-1]
        assert last.startswith(
            "error[E320] 8 of 8 candidates of generation 1 failed; "
            "the first because: merging gave a value that is not finite"
        )
        assert "Traceback" not in err
    data = json.loads(call("status", "trial", "--root", tmp_path / "results", "--json")[1])
    assert (data["state"], data["failed"], data["evaluations"]) == ("failed", 8, 8)
    assert data["best"]["origin"] in ("parent", "hand")


def test_verbose_shows_where(tmp_path: Path) -> None:
    done = evomerge("-v", "run", tmp_path / "none.yaml", timeout=60)
    assert done.returncode not in (0, 75)
    assert "Traceback" in done.stderr
    assert "ConfigError" in done.stderr


# ---- look ----------------------------------------


PARENTS = ("base", "math", "lang", "string")


def test_run_ends_with_the_verdict_the_table_and_the_next_step(small: Small, call: Call) -> None:
    lines = small.output.splitlines()
    first = lines.index(next(line for line in lines if line.startswith("small: done")))
    assert re.search(r"small/\d+|hand recipe '.*'|parent '.*'", lines[first + 1])
    whole = call("status", "small", "--root", small.root, "--all")[1]
    for label in (*PARENTS, "uniform average", "TIES .5, sum"):
        row = rf"^{re.escape(label)} +\d\.\d\d\d +\d\.\d\d\d +\d\.\d\d\d"
        assert re.search(row, whole, re.M), label
        assert re.search(row, small.output, re.M) or label not in PARENTS, "parents are never folded"
    assert "other parents and hand recipes: evomerge status small --all" in small.output
    assert "other parents" not in whole
    assert f"evomerge export small/best OUT --weights --root {small.root}" in small.output
    report = (small.root / "small" / "report.md").read_text()
    assert report.splitlines()[0] == f"# small: {lines[first + 1]}"


def test_status_says_what_the_store_holds(small: Small, call: Call) -> None:
    code, out, _ = call("status", "small", "--root", small.root, "--json")
    assert code == 0
    data = json.loads(out)
    rows = stored_rows(small.root / "small" / "study.db")
    outcome = json.loads(rows["study"][0]["outcome"])
    assert (
        data["study"],
        data["state"],
        data["seed"],
        data["evaluations"],
        data["generations"],
        data["failed"],
    ) == ("small", "done", 0, 16, 2, 0)
    assert (data["best"], data["references"], data["finalists"]) == (
        outcome["best"],
        outcome["references"],
        outcome["finalists"],
    )
    assert data["store"] == "ok"
    assert sum(data["evaluations_by_role"].values()) == len(rows["evaluations"])
    code, text, _ = call("status", "small", "--root", small.root)
    assert code == 0
    assert text.startswith("small: done, 16 evaluations in 2 generations, 0 failed, seed 0")
    assert f"best: small/{data['best']['id']} ({data['best']['origin']})" in text
    assert f"{data['best']['test']:.3f}" in text


def test_status_of_all_is_a_line_each(small: Small, call: Call, tmp_path: Path) -> None:
    code, out, _ = call("status", "--root", small.root)
    assert code == 0
    assert re.fullmatch(r"small: done, 16 evaluations, best 0\.\d\d\d \(candidate \d+\)\n", out)
    code, out, _ = call("status", "--root", small.root, "--json")
    assert [row["study"] for row in json.loads(out)] == ["small"]
    code, out, _ = call("status", "--root", tmp_path)
    assert (code, out) == (0, "no studies here; start one with: evomerge run CONFIG\n")


def test_a_study_that_cannot_be_read_hides_no_other(small: Small, call: Call, tmp_path: Path) -> None:
    shutil.copytree(small.root / "small", tmp_path / "small")
    for name, content in (("a-begun", None), ("b-broken", b"no database at all, but text" * 99)):
        (tmp_path / name).mkdir()
        if content is None:
            Store.open(tmp_path / name / "study.db", write=True).close()
        else:
            (tmp_path / name / "study.db").write_bytes(content)
    code, out, err = call("status", "--root", tmp_path)
    assert "small: done" in out, err
    assert "b-broken" in out + err
    assert code in (0, 2)


def test_show_says_what_the_store_holds(small: Small, call: Call) -> None:
    with Store.open(small.root / "small" / "study.db") as store:
        everything = store.trials()
        for trial in (
            everything[0],
            everything[-1],
            next(t for t in everything if t.origin == "injected"),
            everything[-3],
        ):
            code, out, _ = call("show", f"small/{trial.id}", "--root", small.root, "--json")
            assert code == 0
            data = json.loads(out)
            assert (data["id"], data["generation"], data["slot"], data["origin"]) == (
                trial.id,
                trial.generation,
                trial.slot,
                trial.origin,
            )
            assert data["recipe_body"] == json.loads(store.recipe(trial.recipe_id).canonical())
            assert data["parents"] == list(trial.parents)
            found = [
                (role, s.score, dict(s.evaluation.metrics)) for role, s in store.evaluations(trial.recipe_id)
            ]
            assert [(s["role"], s["objective"], s["metrics"]) for s in data["scores"]] == found
            code, out, _ = call("show", f"small/{trial.id}", "--root", small.root)
            assert code == 0
            assert out.startswith(f"candidate {trial.id}")
            for role, score, _ in found:
                assert f"{role}: {score:.3f} on" in out
        best = store.study().outcome.best["id"]  # type: ignore[union-attr]
    assert (
        call("show", "small/best", "--root", small.root)[1]
        == call("show", f"small/{best}", "--root", small.root)[1]
    )


NOTES = (
    "generation 1: best 0.625, median 0.5",
    "candidate 9 failed: cannot open [/tmp/model]",
    "candidate 10 failed: shapes [bold] and [3, 4] {differ}",
)


def test_a_search_is_drawn_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a person sees: nothing here may fail because there is a terminal."""
    from evomerge.cli import progress, screen
    from evomerge.search import Progress

    main, side = os.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))  # rows, columns
    written: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # the end of a terminal is an error
            while more := os.read(main, 1 << 16):
                written.append(more)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(side, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "150")
        with screen.open_screen("small") as opened:
            for done in range(1, 4):
                opened.show(Progress("parents and hand recipes", done, 3, 0.25))
            opened.show(Progress("search", 5, 8))
            for note in NOTES:
                opened.show(Progress("search", 9, 16, 0.75, note))
        with progress.bar("tensors") as counter:
            for done in range(1, 4):
                counter(done, 3)
    reader.join()
    os.close(main)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(written).decode())
    for words in ("search", "9/16", "tensors", *NOTES):
        assert words in text


def test_the_root_may_come_from_the_environment(
    small: Small, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVOMERGE_ROOT", str(small.root))
    assert call("status", "small")[1] == call("status", "small", "--root", small.root)[1]


# ---- ship ----------------------------------------


def test_the_exported_weights_are_the_scored_ones(small: Small) -> None:
    zoo = zoo_folder()
    parents = {name: Checkpoint(zoo / name) for name in ("base", "math", "lang", "string")}
    with Store.open(small.root / "small" / "study.db") as store:
        recipe = store.recipe(store.study().outcome.best["recipe"])  # type: ignore[union-attr]
    model = model_loading.load_base(parents["base"], "float32")
    merge.merge_into(recipe, parents, WeightMap(model, parents["base"].tensors))
    shipped = load_file(small.weights / "model.safetensors")
    inside = dict(model.named_parameters())
    assert set(shipped) == set(inside)
    for name, tensor in inside.items():
        assert shipped[name].dtype == tensor.dtype == torch.float32
        assert torch.equal(shipped[name].view(torch.int32), tensor.view(torch.int32)), name
    assert any(not torch.equal(shipped[n], parents["base"].tensor(n)) for n in shipped)


def test_the_exported_folder_tells_its_story(small: Small) -> None:
    assert {
        "README.md",
        "recipe.yaml",
        "recipe.json",
        "lineage.json",
        "config.json",
        "tokenizer.json",
        "model.safetensors",
    } <= {p.name for p in small.weights.iterdir()}
    lineage = json.loads((small.weights / "lineage.json").read_text())
    rows = stored_rows(small.root / "small" / "study.db")
    trial = next(t for t in rows["trials"] if t["id"] == lineage["candidate"])
    assert lineage["recipe"] == trial["recipe"]
    assert lineage["config"] == json.loads(small.file.read_text())
    assert lineage["facts"] == json.loads(rows["study"][0]["facts"])
    card = (small.weights / "README.md").read_text()
    for score in lineage["scores"]:
        if score["role"] != "search":
            assert f"{score['objective']:.4f}" in card
    for name in ("base", "math", "lang", "string"):
        assert f"| {name} | `{zoo_folder() / name}` |" in card
    assert os.stat(small.weights).st_mode & 0o777 == 0o755
    assert not [p for p in small.weights.parent.iterdir() if p.name.startswith(".")], (
        "nothing half made is left"
    )


def test_merge_rebuilds_the_exported_weights_to_the_bit(small: Small, call: Call, tmp_path: Path) -> None:
    code, out, _ = call("export", "small/best", tmp_path / "recipe", "--root", small.root)
    assert code == 0
    assert f"evomerge merge {tmp_path / 'recipe'}/recipe.json OUT" in out
    assert not list((tmp_path / "recipe").glob("*.safetensors"))
    for kind in ("json", "yaml"):
        code, out, err = call("merge", tmp_path / "recipe" / f"recipe.{kind}", tmp_path / kind)
        assert code == 0, err
        ours, theirs = (
            load_file(tmp_path / kind / "model.safetensors"),
            load_file(small.weights / "model.safetensors"),
        )
        assert set(ours) == set(theirs)
        for name in ours:
            assert torch.equal(ours[name].view(torch.int32), theirs[name].view(torch.int32)), (
                f"{kind}: {name}"
            )
        assert (tmp_path / kind / "config.json").read_text() == (small.weights / "config.json").read_text()
    code, _, err = call("merge", tmp_path / "recipe" / "recipe.json", tmp_path / "json")
    assert code == 3
    one_line(err, "E200")


@pytest.mark.parametrize(
    "label",
    [
        "base",
        "uniform average",
        "task arithmetic 0.5",
        "TIES .5, normalized",
        "TIES .5, sum",
        "lang + string at 1",
    ],
)
def test_hand_recipes_can_be_taken_along_too(label: str, small: Small, call: Call, tmp_path: Path) -> None:
    with Store.open(small.root / "small" / "study.db") as store:
        trial = next(t for t in store.trials() if t.label == label)
    assert call("export", f"small/{trial.id}", tmp_path / "all", "--weights", "--root", small.root)[0] == 0
    theirs = load_file(tmp_path / "all" / "model.safetensors")
    code, _, err = call("merge", tmp_path / "all" / "recipe.yaml", tmp_path / "built")
    assert code == 0, err
    ours = load_file(tmp_path / "built" / "model.safetensors")
    assert all(torch.equal(ours[name].view(torch.int32), theirs[name].view(torch.int32)) for name in theirs)
    if label == "base":
        base = load_file(zoo_folder() / "base" / "model.safetensors")
        assert all(torch.equal(theirs[name], base[name]) for name in base)


def test_a_parent_that_has_changed_since_is_named(small: Small, call: Call, tmp_path: Path) -> None:
    shutil.copytree(small.root, tmp_path / "results")
    connection = sqlite3.connect(tmp_path / "results" / "small" / "study.db")
    facts = json.loads(connection.execute("SELECT facts FROM study").fetchone()[0])
    facts["parents"]["math"]["path"] = facts["parents"]["lang"]["path"]  # another model now lies there
    connection.execute("UPDATE study SET facts = ?", (json.dumps(facts, sort_keys=True),))
    connection.commit()
    connection.close()
    code, _, err = call("export", "small/best", tmp_path / "out", "--weights", "--root", tmp_path / "results")
    assert code == 2
    one_line(err, "E300")
    assert "model 'math'" in err
    assert not (tmp_path / "out").exists()


# ---- go on ----------------------------------------


def test_an_existing_study_is_not_overwritten(small: Small, call: Call) -> None:
    before = (small.root / "small" / "study.db").read_bytes()
    code, _, err = call("run", small.file, "--root", small.root)
    assert code == 2
    one_line(err, "E300")
    assert "--resume" in err
    assert (small.root / "small" / "study.db").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s["space"].update(groups=3), ("space.groups was 2, is 3",)),
        (lambda s: s["search"].update(seed=1), ("search.seed was 0, is 1",)),
        (
            lambda s: s["models"].update(math=str(zoo_folder() / "lang")),
            ("parents.math.sha256",),
        ),
        (
            lambda s: s["evaluation"].update(test=9),
            ("evaluation.test was 8, is 9", "items.test.zoo_arithmetic was 8, is 9"),
        ),
    ],
    ids=["space", "seed", "model", "items"],
)
def test_another_search_under_the_same_name_is_refused_field_by_field(
    change: Callable[[dict[str, Any]], object],
    words: tuple[str, ...],
    small: Small,
    call: Call,
    tmp_path: Path,
) -> None:
    settings = json.loads(small.file.read_text())
    change(settings)
    other = tmp_path / "small.yaml"
    other.write_text(json.dumps(settings))
    shutil.copytree(small.root, tmp_path / "results")
    before = stored_rows(tmp_path / "results" / "small" / "study.db", ())
    code, _, err = call("run", other, "--resume", "--root", tmp_path / "results")
    assert code == 2
    one_line(err, "E300")
    for word in words:
        assert word in err
    assert stored_rows(tmp_path / "results" / "small" / "study.db", ()) == before


def test_a_larger_budget_goes_on(small: Small, call: Call, tmp_path: Path) -> None:
    shutil.copytree(small.root, tmp_path / "results")
    code, out, err = call("resume", "small", "--evaluations", "+8", "--root", tmp_path / "results")
    assert code == 0, err
    assert "24 evaluations in 3 generations" in out
    before, after = (
        stored_rows(small.root / "small" / "study.db"),
        stored_rows(tmp_path / "results" / "small" / "study.db"),
    )
    assert after["trials"][: len(before["trials"])] == before["trials"]
    assert json.loads(after["study"][0]["overrides"]) == {"evaluations": 24}
    code, out, _ = call("status", "small", "--root", tmp_path / "results", "--json")
    assert (code, json.loads(out)["evaluations"], json.loads(out)["state"]) == (0, 24, "done")


def test_a_signal_pauses_and_a_second_one_drops_and_the_end_is_the_same(small: Small, call: Call) -> None:
    store = small.paused / "small" / "study.db"
    code, out, err = small.stopped
    assert code == 75, err
    assert "stopping within" in err
    assert err.splitlines()[-1].startswith("error[E500] stopped by a signal")
    assert "Traceback" not in err
    assert out == ""
    assert json.loads(call("status", "small", "--root", small.paused, "--json")[1])["state"] == "paused"
    paused = count_rows(store, "trials")
    assert 5 <= paused < 39

    process = small.prepared.start("resume", "small", "--root", small.paused)
    wait_for(process, store, paused + 1)
    code, _, err = call("run", small.file, "--resume", "--root", small.paused)  # a second driver
    assert code == 2
    one_line(err, "E300")
    assert f"pid {process.pid}" in err
    assert json.loads(call("status", "small", "--root", small.paused, "--json")[1])["state"] == "running"
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGTERM)  # a second signal, while the first is being obeyed
    code, err = process.wait(), process.err.read_text()
    assert code == 75, err
    assert "what was in flight is dropped" in err
    assert "Traceback" not in err
    assert json.loads(call("status", "small", "--root", small.paused, "--json")[1])["state"] == "paused"
    assert count_rows(store, "trials") > paused

    code, _, err = call("run", small.file, "--resume", "--root", small.paused)
    assert code == 0, err
    assert stored_rows(store) == stored_rows(small.root / "small" / "study.db")


def test_a_stop_ends_with_zero_and_the_end_is_the_same(small: Small, call: Call, tmp_path: Path) -> None:
    store = tmp_path / "small" / "study.db"
    process = small.prepared.start("run", small.file, "--root", tmp_path)
    wait_for(process, store, 3)
    code, out, err = call("stop", "small", "--wait", "--root", tmp_path)
    assert code == 0, err
    assert out.splitlines()[0].endswith(f"pid {process.pid})")
    assert out.splitlines()[1] == "small: paused"
    assert process.wait() == 0, process.err.read_text()
    assert "Traceback" not in process.err.read_text()
    assert 3 <= count_rows(store, "trials") < count_rows(small.root / "small" / "study.db", "trials")
    data = json.loads(call("status", "small", "--root", tmp_path, "--json")[1])
    assert (data["state"], data["stop_requested"], data["driver"]["alive"], data["store"]) == (
        "paused",
        False,
        False,
        "ok",
    )
    code, _, err = call("resume", "small", "--root", tmp_path)
    assert code == 0, err
    assert stored_rows(store) == stored_rows(small.root / "small" / "study.db")
    data = json.loads(call("status", "small", "--root", tmp_path, "--json")[1])
    assert sum(w["jobs"] for w in data["workers"]) == count_rows(store, "evaluations"), (
        "each was evaluated once"
    )
    assert len(data["runs"]) == 2


def test_a_full_disk_pauses_the_search_and_the_end_is_the_same(
    small: Small, call: Call, tmp_path: Path
) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, check=False
    ).returncode:
        pytest.skip("may not mount a file system here")
    try:
        code, out, err = call("run", small.file, "--root", place)
        assert code == 75, err
        assert out == ""
        one_line(err, "E520")
        assert "make room" in err
        stored = count_rows(place / "small" / "study.db", "trials")
        assert 0 < stored < count_rows(small.root / "small" / "study.db", "trials")
        subprocess.run(["mount", "-o", "remount,size=50m", place], check=True)  # room is made
        code, _, err = call("run", small.file, "--resume", "--root", place)
        assert code == 0, err
        assert stored_rows(place / "small" / "study.db") == stored_rows(small.root / "small" / "study.db")
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.parametrize(
    ("number", "codes"),
    [(signal.SIGTERM, (75,)), (signal.SIGUSR1, (75,)), (signal.SIGINT, (75, 130))],
    ids=lambda v: getattr(v, "name", ""),
)
def test_a_signal_while_models_are_opened_asks_to_be_started_again(
    number: int, codes: tuple[int, ...], small: Small, call: Call, tmp_path: Path
) -> None:
    process = small.prepared.start("run", small.file, "--root", tmp_path)
    limit = time.monotonic() + 60
    while "opening models and tasks" not in process.err.read_text():
        assert time.monotonic() < limit
        time.sleep(0.01)
    time.sleep(0.2)
    os.kill(process.pid, number)
    assert process.wait() in codes, process.err.read_text()
    assert "Traceback" not in process.err.read_text()
    assert process.out.read_text() == ""
    assert call("status", "--root", tmp_path)[:2] == (
        0,
        "no studies here; start one with: evomerge run CONFIG\n",
    )


def test_lm_eval_itself_gives_the_exported_folder_the_stored_scores(small: Small, call: Call) -> None:
    """By what its command line calls; docs/test_code_blocks.py runs that."""
    with Store.open(small.root / "small" / "study.db") as store:
        best = store.study().outcome.best  # type: ignore[union-attr]
        scored = dict(store.evaluations(best["recipe"]))["test"].evaluation
    samples = {
        task: sorted(positions(task)[s.item] for s in scored.items if s.task == task) for task in TASKS
    }
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(small.weights), "dtype": "float32"},
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(REPO / "evaluators" / "zoo"), include_defaults=False),
        device="cpu",
        batch_size=64,
        samples=samples,
        bootstrap_iters=0,
    )["results"]
    shown = json.loads(call("show", "small/best", "--root", small.root, "--json")[1])
    stored = next(s["metrics"] for s in shown["scores"] if s["role"] == "test")
    assert {name for name in stored if ":" not in name} == set(TASKS)
    for task in TASKS:
        metric = {k.partition(",")[0]: v for k, v in results[task].items()}[
            "acc" if task in ("zoo_lookup", "zoo_string") else "exact_match"
        ]
        assert metric == pytest.approx(stored[task], abs=1e-6), task
