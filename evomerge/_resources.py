"""Finds the distribution's data: `search_spaces/` and `evaluators/`, in a checkout or in the wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def root() -> Path:
    """The folder that holds `search_spaces/` and `evaluators/`."""
    installed = _PACKAGE / "_data"
    return installed if installed.is_dir() else _PACKAGE.parent


def search_spaces() -> dict[str, Path]:
    """Shipped search files by name, sorted."""
    return {path.stem: path for path in sorted((root() / "search_spaces").glob("*.yaml"))}


def evaluators() -> Path:
    """Folder of the shipped lm-eval tasks."""
    return root() / "evaluators"


def cluster_templates() -> Path:
    """Folder of the templates of cluster jobs."""
    installed = root() / "cluster"
    return installed if installed.is_dir() else root() / "scripts" / "cluster"
