"""Code blocks of the README and the documents: they run as they stand, or say what they need."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from evomerge import _yaml
from evomerge.config import loading
from tests.support.toy import REPO, in_process, search_file, zoo_folder

PAGES = sorted([REPO / "README.md", REPO / "CONTRIBUTING.md", *(REPO / "docs").rglob("*.md")])
ELSEWHERE = (
    "python scripts/docs/generate.py",
    "mkdocs build --strict",
)  # tests/docs/test_reference.py runs them
OWN_COMMANDS = ("evomerge", "source")  # what this file runs itself; anything else has to say what it needs


def blocks(language: str) -> list[tuple[str, str]]:
    """(page and line, text) of every block of a language."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.S | re.M):
            line = text[: match.start()].count("\n") + 1
            found.append((f"{page.relative_to(REPO)}:{line}", match[1]))
    return found


def commands() -> Iterator[tuple[str, list[str]]]:
    """(place, words) of every command that claims to run as it stands."""
    for place, text in blocks("sh"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and "# needs:" not in line:
                yield f"{place}: {line.split('#')[0].strip()}", words


COMMANDS = list(commands())


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a checkout after `scripts/demo`, its study with a smaller budget."""
    zoo_folder()
    root = tmp_path_factory.mktemp("checkout")
    for name in ("search_spaces", "evaluators", "scripts"):
        (root / name).symlink_to(REPO / name)
    (root / "results").mkdir()
    (root / "results" / "zoo").symlink_to(REPO / "results" / "zoo")
    code, _, err = in_process("run", search_file(root, "demo", evaluations=8), "--root", root / "results")
    assert code == 0, err
    return root


@pytest.mark.parametrize(("place", "words"), COMMANDS, ids=[place for place, _ in COMMANDS])
def test_a_command_runs(
    place: str, words: list[str], checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if " ".join(words) in ELSEWHERE:
        return
    assert words[0] in OWN_COMMANDS or "=" in words[0], place
    monkeypatch.chdir(checkout)
    monkeypatch.delenv("EVOMERGE_ROOT", raising=False)
    monkeypatch.setenv("EVOMERGE_THREADS", "1")
    if words[0] == "source":
        assert words[1] == ".venv/bin/activate"
        return
    if words[0] == "evomerge":
        code, out, err = in_process(*words[1:])
        assert code == 0, out + err
        return
    program = " ".join(map(shlex.quote, words))
    run = subprocess.run(["bash", "-c", program], cwd=checkout, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-1000:] + run.stderr[-1000:]


PYTHON = [(place, text) for place, text in blocks("python") if "# needs:" not in text]


@pytest.mark.parametrize(("place", "text"), PYTHON, ids=[place for place, _ in PYTHON])
def test_a_program_runs(place: str, text: str, checkout: Path) -> None:
    program = subprocess.run(
        [sys.executable, "-c", text], cwd=checkout, capture_output=True, text=True, check=False
    )
    assert program.returncode == 0, program.stderr[-2000:]


YAML = [(place, text) for place, text in blocks("yaml") if "--8<--" not in text]


@pytest.mark.parametrize(("place", "text"), YAML, ids=[place for place, _ in YAML])
def test_a_yaml_block_is_read(place: str, text: str, tmp_path: Path) -> None:
    documents = [document.data for document in _yaml.parse_all(text, place)]  # where `on` is no truth value
    if any("merge_method" in document for document in documents):
        return  # a merge recipe: tests/recipes reads its kind
    settings = yaml.safe_load((REPO / "search_spaces" / "demo.yaml").read_text())
    known_tasks = [task["task"] for task in settings["tasks"]]
    for key, value in documents[0].items():
        settings[key] = {**settings[key], **value} if isinstance(settings.get(key), dict) else value
    tasks = [*settings["tasks"]]
    named = {str(task.get("task") or task.get("name")) for task in tasks}
    tasks += [{"task": task} for task in settings.get("keep", {}) if task not in named | set(known_tasks)]
    settings["tasks"] = tasks
    file = tmp_path / "search.yaml"
    file.write_text(json.dumps(settings))  # JSON is YAML
    loading.load(str(file))
