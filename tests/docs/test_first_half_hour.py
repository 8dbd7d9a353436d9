"""The page of the first half hour, line by line, on the built wheel and outside the checkout."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.support.toy import REPO, Prepared, environment, zoo_folder

PAGE = REPO / "docs" / "first-half-hour.md"
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def steps() -> list[tuple[str, list[str]]]:
    """(command, the lines of its output that the page shows) of every console block, in order."""
    found: list[tuple[str, list[str]]] = []
    for block in re.findall(r"^```console\n(.*?)^```", PAGE.read_text(), re.S | re.M):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
    return found


def missing(shown: list[str], output: str) -> list[str]:
    """The lines of the page that do not follow each other in an output; '…' stands for anything."""
    lines = iter(output.splitlines())
    return [
        line
        for line in shown
        if line.strip() != "…"
        and not any(
            re.fullmatch(re.escape(line.rstrip()).replace("…", ".*"), found.rstrip()) for found in lines
        )
    ]


def test_what_the_page_shows_is_what_happens(tmp_path: Path) -> None:
    target, place = tmp_path / "wheel", tmp_path / "place"
    (place / "tasks").mkdir(parents=True)
    (place / "models").mkdir()
    for name in ("base", "math", "lang"):
        (place / "models" / name).symlink_to(zoo_folder() / name)
    rows = [
        {"question": f"Q: {WORDS[n // 10]} plus {WORDS[n % 10]} A:", "answer": str(n // 10 + n % 10)}
        for n in range(100)
    ]
    (place / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    written = steps()
    task = next(lines for command, lines in written if command == "cat tasks/sums.yaml")
    (place / "tasks" / "sums.yaml").write_text("\n".join(task) + "\n")

    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(target)]
    subprocess.run(build, cwd=REPO, check=True, capture_output=True)
    (wheel,) = target.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target / "site")]
    subprocess.run([*install, "--disable-pip-version-check", str(wheel)], check=True, capture_output=True)
    env = environment() | {
        "PYTHONPATH": str(target / "site"),
        "EVOMERGE_THREADS": "1",
        "COLUMNS": "160",
    }
    where = "import evomerge; print(evomerge.__file__)"
    run = subprocess.run(
        [sys.executable, "-c", where], cwd=place, env=env, check=True, capture_output=True, text=True
    )
    assert run.stdout.startswith(str(target / "site")), "the wheel, not the checkout"

    assert len(written) >= 8
    with Prepared(target, cwd=place, env=env) as prepared:
        for command, shown in written:
            program, *words = shlex.split(command)
            if program == "evomerge":
                started = prepared.start(*words)
                code = started.wait()
                output = started.out.read_text() + started.err.read_text()
            else:
                done = subprocess.run(
                    command, shell=True, cwd=place, env=env, capture_output=True, text=True, check=False
                )
                code, output = done.returncode, done.stdout + done.stderr
            assert code == 0, f"{command}: {output}"
            assert missing(shown, output) == [], f"{command}: {output}"
    assert (place / "report.html").stat().st_size < 2_000_000
