"""The verb about this machine: doctor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import typer

from evomerge.cli.options import Json, Root


def doctor(root: Root = None, as_json: Json = False) -> None:
    """The environment: Python, packages, devices, compiler, memory, disk, file locks. Exit code 3 where a search cannot run."""
    from evomerge.launch import environment as doctors
    from evomerge.store.paths import root as studies_root

    found = doctors.examine(studies_root(root))
    print(json.dumps(found, indent=2) if as_json else _screen(found))
    if found["problems"]:
        raise typer.Exit(3)


def _screen(found: Mapping[str, Any]) -> str:
    python, studies, memory = found["python"], found["studies"], found["memory"]
    lines = [f"python     {python['version']} ({python['wanted']})"]
    for row in found["packages"]:
        mark = "" if row["fits"] else "   optional" if row["extra"] else "   DOES NOT FIT"
        lines.append(f"package    {row['name']:18} {row['found'] or '–':14} {row['wanted']}{mark}")
    for d in found["devices"]:
        lines.append(
            f"device     {d['name']:18} {d['what']}"
            + (f", {d['memory'] / 1e9:.1f} GB" if d["memory"] else "")
        )
    sizes = (
        f", {memory['available'] / 1e9:.1f} of {memory['total'] / 1e9:.1f} GB memory free"
        if len(memory) == 2
        else ""
    )
    lines.append(f"machine    {found['cores']} cores{sizes}")
    lines.append(f"compiler   {found['compiler'] or 'none'}")
    lines.append(
        f"studies    {studies['root']}: {studies['free'] / 1e9:.1f} GB free on {studies['file_system'] or 'a disk of unknown type'}, "
        f"journal {studies['journal']}, writable {studies['writable']}, locks {studies['locks']}"
    )
    lines.append(f"hub        {'offline' if found['offline'] else 'asked for models that are not here'}")
    lines += ["", *(f"problem: {p}" for p in found["problems"]), *(f"note: {n}" for n in found["notes"])]
    return "\n".join([*lines, "ready" if not found["problems"] else "not ready"])
