"""The settings of a search -> what listens to it: trackers and notifications."""

from __future__ import annotations

import json

from evomerge._redaction import scrub_data
from evomerge.config import Config
from evomerge.config.listener_schema import NotifyConfig
from evomerge.errors import ConfigError
from evomerge.launch.opening import Allowed
from evomerge.reports.monitor import Listener
from evomerge.reports.notifications import Channel, Command, Email, Notifications, Webhook
from evomerge.reports.tally import Tally
from evomerge.reports.trackers import Place, open_tracking
from evomerge.store import Store


def check_notify(settings: Config, allowed: Allowed) -> None:
    """Refuses commands and addresses of a search file that its user has not allowed.

    Args:
        settings: The settings of the search.
        allowed: What the user permits.

    Raises:
        ConfigError: The settings have notifications, which may run any program, and they are not allowed.
    """
    if settings.notify and not allowed.notify:
        names = ", ".join(dict.fromkeys(channel(notify).name for notify in settings.notify))
        raise ConfigError(
            f"notify runs commands and calls addresses of the search file ({names}); add --allow-notify "
            "if you trust it (allow_notify=True in Python), or leave notify out"
        )


def open_listeners(settings: Config, store: Store) -> list[Listener]:
    """Makes the trackers and notifications of a search; their threads start.

    Args:
        settings: The settings of the search; notifications are allowed.
        store: Of the study, which has begun.

    Returns:
        The listeners, without trackers that are not installed.
    """
    study = store.study()
    name = settings.study if study is None else study.name
    listeners: list[Listener] = []
    first_step = Tally.of(store).figures().evaluations if settings.trackers else 0
    for tracker in settings.trackers:
        place = Place(
            study=name,
            folder=store.path.parent,
            project=tracker.project,
            entity=tracker.entity,
            tags=tracker.tags,
            settings=_plain(settings),
            first_step=first_step,
        )
        tracking = open_tracking(tracker.name, place)
        listeners += [] if tracking is None else [tracking]
    if settings.notify:
        listeners.append(Notifications(name, [(channel(n), n.on) for n in settings.notify]))
    return listeners


def channel(notify: NotifyConfig) -> Channel:
    """Makes what sends messages.

    Args:
        notify: An entry of `notify`.

    Returns:
        The channel.
    """
    if notify.webhook is not None:
        return Webhook(notify.webhook, notify.seconds)
    if notify.email is not None:
        return Email(notify.email, notify.command or ("sendmail", "-t"), notify.seconds)
    assert notify.command is not None
    return Command(notify.command, notify.seconds)


def _plain(settings: Config) -> dict[str, object]:
    """The settings as plain data that may be shown."""
    kept = settings.model_dump(mode="json", exclude={"notify", "trackers"}, exclude_none=True)
    plain: dict[str, object] = scrub_data(json.loads(json.dumps(kept)))
    return plain
