"""What a model card says of a merge with a weight for each row, which is fine-tuning by another name."""

from __future__ import annotations

from evomerge.export.stored_candidate import StoredCandidate


def fine_tuning_note(candidate: StoredCandidate) -> str | None:
    """Says what kind of model a candidate with weights by row is, and on what it was trained.

    Args:
        candidate: The candidate.

    Returns:
        Sentences for its model card; None for a candidate without weights by row.
    """
    count = candidate.recipe.row_numbers
    if not count:
        return None
    items, texts = trained_on(candidate)
    retained = f", and held to a teacher's answers on {texts:,} texts" if texts else ""
    return (
        f"This is fine-tuning in the span of the parents, not only a merge: {count:,} weights, one for each "
        f"row of a matrix and parent, were trained on {items:,} items of the search{retained}. "
        "As fine-tuning does, it may have lost what neither asks for."
    )


def trained_on(candidate: StoredCandidate) -> tuple[int, int]:
    """Counts what the steps of gradient descent before a candidate were scored on.

    Args:
        candidate: The candidate.

    Returns:
        (different items of tasks, different texts that were retained).
    """
    store, trial = candidate.store, candidate.trial
    found: set[tuple[str, str]] = set()
    for step in store.trials():
        if step.origin == "learned" and step.stage <= trial.stage and step.generation <= trial.generation:
            found |= {(score.task, score.item) for score in store.scored(step).evaluation.items}
    texts = {item for task, item in found if task.startswith("retain:")}
    return len([1 for task, _ in found if not task.startswith("retain:")]), len(texts)
