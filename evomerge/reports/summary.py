"""A study or a candidate as plain data: what `status --json` and `show --json` print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from evomerge.errors import StudyError
from evomerge.evaluation import Term
from evomerge.evaluation.flat_tasks import find_flat_tasks
from evomerge.recipes import Recipe
from evomerge.reports.learned_stages import agreements, label_rows
from evomerge.reports.route_text import depths, hops, methods_by_place
from evomerge.reports.stages import stage_rows
from evomerge.reports.tally import Tally, rank
from evomerge.reports.verdict import verdict
from evomerge.store import Scored, Store, StudyFacts, StudyRow, Trial


def study_summary(store: Store, check: bool = True, trials: Sequence[Trial] | None = None) -> dict[str, Any]:
    """Summarizes a study: state, counts, the best candidate and what it is compared with.

    Args:
        store: An open study.
        check: Check the whole file, which takes about a second for 100 MB.
        trials: All of its trials, where the caller has read them; None to read them here.

    Returns:
        `state`: 'running', 'interrupted' (running, but its process is gone), 'paused', 'failed' or 'done'.
        `evaluations`: candidates of the search, of which `failed` failed, a race dropped `dropped` and scored
        `partial` on a part of the items. `store`: what the check found, 'not checked' without one. `pareto`:
        ids of the candidates on the front, see `front`. `best`, `references` (parents and hand recipes) and
        `finalists`: rows with scores by role, of which `search` is the objective by the tasks' metrics, also
        where candidates are ranked by soft metrics. `test_items`: how many `winners` they were used for, and
        at how many candidates somebody `looks` by hand. `retention`: by task and parent what the winner has
        lost, empty before the end. `stages`: see `evomerge.reports.stages.stage_rows`. `agreements`,
        `labels`: of learned stages, see `evomerge.reports.learned_stages`. `flat`: a sentence for each task
        on which all parents score alike. `alike`: a sentence where a finished search has no winner since all
        score alike, else ''. `metrics`: of each task what is scored, by which filter. `figures`: budget, pace
        and cost, see `evomerge.reports.tally.Figures`.
        `verdict`: `kind` and `sentence`, see `evomerge.reports.verdict.Verdict`.

    Raises:
        StudyError: The file holds no study yet.
    """
    study = _study(store)
    trials = store.trials() if trials is None else trials
    counts = store.count_evaluations()
    searched = [trial for trial in trials if trial.generation > 0 and trial.origin != "mean"]
    interrupted = study.state == "running" and not store.is_driven()
    data: dict[str, Any] = {
        "study": study.name,
        "state": "interrupted" if interrupted else study.state,
        "seed": study.seed,
        "evaluations": len(searched),
        "failed": counts.get("failed", 0),
        "dropped": sum(trial.dropped is not None for trial in searched),
        "partial": sum(trial.whole is not None for trial in searched),
        "generations": max((trial.generation for trial in searched), default=0),
        "evaluations_by_role": {role: count for role, count in counts.items() if role != "failed"},
        "store": store.check() if check else "not checked",
        "pareto": [trial.id for trial in _front(store)[1]],
        "flat": flat_tasks(store, trials),
        "metrics": metric_names(study.facts),
        "test_items": _test_items(store, study),
        "retention": [] if study.outcome is None else list(study.outcome.retention),
        "agreements": agreements(study),
        "labels": label_rows(store, study, trials),
        "stages": stage_rows(store, trials),
        "figures": Tally.of(store, trials).figures().to_json(),
    }
    data |= _ranking(study, trials)
    return data | {"verdict": asdict(verdict(data))}


def _ranking(study: StudyRow, trials: Sequence[Trial]) -> dict[str, Any]:
    """The best, what it is compared with, the finalists, and whether all score alike."""
    if study.outcome is not None:
        rows = [study.outcome.best, *study.outcome.references, *study.outcome.finalists]
        return {
            "best": study.outcome.best,
            "references": list(study.outcome.references),
            "finalists": list(study.outcome.finalists),
            "alike": all_alike(trials, rows),
        }
    scored = [trial for trial in trials if trial.score is not None and trial.dropped is None]
    leader = max(scored, key=rank, default=None)
    return {
        "best": _row(leader) if leader else None,
        "references": [_row(trial) for trial in trials if trial.generation == 0],
        "finalists": [],
        "alike": "",
    }


def all_alike(trials: Sequence[Trial], rows: Sequence[Mapping[str, Any]]) -> str:
    """Says of a search in which all models have one score that it has no winner.

    Args:
        trials: All candidates, parents and hand recipes.
        rows: Those that were compared at the end, with their scores by role.

    Returns:
        A sentence without a full stop; '' where scores differ, or only one model was scored.
    """
    whole = [trial for trial in trials if trial.score is not None and trial.dropped is None]
    scored = {trial.recipe_id for trial in whole}
    metrics = {tuple(sorted(trial.metrics.items())) for trial in whole}  # those that rank among them
    validation = {row["validation"] for row in rows if row.get("validation") is not None}
    if len(scored) < 2 or len(metrics) > 1 or len(validation) > 1:
        return ""
    value = f"{whole[0].reported if whole[0].reported is not None else whole[0].score:.3f} on search items"
    if validation:
        value += f" and {validation.pop():.3f} on validation items"
    return (
        f"all {len(scored)} candidates, parents and hand recipes score alike ({value}), so nothing was "
        "learned and there is no winner"
    )


def metric_names(facts: StudyFacts) -> dict[str, str]:
    """Names what is scored of each task.

    Args:
        facts: Of a study.

    Returns:
        Task -> its metric and, where a text is filtered, the filter: 'exact_match, strict-match'.
    """
    filters = facts.filters
    return {
        task: f"{metric}, {filters[task]}" if task in filters else metric
        for task, metric in facts.metrics.items()
    }


def flat_tasks(store: Store, trials: Sequence[Trial]) -> list[str]:
    """Names the tasks on which all parents scored alike before the search, at their floor or elsewhere.

    Args:
        store: An open study.
        trials: Its trials.

    Returns:
        A sentence without a full stop for each such task.
    """
    parents = {
        str(trial.label): store.scored(trial).evaluation
        for trial in trials
        if trial.origin == "parent" and trial.score is not None
    }
    terms = [
        Term(task, sign=facts.sign, subtasks=facts.subtasks)
        for task, facts in _study(store).facts.terms.items()
    ]
    return [task.sentence() for task in find_flat_tasks(terms, parents)]


def test_item_uses(data: Mapping[str, Any]) -> str:
    """Says what the test items of a study were used for.

    Args:
        data: As `study_summary` gives it.

    Returns:
        A clause, '' where they were not used.
    """
    winners, looks = data["test_items"]["winners"], data["test_items"]["looks"]
    if not winners and not looks:
        return ""
    uses = [f"for {winners} winner{'s' if winners != 1 else ''}"] if winners else []
    uses += [f"by hand for {looks} other candidate{'s' if looks != 1 else ''}"] if looks else []
    return f"test items were used {', and '.join(uses)}"


def resolve(store: Store, reference: str) -> Trial:
    """Looks up a candidate.

    Args:
        store: An open study.
        reference: 'best', the number of a candidate, or the label of a parent or hand recipe.

    Returns:
        The trial.

    Raises:
        StudyError: There is no such candidate.
    """
    study = _study(store)
    if reference == "best":
        best = study_summary(store, check=False)["best"]
        if best is None:
            raise StudyError(f"{study.name} has no scored candidate yet")
        return store.trial(int(best["id"]))
    if reference.isascii() and reference.isdigit() and len(reference) < 18:
        return store.trial(int(reference))
    labelled = {
        trial.label: trial for trial in reversed(store.trials()) if trial.origin in ("parent", "hand")
    }
    if reference not in labelled:
        raise StudyError(
            f"'{reference}' names no candidate of {study.name}; "
            "use a number, 'best', or a parent's or hand recipe's name"
        )
    return labelled[reference]


def leaders(store: Store, count: int) -> list[Trial]:
    """Ranks the candidates of a search: the winner, the other finalists, then the others.

    Finalists are ranked by their validation scores; what was not a finalist by its search score, among those
    that no race dropped, where other generations have other items.

    Args:
        store: An open study.
        count: Most candidates, at least 1.

    Returns:
        The best first, each recipe once; fewer where there are no more.

    Raises:
        StudyError: The file holds no study yet.
    """
    study, trials = _study(store), store.trials()
    searched = [t for t in trials if t.generation > 0 and t.score is not None and t.dropped is None]
    searched.sort(key=lambda trial: (trial.violation, -(trial.score or 0.0), trial.id))
    first: list[int] = []
    if study.outcome is not None:
        scored = [row for row in study.outcome.finalists if row.get("validation") is not None]
        scored.sort(key=lambda row: -float(row["validation"]))
        first = [int(row["id"]) for row in (study.outcome.best, *scored)]
    known = {trial.id: trial for trial in trials}
    ranked: dict[str, Trial] = {}
    for trial in (*(known[i] for i in first if i in known), *searched):
        ranked.setdefault(trial.recipe_id, trial)
    return list(ranked.values())[:count]


def front(store: Store) -> dict[str, Any]:
    """Reads the Pareto front over tasks.

    On it are candidates that no other equals or betters in every task and betters in one. Scores on different
    items are not compared, so that there is no front across generations.

    Args:
        store: An open study.

    Returns:
        `items`: 'validation' in a finished search, whose front is of finalists, parents and hand recipes;
        before, the last generation; 'none' without a front. `tasks`: their names. `candidates`: rows with
        objective and metrics on these items.

    Raises:
        StudyError: The file holds no study yet.
    """
    study = _study(store)
    items, trials = _front(store)
    tasks = list(study.facts.tasks)
    candidates = []
    for trial in trials:
        metrics, objective = trial.metrics, trial.reported
        validated = _validation(store, trial) if items == "validation" else None
        if validated is not None:
            metrics, objective = validated.evaluation.metrics, validated.reported
        candidates.append(
            {
                "id": trial.id,
                "origin": trial.origin,
                "label": trial.label,
                "generation": trial.generation,
                "recipe": trial.recipe_id,
                "objective": objective,
                "metrics": {task: metrics[task] for task in tasks if task in metrics},
            }
        )
    return {"study": study.name, "items": items, "tasks": tasks, "candidates": candidates}


def lost_skills(retention: Sequence[Mapping[str, Any]]) -> str:
    """Says which skills of parents the winner has lost on the test items.

    Args:
        retention: Rows of `Outcome.retention`.

    Returns:
        A sentence with the largest fall of each task, 'no skill lost', or '' where nothing is known; and the
        tasks in which no parent had a skill to lose.
    """
    if not retention:
        return ""
    largest: dict[str, Mapping[str, Any]] = {}
    lost_rows = [row for row in retention if row["lost"]]
    for row in sorted(lost_rows, key=lambda row: float(row["difference"])):
        largest.setdefault(row["task"], row)
    falls = [
        f"task {task} {row['difference']:+.3f} ± {row['error']:.3f} against {row['parent']}"
        for task, row in largest.items()
    ]
    tasks = dict.fromkeys(row["task"] for row in retention)
    none = [task for task in tasks if all("floor" in row for row in retention if row["task"] == task)]
    items = {row["task"]: row.get("floor") for row in retention}
    nothing = [f"task {task}: no parent had it (0 of {items[task]} right), nothing to keep" for task in none]
    kept = [f"LOST: {', '.join(falls)}"] if falls else ["no skill lost"] * (len(none) < len(tasks))
    return "; ".join([*kept, *nothing])


def candidate(store: Store, trial: Trial) -> dict[str, Any]:
    """Collects what is stored of a candidate.

    Args:
        store: An open study.
        trial: One of its trials.

    Returns:
        Where it comes from, its recipe and genome, its `scores` by role, or the `error` that it failed by.
        `partial`: how many of its generation's items a race scored it on, None for all. `estimate`: (mean,
        standard error) over all search items, of the leaders of a finished search. `violation`: by how much
        it breaks the retention constraints. `costs`: its layers and parameters. `route`: its layers in words,
        None for a merge of whole models. `methods`: method -> its places, of such a merge by several methods.
        `coefficients`: `models` and `rows` of (layers, a number for each model). `agreements`: of its stage,
        where that is a learned one.
    """
    study = store.study()
    outcome = None if study is None else study.outcome
    estimate = None if outcome is None else outcome.estimates.get(trial.id)
    recipe = store.recipe(trial.recipe_id)
    is_route = recipe.is_route(depths(store))
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
        "scores": [_score_row(role, scored) for role, scored in store.evaluations(trial.recipe_id)],
        "genome": trial.genome,
        "stage": trial.stage,
        "costs": dict(trial.costs),
        "route": hops(recipe) if is_route else None,
        "methods": {} if is_route else dict(methods_by_place(recipe)),
        "coefficients": _coefficients(recipe),
        "agreements": [
            row for row in ([] if study is None else agreements(study)) if row["stage"] == trial.stage + 1
        ],
    }


def _coefficients(recipe: Recipe) -> dict[str, Any]:
    """How much of each model a recipe takes, by layers and component."""
    from evomerge.reports.panels.beliefs import recipe_rows  # its package's face imports this module

    models, rows = recipe_rows(recipe)
    return {"models": models, "rows": [[name, values] for name, values in rows]}


def _study(store: Store) -> StudyRow:
    study = store.study()
    if study is None:
        raise StudyError(f"{store.path} holds no study yet")
    return study


def _test_items(store: Store, study: StudyRow) -> dict[str, int]:
    """How many winners test items were used for, and how many candidates somebody looked at."""
    uses = store.usage.test_uses()
    winners = {use.recipe_id for use in uses if use.tests and not use.is_reference}
    if study.outcome is not None and study.outcome.best.get("test") is not None:
        winners.add(str(study.outcome.best.get("recipe")))
    return {"winners": len(winners), "looks": sum(use.looks > 0 for use in uses)}


def _front(store: Store) -> tuple[str, list[Trial]]:
    """(which items, candidates) of the front that is shown."""
    validated = store.front("validation")
    if validated:
        return "validation", validated
    newest = store.front("search")
    if newest:
        return f"generation {max(trial.generation for trial in newest)}", newest
    return "none", newest


def _validation(store: Store, trial: Trial) -> Scored | None:
    """The first evaluation of a candidate on validation items."""
    for role, scored in store.evaluations(trial.recipe_id):
        if role == "validation":
            return scored
    return None


def _partial(store: Store, trial: Trial) -> str | None:
    """'25 of 100 items' for a candidate that a race scored on a part of them."""
    if trial.whole is None:
        return None
    return f"{len(store.scored(trial).evaluation.items)} of {trial.whole} items"


def _score_row(role: str, scored: Scored) -> dict[str, Any]:
    evaluation = scored.evaluation
    row = {
        "role": role,
        "objective": scored.reported,
        "ranked_by": scored.score,
        "metrics": dict(evaluation.metrics),
        "items": len(evaluation.items),
        "seconds": dict(evaluation.seconds),
    }
    if evaluation.error:
        row["error"] = evaluation.error
    return row


def _row(trial: Trial) -> dict[str, Any]:
    row = {
        "id": trial.id,
        "origin": trial.origin,
        "label": trial.label,
        "recipe": trial.recipe_id,
        "search": trial.reported,
    }
    if trial.error:
        row["error"] = trial.error
    return row
