"""The page that shows a study's panels: templates, style and scripts of the dashboard and of the HTML report.

Nothing is fetched from elsewhere: the charts are drawn by Apache ECharts, which lies in `static/echarts` with
its licence and the hashes of its files. What somebody else has written, such as names of models and tasks, is
escaped by the templates and never read as HTML.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from evomerge._escaping import printable
from evomerge.reports.panels import Panel, cell

STATIC = Path(__file__).parent / "static"
"""Folder of the style sheet and the scripts."""
_TEMPLATES = Path(__file__).parent / "templates"
_WIDE = ("history", "beliefs", "routes", "parallel", "candidates", "pair", "lineage", "timeline")


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["cell"] = lambda value, kind: printable(cell(value, kind))
    environment.globals["wide"] = _WIDE
    return environment


def render(template: str, **values: Any) -> str:
    """Fills a template.

    Args:
        template: Name of a file in `templates`.
        **values: What it shows.

    Returns:
        HTML.
    """
    return _environment().get_template(template).render(**values)


def render_part(part: str, *values: Any) -> str:
    """Fills a macro of `parts.html`.

    Args:
        part: Name of the macro: 'overview' or 'tables'.
        *values: Its arguments.

    Returns:
        HTML.
    """
    module = _environment().get_template("parts.html").make_module({})
    return str(getattr(module, part)(*values))


def chart_json(panels: list[Panel]) -> str:
    """Writes what the page's script draws.

    Args:
        panels: The panels.

    Returns:
        JSON of id -> chart that can stand inside a script element.
    """
    charts: Mapping[str, Any] = {panel.id: panel.chart for panel in panels}
    return json.dumps(charts, separators=(",", ":")).replace("<", "\\u003c")


def digest(text: str) -> str:
    """Names a text by its content, so that what has not changed is not sent again.

    Args:
        text: Any text.

    Returns:
        16 hexadecimal digits.
    """
    return hashlib.sha256(text.encode()).hexdigest()[:16]
