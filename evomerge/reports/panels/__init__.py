"""The panels of a study's page: plain data for charts, and tables that say the same. Loads no torch.

`snapshot` reads a study's rows once; `overview` is the head of the page and `PANELS` names what follows. The
dashboard and the HTML report show the same panels, see `evomerge.reports.page`.
"""

from __future__ import annotations

from collections.abc import Callable

from evomerge.reports.panels.beliefs import beliefs
from evomerge.reports.panels.candidates import TableQuery, candidates, parallel
from evomerge.reports.panels.history import history
from evomerge.reports.panels.lineage import lineage
from evomerge.reports.panels.machines import failures, timeline
from evomerge.reports.panels.optimizer import optimizer
from evomerge.reports.panels.overview import overview
from evomerge.reports.panels.pair import pair
from evomerge.reports.panels.panel import Column, Overview, Panel, Table, Tile, cell
from evomerge.reports.panels.routes import routes
from evomerge.reports.panels.snapshot import Snapshot
from evomerge.reports.panels.tasks import tasks, trade_offs

PANELS: dict[str, Callable[[Snapshot], Panel | None]] = {
    "history": history,
    "beliefs": beliefs,
    "tasks": tasks,
    "tradeoff": trade_offs,
    "routes": routes,
    "parallel": parallel,
    "candidates": candidates,
    "pair": pair,
    "lineage": lineage,
    "timeline": timeline,
    "optimizer": optimizer,
    "failures": failures,
}
"""Name -> what makes the panel, in the order of the page; None for one that does not concern a study."""

__all__ = [
    "PANELS",
    "Column",
    "Overview",
    "Panel",
    "Snapshot",
    "Table",
    "TableQuery",
    "Tile",
    "candidates",
    "cell",
    "overview",
    "pair",
    "study_panels",
]


def study_panels(snapshot: Snapshot) -> list[Panel]:
    """Makes every panel that concerns a study.

    Args:
        snapshot: Of the study.

    Returns:
        The panels, in the order of the page.
    """
    panels = (make(snapshot) for make in PANELS.values())
    return [panel for panel in panels if panel is not None]
