"""Tells a person what became of a search: by a command, a webhook, or an email that a command sends.

At the end, or at a new best that is ahead by more than its error. A notification that fails costs a warning;
none holds a secret that is recognised as one.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.message import EmailMessage
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from evomerge._escaping import one_line
from evomerge._redaction import scrub
from evomerge.reports.monitor import Update
from evomerge.reports.tally import Standing

log = logging.getLogger(__name__)
Event = Literal["done", "paused", "failed", "best"]
EVENTS: tuple[Event, ...] = ("done", "paused", "failed", "best")
"""What a person is told of: the three ends, and a new best that is ahead by more than its error."""
_LONGEST = 1000  # characters of a message
_AT_END = 5.0  # seconds beyond their own time that notifications are waited for


@dataclass(frozen=True, slots=True)
class Message:
    """What is sent.

    Attributes:
        event: What happened.
        study: Name of the study.
        text: One line.
        numbers: Evaluations, scores and the like by name.
    """

    event: Event
    study: str
    text: str
    numbers: Mapping[str, Any]

    def to_json(self) -> str:
        """The message as JSON; `text` and `content` are what chat services show."""
        data = {"event": self.event, "study": self.study, "text": self.text, "content": self.text}
        return json.dumps({**data, **self.numbers})


class Channel(Protocol):
    """Sends messages. May raise or take as long as its `seconds`."""

    @property
    def seconds(self) -> float:
        """That sending may take."""

    @property
    def name(self) -> str:
        """What it is called in a warning, without anything secret."""

    def send(self, message: Message) -> None:
        """Sends a message.

        Args:
            message: What to send.
        """


@dataclass(frozen=True, slots=True)
class Command:
    """Runs a program: the message is JSON on its standard input and `$EVOMERGE_MESSAGE`.

    Attributes:
        words: Program and arguments; no shell reads them.
        seconds: That it may take.
    """

    words: tuple[str, ...]
    seconds: float = 30.0

    @property
    def name(self) -> str:
        """See `Channel.name`."""
        return f"command {self.words[0]}"

    def send(self, message: Message) -> None:
        """See `Channel.send`."""
        _run(self.words, message.to_json(), message, self.seconds)


@dataclass(frozen=True, slots=True)
class Email:
    """Hands a message with its headers to a program that sends it.

    Attributes:
        to: Address.
        words: Program and arguments that take an email on standard input.
        seconds: That it may take.
    """

    to: str
    words: tuple[str, ...] = ("sendmail", "-t")
    seconds: float = 30.0

    @property
    def name(self) -> str:
        """See `Channel.name`."""
        return f"email by {self.words[0]}"

    def send(self, message: Message) -> None:
        """See `Channel.send`."""
        email = EmailMessage()
        email["To"] = self.to
        email["Subject"] = f"evomerge {message.study}: {message.event}"
        lines = [f"{name}: {value}" for name, value in message.numbers.items()]
        email.set_content("\n".join([message.text, "", *lines, ""]))
        _run(self.words, email.as_string(), message, self.seconds)


@dataclass(frozen=True, slots=True)
class Webhook:
    """Posts a message as JSON.

    Attributes:
        address: URL, or '$NAME' of an environment variable that holds it.
        seconds: That it may take.
    """

    address: str
    seconds: float = 30.0

    @property
    def name(self) -> str:
        """See `Channel.name`; the path of a chat's address is a secret."""
        if self.address.startswith("$"):
            return f"webhook {self.address}"
        return f"webhook of {urlsplit(self.address).hostname}"

    def send(self, message: Message) -> None:
        """See `Channel.send`."""
        address = os.environ.get(self.address[1:], "") if self.address.startswith("$") else self.address
        if urlsplit(address).scheme not in ("http", "https"):
            raise ValueError("its address begins with neither https:// nor http://, or is not set")
        request = urllib.request.Request(
            address,
            data=message.to_json().encode(),
            headers={"Content-Type": "application/json", "User-Agent": "evomerge"},
        )
        try:
            with urllib.request.urlopen(request, timeout=self.seconds) as answer:
                answer.read(1)
        except urllib.error.HTTPError as error:
            raise OSError(f"it answered {error.code} {error.reason}") from None


def _run(words: Sequence[str], text: str, message: Message, seconds: float) -> None:
    """Runs a program with a text on its standard input; raises OSError where it fails."""
    told = {
        "EVOMERGE_EVENT": message.event,
        "EVOMERGE_STUDY": message.study,
        "EVOMERGE_MESSAGE": message.text,
    }
    done = subprocess.run(
        list(words),
        input=text,
        text=True,
        env={**os.environ, **told},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        timeout=seconds,
        check=False,
    )
    if done.returncode:
        raise OSError(f"exit code {done.returncode} {done.stderr.strip()[-300:]}")


class Notifications:
    """A listener that sends messages by several channels, each in a thread of its own."""

    def __init__(self, study: str, channels: Sequence[tuple[Channel, Sequence[Event]]]) -> None:
        """Sends nothing yet.

        Args:
            study: Name of the study.
            channels: (channel, events that it is told of) pairs.
        """
        self._study, self._channels = study, channels
        self._last: Standing | None = None
        self._threads: list[tuple[threading.Thread, float]] = []

    def update(self, update: Update) -> None:
        """See `evomerge.reports.monitor.Listener`."""
        if update.kind == "end" and update.state:
            self._send(update.state, update)
            for thread, seconds in self._threads:
                thread.join(seconds + _AT_END)
        elif self._is_ahead(update):
            self._send("best", update)

    def _is_ahead(self, update: Update) -> bool:
        """Whether there is a new best that is ahead of the last one told of by more than its error.

        Parents and hand recipes, and what is stored when a run begins, are where this starts from.
        """
        best, last = update.figures.best, self._last
        if best is None:
            return False
        if last is None or update.figures.generation == 0:
            self._last = best
            return False
        if update.kind != "best" or best.score - last.score <= (best.error or 0.0):
            return False
        self._last = best
        return True

    def _send(self, event: Event, update: Update) -> None:
        message = _message(self._study, event, update)
        for channel, events in self._channels:
            if event in events:
                thread = threading.Thread(target=_deliver, args=(channel, message), daemon=True)
                thread.start()
                self._threads.append((thread, channel.seconds))


def _deliver(channel: Channel, message: Message) -> None:
    """Sends a message; a failure is a warning."""
    try:
        channel.send(message)
    except Exception as error:  # whatever a program or a server does, the search goes on
        reason = str(error)
        if isinstance(error, subprocess.TimeoutExpired):
            reason = f"it took longer than {channel.seconds:g} s"
        log.warning("not told of '%s' by %s: %s", message.event, channel.name, one_line(scrub(reason))[:300])


def _message(study: str, event: Event, update: Update) -> Message:
    figures = update.figures
    count = f"{figures.evaluations}" + ("" if figures.budget is None else f" of {figures.budget}")
    parts = [f"{count} evaluations", *([f"{figures.failed} failed"] if figures.failed else [])]
    if figures.best is not None:
        error = "" if figures.best.error is None else f" ± {figures.best.error:.3f}"
        parts.insert(0, f"best so far {figures.best.score:.3f}{error}")
    if event == "best":
        start = f"new best {update.trial.id}" if update.trial is not None else "new best"
    else:
        start = f"{event}: {update.text}" if update.text else event
    text = one_line(scrub(f"{study}: {start} ({', '.join(parts)})"))[:_LONGEST]
    numbers: dict[str, Any] = {
        "evaluations": figures.evaluations,
        "budget": figures.budget,
        "failed": figures.failed,
        "best": None if figures.best is None else figures.best.score,
        "lead": figures.lead,
        "gpu_hours": figures.gpu_hours,
        "cost": figures.cost,
        **{f"winner_{name}": value for name, value in update.results.items()},
    }
    return Message(event, study, text, numbers)
