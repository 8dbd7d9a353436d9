"""The blocks of a search file that say who is told of the search: trackers and notifications."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from evomerge.config.block import Strict
from evomerge.config.value_types import Name, Positive, TrackerName
from evomerge.reports.notifications import EVENTS


class TrackerConfig(Strict):
    """A tracker that the search is written to; written as text alone, the text is its name."""

    name: TrackerName
    """Which: tensorboard, wandb, trackio or mlflow."""
    project: Name = "evomerge"
    """Project of wandb and trackio, experiment of mlflow."""
    entity: Name | None = None
    """User or team of wandb; the user's own unless given."""
    tags: tuple[Name, ...] = ()
    """Tags of the run; of trackio the first is its group."""


class NotifyConfig(Strict):
    """Who is told of the search: a command, a webhook, or an email that a command sends."""

    command: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Program and arguments, which no shell reads; takes the message as JSON, for an email the email."""
    webhook: str | None = Field(default=None, pattern=r"^(https?://\S+|\$[A-Za-z_][A-Za-z0-9_]*)$")
    """Address that the message is posted to as JSON, or $NAME of an environment variable that holds it."""
    email: str | None = Field(default=None, pattern=r"^[^@\s,<>]+@[^@\s,<>]+$")
    """Address of an email, which the command sends; `sendmail -t` unless one is given."""
    on: tuple[Literal["done", "paused", "failed", "best"], ...] = Field(default=EVENTS, min_length=1)
    """What is told: the ends of the search, and a new best that is ahead by more than its error."""
    seconds: Positive = 30.0
    """How long it may take."""

    @model_validator(mode="after")
    def _one_way(self) -> NotifyConfig:
        if (self.webhook is None) == (self.command is None and self.email is None):
            raise ValueError("give a command, a webhook or an email")
        return self
