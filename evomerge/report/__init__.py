"""Stored rows -> something to read. Runs no search."""

from evomerge.report.markdown import markdown
from evomerge.report.summary import candidate, resolve, summary

__all__ = ["candidate", "markdown", "resolve", "summary"]
