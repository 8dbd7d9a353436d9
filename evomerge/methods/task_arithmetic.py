"""Task arithmetic (Ilharco et al. 2023, arXiv 2212.04089): add weighted task vectors to the base.

A negative weight subtracts a skill (unlearning); a task analogy C + (B - A) is a merge of its own (see the
README).
"""

from __future__ import annotations

from evomerge.methods.declaration import TaskVectorSum
from evomerge.methods.task_vectors import task_vector_method

TASK_ARITHMETIC = task_vector_method(
    "task_arithmetic",
    TaskVectorSum(),
    normalize=False,
    paper="arXiv 2212.04089",
    summary="base + weighted sum of task vectors",
)
