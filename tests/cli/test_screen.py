"""What a search and `status --watch` show on a terminal of 80 columns and 24 lines, and without one."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import struct
import termios
from dataclasses import replace
from pathlib import Path

import pyte
import pytest

from evomerge.cli.screen import open_screen
from evomerge.search import Progress
from evomerge.store import Store, StudyFacts
from tests.support.screens import ENDED
from tests.support.stored import SPACE, add_many
from tests.support.toy import REPO, command, environment

COLUMNS, LINES = 80, 24
UNSET = ("COLUMNS", "LINES", "NO_COLOR")
IMPORTS = """
import os
from dataclasses import replace
from evomerge.cli.screen import open_screen
from types import SimpleNamespace
from tests.support.screens import ENDED
"""


def drawn(body: str, environment_: dict[str, str]) -> tuple[bytes, pyte.HistoryScreen]:
    """What a program wrote to a terminal, and the terminal at its end."""
    program = f"{IMPORTS}with open_screen('demo') as screen:\n{body}"
    words = [command("status")[0], "-c", program]
    return on_terminal(words, environment_)


def on_terminal(
    words: list[str], variables: dict[str, str], until: bytes | None = None
) -> tuple[bytes, pyte.HistoryScreen]:
    """Runs a program on a terminal; ends it by Ctrl-C once a text was written, if one is given."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(REPO)
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        known = {name: value for name, value in environment().items() if name not in UNSET}
        os.execve(words[0], words, {**known, "TERM": "xterm-256color", **variables})
    written, is_ended = b"", until is None
    while True:
        try:
            ready = select.select([terminal], [], [], 60)[0]
            part = os.read(terminal, 65536) if ready else b""
        except OSError:  # the other side is closed
            break
        if not part:
            break
        written += part
        if not is_ended and until is not None and written.count(until) > 1:
            os.kill(pid, signal.SIGINT)
            is_ended = True
    os.waitpid(pid, 0)
    os.close(terminal)
    return written, shown(written)


def shown(written: bytes) -> pyte.HistoryScreen:
    screen = pyte.HistoryScreen(COLUMNS, LINES, history=10_000)
    pyte.ByteStream(screen).feed(written)
    return screen


def lines(screen: pyte.HistoryScreen) -> list[str]:
    return [line.rstrip() for line in screen.display if line.strip()]


BODY = """
    opening = {"stage": "opening models and tasks", "done": 0, "total": 1, "note": "parents: on the device"}
    screen.show(SimpleNamespace(**opening))
    for done in range(84):
        screen.update(replace(ENDED, kind="candidate", done=done, text=""))
    screen.update(ENDED)
    screen.update(replace(ENDED, kind="failure", text="candidate 83 failed: it is broken"))
    screen._live.refresh()
    os.write(1, b"\\x1b[?2004h")
"""


@pytest.mark.parametrize("variables", [{}, {"NO_COLOR": "1"}])
def test_one_block_holds_bar_best_pace_cost_and_failures(variables: dict[str, str]) -> None:
    written, _ = drawn(BODY, variables)
    before_end = shown(written.partition(b"\x1b[?2004h")[0])
    assert lines(before_end)[:2] == ["parents: on the device", "candidate 83 failed: it is broken"]
    head, best, pace, used, last = lines(before_end)[2:]
    assert head.startswith("demo: search ━")
    assert head.endswith(" 84/500")
    assert best == "best  0.612 ± 0.021 (candidate 57), +0.034 ± 0.028 over the best parent 'math'"
    assert pace == "pace  1,200 candidates an hour, about 21 min to the end"
    assert used == "used  2.12 GPU hours, cost 4.25 of 16; 3 failed"
    assert last == "last  generation 5: best 0.601, median 0.550"
    assert len(before_end.history.top) == 0, "nothing scrolls away"
    coloured = [code for code in written.split(b"\x1b[") if code[:3] in (b"38;", b"31m", b"32m", b"35m")]
    assert bool(coloured) is not bool(variables)


def test_without_a_terminal_there_is_a_line_a_generation_a_new_best_and_a_failure(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with open_screen("demo") as screen:
        for done in range(1, 80):
            screen.update(replace(ENDED, kind="candidate", done=done, text=""))
        screen.update(replace(ENDED, kind="best", done=80, text="candidate 57, new best 0.612 ± 0.021"))
        screen.update(replace(ENDED, kind="failure", done=81, text="candidate 58 failed: it is broken"))
        screen.update(ENDED)
        screen.update(replace(ENDED, kind="end", state="done"))
    captured = capsys.readouterr()
    assert captured.out == ""
    texts = [line[20:] for line in captured.err.splitlines()]
    assert texts == [
        "demo: opening models and tasks",
        "demo: search 1/500 best so far 0.612 ± 0.021",
        "demo: search 80/500 candidate 57, new best 0.612 ± 0.021",
        "demo: search 81/500 candidate 58 failed: it is broken",
        "demo: search 84/500 generation 5: best 0.601, median 0.550; "
        "best so far 0.612 ± 0.021, about 21 min left",
    ]


def test_quiet_shows_nothing_and_json_a_line_an_event(capsys: pytest.CaptureFixture[str]) -> None:
    with open_screen("demo", quiet=True) as screen:
        screen.show(Progress("opening models and tasks", 0, 1, None, "a note"))
        screen.update(ENDED)
    assert capsys.readouterr() == ("", "")
    with open_screen("demo", as_json=True) as screen:
        screen.update(replace(ENDED, kind="progress"))
        print("what a library prints")
        screen.update(ENDED)
        screen.update(replace(ENDED, kind="end", state="done", results={"test": 0.6}))
    captured = capsys.readouterr()
    assert captured.err == "what a library prints\n"
    first, second = map(json.loads, captured.out.splitlines())
    assert (first["event"], first["figures"]["best"]["score"], first["study"]) == (
        "generation",
        0.612,
        "demo",
    )
    assert (second["event"], second["state"], second["results"]) == ("end", "done", {"test": 0.6})


def test_watch_never_showed_state_and_best_and_flooded_the_scrollback(tmp_path: Path) -> None:
    folder = tmp_path / "trial"
    folder.mkdir()
    with Store.open(folder / "study.db", write=True) as store:
        store.begin("trial", 3, "study: trial\n", {}, StudyFacts(limits={"budgets": [90]}))
        add_many(store, 60)  # each is a row, were they all shown
        assert len(SPACE.axes) > 1
    words = command("status", "trial", "--root", tmp_path, "--watch", "--every", "0.1")
    written, _ = on_terminal(list(map(str, words)), {}, until=b"60 of 90")
    entered, left = written.index(b"\x1b[?1049h"), written.index(b"\x1b[?1049l")
    watched = shown(written[entered:left])
    assert len(watched.history.top) == 0
    assert any("trial: interrupted, 60 of 90 evaluations" in line for line in lines(watched))
    assert any(line.startswith("best so far: 0.500") for line in lines(watched))
    after = written[left:].decode()
    assert "trial: interrupted" in after, "the last state stays on the terminal"
    assert len(after.splitlines()) < 10
    assert b"Traceback" not in written
