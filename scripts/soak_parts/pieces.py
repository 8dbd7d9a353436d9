"""A part's results so far, kept beside its working files so that a part broken off is gone on with."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


def read(file: Path) -> dict[str, Any]:
    """What a part came to, {} before it began."""
    return json.loads(file.read_text()) if file.is_file() else {}


def write(file: Path, data: dict[str, Any]) -> None:
    """Replaces the file whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(file.name + ".new")
    beside.write_text(json.dumps(data, indent=1))
    beside.replace(file)


def code() -> str:
    """8 hexadecimal digits of the sources of the package: what a part ran on, where others are at work on them."""
    digest = hashlib.sha256()
    for file in sorted((REPOSITORY / "evomerge").rglob("*.py")):
        digest.update(f"{file.relative_to(REPOSITORY)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:8]


def environment() -> dict[str, str]:
    """What the soak's processes run under: one thread, no network, and these parts importable."""
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    own = [str(REPOSITORY / "scripts"), str(REPOSITORY / "tests"), str(REPOSITORY)]
    path = os.pathsep.join([*own, *(p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p not in own)])
    return os.environ | quiet | {"PYTHONPATH": path}
