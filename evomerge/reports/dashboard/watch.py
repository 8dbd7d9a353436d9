"""Studies read again when their files have changed, once for all who look."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from evomerge.errors import EvomergeError
from evomerge.recipes import Recipe
from evomerge.reports.outputs import OUTPUTS
from evomerge.reports.page import digest, render_part
from evomerge.reports.panels import (
    Overview,
    Panel,
    Snapshot,
    TableQuery,
    candidates,
    overview,
    pair,
    study_panels,
)
from evomerge.store import Store, TrialReader
from evomerge.store.stop_request import STOP

_OLD = 5.0  # seconds after which a running study is read again without a change: its driver may be gone
_VERY_OLD = 60.0  # the same of one that does not run
_REST = 2.0  # a study is read again no sooner than after so many times what reading it took
_RECIPES = 4000  # that are kept from one reading to the next

Marker = tuple[tuple[int, int, int], ...]
"""What changes with a study's files."""


@dataclass(frozen=True)
class View:
    """A study at one moment.

    Attributes:
        marker: Of the files that were read.
        overview: The head of its page, None where it cannot be read.
        panels: Its panels.
        error: Why it cannot be read, '' where it can.
        is_empty: Whether its file holds no study yet.
    """

    marker: Marker
    overview: Overview | None = None
    panels: tuple[Panel, ...] = ()
    error: str = ""
    is_empty: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether nothing more is to be read."""
        return bool(self.panels) or self.overview is None

    @cached_property
    def head(self) -> dict[str, str]:
        """HTML, digest and title of the head."""
        assert self.overview is not None
        html = render_part("overview", self.overview)
        title = f"{self.overview.study} · {self.overview.state} · evomerge"
        return {"html": html, "digest": digest(html), "title": title}

    @cached_property
    def messages(self) -> dict[str, PanelMessage]:
        """Panel -> what a page that is open has to be told of it."""
        return {panel.id: PanelMessage.of(panel) for panel in self.panels}


@dataclass(frozen=True, slots=True)
class PanelMessage:
    """A panel as it is sent to a page.

    Attributes:
        digest: Of all that is sent.
        table_digest: Of its tables.
        text: JSON with id, title, tables as HTML, and chart.
    """

    digest: str
    table_digest: str
    text: str

    @classmethod
    def of(cls, panel: Panel) -> PanelMessage:
        """Writes a panel.

        Args:
            panel: A panel.

        Returns:
            The message.
        """
        html = "" if panel.id == "candidates" else render_part("tables", panel, True)
        named = {"id": panel.id, "title": panel.title, "digest": digest(html), "html": html}
        text = json.dumps({**named, "chart": panel.chart}, separators=(",", ":"))
        return cls(digest(text), named["digest"], text)


@dataclass
class StudyWatch:
    """One study; `view` is what it holds now::

        watch = StudyWatch(Path("results/demo/study.db"))
        print(watch.view().overview.verdict)

    Attributes:
        path: The study's file.
        clock: Seconds, for the tests.
    """

    path: Path
    clock: Callable[[], float] = time.monotonic
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _view: View | None = None
    _snapshot: Snapshot | None = None
    _recipes: dict[str, Recipe] = field(default_factory=dict)
    _reader: TrialReader = field(default_factory=TrialReader)
    _read_at: float = 0.0
    _took: float = 0.0
    _pairs: dict[tuple[str, str], Panel] = field(default_factory=dict)

    def head(self) -> View:
        """Reads what the head of the page needs, where nothing newer is known; much faster than `view`.

        Returns:
            What the study holds, without panels unless they are known.
        """
        with self._lock:
            if self._view is not None and self._is_fresh(self._view):
                return self._view
            return self._read(panels=False)

    def view(self) -> View:
        """Reads the study where its files have changed since, or its last reading is old.

        Returns:
            What it holds, or why it cannot be read.
        """
        with self._lock:
            view = self._view
            if view is None or not view.is_whole or not self._is_fresh(view):
                view = self._read(panels=True)
            return view

    def _is_fresh(self, view: View) -> bool:
        now = self.clock()
        if now - self._read_at < _REST * self._took:
            return True
        is_running = view.overview is not None and view.overview.state == "running"
        return view.marker == self._marker() and now - self._read_at < (_OLD if is_running else _VERY_OLD)

    def table(self, address: Mapping[str, str]) -> Panel | None:
        """The candidates as an address wants them sorted and filtered.

        Args:
            address: Parameters of the address.

        Returns:
            The panel, None where the study cannot be read.
        """
        with self._lock:
            return None if self._snapshot is None else candidates(self._snapshot, TableQuery.of(address))

    def pair(self, one: str, other: str) -> Panel | None:
        """Two candidates compared.

        Args:
            one: The first, '' for the best.
            other: The second, '' for the best parent.

        Returns:
            The panel, None where the study cannot be read.
        """
        with self._lock:
            if self._snapshot is None:
                return None
            if (one, other) not in self._pairs:
                try:
                    with Store.open(self.path) as store, store.reading():
                        self._snapshot.store = store
                        self._pairs[one, other] = pair(self._snapshot, one, other)
                except EvomergeError as error:
                    title = "Two candidates compared"
                    return Panel("pair", title, "", note=str(error))
            return self._pairs[one, other]

    def _read(self, panels: bool) -> View:
        """Reads the study anew, or the panels to a head that was just read."""
        began, known = self.clock(), self._view
        if panels and known is not None and known.overview and not known.is_whole and self._is_fresh(known):
            marker, snapshot = known.marker, self._snapshot
        else:
            marker, snapshot = self._marker(), None
            self._pairs = {}
        self._view = self._try(marker, snapshot, panels)
        self._read_at = self.clock()
        self._took = self._read_at - began
        return self._view

    def _try(self, marker: Marker, snapshot: Snapshot | None, panels: bool) -> View:
        self._snapshot = None
        try:
            with Store.open(self.path) as store, store.reading():
                if store.study() is None:
                    return View(marker, is_empty=True)
                if len(self._recipes) > _RECIPES:
                    self._recipes = {}
                if snapshot is None:
                    snapshot = Snapshot(store, self._recipes, self._reader)
                snapshot.store = store
                head = overview(snapshot)
                made = tuple(study_panels(snapshot)) if panels else ()
        except EvomergeError as error:
            return View(marker, error=str(error))
        self._snapshot = snapshot
        return View(marker, head, made)

    def _marker(self) -> Marker:
        names = (self.path.name, f"{self.path.name}-wal", STOP, OUTPUTS)
        return tuple(_stamp(self.path.with_name(name)) for name in names)


def _stamp(file: Path) -> tuple[int, int, int]:
    try:
        status = file.stat()
    except OSError:
        return 0, 0, 0
    return status.st_ino, status.st_size, status.st_mtime_ns


def change(
    view: View, sent: dict[str, str], other: Panel | None = None, *, head_only: bool = False
) -> str | None:
    """Writes what has changed since a page was last told.

    Args:
        view: The study now.
        sent: Part -> digest of what the page has; brought up to date.
        other: The comparison that this page asked for, in place of the usual one.
        head_only: Say nothing of panels.

    Returns:
        JSON of the parts that differ, None where none does.
    """
    if view.overview is None:
        return None
    parts = []
    if sent.get("overview") != view.head["digest"]:
        sent["overview"] = view.head["digest"]
        parts.append(f'"overview":{json.dumps(view.head)}')
    messages: dict[str, Any] = {} if head_only else dict(view.messages)
    if other is not None:
        messages["pair"] = PanelMessage.of(other)
    changed = [name for name, message in messages.items() if sent.get(name) != message.digest]
    for name in changed:
        sent[name] = messages[name].digest
    if changed:
        parts.append(f'"panels":[{",".join(messages[name].text for name in changed)}]')
    return f"{{{','.join(parts)}}}" if parts else None
