"""A part's results so far, kept beside its working files so that a part broken off is gone on with."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[3]


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
    """8 hexadecimal digits of the sources of the package: what a part ran on, where others are at work on
    them.
    """
    digest = hashlib.sha256()
    for file in sorted((REPOSITORY / "evomerge").rglob("*.py")):
        digest.update(f"{file.relative_to(REPOSITORY)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:8]


def environment() -> dict[str, str]:
    """What the soak's processes run under: one thread, no network, and these parts importable."""
    quiet = {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    others = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p not in ("", str(REPOSITORY))]
    return os.environ | quiet | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), *others])}


class Hang(BaseException):
    """A case took too long; no handler of the library's may take it for its own."""


def watch() -> None:
    """Lets a case of this process be broken off by `judged`."""
    signal.signal(signal.SIGPROF, _hang)


def judged(
    work: Callable[[], tuple[str, str]], seconds: float, longest: int | None = None
) -> tuple[str, str]:
    """What `work` says of a case; ('refused', error) for one error of ours in a line, ('wrong', what
    happened) for anything else.

    seconds: of processor time, after which the case hangs; longest: characters of an error, None for any
    number.
    """
    from evomerge.errors import EvomergeError

    try:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        return work()
    except EvomergeError as error:
        said = str(error)
        if not said or "\n" in said or "\r" in said or (longest is not None and len(said) > longest):
            return (
                "wrong",
                f"an error of {len(said.splitlines())} lines and {len(said)} characters: {said[:200]!r}",
            )
        return "refused", said
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # anything else is what the soak looks for
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if "evomerge" in Path(frame.filename).parts] or list(frames)
        return (
            "wrong",
            f"{type(error).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno} ({own[-1].name}): "
            f"{str(error)[:200]!r}",
        )
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _hang(*_: object) -> None:
    raise Hang("no end in the processor time that a case has")
