"""The README is true: its program runs, its table of methods is the registry's, its files exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from evomerge.methods import METHODS
from tests.support.toy import zoo_folder

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text()


def test_table_of_methods_is_the_registry() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \|$", README, re.M)
    expected = []
    for m in METHODS.values():
        params = ", ".join(f"`{p.name}`" for p in m.params)
        expected.append((m.name, m.summary, params, m.paper))
    assert rows == expected


def test_program_runs_and_finds_something() -> None:
    zoo_folder()  # says what to run if the zoo is not there
    program = re.search(r"```python\n(.*?)```", README, re.S)
    assert program is not None
    env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, "-c", program[1]],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        env=env,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(r"test items: (0\.\d+)", done.stdout)
    assert found is not None, done.stdout
    assert float(found[1]) > 0.25  # the uniform start has about .2


def test_every_path_in_the_tree_exists() -> None:
    tree = re.search(r"## What is where\n\n```\n(.*?)```", README, re.S)
    assert tree is not None
    for line in tree[1].splitlines():
        names = re.match(r"(\s*)((?:[\w./]+ ?)+?)(?:  |$)", line)
        assert names is not None, line
        for name in names[2].split():
            folder = REPOSITORY / "evomerge" if names[1] else REPOSITORY
            assert (folder / name).exists(), name


def test_every_verb_is_documented() -> None:
    from evomerge.cli.app import app

    for command in app.registered_commands:
        assert command.callback is not None
        assert f"evomerge {command.callback.__name__}" in README, command.callback.__name__
