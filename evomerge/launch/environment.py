"""Examines the environment that searches would run in: versions, devices, compiler, memory, disk, locks.

Starts nothing and writes one file, for a moment, beside the studies.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import platform
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from evomerge.errors import ConfigError
from evomerge.merging.host_memory import host_memory
from evomerge.store import file_systems

_FOR_DEVELOPMENT = ("dev", "docs")  # extras that no search needs
_SMALL_DISK = 5_000_000_000  # bytes below which a search may not end


def examine(root: Path) -> dict[str, Any]:
    """Examines this machine and its installation.

    Args:
        root: Folder of the studies; need not exist.

    Returns:
        Plain data, sizes in bytes; 'problems' keep a search from running, 'notes' do not.
    """
    data: dict[str, Any] = {
        "python": _python(),
        "packages": _packages(),
        "devices": _devices(),
        "compiler": _compiler(),
        "cores": _cores(),
        "memory": _memory(),
        "studies": _studies(root),
        "offline": os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"),
    }
    return data | {"problems": _problems(data), "notes": _notes(data)}


def _python() -> dict[str, Any]:
    wanted = importlib.metadata.metadata("evomerge")["Requires-Python"] or ""
    return {
        "version": platform.python_version(),
        "wanted": wanted,
        "fits": platform.python_version() in SpecifierSet(wanted),
    }


def _packages() -> list[dict[str, Any]]:
    """The packages that evomerge needs, those of its extras last, without those for its development.

    'found' is the version, None where it is not installed.
    """
    rows = []
    for line in importlib.metadata.requires("evomerge") or ():
        requirement = Requirement(line)
        extra = _extra(requirement)
        if extra in _FOR_DEVELOPMENT:
            continue
        try:
            version: str | None = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        fits = version is not None and requirement.specifier.contains(version, prereleases=True)
        rows.append(
            {
                "name": requirement.name,
                "wanted": str(requirement.specifier),
                "found": version,
                "fits": fits,
                "extra": extra,
            }
        )
    return sorted(rows, key=lambda row: (str(row["extra"]), str(row["name"]).lower()))


def _extra(requirement: Requirement) -> str:
    """The extra that a package belongs to; '' for one that is always needed."""
    marker = requirement.marker
    if marker is None or marker.evaluate({"extra": ""}):
        return ""
    named = re.search(r"""extra == ["']([\w-]+)["']""", str(marker))
    return named[1] if named else ""


def _devices() -> list[dict[str, Any]]:
    """What torch can compute on; no row where torch cannot be imported."""
    try:
        import torch
    except (ImportError, OSError) as error:  # itself, or a library beneath it
        return [
            {
                "name": "none",
                "what": f"torch cannot be imported: {type(error).__name__}: {error}",
                "memory": 0,
            }
        ]
    rows = [{"name": "cpu", "what": platform.processor() or platform.machine(), "memory": 0}]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        rows.append({"name": f"cuda:{i}", "what": properties.name, "memory": int(properties.total_memory)})
    if torch.backends.mps.is_available():
        rows.append({"name": "mps", "what": "Apple GPU", "memory": 0})
    return rows


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _compiler() -> str | None:
    """Path of the first C compiler that is there: $CC, cc, gcc, clang."""
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and (path := shutil.which(name)):
            return path
    return None


def _memory() -> dict[str, int]:
    """total and available, as far as the machine says; a container's limit counts as its total."""
    memory = host_memory()
    named = {"total": memory.total or None, "available": memory.available}
    return {name: size for name, size in named.items() if size is not None}


def _studies(root: Path) -> dict[str, Any]:
    """Where studies would be kept: disk, file system, journal, whether files can be written and locked."""
    place = root.absolute()
    while not place.is_dir():
        place = place.parent
    try:
        journal = file_systems.journal_mode(place)
    except ConfigError as error:
        journal = str(error)
    written, locks = "yes", "yes"
    try:
        with tempfile.TemporaryFile(dir=place) as handle:
            handle.write(b"x")
            handle.flush()
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                locks = f"no: {error.strerror}; a lease file is used instead"
    except OSError as error:
        written, locks = f"no: {error.strerror}", "not tried"
    free = shutil.disk_usage(place).free
    return {
        "root": str(root),
        "free": free,
        "file_system": file_systems.file_system(place),
        "journal": journal,
        "writable": written,
        "locks": locks,
    }


def _problems(data: dict[str, Any]) -> list[str]:
    """What keeps a search from running, and what to do about it."""
    python, studies = data["python"], data["studies"]
    problems = []
    if not python["fits"]:
        problems.append(f"Python {python['version']} does not fit {python['wanted']}: use another")
    for row in data["packages"]:
        if not row["extra"] and not row["fits"]:
            package, version = row["name"] + row["wanted"], row["found"] or "not installed"
            problems.append(f"{package} is needed, {version}: pip install '{package}'")
    problems += [device["what"] for device in data["devices"] if device["name"] == "none"]
    if studies["writable"] != "yes":
        problems.append(
            f"{studies['root']} cannot be written ({studies['writable']}): "
            "choose another folder with --root or $EVOMERGE_ROOT"
        )
    if studies["journal"] not in ("WAL", "DELETE"):
        problems.append(studies["journal"])
    return problems


def _notes(data: dict[str, Any]) -> list[str]:
    """What makes a search slower or less safe, or what cannot be used."""
    studies, notes = data["studies"], []
    for row in data["packages"]:
        if row["extra"] and not row["fits"]:
            state = f"{row['found']} is installed" if row["found"] else "not installed"
            use = _USES.get(row["extra"], row["extra"])
            advice = f"pip install 'evomerge[{row['extra']}]' for {use}"
            notes.append(f"{row['name']}{row['wanted']} ({state}): {advice}")
    if len(data["devices"]) == 1:
        notes.append("no GPU: candidates are evaluated on the CPU")
    if data["compiler"] is None:
        notes.append(
            "no C compiler: merges run in torch, about five times slower; install gcc or clang, or set CC"
        )
    if studies["free"] < _SMALL_DISK:
        notes.append(f"{studies['free'] / 1e9:.1f} GB are free at {studies['root']}")
    if studies["locks"].startswith("no:"):
        notes.append(f"no file locks at {studies['root']}: {studies['locks']}")
    return notes


_USES = {"ray": "a cluster", "plots": "plots"}
"""Extra -> what it is for."""
