"""Which of a machine's cards each worker process sees: one each, by `CUDA_VISIBLE_DEVICES`.

Without it every process would compute on the first card. Names of cards are passed on as they are given,
numbers, UUIDs or parts of a card (MIG); a process calls its own card `cuda`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

VARIABLE = "CUDA_VISIBLE_DEVICES"


def visible_devices(environment: Mapping[str, str], count: int) -> tuple[str, ...]:
    """The cards that a process of this environment sees, by the names that the variable gives them.

    Args:
        environment: Variables of the process.
        count: How many cards it sees, as torch counts them: names after one that is not there do not count.

    Returns:
        Names in the order of `cuda:0`, `cuda:1`, ...; numbers where the variable is unset.
    """
    given = environment.get(VARIABLE)
    names = [str(number) for number in range(count)] if given is None else given.split(",")
    return tuple(name.strip() for name in names[:count])


def device_of(worker: int, devices: Sequence[str]) -> str | None:
    """The card of a worker process; where there are more workers than cards, they share them in turn.

    Args:
        worker: Number of the worker, from 0.
        devices: Names of the cards.

    Returns:
        What `CUDA_VISIBLE_DEVICES` is to be in the process; None to leave it as it is: there is no card.
    """
    return devices[worker % len(devices)] if devices else None
