"""The verb about this machine: doctor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import typer

from evomerge.cli.options import Json, Root
from evomerge.cli.output import put


def doctor(root: Root = None, as_json: Json = False) -> None:
    """Check this machine for searches.

    Python, packages, devices, compiler, memory, disk, file locks. Exit code 3 where a search cannot run.
    """
    from evomerge.launch import environment
    from evomerge.store.paths import root as studies_root

    data = environment.examine(studies_root(root))
    put(json.dumps(data, indent=2) if as_json else _text(data))
    if data["problems"]:
        raise typer.Exit(3)


def _text(data: Mapping[str, Any]) -> str:
    python, studies, memory = data["python"], data["studies"], data["memory"]
    lines = [f"python     {python['version']} ({python['wanted']})"]
    lines += [_package_line(row) for row in data["packages"]]
    for device in data["devices"]:
        size = f", {device['memory'] / 1e9:.1f} GB" if device["memory"] else ""
        lines.append(f"device     {device['name']:18} {device['what']}{size}")
    sizes = ""
    if len(memory) == 2:
        sizes = f", {memory['available'] / 1e9:.1f} of {memory['total'] / 1e9:.1f} GB memory free"
    disk = f"{studies['free'] / 1e9:.1f} GB free on {studies['file_system'] or 'a disk of unknown type'}"
    state = f"journal {studies['journal']}, writable {studies['writable']}, locks {studies['locks']}"
    lines += [
        f"machine    {data['cores']} cores{sizes}",
        f"compiler   {data['compiler'] or 'none'}",
        f"studies    {studies['root']}: {disk}, {state}",
        f"hub        {'offline' if data['offline'] else 'asked for models that are not here'}",
        "",
        *(f"problem: {problem}" for problem in data["problems"]),
        *(f"note: {note}" for note in data["notes"]),
        "not ready" if data["problems"] else "ready",
    ]
    return "\n".join(lines)


def _package_line(row: Mapping[str, Any]) -> str:
    mark = ""
    if not row["fits"]:
        mark = "   optional" if row["extra"] else "   DOES NOT FIT"
    return f"package    {row['name']:18} {row['found'] or '–':14} {row['wanted']}{mark}"
