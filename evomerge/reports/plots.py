"""Curves of a sensitivity scan drawn to a file, and what other pictures are drawn and saved with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evomerge.errors import ConfigError, SetupError
from evomerge.reports.sensitivity import Curve

_SUFFIXES = (".png", ".svg", ".pdf")
_COLUMNS = 4  # panels beside one another


def check(file: Path) -> None:
    """Checks, before the work, that a picture can be drawn.

    Args:
        file: The picture.

    Raises:
        ConfigError: Its kind of file is not drawn.
        SetupError: matplotlib or the folder is missing.
    """
    if file.suffix.lower() not in _SUFFIXES:
        raise ConfigError(f"'{file}' names no kind of picture; end it with {', '.join(_SUFFIXES)}")
    if not file.absolute().parent.is_dir():
        raise SetupError(f"there is no folder {file.absolute().parent} to draw {file.name} into; make it")
    figure_class()


def sensitivity(curves: Sequence[Curve], title: str, file: Path) -> None:
    """Draws for each axis the score over the coefficient, bars of ± 2 paired errors, a line at the candidate.

    Args:
        curves: Curves of a scan, at least one; steep ones are red.
        title: Title of the picture.
        file: Picture to write.

    Raises:
        SetupError: matplotlib is missing.
    """
    make = figure_class()
    columns = min(_COLUMNS, len(curves))
    rows = -(-len(curves) // columns)
    figure = make(figsize=(3.2 * columns, 2.4 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for panel in panels.flat[len(curves) :]:
        panel.set_visible(False)
    for curve, panel in zip(curves, panels.flat, strict=False):
        _draw(curve, panel)
    figure.suptitle(title, fontsize=9)
    figure.supxlabel("coefficient; dashed: the candidate's", fontsize=8)
    figure.supylabel("objective, bars: ± 2 errors of the difference", fontsize=8)
    save(figure, file)


def save(figure: Any, file: Path) -> None:
    """Writes a picture; the same figure gives the same SVG.

    Args:
        figure: Of matplotlib.
        file: Picture to write.
    """
    from matplotlib import rc_context

    metadata = {"Date": None} if file.suffix.lower() == ".svg" else None
    with rc_context({"svg.hashsalt": "evomerge", "svg.fonttype": "none"}):
        figure.savefig(file, dpi=150, metadata=metadata)


def _draw(curve: Curve, panel: Any) -> None:
    steps = [step for step in curve.steps if step.score is not None]
    errors = [0.0 if step.difference is None else 2 * step.difference.error for step in steps]
    panel.errorbar(
        [step.value for step in steps],
        [step.score for step in steps],
        yerr=errors,
        marker="o",
        markersize=3,
        linewidth=1,
        color="C3" if curve.steep else "C0",
    )
    panel.axvline(curve.value, color="0.6", linewidth=0.8, linestyle="--")
    panel.set_title(curve.axis, fontsize=7)
    panel.tick_params(labelsize=7)


def figure_class() -> Any:
    """Finds matplotlib's Figure, which draws without a display and without global state.

    Returns:
        The class.

    Raises:
        SetupError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SetupError(
            "plots need matplotlib, which is not installed; pip install 'evomerge[plots]'"
        ) from None
    return Figure
