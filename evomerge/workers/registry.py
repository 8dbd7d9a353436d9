"""The pools by name; a new one is a file and an entry here. None is imported before it is opened."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from evomerge.workers.pool import Pool, PoolSettings


@dataclass(frozen=True, slots=True)
class PoolEntry:
    """A pool that candidates can be evaluated in.

        pool = POOLS["processes"].open(PoolSettings(scorer, make, workers=4))

    Attributes:
        name: what it is called.
        summary: one line on where its workers run.
        path: 'module:class', imported when it is opened; the class has `from_settings(PoolSettings)`.
    """

    name: str
    summary: str
    path: str

    def load(self) -> Callable[[PoolSettings], Pool]:
        """Imports the module; returns what makes a pool from settings."""
        module, _, class_name = self.path.partition(":")
        pool_class = getattr(importlib.import_module(module), class_name)
        factory: Callable[[PoolSettings], Pool] = pool_class.from_settings
        return factory

    def open(self, settings: PoolSettings) -> Pool:
        """A new pool.

        Args:
            settings: what it is made with; what it does not take is ignored.

        Returns:
            The pool, for the caller to close.

        Raises:
            ImportError: where a library that it needs is not installed.
            SetupError: where its workers cannot be opened.
        """
        return self.load()(settings)


POOLS: dict[str, PoolEntry] = {
    entry.name: entry
    for entry in (
        PoolEntry(
            "in-process", "one worker in this process", "evomerge.workers.in_process_pool:InProcessPool"
        ),
        PoolEntry(
            "processes",
            "several workers in processes of this machine",
            "evomerge.workers.process_pool:ProcessPool",
        ),
        PoolEntry("ray", "workers on a Ray cluster", "evomerge.workers.ray_pool:RayPool"),
    )
}
"""Name -> entry."""
