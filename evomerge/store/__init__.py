"""One SQLite file a study, and the only package that imports sqlite3.

The driver alone writes; anyone may read, while it writes too. Every acknowledged evaluation is one committed
transaction, synced to the disk: a killed driver loses none. Each row carries a digest of itself, so that
damage that SQLite takes for data is found.

`store` holds trials, evaluations and recipes by name; `activity_log` attempts, worker time and runs; `usage`
what test items were used for; `pareto_front` the front over tasks; `study_facts` what a study says of itself
and what its search found; `records` the values of the tables, `rows` how a row becomes one. `connection`
opens the file, with `locks`, `file_systems`, `migrations`, `integrity` and `backup`; `paths` says where
studies are, `stop_request` lets another process end a search. Loads no torch.
"""

from __future__ import annotations

from evomerge.store.activity_log import ActivityLog
from evomerge.store.records import (
    BudgetEnd,
    NewEvaluation,
    NewSensitivity,
    NewTrial,
    Purpose,
    Run,
    Scored,
    StudyRow,
    Trial,
    WorkerUse,
)
from evomerge.store.rows import TrialReader, item_set_id
from evomerge.store.store import Store
from evomerge.store.study_facts import Agreement, Outcome, ParentFacts, StageOutcome, StudyFacts, TermFacts
from evomerge.store.usage import Tested

__all__ = [
    "ActivityLog",
    "Agreement",
    "BudgetEnd",
    "NewEvaluation",
    "NewSensitivity",
    "NewTrial",
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
    "Tested",
    "Trial",
    "TrialReader",
    "WorkerUse",
    "item_set_id",
]
