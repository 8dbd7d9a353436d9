"""Stored rows -> something to read. Runs no search."""

from evomerge.report.markdown import markdown
from evomerge.report.summary import candidate, front, lost, resolve, summary

__all__ = ["candidate", "front", "lost", "markdown", "resolve", "summary"]
