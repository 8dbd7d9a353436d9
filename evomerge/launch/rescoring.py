"""Re-scoring of stored candidates with their models open: candidates compared, coefficients scanned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evomerge import reports
from evomerge.errors import StudyError
from evomerge.evaluation import Evaluation, Items, Objective, Role
from evomerge.launch import objective as objective_module
from evomerge.launch.opening import Allowed, Opened, open_stored_search
from evomerge.recipes import Recipe
from evomerge.reports import comparison, outputs, plots
from evomerge.reports import sensitivity as scanning
from evomerge.reports.comparison import Contender
from evomerge.spaces import Axis, MergeSpace
from evomerge.store import NewEvaluation, Store, Trial
from evomerge.store.paths import store_path
from evomerge.workers.worker import Worker

OnProgress = Callable[[int, int], None]
"""Called with how many are done and how many there are."""


def silent(done: int, total: int) -> None:
    """Shows no progress.

    Args:
        done: How many are done.
        total: How many there are.
    """


@dataclass(frozen=True, slots=True)
class CompareRequest:
    """What to compare candidates on.

    Attributes:
        role: Whose items: 'search', 'validation' or 'test'.
        task: The only task to compare on; None for all, and the objective.
        samples: How many items are asked again, to show every model's output; None for none.
        score: Score now the items that one candidate was scored on and another was not, all of the role where
            none was.
            The search never reads these scores. On test items they are stored as looks, so that what test
            items were used for is known; on others they are shown alone.
    """

    role: Role = "test"
    task: str | None = None
    samples: int | None = None
    score: bool = False


@dataclass(frozen=True, slots=True)
class ScanRequest:
    """Which coefficients to scan, how far, and on which items.

    Attributes:
        step: Distance of two points of a coefficient, in its own units, above 0.
        span: How far to both sides of the candidate's value, within the coefficient's bounds.
        pattern: Part of the axes' names, or a pattern with * and ?; None for all axes.
        role: Whose items: 'search' or 'validation'.
        count: Items of each task; None for as many as a generation has.
    """

    step: float = 0.1
    span: float = 0.3
    pattern: str | None = None
    role: Role = "search"
    count: int | None = None


def compare(
    candidates: Sequence[tuple[str, str, str]],
    root: Path,
    request: CompareRequest,
    *,
    allowed: Allowed | None = None,
    show: OnProgress = silent,
) -> dict[str, Any]:
    """Compares candidates on the items of a role that all were scored on.

    Args:
        candidates: (name to show, study, reference) of each; the others are compared with the first.
        root: Folder of the studies.
        request: What to compare on.
        allowed: What the tasks may do, where models are asked again.
        show: Called with (done, total) of candidates scored or asked.

    Returns:
        Plain data, see `evomerge.reports.comparison.compare`, with 'role', 'notes', and 'samples' where they
        were requested.

    Raises:
        StudyError: If the studies have other tasks, no items are shared, or test items are to be scored in a
            study that another process writes.
    """
    looks = request.score and request.role == "test"  # each is a row of its study
    with ExitStack() as stack:
        stores = {
            study: stack.enter_context(Store.open(store_path(study, root), write=looks))
            for study in dict.fromkeys(study for _, study, _ in candidates)
        }
        contenders = [
            comparison.contender(stores[study], name, reference, request.role)
            for name, study, reference in candidates
        ]
        rows = {study: row for study, store in stores.items() if (row := store.study()) is not None}
        objectives = {study: objective_module.stored_objective(row) for study, row in rows.items()}
        notes = comparison.check_comparable({study: row.facts for study, row in rows.items()}, request.task)
        models = _Models(stores, allowed)
        if request.score:
            contenders = models.score(contenders, request.role, show)
        first = contenders[0].study
        if any(objective != objectives[first] for objective in objectives.values()):
            notes.append(f"the studies weigh their tasks differently; the objective here is that of {first}")
        data = comparison.compare(contenders, objectives[first], request.task)
        data |= {"role": request.role, "notes": notes}
        if request.samples is not None:
            shared = comparison.common_items(contenders, request.task)
            chosen = comparison.most_different_items(contenders, shared, request.samples)
            data["samples"] = models.samples(contenders, chosen, show)
            data["notes"] += _kept_outputs(stores, contenders, data["samples"])
    return data


def _kept_outputs(
    stores: Mapping[str, Store], contenders: Sequence[Contender], samples: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Keeps outputs beside each study, for its page; notes where they could not be."""
    notes = []
    for study, store in stores.items():
        own = [c.recipe.id if c.study == store.path.parent.name else "" for c in contenders]
        try:
            outputs.keep_outputs(store.path.parent, own, samples)
        except OSError as error:
            notes.append(f"the outputs are not kept beside {study} for its page: {error.strerror or error}")
    return notes


def sensitivity(
    store: Store,
    reference: str,
    request: ScanRequest,
    *,
    plot: Path | None = None,
    allowed: Allowed | None = None,
    show: OnProgress = silent,
) -> dict[str, Any]:
    """Scans a candidate's coefficients, one at a time.

    Points are stored, and those stored before are not scored again.

    Args:
        store: Of the study, open for writing.
        reference: The candidate: its number, 'best', or the label of a parent or hand recipe.
        request: Which coefficients, how far and on which items.
        plot: A picture of the curves to draw, .png, .svg or .pdf.
        allowed: What the tasks may do.
        show: Called with (done, total) of the points.

    Returns:
        Plain data: the candidate's score, and for each axis its steps, slope and verdict.

    Raises:
        StudyError: If the candidate is not of a first weight search, or models or tasks have changed.
    """
    if plot is not None:
        plots.check(plot)
    trial = reports.resolve(store, reference)
    opened = open_stored_search(store, allowed)
    if trial.stage or opened.settings.kinds[0] != "weights":
        raise StudyError(
            f"candidate {trial.id} is of another stage than a first search of weights, or came after one: "
            "only the coefficients of a first weight search are scanned"
        )
    scan = _Scan.of(store, trial, opened, request)
    evaluated = scan.run(store, show)
    data = scan.data(store, evaluated)
    if plot is not None:
        title = f"{scan.name}, {scan.num_items} {request.role} items"
        plots.sensitivity(scan.curves(store), title, plot)
    return data


@dataclass(frozen=True, slots=True)
class _Scan:
    """A candidate's neighbours in the space of weights, and the items that they are scored on.

    centre: the recipe of `genome`, which is the candidate's own where it is a point of the space.
    """

    trial: Trial
    opened: Opened
    request: ScanRequest
    genome: tuple[float, ...]
    centre: Recipe
    neighbours: Sequence[scanning.Point]
    items: Items
    notes: tuple[str, ...]

    @classmethod
    def of(cls, store: Store, trial: Trial, opened: Opened, request: ScanRequest) -> _Scan:
        recipe, space = store.recipe(trial.recipe_id), opened.space
        genome = scanning.genome_of(space, recipe, trial.genome)
        axes = _numbers(space, scanning.matching_axes(space.axes, request.pattern))
        neighbours = scanning.points(space, genome, axes, request.step, request.span)
        centre = space.decode(genome)
        notes = []
        if centre.id != recipe.id:
            notes.append(f"recipe {recipe.id} is no point of the space; its nearest, {centre.id}, is scanned")
        if not opened.objective.is_mean_of_items:
            notes.append(
                "the objective is no mean of items: errors, slopes and verdicts are of the weighted mean of "
                "the items' values"
            )
        items = scan_items(opened, request)
        return cls(trial, opened, request, genome, centre, neighbours, items, tuple(notes))

    @property
    def name(self) -> str:
        return f"{self.opened.settings.study}/{self.trial.id}"

    @property
    def num_items(self) -> int:
        return sum(map(len, self.items.values()))

    def run(self, store: Store, show: OnProgress) -> int:
        """Scores the points that are not stored yet; returns how many. The first of them loads the models."""
        workers: list[Worker] = []

        def evaluate(recipe: Recipe, items: Items) -> Evaluation:
            if not workers:
                workers.append(self.opened.load())
            return workers[0].evaluate(recipe, items)

        objective, role = self.opened.objective, self.request.role
        return scanning.scan(
            store,
            scanning.Scan(self.centre, role, self.items),
            self.neighbours,
            evaluate,
            objective.reported_score,
            show,
        )

    def curves(self, store: Store) -> list[scanning.Curve]:
        points = store.sensitivity(self.centre.id, self.request.role, self.items)
        shares = Objective(self.opened.objective.terms).shares()
        return scanning.curves(self.opened.space, self.genome, self.neighbours, points, shares)

    def data(self, store: Store, evaluated: int) -> dict[str, Any]:
        """What is printed. evaluated: how many points were scored now."""
        points = store.sensitivity(self.centre.id, self.request.role, self.items)
        return {
            "study": self.opened.settings.study,
            "candidate": self.trial.id,
            "recipe": self.centre.id,
            "role": self.request.role,
            "items": self.num_items,
            "step": self.request.step,
            "span": self.request.span,
            "score": points[scanning.CENTRE, 0.0].score,
            "evaluated": evaluated,
            "stored": len(self.neighbours) + 1 - evaluated,
            "notes": list(self.notes),
            "axes": [scanning.curve_data(curve) for curve in self.curves(store)],
        }


def _numbers(space: MergeSpace, places: Sequence[int]) -> list[int]:
    """Those of some axes that are numbers, which alone are scanned."""
    numbers = [place for place in places if isinstance(space.axes[place], Axis)]
    if not numbers:
        raise StudyError(
            f"'{space.axes[places[0]].name}' is a choice, and numbers alone are scanned; "
            "leave the pattern out, or give one of a parameter such as weight"
        )
    return numbers


def scan_items(opened: Opened, request: ScanRequest) -> Items:
    """The items of a scan: so many of each task, or as many as a generation has.

    Args:
        opened: The search.
        request: Role and number of the items.

    Returns:
        Task -> items.
    """
    pool = opened.harness.items(request.role)
    if request.count is not None:
        sizes = dict.fromkeys(pool, request.count)
    else:
        search = opened.harness.items("search")
        generation = objective_module.first_items(search, opened.settings, opened.objective)
        sizes = {task: len(ids) for task, ids in generation.items()}
    return scanning.scan_items(pool, sizes)


class _Models:
    """The models of the studies, opened to score candidates again; one study is open at a time."""

    def __init__(self, stores: Mapping[str, Store], allowed: Allowed | None) -> None:
        self._stores, self._allowed = stores, allowed
        self._study: str | None = None
        self._opened: Opened
        self._worker: Worker

    def score(self, contenders: Sequence[Contender], role: Role, show: OnProgress) -> list[Contender]:
        """The candidates, each scored on what others have and it lacks, as far as its study has that."""
        any_scored = any(contender.scores for contender in contenders)
        requested = []
        for contender, missing in zip(contenders, comparison.missing_items(contenders), strict=True):
            if not any_scored:
                requested.append(self._items(contender.study, role))
            elif missing:
                available = self._items(contender.study, role)
                requested.append(_intersection(missing, available))
            else:
                requested.append({})
        scored = []
        for done, (contender, items) in enumerate(zip(contenders, requested, strict=True), 1):
            scored.append(self._scored(contender, items, role) if items else contender)
            show(done, len(contenders))
        return scored

    def samples(
        self, contenders: Sequence[Contender], items: Items, show: OnProgress
    ) -> list[dict[str, Any]]:
        """Item by item the prompt, the right answer and every candidate's output."""
        rows: dict[tuple[str, str], dict[str, Any]] = {}
        for done, contender in enumerate(contenders, 1):
            self._open(contender.study)
            self._merge(contender, items)
            module = self._worker.module(contender.recipe, items)
            for s in self._opened.harness.samples(module, items):
                new = {"task": s.task, "item": s.item, "prompt": s.prompt, "target": s.target, "answers": []}
                row = rows.setdefault((s.task, s.item), new)
                options = [
                    {"text": o.text, "probability": o.probability, "right": o.right, "chosen": o.chosen}
                    for o in s.options
                ]
                answer = {"name": contender.name, "value": s.value, "output": s.output, "options": options}
                row["answers"].append(answer)
            show(done, len(contenders))
        return list(rows.values())

    def _items(self, study: str, role: Role) -> dict[str, tuple[str, ...]]:
        self._open(study)
        return {task: tuple(ids) for task, ids in self._opened.harness.items(role).items()}

    def _scored(self, contender: Contender, items: Items, role: Role) -> Contender:
        self._open(contender.study)
        evaluation = self._merge(contender, items)
        if role == "test":
            look = NewEvaluation(contender.recipe, "look", items, evaluation, None)
            self._stores[contender.study].add_evaluation(look)
        scores = {(s.task, s.item): s for s in evaluation.items}
        return replace(
            contender,
            scores={**contender.scores, **scores},
            evaluations=(*contender.evaluations, evaluation),
        )

    def _merge(self, contender: Contender, items: Items) -> Evaluation:
        """Leaves the candidate in the model. Raises StudyError where it cannot be scored."""
        evaluation = self._worker.evaluate(contender.recipe, items)
        if evaluation.error is not None:
            raise StudyError(f"{contender.name} cannot be scored: {evaluation.error}")
        return evaluation

    def _open(self, study: str) -> None:
        if self._study != study:
            self._opened = open_stored_search(self._stores[study], self._allowed)
            self._worker = self._opened.load()
            self._study = study


def _intersection(wanted: Items, available: Items) -> dict[str, tuple[str, ...]]:
    """The items of `wanted` that are available, by task."""
    shared = {}
    for task, ids in wanted.items():
        here = set(available.get(task, ()))
        if common := tuple(item for item in ids if item in here):
            shared[task] = common
    return shared
