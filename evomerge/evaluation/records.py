"""What scoring a candidate gives, and how it becomes one number and a rank. Knows nothing of lm-eval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    pass


Role = Literal["search", "validation", "test"]
ROLES: tuple[Role, ...] = ("search", "validation", "test")
TENTHS: tuple[tuple[Role, int], ...] = (("search", 6), ("validation", 8), ("test", 10))
Items = Mapping[str, Sequence[str]]
"""Task name -> ids of the items to score, in order."""


def role_of_hash(digest: str) -> Role:
    """The role of an item that no one declared one for: 6, 2 and 2 tenths, by the first 8 hexadecimal digits of its hash."""
    tenth = int(digest[:8], 16) % 10
    return next(role for role, end in TENTHS if tenth < end)


@dataclass(frozen=True, slots=True)
class ItemScore:
    """One item's value of its task's metric, and two soft scores beside it where the task has a right answer.

    probability: of the right answer, in [0, 1]: among the choices, or of the whole answer. logprob: mean log-probability
    of a token of the right answer, in nats, at most 0.
    """

    task: str
    item: str
    value: float
    probability: float | None = None
    logprob: float | None = None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A scored candidate, or the sentence that says why it could not be scored.

    metrics: task name -> the task's metric over the items; empty if `error` is set; 'TASK:probability' and 'TASK:logprob'
    -> mean of the soft score, where the task has a right answer. seconds: stage name -> seconds. costs: 'layers' and
    'parameters' of the model, where it was made. A candidate kept out by the gate has an error and one metric, its nats.
    """

    recipe_id: str
    items: tuple[ItemScore, ...]
    metrics: Mapping[str, float]
    seconds: Mapping[str, float]
    error: str | None = None
    costs: Mapping[str, float] = field(default_factory=dict)


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
