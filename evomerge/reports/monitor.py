"""Tells listeners of a search that runs: each stored candidate, generation, new best, failure, and the end.

The console, trackers and notifications listen to the same updates. A listener cannot end a search: one that
raises is left out from then on, which costs a warning.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from evomerge._redaction import scrub
from evomerge.reports.tally import Figures, Tally
from evomerge.store import Store, Trial

if TYPE_CHECKING:
    from evomerge.search import Progress

Kind = Literal["progress", "candidate", "best", "failure", "generation", "note", "end"]
State = Literal["done", "paused", "failed"]
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Update:
    """Something that happened in a search.

    Attributes:
        kind: 'candidate', 'best' and 'failure' for a candidate that was stored, a new best among them one
            that failed; 'generation' for one that has ended; 'note' for another line worth reading; 'end' of
            the search; 'progress' for all else, such as scores on validation items.
        stage: What is at work, see `evomerge.search.Progress`.
        done: Candidates of it that are scored.
        total: Candidates that it will have.
        text: A line to be printed, or ''.
        figures: Where the search stands.
        trial: The candidate that was stored, else None.
        generation: The one that has ended, else None.
        state: At the end: what became of the search; '' before.
        results: At the end of a finished search: numbers of its winner by name, such as 'test'.
    """

    kind: Kind
    stage: str
    done: int
    total: int
    text: str
    figures: Figures
    trial: Trial | None = None
    generation: int | None = None
    state: State | Literal[""] = ""
    results: Mapping[str, float] = field(default_factory=dict)


class Listener(Protocol):
    """Takes the updates of a search, in the thread that drives it; must return at once."""

    def update(self, update: Update) -> None:
        """Takes an update.

        Args:
            update: What happened.
        """


class Monitor:
    """Turns the progress of a study into updates.

        monitor = Monitor(study.store, [screen])
        study.show = monitor.show
        study.run()
        monitor.end("done", "")

    Attributes:
        tally: Of the study's trials.
    """

    def __init__(
        self, store: Store, listeners: Sequence[Listener], clock: Callable[[], float] = time.time
    ) -> None:
        """Makes a monitor of what a store holds.

        Args:
            store: Of the study, which has begun.
            listeners: Told of updates, in this order.
            clock: Gives Unix seconds.
        """
        self.tally = Tally.of(store)
        self._listeners = list(listeners)
        self._clock = clock

    def show(self, progress: Progress) -> None:
        """Takes the progress of the study.

        Args:
            progress: What the search has done so far.
        """
        kind = self._kind(progress)
        trial, text = progress.trial, progress.note
        figures = self.tally.figures()
        if kind == "best" and trial is not None:
            text = text or f"candidate {trial.id}, new best {figures.best or ''}"
        ended = progress.generation if kind == "generation" else None
        counts = (progress.done, progress.total)
        self._tell(Update(kind, progress.stage, *counts, text, figures, trial, ended))

    def end(self, state: State, text: str, results: Mapping[str, float] | None = None) -> None:
        """Tells that the search has ended.

        Args:
            state: What became of it.
            text: Why, or what it found, in a sentence.
            results: Of a finished search, see `Update`.
        """
        figures = self.tally.figures()
        counts = (figures.evaluations, figures.budget or 0)
        self._tell(Update("end", state, *counts, text, figures, state=state, results=results or {}))

    def _kind(self, progress: Progress) -> Kind:
        trial = progress.trial
        is_new = trial is None or trial.id not in self.tally
        is_best = trial is not None and is_new and self.tally.add(trial, self._clock())
        if progress.generation is not None:
            return "generation" if is_new else "progress"
        if trial is None:
            return "note" if progress.note else "progress"
        if trial.error is not None:
            return "failure"
        return "best" if is_best and trial.generation > 0 else "candidate"

    def _tell(self, update: Update) -> None:
        for listener in list(self._listeners):
            try:
                listener.update(update)
            except Exception as error:  # whatever a listener does, the search goes on
                self._listeners.remove(listener)
                reason = f"{type(error).__name__}: {scrub(str(error))}"
                log.warning("%s is left out from here on: %s", type(listener).__name__, reason)
