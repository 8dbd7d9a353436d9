"""Stored rows -> plain data, Markdown, plots. Runs no search and loads no torch.

`summary` turns a study or a candidate into plain data, `tally` says where a search stands and `verdict` what
it found, `activity` adds who drives it and what its workers did, `monitor` tells listeners of a search that
runs; `markdown` writes the report of a finished study, with `route_text` for routes of layers. `panels` makes
what the page of a study shows, `html` writes it into one file with the style and scripts of `page`, and
`outputs` keeps what candidates answered. `comparison` puts candidates beside one another on the items that
all were scored on; `sensitivity` scans the coefficients of one candidate. What the last two score is passed
in: this package opens no model. `plots` draws a scan, `study_plots` other pictures, and `candidate_table`
writes all candidates as CSV or Parquet. `trackers` and `notifications` listen to a search.
"""

from __future__ import annotations

from evomerge.reports.activity import study_activity
from evomerge.reports.markdown import study_markdown
from evomerge.reports.summary import (
    candidate,
    front,
    leaders,
    lost_skills,
    resolve,
    study_summary,
    test_item_uses,
)

__all__ = [
    "candidate",
    "front",
    "leaders",
    "lost_skills",
    "resolve",
    "study_activity",
    "study_markdown",
    "study_summary",
    "test_item_uses",
]
