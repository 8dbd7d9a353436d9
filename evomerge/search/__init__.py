"""The search loop: ask, dispatch, race, store, tell, select.

Resume is replay: the same code runs from the start, and what the store holds is not evaluated again.
`plan` says what is searched and `study` runs it. A stage has one or several islands (`island`), each an
optimizer with its open generations (`generation`, opened by `generation_runner`); `event_loop` submits their
jobs through `dispatch` and hands results back. `item_windows` chooses each generation's items,
`trial_recorder` writes trials, `retention` holds the constraint called `keep` in the search file, `racing`
and `racing_statistics` drop candidates early, `reuse` answers jobs from earlier studies, `selection` and
`final_selection` choose the winner and estimate what it owes to selection.
"""

from __future__ import annotations

from evomerge.search.dispatch import Budget, Dispatch, StopRequest
from evomerge.search.plan import (
    LearnedOpening,
    Opening,
    Plan,
    Progress,
    Relaxation,
    Stage,
    Start,
    one_stage,
)
from evomerge.search.study import Study

__all__ = [
    "Budget",
    "Dispatch",
    "LearnedOpening",
    "Opening",
    "Plan",
    "Progress",
    "Relaxation",
    "Stage",
    "Start",
    "StopRequest",
    "Study",
    "one_stage",
]
