"""Stored rows -> plain data, Markdown and plots. Runs no search and loads no torch."""

from __future__ import annotations

from evomerge.reports.activity import activity
from evomerge.reports.markdown import markdown
from evomerge.reports.summary import candidate, front, lost, resolve, summary

__all__ = ["activity", "candidate", "front", "lost", "markdown", "resolve", "summary"]
