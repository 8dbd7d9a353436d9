"""A study or a candidate as plain data: what `status --json` and `show --json` print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evomerge.errors import StudyError
from evomerge.reports.route_text import depths, hops
from evomerge.store import Store, Trial


def study_summary(store: Store, check: bool = True) -> dict[str, Any]:
    """State, counts, best and every parent and hand recipe with search, validation and test scores, front and retention.

    state: running, interrupted (running, but its process is gone), paused, failed or done. search: the objective by the
    tasks' metrics, also where candidates are ranked by soft scores. dropped: candidates that a race took out; partial:
    those that it scored on a part of the items. store: what its check found, 'not checked' unless check. pareto: ids of the
    candidates on the front, see `front`. retention: the outcome's rows, empty before the end.
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
        "dropped": sum(t.dropped is not None for t in searched),
        "partial": sum(t.whole is not None for t in searched),
        "generations": max((t.generation for t in searched), default=0),
        "evaluations_by_role": {role: n for role, n in counts.items() if role != "failed"},
        "store": store.check() if check else "not checked",
        "pareto": [t.id for t in _front(store)[1]],
        "retention": [] if study.outcome is None else list(study.outcome.retention),
    }
    if study.outcome is not None:
        outcome = study.outcome
        return out | {
            "best": outcome.best,
            "references": list(outcome.references),
            "finalists": list(outcome.finalists),
        }
    standing = [t for t in trials if t.score is not None and t.dropped is None]
    leader = max(standing, key=lambda t: (-t.violation, t.score or 0.0, -t.id), default=None)
    rows = [_row(t) for t in trials if t.generation == 0]
    return out | {"best": _row(leader) if leader else None, "references": rows, "finalists": []}


def resolve(store: Store, reference: str) -> Trial:
    """The trial that 'best', a number or the label of a parent or hand recipe names."""
    study = store.study()
    if study is None:
        raise StudyError(f"{store.path} holds no study yet")
    if reference == "best":
        best = study_summary(store, check=False)["best"]
        if best is None:
            raise StudyError(f"{study.name} has no scored candidate yet")
        return store.trial(int(best["id"]))
    if not (reference.isascii() and reference.isdigit() and len(reference) < 18):
        labelled = {t.label: t for t in reversed(store.trials()) if t.origin in ("parent", "hand")}
        if reference not in labelled:
            raise StudyError(
                f"'{reference}' names no candidate of {study.name}; use a number, 'best', or a parent's or hand recipe's name"
            )
        return labelled[reference]
    return store.trial(int(reference))


def front(store: Store) -> dict[str, Any]:
    """The Pareto front over tasks: candidates that none of those scored on the same items equals or betters everywhere.

    Of a finished search, finalists, parents and hand recipes on the validation items; before, the last generation. Scores
    on different items are not compared, so that there is no front across generations.
    """
    study = store.study()
    if study is None:
        raise StudyError(f"{store.path} holds no study yet")
    where, trials = _front(store)
    tasks, rows = list(study.facts.tasks), []
    for trial in trials:
        scored = (
            [s for role, s in store.evaluations(trial.recipe_id) if role == "validation"]
            if where == "validation"
            else []
        )
        metrics, objective = (
            (scored[0].evaluation.metrics, scored[0].reported) if scored else (trial.metrics, trial.reported)
        )
        name = {
            "id": trial.id,
            "origin": trial.origin,
            "label": trial.label,
            "generation": trial.generation,
            "recipe": trial.recipe_id,
        }
        rows.append(
            name
            | {"objective": objective, "metrics": {task: metrics[task] for task in tasks if task in metrics}}
        )
    return {"study": study.name, "items": where, "tasks": tasks, "candidates": rows}


def lost_skills(retention: Sequence[Mapping[str, Any]]) -> str:
    """One sentence for the skills of parents that the winner has lost on the test items, '' where nothing is known.

    Of a task only the largest fall is named.
    """
    if not retention:
        return ""
    worst: dict[str, Mapping[str, Any]] = {}
    for r in sorted((r for r in retention if r["lost"]), key=lambda r: float(r["difference"])):
        worst.setdefault(r["task"], r)
    rows = [
        f"task {t} {r['difference']:+.3f} ± {r['error']:.3f} against {r['parent']}" for t, r in worst.items()
    ]
    return f"LOST: {', '.join(rows)}" if rows else "no skill lost"


def candidate(store: Store, trial: Trial) -> dict[str, Any]:
    """One candidate: where it comes from, its recipe, its scores by role, or why it failed.

    partial: how many of its generation's items a race scored it on, None for all; estimate: (mean, standard error) over
    all search items, of the leaders of a finished search; violation: by how much it breaks the search's `keep`; costs: its
    layers and parameters; route: its layers in words, None for a merge of whole models.
    """
    study = store.study()
    recipe = store.recipe(trial.recipe_id)
    is_route = recipe.is_route(depths(store))
    outcome = None if study is None else study.outcome
    estimate = None if outcome is None else outcome.estimates.get(trial.id)
    scores = []
    for role, scored in store.evaluations(trial.recipe_id):
        e = scored.evaluation
        row = {
            "role": role,
            "objective": scored.reported,
            "ranked_by": scored.score,
            "metrics": dict(e.metrics),
            "items": len(e.items),
            "seconds": dict(e.seconds),
        }
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
        "dropped": trial.dropped,
        "partial": _partial(store, trial),
        "violation": trial.violation,
        "estimate": None if estimate is None else list(estimate),
        "scores": scores,
        "genome": trial.genome,
        "stage": trial.stage,
        "costs": dict(trial.costs),
        "route": hops(recipe) if is_route else None,
    }


def _front(store: Store) -> tuple[str, list[Trial]]:
    """(which items, candidates) of the front that is shown."""
    validated = store.front("validation")
    if validated:
        return "validation", validated
    newest = store.front("search")
    return (f"generation {max(t.generation for t in newest)}" if newest else "none"), newest


def _partial(store: Store, trial: Trial) -> str | None:
    """'25 of 100 items' for a candidate that a race scored on a part of them."""
    return (
        None if trial.whole is None else f"{len(store.scored(trial).evaluation.items)} of {trial.whole} items"
    )


def _row(trial: Trial) -> dict[str, Any]:
    row = {
        "id": trial.id,
        "origin": trial.origin,
        "label": trial.label,
        "recipe": trial.recipe_id,
        "search": trial.reported,
    }
    return row | ({"error": trial.error} if trial.error else {})
