"""Measures the dashboard on a large study: first paint, and a commit until the page shows it.

    python scripts/benchmarks/dashboard.py [--candidates 5000] [--runs 7] [--out results/dashboard.md]

Serves a study that is made through the store's own API, from a process of its own, to headless Chromium.
First paint is Chromium's own first-contentful-paint; 'cold' is a study that the server has not read yet. An
update is the time from the return of a commit until the number of candidates in the page is the new one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.benchmarks.machine import stamp
from tests.support.browser import browser, watched
from tests.support.large_study import StudyMaker, StudyPlan, making

if TYPE_CHECKING:
    from playwright.sync_api import Browser

PAINT = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
SERVER = """
import sys
from pathlib import Path
from evomerge.reports.dashboard.server import Listening, serve
serve(Path(sys.argv[1]), Listening(port=0, token="benchmarks"), lambda line: print(line, flush=True))
"""


@contextmanager
def server(root: Path) -> Iterator[str]:
    """The address of a dashboard in a process of its own."""
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(root)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        yield line[line.index("http://") :].partition("/?token")[0]
    finally:
        process.terminate()
        process.wait()


def first_paints(opened: Browser, address: str, names: Sequence[str]) -> list[float]:
    """Milliseconds until the numbers of each study are painted."""
    times = []
    for name in names:
        with watched(opened, address) as tab:
            tab.page.goto(f"{address}/study/{name}/", wait_until="commit")
            tab.page.locator(".tiles").wait_for()
            tab.page.wait_for_function(f"() => {PAINT} > 0")
            times.append(float(tab.page.evaluate(PAINT)))
            tab.page.locator("body[data-updates]").wait_for()
            tab.check()
    return times


def updates(opened: Browser, address: str, maker: StudyMaker, runs: int) -> list[float]:
    """Milliseconds from a commit to the number in the page."""
    times = []
    with watched(opened, address) as tab:
        tab.page.goto(f"{address}/study/{maker.plan.name}/")
        tab.page.locator("body[data-updates]").wait_for()
        for _ in range(runs):
            time.sleep(3)
            maker.add_candidates(1)
            began = time.perf_counter()
            tab.page.locator(".tiles", has_text=f"{maker.made:,} /").wait_for()
            times.append(1000 * (time.perf_counter() - began))
        tab.check()
    return times


def row(name: str, times: Sequence[float], wanted: str) -> str:
    return f"| {name} | {statistics.median(times):,.0f} | {min(times):,.0f} | {max(times):,.0f} | {wanted} |"


def measure(candidates: int, runs: int) -> list[str]:
    """The rows of the table."""
    with tempfile.TemporaryDirectory() as folder, browser() as opened:
        root, plan = Path(folder), StudyPlan(candidates=candidates, budget=candidates + 1000, name="large")
        with making(root, plan) as maker:
            maker.add_candidates(candidates)
            copies = [f"copy-{number}" for number in range(runs)]
            for copy in copies:
                (root / copy).mkdir()
                shutil.copy(maker.store.backup(root / "copy.db"), root / copy / "study.db")
            with server(root) as address:
                first_paints(opened, address, copies[:1])  # imports and templates, once a server
                cold = first_paints(opened, address, copies[1:])
                warm = first_paints(opened, address, copies[1:])
                changed = updates(opened, address, maker, runs)
    return [
        row("first paint, a study not read yet", cold, "< 1000"),
        row("first paint, read before", warm, "< 1000"),
        row("a commit until the page shows it", changed, "< 1000"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--candidates", type=int, default=5000)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = measure(given.candidates, given.runs)
    load = os.getloadavg()[0]
    lines = [
        "# The dashboard on a large study",
        "",
        f"By `scripts/benchmarks/dashboard.py`: a study of {given.candidates:,} candidates, the server in a",
        f"process of its own, headless Chromium on the same machine; load {load:.1f}.",
        f"{stamp('starlette', 'uvicorn')}.",
        "",
        "| | median ms | least | most | wanted |",
        "| --- | ---: | ---: | ---: | ---: |",
        *rows,
        "",
    ]
    text = "\n".join(lines)
    print(text)
    if given.out:
        given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
