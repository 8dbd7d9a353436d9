"""Why a task cannot be loaded, and what to do: missing packages, data that are not on this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from evomerge.checkpoints.hub_access import work_offline_where_needed

_EXTRA = re.compile(r"""^([A-Za-z0-9._-]+)[^;]*;.*\bextra\s*==\s*["']([^"']+)["']""")
_OFFLINE = ("ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "DatasetNotFoundError")
_NOT_CACHED = ("couldn't find", "couldn't reach", "couldn't be found", "doesn't exist on the hub")


def explained(task: str, error: Exception) -> str:
    """Words the failure of loading a task.

    Args:
        task: Its name.
        error: What was raised while it was loaded.

    Returns:
        A sentence: what was seen and, where that is known, what to do.
    """
    imports = [cause for cause in _causes(error) if isinstance(cause, ImportError)]
    if imports:
        # lm-eval words some itself, and what it caught names the module
        named = [cause for cause in imports if _module(cause)]
        return f"task '{task}' cannot be loaded: {_missing((named or imports)[0])}"
    for cause in _causes(error):
        text = str(cause)
        if type(cause).__name__ in _OFFLINE or any(sign in text.lower() for sign in _NOT_CACHED):
            seen = f"its data are not on this machine: {_first(text)}"
            return f"task '{task}' cannot be loaded: {seen}; {_remedy()}"
    return f"task '{task}' cannot be loaded: {type(error).__name__}: {error}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what it was raised from, the last first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _missing(error: ImportError) -> str:
    """What is missing, and the extra of lm-eval that brings it."""
    name = _module(error)
    extra = extra_of(name) if name else None
    named = re.search(r"lm[-_]eval\[([\w-]+)\]", str(error))
    if not name and named:
        return f'it needs packages of an extra of lm-eval: pip install "lm-eval[{named[1]}]"'
    if extra is not None:
        return f"it needs the package '{name}', of an extra of lm-eval: pip install \"lm-eval[{extra}]\""
    if name:
        return f"it needs the package '{name}': pip install {name.replace('_', '-')}"
    return f"{type(error).__name__}: {_first(str(error))}"


def _module(error: ImportError) -> str:
    """The top-level module that was not found; '' where that is not known."""
    found = re.search(r"No module named '([\w.]+)'", str(error))
    name = error.name or (found[1] if found else "")
    return name.partition(".")[0]


def extra_of(module: str) -> str | None:
    """Finds the extra of lm-eval that brings a module.

    Args:
        module: Name of a top-level module.

    Returns:
        The extra with the fewest packages; None where none has a package of that name.
    """
    try:
        lines = requires("lm_eval") or []
    except PackageNotFoundError:
        return None
    packages: dict[str, set[str]] = {}
    for line in lines:
        match = _EXTRA.match(line)
        if match:
            packages.setdefault(match[2], set()).add(_normal(match[1]))
    wanted = _normal(module)
    # a package may be named after its module and more: antlr4-python3-runtime
    for is_named in (lambda package: package == wanted, lambda package: package.startswith(f"{wanted}-")):
        extras = [extra for extra, of in packages.items() if any(map(is_named, of)) and extra != "dev"]
        if extras:
            return min(extras, key=lambda extra: (len(packages[extra]), extra))
    return None


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _remedy() -> str:
    place = os.environ.get("HF_DATASETS_CACHE")
    if place is None:
        home = (
            os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
        )
        place = f"{Path(home) / 'datasets'}, its default"
    unreachable = work_offline_where_needed()
    if unreachable is not None:
        return (
            f"the Hub cannot be reached from here ({unreachable}): `evomerge fetch CONFIG --to DIR` brings "
            f"models and data from a machine with a network; or set HF_DATASETS_CACHE to "
            f"such data (now {place})"
        )
    offline = [
        name for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE") if os.environ.get(name, "0") not in "0"
    ]
    unset = f"unset {' and '.join(offline)} to fetch them, or " if offline else ""
    return (
        f"{unset}load the task once on a machine with a network, copy that machine's cache here and set "
        f"HF_DATASETS_CACHE to it (now {place})"
    )


def _first(text: str) -> str:
    """The first line of a message, without a full stop."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[0] if lines else "no message").rstrip(".")[:300]
