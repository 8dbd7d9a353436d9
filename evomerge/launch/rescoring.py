"""Stored studies looked at again with their models and tasks open: candidates compared, coefficients scanned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from evomerge import reports
from evomerge.errors import StudyError
from evomerge.evaluation import Evaluation, Items, Objective, Role
from evomerge.launch import objective as objective_module
from evomerge.launch import opening
from evomerge.recipes import Recipe
from evomerge.reports import comparison, plots
from evomerge.reports import sensitivity as scanning
from evomerge.reports.comparison import Contender
from evomerge.store import Store
from evomerge.store.paths import store_path
from evomerge.workers.worker import Worker

Show = Callable[[int, int], None]


def compare(
    candidates: Sequence[tuple[str, str, str]],
    root: Path,
    role: Role,
    *,
    task: str | None = None,
    samples: int | None = None,
    score: bool = False,
    allowed: opening.Allowed | None = None,
    show: Show = lambda done, total: None,
) -> dict[str, Any]:
    """Candidates (name, study, reference) on the items of a role that all were scored on, as plain data, see `comparing.compare`.

    samples: so many items are asked again, with every model's output. score: items that one candidate was scored on and
    another not are scored now, all of the role where none was; that is shown and never stored, so that looking at test
    items leaves no trace that a search could follow.
    """
    with ExitStack() as stack:
        stores = {
            study: stack.enter_context(Store.open(store_path(study, root))) for _, study, _ in candidates
        }
        contenders = [
            comparison.contender(stores[study], name, reference, role)
            for name, study, reference in candidates
        ]
        rows = {study: row for study, store in stores.items() if (row := store.study()) is not None}
        objectives = {study: objective_module.stored_objective(row) for study, row in rows.items()}
        notes = comparison.check({study: row.facts for study, row in rows.items()}, task)
        models = _Models(stores, allowed)
        if score:
            contenders = models.score(contenders, role, show)
        objective = objectives[contenders[0].study]
        if any(o != objective for o in objectives.values()):
            notes.append(
                f"the studies weigh their tasks differently; the objective here is that of {contenders[0].study}"
            )
        data = comparison.compare(contenders, objective, task) | {"role": role, "notes": notes}
        if samples is not None:
            chosen = comparison.telling(contenders, comparison.common(contenders, task), samples)
            data["samples"] = models.samples(contenders, chosen, show)
    return data


def sensitivity(
    store: Store,
    reference: str,
    step: float,
    span: float,
    *,
    pattern: str | None = None,
    role: Role = "search",
    count: int | None = None,
    plot: Path | None = None,
    allowed: opening.Allowed | None = None,
    show: Show = lambda done, total: None,
) -> dict[str, Any]:
    """A candidate's coefficients scanned, see `sensitivity.scan`, as plain data; the store must be open for writing.

    pattern: of the axes' names, None for all; count: items of each task, None for a generation's; plot: a picture to draw.
    """
    if plot is not None:
        plots.check(plot)
    trial = reports.resolve(store, reference)
    recipe = store.recipe(trial.recipe_id)
    opened = opening.open_study(store, allowed)
    if trial.stage or opened.settings.kinds[0] != "weights":
        raise StudyError(
            f"candidate {trial.id} is of a stage of routes, or came after one: only the coefficients of a first weight search are scanned"
        )
    space, pool = opened.space, opened.harness.items(role)
    genome = scanning.genome_of(space, recipe, trial.genome)
    neighbours = scanning.points(space, genome, scanning.matching(space.axes, pattern), step, span)
    sizes = {
        task: len(ids)
        for task, ids in objective_module.first_items(
            opened.harness.items("search"), opened.settings, opened.objective
        ).items()
    }
    items = scanning.subset(pool, sizes if count is None else dict.fromkeys(pool, count))
    centre = space.decode(genome)
    notes = (
        []
        if centre.id == recipe.id
        else [f"recipe {recipe.id} is no point of the space; its nearest, {centre.id}, is scanned"]
    )
    if not opened.objective.is_mean_of_items:
        notes.append(
            "the objective is no mean of items: errors, slopes and verdicts are of the weighted mean of the items' values"
        )
    worker: list[Worker] = []

    def evaluate(wanted: Recipe, on: Items) -> Evaluation:
        if not worker:
            worker.append(opened.load())
        return worker[0].evaluate(wanted, on)

    evaluated = scanning.scan(
        store, centre, neighbours, role, items, evaluate, opened.objective.reported_score, show
    )
    known = store.sensitivity(centre.id, role, items)
    found = scanning.curves(space, genome, neighbours, known, Objective(opened.objective.terms).shares())
    title = f"{opened.settings.study}/{trial.id}"
    if plot is not None:
        plots.sensitivity(found, f"{title}, {sum(map(len, items.values()))} {role} items", plot)
    return {
        "study": opened.settings.study,
        "candidate": trial.id,
        "recipe": centre.id,
        "role": role,
        "items": sum(map(len, items.values())),
        "step": step,
        "span": span,
        "score": known[scanning.CENTRE, 0.0].score,
        "evaluated": evaluated,
        "stored": len(neighbours) + 1 - evaluated,
        "notes": notes,
        "axes": [scanning.as_data(curve) for curve in found],
    }


class _Models:
    """The studies' models, each merged and asked again; one study is open at a time."""

    def __init__(self, stores: dict[str, Store], allowed: opening.Allowed | None) -> None:
        self._stores, self._allowed = stores, allowed
        self._study: str | None = None
        self._opened: opening.Opened
        self._worker: Worker

    def score(self, contenders: Sequence[Contender], role: Role, show: Show) -> list[Contender]:
        """The candidates with what they lacked of the others' items scored, as far as their study has those items."""
        lacking = comparison.missing(contenders)
        wanted: list[dict[str, tuple[str, ...]]] = []
        for c, lacks in zip(contenders, lacking, strict=True):
            if not any(other.scores for other in contenders):
                self._open(c.study)
                wanted.append({task: tuple(ids) for task, ids in self._opened.harness.items(role).items()})
            elif lacks:
                self._open(c.study)
                own = {task: set(ids) for task, ids in self._opened.harness.items(role).items()}
                wanted.append(
                    {
                        t: kept
                        for t, ids in lacks.items()
                        if (kept := tuple(i for i in ids if i in own.get(t, ())))
                    }
                )
            else:
                wanted.append({})
        found = []
        for done, (c, items) in enumerate(zip(contenders, wanted, strict=True)):
            found.append(self._scored(c, items) if items else c)
            show(done + 1, len(contenders))
        return found

    def samples(self, contenders: Sequence[Contender], items: Items, show: Show) -> list[dict[str, Any]]:
        """Item by item the prompt, the right answer and every candidate's output."""
        rows: dict[tuple[str, str], dict[str, Any]] = {}
        for done, c in enumerate(contenders):
            self._open(c.study)
            self._merge(c, items)
            for s in self._opened.harness.samples(self._worker.module(c.recipe, items), items):
                row = rows.setdefault(
                    (s.task, s.item),
                    {"task": s.task, "item": s.item, "prompt": s.prompt, "target": s.target, "answers": []},
                )
                options = [
                    {"text": o.text, "probability": o.probability, "right": o.right, "chosen": o.chosen}
                    for o in s.options
                ]
                row["answers"].append(
                    {"name": c.name, "value": s.value, "output": s.output, "options": options}
                )
            show(done + 1, len(contenders))
        return list(rows.values())

    def _scored(self, c: Contender, items: Items) -> Contender:
        self._open(c.study)
        evaluation = self._merge(c, items)
        more = {(s.task, s.item): s for s in evaluation.items}
        return replace(c, scores={**c.scores, **more}, evaluations=(*c.evaluations, evaluation))

    def _merge(self, c: Contender, items: Items) -> Evaluation:
        """Leaves the candidate in the model. Raises StudyError where it cannot be scored."""
        evaluation = self._worker.evaluate(c.recipe, items)
        if evaluation.error is not None:
            raise StudyError(f"{c.name} cannot be scored: {evaluation.error}")
        return evaluation

    def _open(self, study: str) -> None:
        if self._study != study:
            self._opened = opening.open_study(self._stores[study], self._allowed)
            self._worker = self._opened.load()
            self._study = study
