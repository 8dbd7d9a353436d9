"""Names of tasks, groups and tags as task files spell them, found without lm-eval, which takes seconds.

A name that stands in no task file is a slip of the pen, and can be said at once with the place where it is
written. The names of lm-eval's own tree are kept in the user's cache by lm-eval's version. Imports no
lm-eval.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from evomerge import _resources
from evomerge.errors import suggest

_KEYED = re.compile(rb"""(?m)\b(?:task|group|tag)["']?[ \t]*:[ \t]*(?:["']?([\w.+:/-]+)|\[([^\]]*)\])""")
_LISTED = re.compile(rb"""(?m)^[ \t]*-[ \t]+["']?([\w.+:/-]+)["']?[ \t]*(?:#.*)?$""")
_FLOW = re.compile(rb"[\w.+:/-]+")
_NO_TASKS = (".py", ".pyc", ".md", ".json", ".jsonl", ".sh", ".csv", ".tsv", ".txt", ".parquet", ".gz")
_LETTERS = 3  # that a near name begins or ends with alike


def unknown_name(names: Sequence[str], include: Sequence[Path]) -> tuple[int, str] | None:
    """Finds the first name that no task file spells.

    Args:
        names: Names of tasks, groups or tags.
        include: Folders of task files besides the shipped one and lm-eval's own.

    Returns:
        (its position, a sentence that names the nearest); None where all are spelt somewhere, or lm-eval is
        not there.
    """
    near = names_in([_resources.evaluators(), *include])
    missing = [position for position, name in enumerate(names) if name not in near]
    if not missing:
        return None
    own = _own_names()
    if own is None:
        return None
    for position in missing:
        if names[position] not in own:
            return position, f"unknown task '{names[position]}'. {_nearest(names[position], near | own)}"
    return None


def names_in(folders: Iterable[Path]) -> frozenset[str]:
    """Reads the names that task files may define: a few too many, never one too few.

    Args:
        folders: Folders of task files; one that is missing has none.

    Returns:
        Names of tasks, groups and tags, and entries of lists.
    """
    found: set[bytes] = set()
    for file in _task_files(folders):
        with contextlib.suppress(OSError):
            text = file.read_bytes()
            found.add(file.stem.encode())
            for name, listed in _KEYED.findall(text):
                found |= {name} if name else set(_FLOW.findall(listed))
            found.update(_LISTED.findall(text))
    return frozenset(name.decode(errors="replace") for name in found)


def _task_files(folders: Iterable[Path]) -> Iterator[Path]:
    for folder in folders:
        for place, _, files in os.walk(folder):
            yield from (Path(place, name) for name in files if not name.endswith(_NO_TASKS))


def _own_names() -> frozenset[str] | None:
    """The names of lm-eval's own tree, None where it is not installed."""
    try:
        spec, release = find_spec("lm_eval"), version("lm_eval")
    except (PackageNotFoundError, ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    tree = Path(spec.origin).with_name("tasks")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evomerge"
    file = cache / f"lm-eval-{release}-tasks.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["tree"] == _stamp(tree):
            return frozenset(map(str, kept["names"]))
    names = names_in([tree])
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=cache, delete=False, encoding="utf-8") as stream:
            json.dump({"tree": _stamp(tree), "names": sorted(names)}, stream)
        Path(stream.name).replace(file)
    return names


def _stamp(tree: Path) -> list[str | int]:
    """What tells one installation from another."""
    return [str(tree), tree.stat().st_mtime_ns]


def _nearest(name: str, names: Iterable[str]) -> str:
    """The nearest name; of thousands only those are compared that begin or end alike."""
    ends = (name[:_LETTERS], name[-_LETTERS:])
    alike = [other for other in names if other.startswith(ends[0]) or other.endswith(ends[1])]
    if not alike:
        return "Look for it with: lm_eval ls tasks."
    return suggest(name, sorted(alike, key=lambda other: abs(len(other) - len(name)))[:400])
