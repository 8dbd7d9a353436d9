"""Optimizers: genomes in and out as arrays, by ask and tell; higher scores are better.

They know nothing of recipes or models. `OPTIMIZERS` has all of them by the name in the search file:

- `cma`: CMA-ES (cma_es.py), for continuous genes;
- `cat_cma`: CatCMA (cat_cma.py), for categorical genes with continuous ones after them;
- `elitist`: (mu + lambda) evolution (elitist.py), for categorical genes first;
- `random`: random search (random_search.py), the baseline.

Every optimizer replays exactly: the same scores give the same genomes, which is what resuming a study rests
on.
"""

from __future__ import annotations

from evomerge.optimizers.base import Array, Optimizer, OptimizerSettings, default_population, is_diagonal
from evomerge.optimizers.registry import OPTIMIZERS, OptimizerEntry, optimizer_for

__all__ = [
    "OPTIMIZERS",
    "Array",
    "Optimizer",
    "OptimizerEntry",
    "OptimizerSettings",
    "default_population",
    "is_diagonal",
    "optimizer_for",
]
