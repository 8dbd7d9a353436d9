"""Weights & Biases: one run a study; written offline where there is no key or no route to the server."""

from __future__ import annotations

import contextlib
import hashlib
import netrc
import os
import socket
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from evomerge.reports.trackers.tracker import Place

_SERVER = "https://api.wandb.ai"
_SECONDS = 5.0  # that a connection to the server may take


class WeightsAndBiases:
    """Writes a run of the study's name; goes on with it when the study is resumed."""

    def __init__(self) -> None:
        self._run: Any = None

    def start(self, place: Place) -> None:
        """See `Tracker.start`."""
        import wandb

        folder = place.folder / "trackers"
        folder.mkdir(exist_ok=True)
        run_id = hashlib.sha256(str(place.folder.absolute()).encode()).hexdigest()[:16]
        mode = os.environ.get("WANDB_MODE") or ("online" if _is_reachable() else "offline")
        self._run = wandb.init(
            project=place.project,
            entity=place.entity,
            name=place.study,
            id=run_id,
            resume="allow" if mode == "online" else None,
            dir=str(folder),
            tags=list(place.tags),
            config=dict(place.settings),
            mode=mode,
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, disable_code=True, save_code=False
            ),
        )
        self._run.define_metric("*", step_metric="evaluations")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker.log`."""
        self._run.log({"evaluations": step, **values})

    def finish(self, state: str, results: Mapping[str, float], text: str) -> None:
        """See `Tracker.finish`."""
        winner = {f"winner/{name}": value for name, value in results.items()}
        self._run.summary.update({"state": state, "verdict": text, **winner})
        self._run.finish(exit_code=int(state == "failed"))


def _is_reachable() -> bool:
    """Whether there is a key and a route to the server, so that a run can be written there."""
    server = os.environ.get("WANDB_BASE_URL", _SERVER)
    address = urlsplit(server)
    host = address.hostname or ""
    if not (os.environ.get("WANDB_API_KEY") or _is_in_netrc(host)):
        return False
    port = address.port or (80 if address.scheme == "http" else 443)
    with contextlib.suppress(OSError), socket.create_connection((host, port), _SECONDS):
        return True
    return False


def _is_in_netrc(host: str) -> bool:
    """Whether `wandb login` has left a key."""
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc().authenticators(host) is not None
    return False
