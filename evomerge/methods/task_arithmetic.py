"""Task arithmetic (Ilharco et al. 2023, arXiv 2212.04089): add weighted task vectors to the base."""

from evomerge.methods import task_vectors
from evomerge.methods.method import Method

TASK_ARITHMETIC = Method(
    name="task_arithmetic",
    kernel=task_vectors.merge,
    params=task_vectors.params(normalize=False, rescale=False, density=False),
    needs_base=True,
    paper="arXiv 2212.04089",
    summary="base + weighted sum of task vectors",
)
