"""What the quick verbs do not import: help, status and show start at once because nothing heavy is on their
way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from evomerge.evaluation import Evaluation, ItemScore
from evomerge.store import NewTrial, Store, StudyFacts
from tests.support.toy import REPO, environment, weight_space

HEAVY = {
    "cma",
    "cmaes",
    "datasets",
    "huggingface_hub",
    "lm_eval",
    "markdown_it",
    "matplotlib",
    "numpy",
    "pandas",
    "ray",
    "rich",
    "safetensors",
    "scipy",
    "torch",
    "tqdm",
    "transformers",
    "yaml",
}
PROGRAM = """
import sys
sys.argv[0] = "evomerge"
from evomerge.cli import main
try:
    main()
finally:
    print(*sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""


def imported(*words: object) -> tuple[str, set[str]]:
    """(what a verb printed, the packages that were imported for it)."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, words)],
        cwd=REPO,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    packages = set(done.stderr.splitlines()[-1].split())
    assert "typer" in packages, "the list of imports was read"
    return done.stdout, packages


@pytest.mark.parametrize(
    "words", [["--help"], ["plan", "--help"], ["run", "--help"], ["status", "--help"], ["init", "--help"]]
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    shown, packages = imported(*words)
    assert "Usage" in shown
    assert packages & HEAVY == set()


def test_the_version_is_said_at_once() -> None:
    shown, packages = imported("--version")
    assert shown.startswith("evomerge ")
    assert packages & HEAVY == set()


@pytest.mark.parametrize(
    "words", [["status"], ["status", "trial"], ["status", "trial", "--json"], ["show", "trial/1"]]
)
def test_reading_a_study_imports_nothing_heavy(words: list[str], tmp_path: Path) -> None:
    space = weight_space()
    recipe = space.decode(space.start)
    (tmp_path / "trial").mkdir()
    with Store.open(tmp_path / "trial" / "study.db", write=True) as store:
        store.begin("trial", 3, "study: trial\n", {}, StudyFacts())
        store.add_trial(
            NewTrial(
                generation=1,
                slot=0,
                origin="sampled",
                label=None,
                genome=space.start,
                parents=(),
                recipe=recipe,
                items={"first": ("a",)},
                evaluation=Evaluation(recipe.id, (ItemScore("first", "a", 0.5),), {"first": 0.5}, {}),
                score=0.5,
            )
        )
    shown, packages = imported(*words, "--root", tmp_path)
    assert "trial" in shown or "candidate 1" in shown
    assert packages & HEAVY == set()
