"""Registry of evaluation backends.

What answers the requests of lm-eval's tasks, by the name in the search file.

A new backend is one file here, with a class that satisfies `base.Backend`, and one line of `BACKENDS`. The
configuration, the harness, the documentation and the contract suite `tests/contracts/test_backends.py` read
the registry. Importing it loads neither torch nor lm-eval: a backend's module is imported by
`BackendEntry.load`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evomerge.errors import ConfigError, suggest

if TYPE_CHECKING:
    from evomerge.evaluation.lm_harness.backends.base import BackendFactory


@dataclass(frozen=True, slots=True)
class BackendEntry:
    """A backend of the registry.

    Attributes:
        path: 'module:name' of its factory, a callable (model, tokenizer, batch_size) -> `base.Backend`.
        takes: What it runs on.
        summary: One line for people.
    """

    path: str
    takes: str
    summary: str

    def load(self) -> BackendFactory:
        """Imports the backend's module and returns its factory."""
        module, _, name = self.path.partition(":")
        factory: BackendFactory = getattr(importlib.import_module(module), name)
        return factory


_HERE = "evomerge.evaluation.lm_harness.backends"
BACKENDS: dict[str, BackendEntry] = {
    "resident": BackendEntry(
        f"{_HERE}.compiled:CompiledBackend",
        takes="a transformers model in this process",
        summary="Compiles the requests once for the live model; what it cannot, lm-eval answers.",
    ),
    "lm-eval": BackendEntry(
        f"{_HERE}.hflm:HFLMBackend",
        takes="a transformers model in this process",
        summary="Passes all requests to lm-eval's own HFLM on the live model.",
    ),
}
DEFAULT_BACKEND = "resident"


def find_backend(name: str) -> BackendEntry:
    """Looks up a backend.

    Args:
        name: Key of `BACKENDS`.

    Returns:
        Its entry.

    Raises:
        ConfigError: There is no such backend.
    """
    if name not in BACKENDS:
        raise ConfigError(f"unknown evaluation backend '{name}'. {suggest(name, BACKENDS)}")
    return BACKENDS[name]
