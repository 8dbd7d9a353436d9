"""What the verbs show: progress while a search runs, tables afterwards, signals."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evomerge.stages import Progress
    from evomerge.study import Study


class Search:
    """The screen of a running search: a bar per stage on a terminal, else one dated line per event."""

    def __init__(self, name: str) -> None:
        self._name, self._stage, self._said = name, "", 0.0
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Search:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

            left = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            columns = (*left, TimeRemainingColumn(), TextColumn("{task.fields[best]}"))
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task("opening models and tasks", total=None, best="")
        else:
            self._line("opening models and tasks")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, progress: Progress) -> None:
        """Draws a progress report."""
        best = f"best {progress.best:.3f}" if progress.best is not None else ""
        if self._bar:
            if progress.stage != self._stage:
                self._bar.update(self._task, visible=False)
                self._task = self._bar.add_task(progress.stage, total=progress.total, best=best)
            self._bar.update(self._task, completed=progress.done, total=progress.total, best=best)
            if progress.note:
                self._bar.console.print(progress.note, highlight=False, markup=False)
        elif progress.note or progress.stage != self._stage or time.monotonic() - self._said > 15:
            self._line(f"{progress.stage} {progress.done}/{progress.total} {progress.note or best}".rstrip())
        self._stage = progress.stage

    def _line(self, text: str) -> None:
        self._said = time.monotonic()
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self._name}: {text}", file=sys.stderr, flush=True)


@contextmanager
def opening() -> Iterator[None]:
    """Until the search runs, SIGTERM and SIGUSR1 leave at once with 75, SIGINT with 130: nothing is begun, start it again.

    An exception that a handler raises can be lost in a callback of a library; the signal is remembered and answered at the end.
    """
    asked: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        if not asked:
            print("stopped while opening; start it again", file=sys.stderr, flush=True)
        asked.append(130 if number == signal.SIGINT else 75)
        raise SystemExit(asked[0])

    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
        if asked:
            raise SystemExit(asked[0])
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def signals(study: Study) -> Iterator[None]:
    """The first SIGINT, SIGTERM or SIGUSR1 lets what is in flight end within the grace, the second drops it, the third kills."""

    def handler(number: int, frame: FrameType | None) -> None:
        study.dispatch.stop += 1
        if study.dispatch.stop > 2:
            os._exit(130)
        if study.dispatch.stop == 2:
            raise KeyboardInterrupt
        print(f"stopping within {study.dispatch.grace:g} s, when what is in flight has ended; once more to drop that", file=sys.stderr, flush=True)

    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def bar(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A counter on a terminal; silent elsewhere. Yields what to call with the count and the total."""
    from tqdm import tqdm

    with tqdm(unit=f" {unit}", disable=not sys.stderr.isatty(), leave=False) as counter:

        def show(done: int, total: int) -> None:
            counter.total = total
            counter.update(done - counter.n)

        yield show


def studies(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per study."""
    if not rows:
        return "no studies here; start one with: evomerge run CONFIG"
    return "\n".join(f"{r['study']}: {r['state']}, {r['evaluations']} evaluations, best {_best(r)}" for r in rows)


def study(data: Mapping[str, Any]) -> str:
    """Header line and the table of the best, parents and hand recipes."""
    lines = [
        f"{data['study']}: {data['state']}, seed {data['seed']}, {data['evaluations']} evaluations in {data['generations']} generations, "
        f"{data['failed']} failed, store {data['store']}",
        "",
        f"{'':34}{'search':>8}{'valid.':>8}{'test':>8}   lead of the best",
    ]
    rows = list(data["references"])
    if data["best"]:
        best = data["best"]
        rows.insert(0, best | {"label": f"best: {data['study']}/{best['id']} ({best['origin']})"})
    for row in rows:
        numbers = "".join(f"{_number(row.get(key)):>8}" for key in ("search", "validation", "test"))
        lead = f"   {row['lead']:+.3f} ± {row['lead_error']:.3f}" if "lead" in row else ""
        lines.append(f"{row['label'] or row['id']!s:34.34}{numbers}{lead}" + (f"   {row['error']}" if row.get("error") else ""))
    return "\n".join([*lines, *_said(data)])


def candidate(data: Mapping[str, Any]) -> str:
    """One candidate's story and scores."""
    name = f" '{data['label']}'" if data["label"] else ""
    lines = [f"candidate {data['id']}{name}: {data['origin']}, generation {data['generation']}, slot {data['slot']}, recipe {data['recipe']}"]
    if data["partial"]:
        fate = (
            f"dropped by the race after rung {data['dropped']}" if data["dropped"] else "sure to be among the best of its generation before its end"
        )
        lines.append(f"{fate}, partial: {data['partial']}")
    if data["costs"]:
        lines.append(f"{data['costs']['layers']:.0f} layers, {data['costs']['parameters']:,.0f} parameters")
    if data["route"]:
        lines.append(f"route: {data['route']}")
    if data["violation"]:
        lines.append(f"breaks the search's keep by {data['violation']:.4f}")
    if data["estimate"]:
        mean, error = data["estimate"]
        lines.append(f"estimate over all search items: {mean:.3f} ± {error:.3f}")
    if data["parents"]:
        lines.append(f"recombined from: {', '.join(str(p) for p in data['parents'])}")
    for score in data["scores"]:
        if score.get("error"):
            lines.append(f"{score['role']}: failed: {score['error']}")
        else:
            metrics = ", ".join(f"{task} {value:.4f}" for task, value in score["metrics"].items() if ":" not in task)
            seconds = sum(score["seconds"].values())
            lines.append(f"{score['role']}: {_number(score['objective'])} on {score['items']} items ({metrics}) in {seconds:.2f} s")
            soft = ", ".join(f"{name.replace(':', ' ')} {value:.4f}" for name, value in score["metrics"].items() if ":" in name)
            lines += [f"  right answers: {soft}"] if soft else []
    return "\n".join(lines)


def _said(data: Mapping[str, Any]) -> list[str]:
    """What follows the table: the winner's interval and luck, skills lost, the front, partial scores."""
    from evomerge.report import lost

    best, lines = data["best"] or {}, [""]
    if "test_interval" in best:
        low, high = best["test_interval"]
        luck = f"; search - test {best['luck']:+.3f} ± {best['luck_error']:.3f} (luck of selection)" if "luck" in best else ""
        lines.append(f"test score of the best, 95 % interval: {low:.3f} to {high:.3f}{luck}")
    if kept := lost(data["retention"]):
        lines.append(f"retention: {kept}")
    if len(data["pareto"]) > 1:
        lines.append(f"trade-offs: {len(data['pareto'])} candidates on the front, see {data['study']}/pareto")
    if data["partial"]:
        lines.append(f"{data['partial']} candidates were scored on a part of the items, {data['dropped']} of them dropped by races")
    return lines if len(lines) > 1 else []


def _best(row: Mapping[str, Any]) -> str:
    best = row["best"]
    return "none yet" if best is None else f"{_number(best.get('test', best.get('search')))} (candidate {best['id']})"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
