"""What a search would be, before it starts: models, space, tasks, work, and on demand how fast a candidate is. Writes nothing."""

from __future__ import annotations

import math
import statistics
from typing import Any

from evomerge.checkpoints import Parent, stored_dtype, total_bytes
from evomerge.config import Config
from evomerge.errors import SetupError
from evomerge.evaluation import ROLES, Evaluation, Items
from evomerge.launch import stages as stages_module
from evomerge.launch.objective import first_items
from evomerge.launch.opening import Allowed, Opened, backends, open_search
from evomerge.launch.route_stages import route_optimizer
from evomerge.launch.weight_space import is_diagonal
from evomerge.optimizers import OPTIMIZERS, OptimizerEntry
from evomerge.search import Opening, Start
from evomerge.workers.worker import Worker

_TIMED = 3  # candidates whose median is the estimate


def plan(settings: Config, *, probe: bool = False, allowed: Allowed | None = None) -> dict[str, Any]:
    """Everything about a search that can be known without starting it, as plain data. Raises what starting it would raise.

    probe: loads the base too, asks what answers each task, which items it truncates and which scoring techniques it can be
    trusted with, and times a candidate. allowed: what the user let the tasks do.
    """
    opened = open_search(settings, allowed)
    search, space, harness = settings.search, opened.space, opened.harness
    diagonal = is_diagonal(settings, space)
    optimizer = OPTIMIZERS[search.optimizer] if settings.kinds[0] == "weights" else route_optimizer(settings)
    stages = _stages(opened, diagonal)
    items = {role: harness.items(role) for role in ROLES}
    generation = first_items(items["search"], settings, opened.objective)
    data: dict[str, Any] = {
        "study": settings.study,
        "models": [_model(name, parent, name == settings.base) for name, parent in opened.parents.items()],
        "warnings": list(opened.warnings),
        "space": {
            "method": settings.method,
            "axes": len(space.axes),
            "first": [axis.name for axis in space.axes[:4]],
            "groups": [name for name, _ in space.spans()],
            "dead": len(space.dead),
        },
        "tasks": [_task(t.task, t.weight, opened, items, generation) for t in settings.tasks],
        "findings": list(harness.warnings()),
        "optimizer": {
            "name": optimizer.title,
            "population": stages[0]["population"],
            "sigma": search.sigma,
            "covariance": _covariance(optimizer, diagonal),
            "start": search.start,
            "seed": search.seed,
        },
        "stages": stages,
        "work": _work(settings, opened, stages, items, generation),
    }
    if probe:
        worker = opened.load()
        data["findings"] = list(harness.warnings(worker.model))
        data["probe"] = _probe(opened, worker, generation, data["work"])
    return data


def seconds_of(work: dict[str, Any], merge: float, item: float) -> float:
    """Seconds of a whole search from those of a merge and of an item, without what is done once."""
    return float(sum(stage["candidates"] * (merge + stage["items"] * item) for stage in work["stages"]))


def _covariance(optimizer: OptimizerEntry, diagonal: bool) -> str | None:
    """The kind of covariance matrix that the optimizer learns; None where it learns none."""
    if not optimizer.learns_covariance:
        return None
    return "diagonal" if diagonal else "full"


def _model(name: str, parent: Parent, is_base: bool) -> dict[str, Any]:
    return {
        "name": name,
        "path": str(parent.path),
        "base": is_base,
        "architecture": (parent.config.get("architectures") or [parent.config.get("model_type", "unknown")])[
            0
        ],
        "layers": parent.layout.num_layers,
        "parameters": sum(math.prod(info.shape) for info in parent.tensors.values()),
        "dtype": stored_dtype(parent),
        "bytes": total_bytes(parent),
    }


def _task(
    task: str, weight: float, opened: Opened, items: dict[Any, Items], generation: Items
) -> dict[str, Any]:
    harness = opened.harness
    leaves = [leaf for leaf, _ in harness.subtasks(task)]
    return {
        "task": task,
        "tasks": leaves if leaves != [task] else [],
        "metric": harness.metric(task),
        "higher_is_better": harness.sign(task) > 0,
        "mean_of_items": harness.is_mean(task),
        "soft": list(harness.soft_metrics(task)),
        "weight": weight,
        "items": {role: sum(len(items[role][leaf]) for leaf in leaves) for role in ROLES},
        "items_of_a_generation": sum(len(generation[leaf]) for leaf in leaves),
    }


def _stages(opened: Opened, diagonal: bool) -> list[dict[str, Any]]:
    """What each stage searches; one that begins at another's best is shown as it would be from the base."""
    settings, out = opened.settings, []
    first = stages_module.references(settings, opened.space, opened.parents)[0]
    for stage in stages_module.stages(settings, opened.space, opened.parents, diagonal, settings.budgets):
        opening: Opening = stage.open(Start(first.recipe, first.label))
        population = len(opening.optimizer(opening.space.start, 0).ask())
        hand = len(opening.hand)
        out.append(
            {
                "stage": stage.name,
                "axes": len(opening.space.axes),
                "population": population,
                "evaluations": stage.evaluations,
                "hand": hand,
            }
        )
    return out


def _work(
    settings: Config,
    opened: Opened,
    planned: list[dict[str, Any]],
    items: dict[Any, Items],
    generation: Items,
) -> dict[str, Any]:
    """Stages of the search with candidates and items each; equal recipes and failures make it less."""
    search = settings.search
    soups = (
        len(settings.models) - 1 if "weights" in settings.kinds else 0
    )  # the greedy soup tries each parent but the best once
    references = (
        len(stages_module.references(settings, opened.space, opened.parents))
        + soups
        + sum(stage["hand"] for stage in planned)
    )
    turns = [math.ceil(stage["evaluations"] / stage["population"]) for stage in planned]
    names = ["search" if len(planned) == 1 else f"search: {stage['stage']}" for stage in planned]
    sizes = {role: sum(map(len, ids.values())) for role, ids in (*items.items(), ("generation", generation))}
    stages: list[dict[str, Any]] = [
        {"stage": "parents, hand recipes and soups", "candidates": references, "items": sizes["generation"]},
        *(
            {"stage": name, "candidates": n * stage["population"], "items": sizes["generation"]}
            for name, n, stage in zip(names, turns, planned, strict=True)
        ),
        {
            "stage": "validation",
            "candidates": search.finalists * len(planned) + references,
            "items": sizes["validation"],
        },
        {"stage": "test", "candidates": 1 + references, "items": sizes["test"]},
    ]
    total = sum(s["candidates"] * s["items"] for s in stages)
    return {
        "generations": sum(turns),
        "stages": stages,
        "item_evaluations": total,
        "race": search.race is not None,
    }


def _probe(opened: Opened, worker: Worker, items: Items, work: dict[str, Any]) -> dict[str, Any]:
    """Verdicts, and the median time of candidates near the start of the space; the first one's, with what is done once, apart."""
    answered = backends(opened.harness, worker.model)
    axes = len(opened.space.axes)
    recipes = [opened.space.decode([0.05 * k * (-1) ** i for i in range(axes)]) for k in range(_TIMED + 1)]
    first, *timed = [_evaluated(worker.evaluate(recipe, items)) for recipe in recipes]
    verdicts = opened.harness.optimizations(worker.model, items)
    merge, score = (statistics.median(e.seconds[stage] for e in timed) for stage in ("merge", "score"))
    count = sum(map(len, items.values()))
    return {
        "backends": answered,
        "techniques": {name: {"allowed": v.allowed, "reason": v.reason} for name, v in verdicts.items()},
        "seconds_first": sum(first.seconds.values()),
        "seconds_merge": merge,
        "seconds_score": score,
        "items": count,
        "seconds_search": seconds_of(work, merge, score / count),
    }


def _evaluated(evaluation: Evaluation) -> Evaluation:
    if evaluation.error is not None:
        raise SetupError(f"a candidate at the start of the space cannot be scored: {evaluation.error}")
    return evaluation
