"""Folders that cannot be made, names without end, a user without a home: one sentence and its exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.toy import environment, in_process, zoo_folder

PLACES = {
    "a dangling link": "dangling",
    "a loop of links": "loop",
    "under a file": "file/out",
    "a device": "/dev/null",
    "under a device": "/dev/null/out",
    "under /proc": "/proc/out",
    "in a process": "/proc/self/out",
    "under /sys": "/sys/out",
    "300 characters": "o" * 300,
    "5,000 characters": "o" * 5000,
    "a deep name": "/".join(["o" * 200] * 30),
    "the root": "/",
    "nothing": "",
    "half a pair": "\udcff\n",
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mergekit recipe of two small models."""
    models = [{"model": str(zoo_folder() / name), "parameters": {"weight": 0.5}} for name in ("base", "math")]
    file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    file.write_text(json.dumps({"merge_method": "linear", "models": models, "dtype": "float32"}))
    return file


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with odd names."""
    (tmp_path / "dangling").symlink_to(tmp_path / "gone" / "x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(found: tuple[int, str, str]) -> None:
    """One printable line of ours and an exit code that is no bug's."""
    code, _, err = found
    last = err.strip().splitlines()[-1]
    assert code in (2, 3, 75), err
    assert last.startswith("error[E")
    assert "E000" not in err
    assert last.isprintable()


@pytest.mark.parametrize("what", PLACES)
def test_a_folder_that_cannot_be_made_is_one_sentence(what: str, recipe: Path, odd: Path) -> None:
    before = sorted(path.name for path in odd.iterdir())
    found = in_process("merge", recipe, PLACES[what])
    if what != "half a pair":  # a name like any other on Linux
        refused(found)
        assert sorted(path.name for path in odd.iterdir()) == before
    else:
        assert found[0] in (0, 2, 3)
        assert "E000" not in found[2]


@pytest.mark.parametrize("what", PLACES)
@pytest.mark.parametrize("verb", ["status", "show"])
def test_studies_in_an_odd_folder_are_one_sentence_or_none(verb: str, what: str, odd: Path) -> None:
    words = ("x/best",) if verb == "show" else ()
    code, _, err = in_process(verb, *words, "--root", PLACES[what])
    assert code in (0, 2, 3), err
    assert "E000" not in err


SEVERAL = """
import json, sys
from evomerge.cli import main

for words in json.loads(sys.argv[1]):
    sys.argv, code = ["evomerge", *words], 0
    try:
        main()
    except SystemExit as error:
        code = error.code or 0
    print("CODE", code)
"""


def in_one_process(verbs: list[list[str]], odd: Path) -> tuple[list[int], str]:
    """(codes, standard error) of several verbs, one after the other, in a process that starts in `odd`."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", SEVERAL, json.dumps(verbs)],
        cwd=odd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    codes = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("CODE ")]
    assert len(codes) == len(verbs), done.stderr
    return codes, done.stderr


@pytest.mark.parametrize("home", [None, "", "relative", "/dev/null"])
def test_a_user_without_a_home_can_look_and_merge(
    home: str | None, recipe: Path, odd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVOMERGE_NATIVE", "0")  # compiling takes most of the time
    for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    codes, err = in_one_process([["doctor"], ["merge", str(recipe), str(odd / "out")]], odd)
    assert codes[0] in (0, 3), err
    assert codes[1] == 0, err
    assert "E000" not in err


def test_a_working_directory_that_is_gone_is_one_sentence(recipe: Path, odd: Path) -> None:
    program = "import os, sys; os.mkdir('g'); os.chdir('g'); os.rmdir('../g')\n"
    program += "from evomerge.cli import main; main()"
    for words in (["status"], ["doctor"], ["merge", str(recipe), "out"], ["plan", "x"]):
        done = subprocess.run(
            [sys.executable, "-P", "-c", program, *words],
            cwd=odd,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert "E000" not in done.stderr, done.stderr
        assert "Traceback" not in done.stderr, done.stderr
