"""Who is told of a search, when, and that nothing of it can end the search or gives a secret away."""

from __future__ import annotations

import email
import json
import logging
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from evomerge import _yaml
from evomerge.config import loading
from evomerge.errors import ConfigError
from evomerge.launch.facts import _comparable
from evomerge.launch.listeners import channel, check_notify
from evomerge.launch.opening import Allowed
from evomerge.reports.notifications import EVENTS, Channel, Command, Email, Message, Notifications, Webhook
from evomerge.reports.tally import Standing
from tests.support.screens import ENDED, FIGURES

WRITE = "import os, sys; open(sys.argv[1], 'a').write(os.environ['EVOMERGE_EVENT'] + ' ' + sys.stdin.read())"
TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"


class Keeping:
    """A channel that keeps what it is told."""

    name, seconds = "keeping", 1.0

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def send(self, message: Message) -> None:
        self.messages.append(message)


def end(state: Any, text: str = "") -> Any:
    return replace(ENDED, kind="end", state=state, text=text, results={"test": 0.6})


def best(number: int, score: float, generation: int = 3) -> Any:
    figures = replace(FIGURES, best=Standing(number, None, "sampled", score, 0.02), generation=generation)
    return replace(ENDED, kind="best", figures=figures)


def told(*updates: Any, of: Any = EVENTS) -> list[Message]:
    keeping = Keeping()
    notifications = Notifications("demo", [(keeping, of)])
    for update in updates:
        notifications.update(update)
    for thread, _ in notifications._threads:
        thread.join()
    return keeping.messages


def test_a_new_best_is_told_where_it_is_ahead_by_more_than_its_error() -> None:
    scores = {1: 0.50, 2: 0.55, 60: 0.56, 70: 0.569, 80: 0.58, 90: 0.59}
    updates = [best(number, score, 0 if number < 60 else 3) for number, score in scores.items()]
    messages = told(*updates)
    assert [message.numbers["best"] for message in messages] == [0.58]
    assert told(best(80, 0.9)) == [], "what is stored when a run begins is what a best is compared with"


@pytest.mark.parametrize("state", ["done", "paused", "failed"])
def test_every_end_is_told_in_a_line_without_secrets(state: str) -> None:
    (message,) = told(end(state, f"the model {TOKEN} cannot be read\nor so"))
    assert message.event == state
    assert message.text.startswith(f"demo: {state}: the model *** cannot be read")
    assert "84 of 500 evaluations" in message.text
    assert "\n" not in message.text
    assert TOKEN not in message.to_json()
    assert json.loads(message.to_json())["winner_test"] == 0.6
    assert told(end(state), of=("best",)) == []


def test_a_command_takes_the_message_as_json(tmp_path: Path) -> None:
    file = tmp_path / "told"
    message = Message("done", "demo", "it is done", {"best": 0.5})
    Command((sys.executable, "-c", WRITE, str(file))).send(message)
    event, _, text = file.read_text().partition(" ")
    assert event == "done"
    assert json.loads(text) == {
        "event": "done",
        "study": "demo",
        "text": "it is done",
        "content": "it is done",
        "best": 0.5,
    }


def test_an_email_is_handed_to_its_command(tmp_path: Path) -> None:
    file = tmp_path / "told"
    command = (sys.executable, "-c", WRITE, str(file))
    Email("me@example.org", command).send(Message("failed", "demo", "it has failed", {"best": 0.5}))
    parsed = email.message_from_string(file.read_text().partition(" ")[2])
    assert (parsed["To"], parsed["Subject"]) == ("me@example.org", "evomerge demo: failed")
    assert "it has failed" in str(parsed.get_payload())


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(address of a server that keeps what is posted, what was posted)."""
    posted: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(404 if self.path == "/gone" else 204)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            return

    serving = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=serving.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{serving.server_port}", posted
    serving.shutdown()
    serving.server_close()


def test_a_webhook_is_posted_to_an_address_or_a_variable(
    server: tuple[str, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, posted = server
    monkeypatch.setenv("MY_HOOK", f"{address}/secret-path")
    message = Message("done", "demo", "it is done", {})
    Webhook("$MY_HOOK").send(message)
    Webhook(address).send(message)
    assert [row["text"] for row in posted] == ["it is done"] * 2
    assert Webhook("$MY_HOOK").name == "webhook $MY_HOOK"
    assert "secret-path" not in Webhook(f"{address}/secret-path").name


def test_a_channel_that_fails_or_hangs_costs_a_warning(
    server: tuple[str, list[dict[str, Any]]], caplog: pytest.LogCaptureFixture
) -> None:
    hanging = (sys.executable, "-c", "import threading; threading.Event().wait(600)")
    channels: list[Channel] = [
        Command(("/no/such/program",)),
        Command((sys.executable, "-c", f"import sys; sys.exit('{TOKEN} is refused')")),
        Command(hanging, seconds=0.2),
        Webhook(f"{server[0]}/gone"),
        Webhook("$NO_SUCH_VARIABLE"),
    ]
    with caplog.at_level(logging.WARNING):
        Notifications("demo", [(one, EVENTS) for one in channels]).update(end("done"))
    assert len(caplog.records) == len(channels)
    for words in ("/no/such/program", "longer than 0.2 s", "it answered 404", "webhook $NO_SUCH_VARIABLE"):
        assert words in caplog.text
    assert TOKEN not in caplog.text


def settings(**changes: Any) -> Any:
    text = "study: x\nmodels: {a: /a, b: /b}\nbase: a\nmethod: linear\ntasks: [{task: arc_easy}]\n"
    text += "".join(f"{key}: {json.dumps(value)}\n" for key, value in changes.items())
    return loading.check(_yaml.parse(text, "x"))


def test_a_search_file_runs_no_command_that_its_user_has_not_allowed() -> None:
    found = settings(notify=[{"command": ["rm", "-rf", "/"]}, {"webhook": "https://chat.example/T/secret"}])
    refused = r"command rm, webhook of chat.example\); add --allow-notify"
    with pytest.raises(ConfigError, match=refused) as error:
        check_notify(found, Allowed())
    assert "secret" not in str(error.value)
    check_notify(found, Allowed(notify=True))
    check_notify(settings(), Allowed())


def test_trackers_and_notifications_may_change_between_start_and_resume() -> None:
    trackers = ["tensorboard", {"name": "wandb", "project": "p"}]
    changed = settings(trackers=trackers, notify=[{"email": "a@b.c"}])
    assert _comparable(settings()) == _comparable(changed)
    assert [tracker.name for tracker in changed.trackers] == ["tensorboard", "wandb"]
    assert channel(changed.notify[0]) == Email("a@b.c")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trackers": ["tensorbord"]}, "should be one of tensorboard, wandb, trackio, mlflow"),
        ({"notify": [{"on": ["done"]}]}, "give a command, a webhook or an email"),
        ({"notify": [{"webhook": "ftp://x"}]}, "webhook"),
        ({"notify": [{"webhook": "https://x", "command": ["a"]}]}, "give a command, a webhook or an email"),
        ({"notify": [{"email": "a@b, c@d"}]}, "email"),
    ],
)
def test_a_wrong_tracker_or_notification_is_one_sentence(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settings(**changes)
