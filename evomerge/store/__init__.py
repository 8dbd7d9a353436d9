"""One SQLite file a study: the only package that imports sqlite3. Written by the driver alone; anyone may read.

Every acknowledged evaluation is one committed transaction, synced to the disk: a killed driver loses none. Each row carries
a digest of itself, so that a damage that SQLite takes for data is found too.
"""

from __future__ import annotations

from evomerge.store.rows import Purpose, Run, Scored, StudyRow, Trial, WorkerUse, item_set_id
from evomerge.store.store import Store
from evomerge.store.study_facts import Outcome, ParentFacts, StageOutcome, StudyFacts, TermFacts

__all__ = [
    "Outcome",
    "ParentFacts",
    "Purpose",
    "Run",
    "Scored",
    "StageOutcome",
    "Store",
    "StudyFacts",
    "StudyRow",
    "TermFacts",
    "Trial",
    "WorkerUse",
    "item_set_id",
]
