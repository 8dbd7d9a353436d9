"""How many threads a process computes with: scores are compared bit for bit, and sums depend on it."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

from evomerge.errors import ConfigError

if TYPE_CHECKING:
    from evomerge.checkpoints import Parent

_SMALL = 20_000_000  # parameters of a model below which threads cost more than they save


def set_thread_defaults() -> None:
    """Sets the thread variables of numpy and OpenMP that are unset, before those are imported.

    numpy, which the optimizers use, gets one thread, so that a replay has the same sums on any machine; idle
    threads of OpenMP sleep, since spinning ones starve the other processes of a node.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def set_torch_threads(base: Parent) -> None:
    """Sets torch's threads: $EVOMERGE_THREADS, else one for a model under 20 M parameters, else every core.

    Scores are compared bit for bit at resume, and sums depend on the number of threads: it is one of the
    study's facts.

    Args:
        base: The model that candidates have the size of.

    Raises:
        ConfigError: If $EVOMERGE_THREADS is not a number from 1 to 9,999.
    """
    import torch

    given = os.environ.get("EVOMERGE_THREADS", "")
    if given and not (given.isascii() and given.isdigit() and 0 < int(given) < 10_000):
        raise ConfigError(
            f"$EVOMERGE_THREADS must be a number of threads, got '{given}'; correct or unset it"
        )
    parameters = sum(math.prod(info.shape) for info in base.tensors.values())
    if given:
        threads = int(given)
    elif parameters < _SMALL:
        threads = 1
    else:
        threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
