"""Whether the Hugging Face Hub can be reached, asked once and briefly: else its libraries work offline.

Without this a node without internet waits for a minute of retries for each repository and data set, though
they lie in its cache.
"""

from __future__ import annotations

import functools
import importlib
import os
import socket
import sys
import threading
from typing import Any
from urllib.parse import urlsplit

SECONDS = 5.0
"""How long an answer is waited for."""
_VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
_PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
_ON = ("1", "on", "yes", "true")


def work_offline_where_needed() -> str | None:
    """Puts huggingface_hub and datasets into their offline mode where the Hub cannot be reached.

    Behind a proxy nothing is asked: only the libraries know how to use it.

    Returns:
        Why the Hub cannot be reached, such as 'no answer within 5 s'; None where it can be, where it is not
        known, and where the user has chosen the offline mode.
    """
    if is_offline_by_choice() or any(os.environ.get(name) for name in _PROXIES):
        return None
    reason = _unreachable(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if reason is not None:
        _set_offline()
    return reason


def is_offline_by_choice() -> bool:
    """Whether the environment asks for the offline mode."""
    return any(os.environ.get(name, "").lower() in _ON for name in _VARIABLES)


@functools.cache
def _unreachable(endpoint: str) -> str | None:
    """Why a connection to an address cannot be made; None where it can."""
    address = urlsplit(endpoint)
    port = address.port or (80 if address.scheme == "http" else 443)
    reasons: list[str | None] = []

    def connect() -> None:
        try:
            socket.create_connection((address.hostname or "", port), timeout=SECONDS).close()
            reasons.append(None)
        except OSError as error:
            reasons.append(error.strerror or str(error) or type(error).__name__)

    asking = threading.Thread(target=connect, daemon=True)  # a resolver has no limit of its own
    asking.start()
    asking.join(SECONDS)
    return reasons[0] if reasons else f"no answer within {SECONDS:g} s"


def _set_offline() -> None:
    """The offline mode of the libraries as they are loaded, which read their variables once."""
    hub: Any = importlib.import_module("huggingface_hub.constants")
    hub.HF_HUB_OFFLINE = True
    data: Any = sys.modules.get("datasets.config")
    if data is not None:
        data.HF_HUB_OFFLINE = data.HF_DATASETS_OFFLINE = True
