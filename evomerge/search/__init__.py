"""The search loop: ask, dispatch, race, store, tell, select. Resume is replay: the same code runs from the start."""

from __future__ import annotations

from evomerge.search.plan import Opening, Plan, Progress, Stage, Start, one_stage
from evomerge.search.study import Study

__all__ = ["Opening", "Plan", "Progress", "Stage", "Start", "Study", "one_stage"]
