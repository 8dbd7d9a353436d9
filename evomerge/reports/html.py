"""The report of a study as one HTML file: opens offline, prints, and its first sentence is the verdict."""

from __future__ import annotations

import base64
import hashlib
import time

from evomerge import __version__
from evomerge.reports.page import STATIC, chart_json, render
from evomerge.reports.panels import Snapshot, overview, study_panels
from evomerge.store import Store

_SCRIPTS = ("echarts/echarts.min.js", "charts.js", "page.js")


def study_html(store: Store) -> str:
    """Writes the report of a study, finished or not.

    Args:
        store: An open study.

    Returns:
        HTML with style, scripts and data inside; every chart has a table that is read without scripts.

    Raises:
        StudyError: The file holds no study yet.
    """
    snapshot = Snapshot(store)
    panels = study_panels(snapshot)
    theme = _static("theme.js")
    scripts = [_static(name) for name in _SCRIPTS]
    hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in (theme, *scripts))
    return render(
        "report.html",
        overview=overview(snapshot),
        panels=panels,
        charts=chart_json(panels),
        style=_static("page.css"),
        theme_script=theme,
        scripts=scripts,
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {hashes}",
        version=__version__,
        date=time.strftime("%Y-%m-%d %H:%M", time.localtime(snapshot.now)),
    )


def _static(name: str) -> str:
    """A script or style sheet as it may stand inside an element."""
    text = (STATIC / name).read_text(encoding="utf-8")
    return text.replace("</script", "<\\/script")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
