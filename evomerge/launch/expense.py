"""What a search takes beside memory: room on disk, the machines it runs on, hours and cost."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge.checkpoints import Parent, total_bytes
from evomerge.config import Config
from evomerge.store import paths

_ITEM = 45  # bytes of a scored item in a study, as measured on one of 135,000: 42
_CANDIDATE = 4_000  # of a candidate's recipe, genome and attempts
_COPIES = 3  # the study and its two backups


def disk_data(
    settings: Config, parents: Mapping[str, Parent], work: Mapping[str, Any], root: Path | None = None
) -> dict[str, Any]:
    """The room that a search takes on disk, and what is free.

    Args:
        settings: The settings of the search.
        parents: Its models, open.
        work: As `evomerge.launch.dry_run.plan_search` gives it.
        root: Folder of the studies; None for the default.

    Returns:
        'root', the folder; 'free', bytes there, None where that cannot be asked; 'study' and 'export', bytes
        of the study with its backups and of one exported model; 'warning', a sentence or ''.
    """
    folder = paths.root(root)
    candidates = sum(step["candidates"] for step in work["stages"])
    study = _COPIES * (_ITEM * work["item_evaluations"] + _CANDIDATE * candidates)
    export = total_bytes(parents[settings.base])
    free = _free(folder)
    warning = ""
    if free is not None and free < study:
        warning = f"{folder} has {free / 1e9:.1f} GB free, and the study takes about {study / 1e9:.1f} GB"
    elif free is not None and free < study + export:
        warning = (
            f"{folder} has {free / 1e9:.1f} GB free: too little for an export with weights beside the study"
        )
    return {"root": str(folder), "free": free, "study": study, "export": export, "warning": warning}


def cluster_data(settings: Config, memory: Mapping[str, Any]) -> dict[str, Any]:
    """Where candidates are evaluated.

    Args:
        settings: The settings of the search.
        memory: As `evomerge.launch.memory.plan_data` gives it.

    Returns:
        'ray', the address or None; 'workers', None where the cluster decides; 'gpus' of each worker, None
        where it is not known here; 'line', what to print.
    """
    cluster = settings.cluster
    gpus: float | None = cluster.gpus if cluster.gpus is not None else memory.get("gpus")
    workers = cluster.workers or memory.get("workers")
    if cluster.ray is not None:
        many = f"{cluster.workers} workers" if cluster.workers else "as many workers as fit"
        each = (
            f", {cluster.gpus:g} GPUs each" if cluster.gpus is not None else ", a GPU each where it has any"
        )
        return {
            "ray": cluster.ray,
            "workers": cluster.workers,
            "gpus": gpus,
            "line": f"Ray, {cluster.ray}: {many}{each}",
        }
    if memory["cards"] is None:
        workers = cluster.workers or 1
        many = f"{workers} worker{'s' if workers > 1 else ''}"
        line = f"this machine's processors, {many}; more by --workers or --ray"
        return {"ray": None, "workers": workers, "gpus": 0, "line": line}
    line = f"{memory['cards']}, {workers} worker{'s' if workers != 1 else ''}, {gpus or 1:g} cards each"
    return {"ray": None, "workers": workers, "gpus": gpus, "line": line}


def cost_data(settings: Config, cluster: Mapping[str, Any], seconds: float | None = None) -> dict[str, Any]:
    """Hours and cost of a search, as far as they are known.

    Args:
        settings: The settings of the search.
        cluster: As `cluster_data` gives it.
        seconds: Of one worker for the whole search, from a probe on this machine; None without one.

    Returns:
        'hours' on the clock, 'gpu_hours' and 'cost', each None where it is not known; 'limits', budget key ->
        number; 'lines', what to print.
    """
    budget = settings.budget
    keys: Sequence[str] = ("hours", "gpu_hours", "cost")
    limits = {key: getattr(budget, key) for key in keys if getattr(budget, key) is not None}
    hours = gpu_hours = cost = None
    if seconds is not None and cluster["ray"] in (None, "local"):
        hours = seconds / 3600 / (cluster["workers"] or 1)
        gpu_hours = seconds / 3600 * (cluster["gpus"] or 0)
        cost = gpu_hours * budget.price if budget.price else None
    lines = []
    if hours is not None:
        text = f"about {hours:.2g} h on {cluster['workers'] or 1} workers, {gpu_hours:.2g} GPU hours"
        lines.append(text + (f", {cost:.2f} at {budget.price:g} a GPU hour" if cost is not None else ""))
    if limits:
        lines.append("ends early at " + " or ".join(f"{key} {value:g}" for key, value in limits.items()))
    if not lines:
        lines.append("not known before --probe; budget: {gpu_hours: N} in the search file ends it early")
    return {"hours": hours, "gpu_hours": gpu_hours, "cost": cost, "limits": limits, "lines": lines}


def _free(folder: Path) -> int | None:
    """Bytes that are free where a folder is, or will be."""
    for place in (folder.absolute(), *folder.absolute().parents):
        if place.exists():
            try:
                return shutil.disk_usage(place).free
            except OSError:
                return None
    return None
