"""An export that is verified: made again by mergekit or a stand-in, and scored again from its folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from evomerge import reports
from evomerge.launch.opening import open_stored_search
from evomerge.recipes import Mix, Recipe
from evomerge.store import NewTrial, Store
from tests.support.toy import REPO, in_process

ENVIRONMENT = Path(os.environ.get("EVOMERGE_MERGEKIT_ENV") or REPO / ".venv-mergekit")


def stand_in(folder: Path, script: str) -> Path:
    """An environment whose mergekit is a shell script; "$2" is the folder that it has to make."""
    program = folder / "bin" / "mergekit-yaml"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def model(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The winner with its weights."""
    out = tmp_path_factory.mktemp("winner") / "out"
    code, _, err = in_process("export", "small/best", out, "--weights", "--root", finished)
    assert code == 0, err
    return out


def stored_test_score(finished: Path) -> float:
    with Store.open(finished / "small" / "study.db") as store:
        return float(reports.study_summary(store, check=False)["best"]["test"])


@pytest.mark.skipif(
    not (ENVIRONMENT / "bin" / "mergekit-yaml").is_file(), reason="needs scripts/make_mergekit_env"
)
def test_mergekit_makes_the_winner_again_and_both_score_what_was_stored(
    finished: Path, tmp_path: Path
) -> None:
    code, out, err = in_process(
        "export", "small/best", tmp_path / "out", "--verify", ENVIRONMENT, "--root", finished
    )
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "verify.json").read_text())
    assert found["mergekit"] == "0.1.5"
    assert (found["verdict"], found["items_of"]) == ("verified", "test")
    assert found["tensors"]["unequal"] == 0
    assert found["stored_score"] == pytest.approx(stored_test_score(finished))
    for name in ("exported", "mergekit"):
        assert found["scores"][name]["score"] == pytest.approx(stored_test_score(finished))
        assert found["scores"][name]["items_that_differ"] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Verification" in card
    assert f"0 of {found['tensors']['elements']:,} elements" in card
    assert found["sentence"] in out
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "nothing is left"


def test_a_model_that_is_another_fails_the_verification_and_the_folder_stays(
    model: Path, finished: Path, tmp_path: Path
) -> None:
    """The stand-in makes a model whose weights are all zero but one tensor's."""
    broken = shutil.copytree(model, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    changed = {name: tensor * 0 for name, tensor in tensors.items() if "mlp" in name}
    save_file(tensors | changed, broken / "model.safetensors", metadata={"format": "pt"})
    unequal = sum(int((tensors[name] != 0).sum()) for name in changed)
    environment = stand_in(tmp_path / "env", f'cp -r "{broken}" "$2"')
    code, out, err = in_process(
        "export", "small/best", tmp_path / "out", "--verify", environment, "--root", finished
    )
    assert code == 4
    assert "verify.json says what differs" in err
    found = json.loads((tmp_path / "out" / "verify.json").read_text())
    assert found["verdict"] == "not verified"
    assert found["tensors"]["unequal"] == unequal
    assert found["scores"]["exported"]["verdict"] == "same"
    assert found["scores"]["mergekit"]["items_that_differ"] > 0
    assert "NOT verified" in out
    assert "NOT verified" in (tmp_path / "out" / "README.md").read_text()


def test_what_mergekit_cannot_make_is_said_and_the_folder_is_scored_alone(
    finished: Path, tmp_path: Path
) -> None:
    environment = stand_in(tmp_path / "env", 'echo "ValueError: not today" >&2; exit 1')
    code, _, err = in_process(
        "export", "small/best", tmp_path / "out", "--verify", environment, "--root", finished
    )
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "verify.json").read_text())
    assert "not today" in found["not_made_by_mergekit"]
    assert found["tensors"] is None
    assert list(found["scores"]) == ["exported"]


def test_without_mergekit_nothing_is_written(finished: Path, tmp_path: Path) -> None:
    words = ("export", "small/best", tmp_path / "out")
    code, _, err = in_process(*words, "--verify", tmp_path / "env", "--root", finished)
    assert (code, (tmp_path / "out").exists()) == (3, False)
    assert "scripts/make_mergekit_env" in err
    code, _, err = in_process(*words, tmp_path / "env", "--root", finished)
    assert (code, (tmp_path / "out").exists()) == (2, False)
    assert "--verify" in err


def test_the_leaders_and_the_front_are_exported_in_one_call(finished: Path, tmp_path: Path) -> None:
    with Store.open(finished / "small" / "study.db") as store:
        study = store.study()
        assert study is not None
        assert study.outcome is not None
        best = study.outcome.best["id"]
        front = [row["id"] for row in reports.front(store)["candidates"]]
        finalists = {row["id"]: row["validation"] for row in study.outcome.finalists}
        leaders = [trial.id for trial in reports.leaders(store, 5)]
    assert leaders[0] == best
    assert len(set(leaders)) == 5
    ranks = [finalists[i] for i in leaders if i in finalists]
    assert ranks == sorted(ranks, reverse=True)
    for words, expected in ((["small", "--top", 2], leaders[:2]), (["small/pareto"], front)):
        out = tmp_path / str(len(words))
        code, _, err = in_process("export", words[0], out, *words[1:], "--root", finished)
        assert code == 0, err
        folders = {path.name for path in out.iterdir() if path.is_dir()}
        assert folders == {str(i) for i in expected}
        table = (out / "README.md").read_text()
        for i in expected:
            assert json.loads((out / str(i) / "lineage.json").read_text())["candidate"] == i
            assert f"[{i}]({i}/README.md)" in table


@pytest.mark.parametrize("words", [["small/best", "--top", 2], ["small"], ["small", "--top", 0]])
def test_a_wrong_reference_is_one_line_and_writes_nothing(
    words: list[object], finished: Path, tmp_path: Path
) -> None:
    code, _, err = in_process("export", words[0], tmp_path / "out", *words[1:], "--root", finished)
    assert code == 2
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.sweep
def test_a_route_is_made_again_too_and_no_test_item_is_looked_at_for_it(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a candidate that was scored on search items alone; mergekit's stand-in gives back the export."""
    monkeypatch.setenv("EVOMERGE_THREADS", "1")
    root = shutil.copytree(finished, tmp_path / "root")
    with Store.open(root / "small" / "study.db", write=True) as store:
        opened = open_stored_search(store)
        layers = [("math", 0), ("lang", 1), ("math", 1), ("base", 2)]
        outer = Mix("passthrough", (("base", None),))
        route = Recipe("base", tuple(Mix("passthrough", (layer,)) for layer in layers), outer, outer)
        items = {task: ids[:2] for task, ids in opened.harness.items("search").items()}
        evaluation = opened.load().evaluate(route, items)
        assert evaluation.error is None
        score = opened.objective.reported_score(evaluation)
        trial = store.add_trial(
            NewTrial(
                generation=9, slot=0, origin="sampled", label=None, genome=None, parents=(), recipe=route,
                items=items, evaluation=evaluation, score=score, reported=score,
            )
        )  # fmt: skip
        looks = len(store.usage.test_uses())
    environment = stand_in(tmp_path / "env", f'cp -r "{tmp_path / "out"}" "$2"')
    words = ("export", f"small/{trial.id}", tmp_path / "out", "--weights", "--verify", environment)
    code, _, err = in_process(*words, "--root", root)
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "verify.json").read_text())
    assert (found["verdict"], found["items_of"]) == ("verified", "search")
    assert found["tensors"]["unequal"] == 0
    assert {name: row["items_that_differ"] for name, row in found["scores"].items()} == {
        "exported": 0,
        "mergekit": 0,
    }
    with Store.open(root / "small" / "study.db") as store:
        assert len(store.usage.test_uses()) == looks
