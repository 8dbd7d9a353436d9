"""The environment that searches would run in, looked over before the night: versions, devices, compiler,
memory, disk, locks.

Starts nothing and writes one file, for a moment, beside the studies.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from evomerge.errors import ConfigError
from evomerge.store import file_systems

_SMALL_DISK = 5_000_000_000  # bytes below which a search may not end


def examine(root: Path) -> dict[str, Any]:
    """What was found, with 'problems' that keep a search from running and 'notes' that do not. Sizes in
    bytes. root: of the studies."""
    found: dict[str, Any] = {
        "python": _python(),
        "packages": _packages(),
        "devices": _devices(),
        "compiler": _compiler(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory": _memory(),
        "studies": _studies(root),
        "offline": os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"),
    }
    return found | {"problems": _problems(found), "notes": _notes(found)}


def _python() -> dict[str, Any]:
    wanted = importlib.metadata.metadata("evomerge")["Requires-Python"] or ""
    return {
        "version": platform.python_version(),
        "wanted": wanted,
        "fits": platform.python_version() in SpecifierSet(wanted),
    }


def _packages() -> list[dict[str, Any]]:
    """What evomerge asks for, extras last; found is None where it is not installed. Those for its development
    are left out."""
    rows = []
    for line in importlib.metadata.requires("evomerge") or ():
        need = Requirement(line)
        extra = next(
            (
                name
                for name in ("ray", "plots", "dev")
                if need.marker and not need.marker.evaluate({"extra": ""}) and name in str(need.marker)
            ),
            "",
        )
        if extra == "dev":
            continue
        try:
            version: str | None = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        fits = version is not None and need.specifier.contains(version, prereleases=True)
        rows.append(
            {"name": need.name, "wanted": str(need.specifier), "found": version, "fits": fits, "extra": extra}
        )
    return sorted(rows, key=lambda row: (str(row["extra"]), str(row["name"]).lower()))


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


def _compiler() -> str | None:
    return next(
        (
            found
            for name in (os.environ.get("CC"), "cc", "gcc", "clang")
            if name and (found := shutil.which(name))
        ),
        None,
    )


def _memory() -> dict[str, int]:
    """total and available, as far as the machine says; a container's limit counts as its total."""
    found: dict[str, int] = {}
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in ("MemTotal", "MemAvailable"):
                found["total" if name == "MemTotal" else "available"] = int(rest.split()[0]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit.isdigit() and int(limit) < found["total"]:
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            found = {"total": int(limit), "available": min(found["available"], max(0, int(limit) - used))}
    except (OSError, ValueError, KeyError):
        return found
    return found


def _studies(root: Path) -> dict[str, Any]:
    """Where studies would be kept: disk, file system, journal, and whether a file can be written and locked
    there."""
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


def _problems(found: dict[str, Any]) -> list[str]:
    python, studies = found["python"], found["studies"]
    problems = (
        [] if python["fits"] else [f"Python {python['version']} does not fit {python['wanted']}: use another"]
    )
    for row in found["packages"]:
        if not row["extra"] and not row["fits"]:
            problems.append(
                f"{row['name']}{row['wanted']} is needed, {row['found'] or 'not installed'}: pip install '{row['name']}{row['wanted']}'"
            )
    problems += [d["what"] for d in found["devices"] if d["name"] == "none"]
    if studies["writable"] != "yes":
        problems.append(
            f"{studies['root']} cannot be written ({studies['writable']}): choose another folder with --root or $EVOMERGE_ROOT"
        )
    if studies["journal"] not in ("WAL", "DELETE"):
        problems.append(studies["journal"])
    return problems


def _notes(found: dict[str, Any]) -> list[str]:
    studies, notes = found["studies"], []
    for row in found["packages"]:
        if row["extra"] and not row["fits"]:
            state = f"{row['found']} is installed" if row["found"] else "not installed"
            notes.append(
                f"{row['name']}{row['wanted']} ({state}): pip install 'evomerge[{row['extra']}]' for {_USES[row['extra']]}"
            )
    if len(found["devices"]) == 1:
        notes.append("no GPU: candidates are evaluated on the CPU")
    if found["compiler"] is None:
        notes.append(
            "no C compiler: merges run in torch, about five times slower; install gcc or clang, or set CC"
        )
    if studies["free"] < _SMALL_DISK:
        notes.append(f"{studies['free'] / 1e9:.1f} GB are free at {studies['root']}")
    if studies["locks"].startswith("no:"):
        notes.append(f"no file locks at {studies['root']}: {studies['locks']}")
    return notes


_USES = {"ray": "a cluster", "plots": "plots"}
