"""Curves drawn to a file: the only room that imports matplotlib, which is optional."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evomerge.errors import ConfigError, SetupError
from evomerge.reports.sensitivity import Curve

_KINDS = (".png", ".svg", ".pdf")
_COLUMNS = 4  # panels beside one another


def check(file: Path) -> None:
    """Raises ConfigError for a kind of file that is not drawn and SetupError where matplotlib or the folder is missing: before the work."""
    if file.suffix.lower() not in _KINDS:
        raise ConfigError(f"'{file}' names no kind of picture; end it with {', '.join(_KINDS)}")
    if not file.absolute().parent.is_dir():
        raise SetupError(f"there is no folder {file.absolute().parent} to draw {file.name} into; make it")
    _matplotlib()


def sensitivity(curves: Sequence[Curve], title: str, file: Path) -> None:
    """Draws a panel an axis: the score over the coefficient, bars of ± 2 paired errors, the candidate as a line."""
    figure = _matplotlib()
    columns = min(_COLUMNS, len(curves))
    rows = -(-len(curves) // columns)
    page = figure(figsize=(3.2 * columns, 2.4 * rows + 0.5), layout="constrained")
    panels = page.subplots(rows, columns, sharey=True, squeeze=False)
    for panel in panels.flat[len(curves) :]:
        panel.set_visible(False)
    for curve, panel in zip(curves, panels.flat, strict=False):
        steps = [s for s in curve.steps if s.score is not None]
        errors = [0.0 if s.difference is None else 2 * s.difference.error for s in steps]
        colour = "C3" if curve.steep else "C0"
        panel.errorbar(
            [s.value for s in steps],
            [s.score for s in steps],
            yerr=errors,
            marker="o",
            markersize=3,
            linewidth=1,
            color=colour,
        )
        panel.axvline(curve.value, color="0.6", linewidth=0.8, linestyle="--")
        panel.set_title(curve.axis, fontsize=7)
        panel.tick_params(labelsize=7)
    page.suptitle(title, fontsize=9)
    page.supxlabel("coefficient; dashed: the candidate's", fontsize=8)
    page.supylabel("objective, bars: ± 2 errors of the difference", fontsize=8)
    page.savefig(file, dpi=150, metadata={"Date": None} if file.suffix.lower() == ".svg" else None)


def _matplotlib() -> Any:
    """matplotlib's Figure: drawn without a display and without its global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SetupError(
            "plots need matplotlib, which is not installed; pip install 'evomerge[plots]'"
        ) from None
    return Figure
