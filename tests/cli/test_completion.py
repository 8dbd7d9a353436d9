"""What a shell offers after the Tab key, asked as bash asks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer._completion_classes import BashComplete

from evomerge.cli.app import app
from evomerge.evaluation import Evaluation, ItemScore
from evomerge.store import NewTrial, Store, StudyFacts
from tests.support.toy import environment, weight_space


@pytest.fixture
def root(tmp_path: Path) -> Path:
    space = weight_space()
    recipe = space.decode(space.start)
    for name in ("trial", "tried", "other"):
        (tmp_path / name).mkdir()
        with Store.open(tmp_path / name / "study.db", write=True) as store:
            store.begin(name, 3, f"study: {name}\n", {}, StudyFacts())
            for slot, label in enumerate(("math", "uniform average")):
                store.add_trial(
                    NewTrial(
                        generation=0,
                        slot=slot,
                        origin="parent" if slot == 0 else "hand",
                        label=label,
                        genome=None,
                        parents=(),
                        recipe=recipe,
                        items={"first": ("a",)},
                        evaluation=Evaluation(recipe.id, (ItemScore("first", "a", 0.5),), {"first": 0.5}, {}),
                        score=0.5,
                    )
                )
    (tmp_path / "empty").mkdir()
    return tmp_path


def offered(*words: object) -> list[str]:
    """The words that bash is given for the last of these."""
    *before, incomplete = map(str, words)
    shell = BashComplete(typer.main.get_command(app), {}, "evomerge", "_EVOMERGE_COMPLETE")
    return [str(item.value) for item in shell.get_completions(before, incomplete)]


def test_the_program_answers_the_shell(root: Path) -> None:
    line = f"evomerge status --root {root} tri"
    asked = {"_EVOMERGE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": "4"}
    program = Path(sys.executable).with_name("evomerge")
    done = subprocess.run(
        [program], env=environment() | asked, capture_output=True, text=True, timeout=120, check=True
    )
    assert sorted(done.stdout.split()) == ["trial", "tried"]


@pytest.mark.parametrize("verb", ["status", "stop", "resume", "report"])
def test_names_of_studies_are_offered(verb: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(offered(verb, "--root", root, "tri")) == ["trial", "tried"]
    monkeypatch.setenv("EVOMERGE_ROOT", str(root))
    assert offered(verb, "o") == ["other"]


@pytest.mark.parametrize("verb", ["show", "compare", "sensitivity", "export"])
def test_candidates_are_offered(verb: str, root: Path) -> None:
    assert sorted(offered(verb, "--root", root, "tri")) == ["trial/best", "tried/best"]
    found = offered(verb, "--root", root, "trial/")
    assert found == ["trial/best", "trial/pareto", "trial/math"]
    assert offered(verb, "--root", root, "nobody/m") == []


@pytest.mark.parametrize("verb", ["plan", "run", "fetch"])
def test_search_files_are_offered(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demand.yaml").touch()
    (tmp_path / "demand.txt").touch()
    (tmp_path / "deme").mkdir()
    monkeypatch.chdir(tmp_path)
    found = offered(verb, "dem")
    assert {"demo", "demo-routes", "demand.yaml", "deme/"} <= set(found)
    assert "demand.txt" not in found


def test_a_root_that_is_not_there_offers_nothing(tmp_path: Path) -> None:
    assert offered("status", "--root", tmp_path / "none", "t") == []
