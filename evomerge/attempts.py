"""One try of a candidate at a worker, as pools report it and the store keeps it. Knows neither of them."""

from __future__ import annotations

from dataclasses import dataclass

CAUSES = ("done", "failed", "died", "hung", "memory", "lost", "late")


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try of a job at a worker, as it is stored. number: of this job, from 1.

    cause: done; failed (an Evaluation with an error); died (the worker); hung (killed at its time limit); memory (the worker
    outgrew its limit); lost (its node); late (a result that nobody waited for any more). started: Unix seconds. log: the last
    lines of the worker's log, secrets scrubbed.
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
