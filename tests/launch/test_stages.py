"""The registry of stage kinds: names, openers, the order of stages, and the seeds of their optimizers."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
from pydantic import ValidationError

from evomerge.config.schema import StageConfig
from evomerge.config.stage_kinds import STAGES, StageKind, check_sequence
from evomerge.launch.stages import number_seeds
from tests.support.toy import REPO, environment

ALLOWED = {
    ("weights",),
    ("routes",),
    ("weights", "routes"),
    ("routes", "weights"),
    ("weights", "routes", "weights"),
}


@pytest.mark.parametrize("kind", STAGES.values(), ids=list(STAGES))
def test_a_kind_of_stage_has_an_opener_and_a_line_about_it(kind: StageKind) -> None:
    assert STAGES[kind.name] is kind
    assert callable(kind.load_opener())
    assert kind.summary
    assert "\n" not in kind.summary
    assert kind.at_most >= 1
    assert StageConfig(stage=kind.name).stage == kind.name


def test_a_stage_of_no_kind_is_refused_with_the_kinds_that_there_are() -> None:
    with pytest.raises(ValidationError, match="should be one of weights, learned, routes"):
        StageConfig(stage="wieghts")


def test_the_sequences_of_stages_are_those_that_they_were() -> None:
    sequences = [s for n in range(1, 5) for s in itertools.product(("weights", "routes"), repeat=n)]
    assert {s for s in sequences if not check_sequence(s)} == ALLOWED


@pytest.mark.parametrize(
    ("kinds", "numbers"),
    [
        (("weights",), [0]),
        (("routes",), [0]),
        (("weights", "routes"), [0, 1]),
        (("routes", "weights"), [0, 2]),
        (("weights", "routes", "weights"), [0, 1, 2]),
    ],
)
def test_stored_searches_keep_their_seeds(kinds: tuple[str, ...], numbers: list[int]) -> None:
    assert number_seeds(kinds) == numbers


def test_no_two_stages_share_a_seed() -> None:
    for n in range(1, 6):
        for kinds in itertools.product(("weights", "routes", "another"), repeat=n):
            numbers = number_seeds(kinds)
            assert len(set(numbers)) == n
            assert numbers == sorted(numbers)


def test_the_registry_is_read_without_torch() -> None:
    program = "import sys, evomerge.config.stage_kinds; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPO,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "torch" not in done.stdout.split()
