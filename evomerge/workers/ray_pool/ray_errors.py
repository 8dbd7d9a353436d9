"""What Ray's errors mean: one line for a log, and the cause of an attempt that failed."""

from __future__ import annotations

from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from evomerge.errors import EvomergeError
from evomerge.workers.ray_pool import cluster
from evomerge.workers.ray_pool.cluster import Node

_LONGEST = 300  # characters of a message
_PREFIXES = ("Worker exit type: ", "The actor is dead because ", "The actor died because ")


def message(error: RayError) -> str:
    """One line of what Ray, or the function that was called, complains of.

    Args:
        error: from `ray.get`.

    Returns:
        The message of the exception that was raised in the actor; else Ray's, at most 300 characters.
    """
    cause = getattr(error, "cause", None) if isinstance(error, RayTaskError) else None
    if isinstance(cause, EvomergeError):
        return " ".join(str(cause).split())
    if cause is not None:
        return " ".join(f"{type(cause).__name__}: {cause}".split())
    text = " ".join(str(error).split())
    for prefix in _PREFIXES:
        _, separator, rest = text.partition(prefix)
        if separator:
            text = rest
    return text.partition(" Some common causes include")[0][:_LONGEST]


def cause_of_death(error: RayError, node: Node) -> str:
    """Why a process is gone.

    Args:
        error: from `ray.get` of a call to it.
        node: that it ran on.

    Returns:
        The cause of an attempt: 'memory' where the node ran out of it, 'lost' where the node is gone or was
        taken away, else 'died'.
    """
    text = str(error)
    if isinstance(error, OutOfMemoryError) or "running low on memory" in text:
        return "memory"
    is_listed = node.id in {there.id for there in cluster.nodes()}
    says_lost = "node died" in text.lower() or "node was terminated" in text.lower()
    if not is_listed or says_lost or getattr(error, "preempted", False) or not cluster.answers(node):
        return "lost"
    return "died"
