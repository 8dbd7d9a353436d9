"""One try of a candidate at a worker, as pools report it and the store keeps it. Knows nothing of either."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Attempt:
    """A try that ended. number: of its job, from 1; started: unix seconds; log: the worker's last lines, without secrets.

    cause: 'done'; 'failed', an evaluation with an error; 'died', 'hung' or 'memory', the worker was lost or put an end to;
    'lost', with its node; 'late', a result that nobody waited for any more.
    """

    recipe_id: str
    number: int
    cause: str
    error: str | None
    worker: str
    host: str
    pid: int
    device: str
    started: float
    seconds: float
    log: str = ""
