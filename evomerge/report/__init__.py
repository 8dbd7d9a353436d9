"""Stored rows -> something to read. Runs no search."""

from evomerge.report.activity import activity
from evomerge.report.markdown import markdown
from evomerge.report.summary import candidate, front, lost, resolve, summary

__all__ = ["activity", "candidate", "front", "lost", "markdown", "resolve", "summary"]
