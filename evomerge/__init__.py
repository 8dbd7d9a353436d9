"""Evolutionary search for merge recipes of language models.

    import evomerge as em

    study = em.run(em.load("demo", evaluations=120), root="results")
    print(study.best()["test"], study.recipe("best"))
    study.export("best", "merged", weights=True)

The names below are imported when they are first used: `import evomerge` alone loads nothing else, and reading
a stored study (`em.open_study`) loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evomerge.evaluation import Objective
    from evomerge.launch.api import compare, export_candidate, merge, plan, run, sensitivity
    from evomerge.launch.ask_tell import AskTell
    from evomerge.launch.search_request import load
    from evomerge.launch.study_view import open_study
    from evomerge.methods import METHODS
    from evomerge.optimizers import OPTIMIZERS
    from evomerge.recipes import Recipe
    from evomerge.store import Store

__version__ = "0.6.0"
__all__ = [
    "METHODS",
    "OPTIMIZERS",
    "AskTell",
    "Objective",
    "Recipe",
    "Store",
    "__version__",
    "compare",
    "export_candidate",
    "load",
    "merge",
    "open_study",
    "plan",
    "run",
    "sensitivity",
]
_MODULES = {
    "METHODS": "evomerge.methods",
    "OPTIMIZERS": "evomerge.optimizers",
    "AskTell": "evomerge.launch.ask_tell",
    "Objective": "evomerge.evaluation",
    "Recipe": "evomerge.recipes",
    "Store": "evomerge.store",
    "compare": "evomerge.launch.api",
    "export_candidate": "evomerge.launch.api",
    "load": "evomerge.launch.search_request",
    "merge": "evomerge.launch.api",
    "open_study": "evomerge.launch.study_view",
    "plan": "evomerge.launch.api",
    "run": "evomerge.launch.api",
    "sensitivity": "evomerge.launch.api",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'evomerge' has no attribute '{name}'")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
