"""An update of a search that runs, for screens. Loads no torch: programs that tests start read it."""

from __future__ import annotations

from evomerge.reports.monitor import Update
from evomerge.reports.tally import Figures, Limits, Standing

FIGURES = Figures(
    evaluations=84,
    budget=500,
    generation=5,
    failed=3,
    best=Standing(57, None, "sampled", 0.612, 0.021),
    parent=Standing(1, "math", "parent", 0.578, 0.022),
    lead=0.034,
    lead_error=0.028,
    rate=1200.0,
    eta=1248.0,
    gpu_hours=2.125,
    cost=4.25,
    limits=Limits(budgets=(500,), price=2.0, cost=16.0),
    on_gpu=True,
)
ENDED = Update("generation", "search", 84, 500, "generation 5: best 0.601, median 0.550", FIGURES)
