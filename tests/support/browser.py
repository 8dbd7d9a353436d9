"""Chromium, headless, for tests of pages; and the dashboard served from a thread."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

    from evomerge.reports.dashboard.app import Dashboard

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def chromium() -> str | None:
    """The program of the system, None where there is none."""
    return next((path for name in PROGRAMS if (path := shutil.which(name))), None)


@contextmanager
def browser() -> Iterator[Browser]:
    """A headless Chromium; skips the test where the system has none."""
    program = chromium()
    if program is None:
        pytest.skip("no Chromium on this machine; apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield opened
        finally:
            opened.close()


class Watched:
    """A page whose console and requests are kept, and that reaches no other origin."""

    def __init__(self, page: Page, origin: str) -> None:
        """origin: such as http://127.0.0.1:8377, or file:// for a file."""
        self.page, self.errors, self.elsewhere = page, list[str](), list[str]()
        page.on("console", lambda m: self.errors.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

        def decide(route: object) -> None:
            url = route.request.url  # type: ignore[attr-defined]
            if url.startswith((origin, "data:")):
                route.continue_()  # type: ignore[attr-defined]
            else:
                self.elsewhere.append(url)
                route.abort()  # type: ignore[attr-defined]

        page.route("**/*", decide)

    def check(self) -> None:
        """No error in the console, and nothing asked for elsewhere."""
        assert self.errors == []
        assert self.elsewhere == []


@contextmanager
def watched(
    opened: Browser, origin: str, scheme: str = "light", width: int = 1280, height: int = 900
) -> Iterator[Watched]:
    """A new page in a context of its own."""
    context = opened.new_context(
        color_scheme=scheme,  # type: ignore[arg-type]
        viewport={"width": width, "height": height},
    )
    try:
        yield Watched(context.new_page(), origin)
    finally:
        context.close()


@contextmanager
def served(dashboard: Dashboard) -> Iterator[str]:
    """A dashboard on a free port of this machine, in a thread; its address without a slash at the end."""
    import uvicorn

    bound = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        dashboard.app(), log_level="error", lifespan="off", ws="none", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


def port_of(address: str) -> int:
    """The port of an address."""
    port = urlsplit(address).port
    assert port is not None
    return port


def damage(file: Path) -> None:
    """Writes zeros over the middle of a study's file."""
    size = file.stat().st_size
    with file.open("r+b") as handle:
        handle.seek(size // 4 // 4096 * 4096)
        handle.write(bytes(size // 2))
