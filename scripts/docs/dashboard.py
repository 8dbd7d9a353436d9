"""Takes the pictures of docs/dashboard.md: every panel of a finished study, and the page in both schemes.

python scripts/docs/dashboard.py results/demo/study.db docs/images/dashboard [--routes STUDY.db]

Needs Chromium. Pictures are of the panels as a reader sees them; a study of routes gives that of the routes.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from evomerge.reports.dashboard.access import Access
from evomerge.reports.dashboard.app import Dashboard
from tests.support.browser import browser, served, watched

PANELS = (
    *("history", "beliefs", "tasks", "tradeoff", "parallel", "candidates", "pair", "lineage", "timeline"),
    *("optimizer", "failures"),
)
LARGEST = 150_000  # bytes of a picture
_UNSTICK = "document.querySelectorAll('.top, .jump').forEach((e) => { e.style.position = 'static'; })"


def take(study: Path, out: Path, panels: Sequence[str], page: bool) -> None:
    """Pictures of panels of a study; of its page and of the page of all studies too."""
    with tempfile.TemporaryDirectory() as folder, browser() as opened:
        shown = Path(folder) / study.parent.name
        shutil.copytree(study.parent, shown, ignore=shutil.ignore_patterns("export"))
        with served(Dashboard(Path(folder), Access("a token of pictures", is_local=True))) as address:
            for scheme in ("light", "dark") if page else ("light",):
                with watched(opened, address, scheme, 1180, 820) as tab:
                    tab.page.goto(f"{address}/study/{shown.name}/")
                    tab.page.locator("body[data-updates]").wait_for()
                    tab.page.wait_for_timeout(500)
                    if page:
                        save(out / f"page-{scheme}.png", tab.page.screenshot())
                    if scheme == "light":
                        tab.page.evaluate(_UNSTICK)
                        for panel in panels:
                            save(out / f"{panel}.png", tab.page.locator(f"#{panel}").screenshot())
                    tab.check()


def save(file: Path, picture: bytes) -> None:
    """Writes a picture, with fewer colours where it is large."""
    file.write_bytes(picture)
    if len(picture) > LARGEST:
        reduce_colours(file)
    print(f"{file} {file.stat().st_size / 1000:.0f} kB")


def reduce_colours(file: Path) -> None:
    """A palette of 128 colours, which text and lines survive."""
    from PIL import Image

    with Image.open(file) as image:
        image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(file, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--routes", type=Path, help="a study of routes")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    take(given.study, given.out, PANELS, page=True)
    if given.routes:
        take(given.routes, given.out, ("routes",), page=False)


if __name__ == "__main__":
    main()
