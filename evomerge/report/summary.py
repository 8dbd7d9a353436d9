"""A study or a candidate as plain data: what `status --json` and `show --json` print."""

from __future__ import annotations

from typing import Any

from evomerge.errors import StudyError
from evomerge.store import Store, Trial


def summary(store: Store) -> dict[str, Any]:
    """State, counts, best and every parent and hand recipe with search, validation and test scores.

    state: running, interrupted (running, but its process is gone), paused, failed or done.
    """
    study = store.study()
    if study is None:
        raise StudyError(f"{store.path} holds no study yet")
    trials = store.trials()
    counts = store.count_evaluations()
    searched = [t for t in trials if t.generation > 0 and t.origin != "mean"]
    out: dict[str, Any] = {
        "study": study.name,
        "state": "interrupted" if study.state == "running" and not store.is_driven() else study.state,
        "seed": study.seed,
        "evaluations": len(searched),
        "failed": counts.get("failed", 0),
        "generations": max((t.generation for t in searched), default=0),
        "evaluations_by_role": {role: n for role, n in counts.items() if role != "failed"},
        "store": store.check(),
    }
    if study.outcome is not None:
        return out | {key: study.outcome[key] for key in ("best", "references", "finalists")}
    leader = max((t for t in trials if t.score is not None), key=lambda t: (t.score or 0.0, -t.id), default=None)
    rows = [_row(t) for t in trials if t.generation == 0]
    return out | {"best": _row(leader) if leader else None, "references": rows, "finalists": []}


def resolve(store: Store, reference: str) -> Trial:
    """The trial that 'best', a number or the label of a parent or hand recipe names."""
    study = store.study()
    if study is None:
        raise StudyError(f"{store.path} holds no study yet")
    if reference == "best":
        best = summary(store)["best"]
        if best is None:
            raise StudyError(f"{study.name} has no scored candidate yet")
        return store.trial(int(best["id"]))
    if not (reference.isascii() and reference.isdigit() and len(reference) < 18):
        labelled = {t.label: t for t in store.trials() if t.generation == 0}
        if reference not in labelled:
            raise StudyError(f"'{reference}' names no candidate of {study.name}; use a number, 'best', or a parent's or hand recipe's name")
        return labelled[reference]
    return store.trial(int(reference))


def candidate(store: Store, trial: Trial) -> dict[str, Any]:
    """One candidate: where it comes from, its recipe, its scores by role, or why it failed."""
    scores = []
    for role, scored in store.evaluations(trial.recipe_id):
        e = scored.evaluation
        row = {"role": role, "objective": scored.score, "metrics": dict(e.metrics), "items": len(e.items), "seconds": dict(e.seconds)}
        scores.append(row | ({"error": e.error} if e.error else {}))
    return {
        "id": trial.id,
        "generation": trial.generation,
        "slot": trial.slot,
        "origin": trial.origin,
        "label": trial.label,
        "parents": list(trial.parents),
        "recipe": trial.recipe_id,
        "error": trial.error,
        "scores": scores,
        "genome": trial.genome,
    }


def _row(trial: Trial) -> dict[str, Any]:
    row = {"id": trial.id, "origin": trial.origin, "label": trial.label, "recipe": trial.recipe_id, "search": trial.score}
    return row | ({"error": trial.error} if trial.error else {})
