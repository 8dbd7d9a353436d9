"""What a search would be, before it starts: models, space, tasks, work, speed. Writes nothing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge.checkpoints import Parent, stored_dtype, total_bytes
from evomerge.checkpoints.licenses import cards_of
from evomerge.config import Config
from evomerge.config.stage_kinds import STAGES
from evomerge.errors import EngineSetupError, EvomergeError, SetupError
from evomerge.evaluation import FORWARDS_OF_A_SLOPE, ROLES, Evaluation, Items
from evomerge.evaluation.engines.installed import vllm_version
from evomerge.evaluation.flat_tasks import find_flat_tasks
from evomerge.evaluation.records import GOLD, LEFT_OUT, SAMPLES
from evomerge.launch import first_scores
from evomerge.launch.expense import cluster_data, cost_data, disk_data
from evomerge.launch.memory import Cards, cards_here, plan_data
from evomerge.launch.objective import first_items
from evomerge.launch.opening import Allowed, Opened, backends, open_search
from evomerge.launch.recommendation import recommendation
from evomerge.launch.route_stages import route_optimizer
from evomerge.launch.stages import open_stages, reference_recipes
from evomerge.launch.tasks import engine_settings
from evomerge.launch.weight_space import is_diagonal
from evomerge.optimizers import OptimizerEntry, optimizer_for
from evomerge.reports.learned_stages import agreement_line, agreements
from evomerge.search import LearnedOpening, Start
from evomerge.search.agreement import ITEMS_ASKED, MOST_COMPARED
from evomerge.search.learned_retention import retained_count
from evomerge.spaces import Axis, MergeSpace, MethodChoiceSpace
from evomerge.spaces.method_choices import MethodAxis
from evomerge.store import Store, StudyFacts, paths
from evomerge.workers.worker import Worker

_TIMED = 3  # candidates whose median is the estimate


def plan_search(
    settings: Config,
    *,
    probe: bool = False,
    allowed: Allowed | None = None,
    cards: Cards | None = None,
    root: Path | None = None,
    show: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Everything about a search that can be known without starting it.

    Args:
        settings: The settings of the search.
        probe: Load the base too, see what answers each task, which items it truncates and which scoring
            techniques it can be
            trusted with, and time a candidate.
        allowed: What the tasks may do.
        cards: Those that memory is planned for; those of this machine unless given.
        root: Folder of the studies, for the room on its disk; None for the default.
        show: Called with what is being done, before it is.

    Returns:
        Plain data, as `evomerge plan --json` prints it.

    Raises:
        EvomergeError: What starting the search would raise.
    """
    show(f"opening {len(settings.models)} models and {len(settings.tasks)} tasks")
    opened = open_search(settings, allowed)
    harness = opened.harness
    first_scores.check_units(settings, harness)
    items = {role: harness.items(role) for role in ROLES}
    stages = _stages(opened, items["search"])
    generation = first_items(items["search"], settings, opened.objective)
    data: dict[str, Any] = {
        "study": settings.study,
        "models": [_model(name, parent, name == settings.base) for name, parent in opened.parents.items()],
        "warnings": list(opened.warnings),
        "space": _space(opened),
        "tasks": [_task(t.task, t.weight, opened, items, generation) for t in settings.tasks],
        "findings": [*harness.warnings(), *_missing_engine(settings), *_known_disagreements(settings)],
        "optimizer": _optimizer(opened, stages[0]["population"]),
        "stages": stages,
        "work": _work(opened, stages, items, generation),
        "memory": plan_data(settings, opened.parents, cards or cards_here()),
    }
    data["disk"] = disk_data(settings, opened.parents, data["work"], root)
    data["cluster"] = cluster_data(settings, data["memory"])
    data["cost"] = cost_data(settings, data["cluster"])
    if settings.merges_weights:
        budget = sum(
            step["candidates"] * step["items"]
            for step in data["work"]["stages"]
            if step["stage"].startswith("search")
        )
        data["recommended"] = recommendation(settings, harness, items["search"], budget)
    if probe:
        show("loading the base, scoring the parents and timing a candidate")
        worker = opened.load()
        parents = _parents(opened, worker, generation)
        first_scores.check_units(settings, harness, parents)
        flat = find_flat_tasks(opened.objective.terms, parents)
        data["findings"] = [
            *harness.warnings(worker.model),
            *_known_disagreements(settings),
            *(task.sentence() for task in flat),
        ]
        data["probe"] = _probe(opened, worker, generation, data["work"]) | {
            "parents": {name: dict(evaluation.metrics) for name, evaluation in parents.items()}
        }
        data["cost"] = cost_data(settings, data["cluster"], data["probe"]["seconds_search"])
    return data


def _missing_engine(settings: Config) -> list[str]:
    """Why the engine that the settings ask for cannot be opened here; a search may start elsewhere."""
    if settings.evaluation.backend != "vllm":
        return []
    try:
        vllm_version(engine_settings(settings).python)
    except EngineSetupError as error:
        return [f"here a start would end at once: {error}"]
    return []


def _known_disagreements(settings: Config) -> list[str]:
    """What a finished study of this name says of surrogates that do not follow the metrics."""
    if not settings.follows_gradients:
        return []
    try:
        path = paths.store_path(settings.study, paths.root())
        if not path.is_file():
            return []
        with Store.open(path) as store:
            study = store.study()
    except EvomergeError:  # which a start would say
        return []
    rows = [] if study is None else agreements(study)
    return [
        f"in study '{settings.study}', stage {row['stage']}: {agreement_line(row)}"
        for row in rows
        if row["sentence"]
    ]


def seconds_of(work: Mapping[str, Any], merge: float, item: float) -> float:
    """Seconds of a whole search, without what is done once.

    Args:
        work: As `plan_search` gives it.
        merge: Seconds of a merge.
        item: Seconds of an item.

    Returns:
        The sum over all candidates.
    """
    return float(sum(step["candidates"] * (merge + step["items"] * item) for step in work["stages"]))


def _space(opened: Opened) -> dict[str, Any]:
    space = opened.space
    return {
        "method": " or ".join(opened.settings.methods),
        "axes": len(space.axes),
        "first": [axis.name for axis in space.axes[:4]],
        "choices": [
            {"name": axis.name, "methods": list(axis.methods)}
            for axis in space.axes
            if isinstance(axis, MethodAxis)
        ],
        "ranges": [
            {"name": axis.name, "low": axis.low, "high": axis.high, "start": axis.start}
            for axis in space.axes
            if isinstance(axis, Axis)
        ],
        "groups": [name for name, _ in space.spans()],
        "dead": len(space.dead),
    }


def _optimizer(opened: Opened, population: int) -> dict[str, Any]:
    """The optimizer of the first stage."""
    settings, search = opened.settings, opened.settings.search
    if STAGES[settings.kinds[0]].is_learned:
        name, seed = "gradient descent (Adam)", search.seed
        return {
            "name": name,
            "population": 1,
            "sigma": None,
            "covariance": None,
            "start": "best",
            "seed": seed,
        }
    weights = settings.kinds[0] == "weights"
    optimizer = route_optimizer(settings)
    if weights:
        optimizer = optimizer_for(search.optimizer, categorical=settings.chooses_methods)
    return {
        "name": optimizer.title,
        "population": population,
        "sigma": search.sigma,
        "covariance": _covariance(optimizer, is_diagonal(settings, opened.space)),
        "start": search.start,
        "seed": search.seed,
    }


def _covariance(optimizer: OptimizerEntry, diagonal: bool) -> str | None:
    """The kind of covariance matrix that the optimizer learns; None where it learns none."""
    if not optimizer.learns_covariance:
        return None
    return "diagonal" if diagonal else "full"


def _model(name: str, parent: Parent, is_base: bool) -> dict[str, Any]:
    architectures = parent.config.get("architectures") or [parent.config.get("model_type", "unknown")]
    return {
        "name": name,
        "path": str(parent.path),
        "base": is_base,
        "architecture": architectures[0],
        "layers": parent.layout.num_layers,
        "parameters": sum(math.prod(info.shape) for info in parent.tensors.values()),
        "dtype": stored_dtype(parent),
        "bytes": total_bytes(parent),
        "licenses": [card.shown for card in cards_of(parent)],
    }


def _task(
    task: str, weight: float, opened: Opened, items: Mapping[Any, Items], generation: Items
) -> dict[str, Any]:
    harness = opened.harness
    subtasks = [name for name, _ in harness.subtasks(task)]
    return {
        "task": task,
        "tasks": subtasks if subtasks != [task] else [],
        "metric": harness.metric(task),
        "filter": harness.filter(task),
        "higher_is_better": harness.sign(task) > 0,
        "mean_of_items": harness.is_mean(task),
        "soft": list(harness.soft_metrics(task)),
        "weight": weight,
        "items": {role: sum(len(items[role][name]) for name in subtasks) for role in ROLES},
        "items_of_a_generation": sum(len(generation[name]) for name in subtasks),
    }


def _stages(opened: Opened, items: Items) -> list[dict[str, Any]]:
    """What each stage searches; one that begins at another's best is shown as it would be from the base."""
    settings, space, parents = opened.settings, opened.space, opened.parents
    first = reference_recipes(settings, space, parents)[0]
    start = Start(first.recipe, first.label)
    rows = []
    facts = StudyFacts(diagonal=is_diagonal(settings, space), budgets=settings.budgets)
    for stage in open_stages(settings, space, parents, facts, items):
        opening = stage.open(start)
        if isinstance(opening, LearnedOpening):
            rows.append(_descent(stage.name, opening) | {"labels": dict(opening.labels)})
            continue
        if opening.relaxation is not None:
            relaxed = opening.relaxation.opening
            rows.append(_descent(f"{stage.name}, {relaxed.name}", relaxed) | {"finalists": 1})
        rows.append(
            {
                "stage": stage.name,
                "axes": len(opening.space.axes),
                "population": len(opening.optimizer(opening.space.start, 0).ask()),
                "evaluations": stage.evaluations,
                "hand": len(opening.hand),
            }
        )
    return rows


def _descent(name: str, opening: LearnedOpening) -> dict[str, Any]:
    """The row of a descent, whose steps are generations of one candidate."""
    return {
        "stage": name,
        "axes": len(opening.space.axes),
        "population": 1,
        "evaluations": opening.steps,
        "hand": 0,
        "items": opening.items,
        "texts": retained_count(opening),
        "checks": opening.steps // opening.stopping.every if opening.stopping else 0,
        "genome": opening.summary,
    }


def _work(
    opened: Opened, stages: Sequence[Mapping[str, Any]], items: Mapping[Any, Items], generation: Items
) -> dict[str, Any]:
    """Steps of the search with candidates and items each; equal recipes and failures make it less."""
    settings, search = opened.settings, opened.settings.search
    references = len(reference_recipes(settings, opened.space, opened.parents))
    references += sum(stage["hand"] for stage in stages)
    if settings.merges_weights:
        references += len(settings.models) - 1  # the greedy soup tries each parent but the best once
    counts = {role: _count(ids) for role, ids in items.items()}
    per_generation = _count(generation)
    generations = [math.ceil(stage["evaluations"] / stage["population"]) for stage in stages]
    steps: list[dict[str, Any]] = [
        {"stage": "parents, hand recipes and soups", "candidates": references, "items": per_generation}
    ]
    for number, stage in zip(generations, stages, strict=True):
        name = "search" if len(stages) == 1 else f"search: {stage['stage']}"
        candidates, scored = number * stage["population"], per_generation
        if "items" in stage:  # of each task, and a backward pass counts as two forward passes
            of_tasks = [min(stage["items"], len(ids)) for ids in items["search"].values()]
            scored = FORWARDS_OF_A_SLOPE * (sum(of_tasks) + stage.get("texts", 0))
        steps.append({"stage": name, "candidates": candidates, "items": scored})
        if "labels" in stage:
            steps += _beside_descent(opened, stage, items, references + search.finalists)
    finalists = sum(stage.get("finalists", search.finalists) for stage in stages) + references
    finalists += sum(stage.get("checks", 0) for stage in stages)
    steps.append({"stage": "validation", "candidates": finalists, "items": counts["validation"]})
    steps.append({"stage": "test", "candidates": 1 + references, "items": counts["test"]})
    return {
        "generations": sum(generations),
        "stages": steps,
        "item_evaluations": sum(step["candidates"] * step["items"] for step in steps),
        "race": search.race is not None,
    }


def _beside_descent(
    opened: Opened, stage: Mapping[str, Any], items: Mapping[Any, Items], candidates: int
) -> list[dict[str, Any]]:
    """The work of a learned stage beside its steps: labels, and the comparison of surrogate and metric."""
    harness, models = opened.harness, len(opened.settings.models)
    sources = {
        subtask: source for task, source in stage["labels"].items() for subtask, _ in harness.subtasks(task)
    }
    answered = asked = 0
    for task, ids in items["search"].items():
        source = sources.get(task, GOLD)
        validation = min(ITEMS_ASKED, len(items["validation"][task]))
        if source not in (GOLD, LEFT_OUT):
            used = min(stage["items"] * stage["evaluations"], len(ids)) + validation
            answered += used * (models if source == SAMPLES else 1)
        if source != LEFT_OUT and (source != GOLD or not harness.soft_metrics(task)):
            asked += validation
    steps = [
        {"stage": "answers that are labels", "candidates": 1, "items": answered},
        {"stage": "surrogate and metric", "candidates": min(MOST_COMPARED, candidates), "items": asked},
    ]
    return [step for step in steps if step["items"]]


def _count(items: Items) -> int:
    return sum(map(len, items.values()))


def _parents(opened: Opened, worker: Worker, items: Items) -> dict[str, Evaluation]:
    """The parents' scores, of those that can be scored."""
    references = reference_recipes(opened.settings, opened.space, opened.parents)
    found = {b.label: worker.evaluate(b.recipe, items) for b in references if b.origin == "parent"}
    return {name: evaluation for name, evaluation in found.items() if evaluation.error is None}


def _probe(opened: Opened, worker: Worker, items: Items, work: Mapping[str, Any]) -> dict[str, Any]:
    """Which optimizations hold, and the median time of candidates near the start of the space.

    The time of the first, which includes what is done once, is given apart.
    """
    answered_by = backends(opened.harness, worker.model)
    recipes = [opened.space.decode(_near_start(opened.space, k)) for k in range(_TIMED + 1)]
    first, *timed = [_evaluated(worker.evaluate(recipe, items)) for recipe in recipes]
    verdicts = opened.harness.optimizations(worker.model, items)
    merge, score = (statistics.median(e.seconds[stage] for e in timed) for stage in ("merge", "score"))
    count = _count(items)
    return {
        "backends": answered_by,
        "techniques": {name: {"allowed": v.allowed, "reason": v.reason} for name, v in verdicts.items()},
        "seconds_first": sum(first.seconds.values()),
        "seconds_merge": merge,
        "seconds_score": score,
        "items": count,
        "seconds_search": seconds_of(work, merge, score / count),
    }


def _near_start(space: MergeSpace, number: int) -> list[float]:
    """A genome near the start of a space, another one for each number; methods are chosen in turn."""
    categories = space.categories if isinstance(space, MethodChoiceSpace) else ()
    choices = [float((number + gene) % count) for gene, count in enumerate(categories)]
    return choices + [0.05 * number * (-1) ** i for i in range(len(space.axes) - len(choices))]


def _evaluated(evaluation: Evaluation) -> Evaluation:
    if evaluation.error is not None:
        raise SetupError(f"a candidate at the start of the space cannot be scored: {evaluation.error}")
    return evaluation
