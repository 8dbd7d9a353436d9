"""Wishes and a survey of the models -> a search file in which every choice has its reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from evomerge.checkpoints.reference import split_reference
from evomerge.errors import ConfigError, suggest
from evomerge.launch.new_search.draft import Draft, Path
from evomerge.launch.new_search.survey import FAR, ModelFacts, Survey
from evomerge.launch.new_search.wishes import DEFAULT_EVALUATIONS, TaskWish, Wishes, study_name
from evomerge.methods import METHODS, Method, Param

_FULL_COVARIANCE = 20  # evaluations for each gene from which CMA-ES learns a full covariance matrix
_MOST_GROUPS = 8
_MANY_PARENTS = 4
_OPPOSED = -0.1  # mean cosine of task vectors below which they work against each other
_ITEMS = ((200, 50), (1000, 100), (math.inf, 200))
"""Budgets below this many evaluations -> items of each task in a generation."""
_FINALS = 25  # parents, hand recipes and finalists, about, which are scored on validation and test items
_LEAST_FINAL, _MOST_FINAL = 200, 1000
"""Test items of each task that are always proposed, and a number from which on all are taken."""
_AUTO_WORKERS = 8  # from here on a generation is sized by the workers


def propose(wishes: Wishes, survey: Survey | None, splits: tuple[str, str]) -> Draft:
    """Proposes a search.

    Args:
        wishes: What is asked for; what they leave open is chosen here.
        survey: The models, compared; None where they are not read.
        splits: (`evaluation.splits`, the reason for it).

    Returns:
        The search file; not yet checked.

    Raises:
        ConfigError: The method is unknown.
    """
    base = survey.base if survey else (wishes.base or next(iter(wishes.models)))
    experts = [name for name in wishes.models if name != base]
    method, why = _method(wishes, survey, len(experts))
    document: dict[str, Any] = {
        "study": wishes.study or study_name(experts),
        "models": {name: _model(reference) for name, reference in wishes.models.items()},
        "base": base,
        "method": method.name,
    }
    comments: dict[Path, str] = {
        ("study",): "Name of the study and of its folder under results (or --root).",
        ("models",): "Parents by name: a folder, a GGUF file or a Hub repository[@revision], with +adapter.",
        ("base",): _base_reason(survey),
        ("method",): why,
    }
    for name in wishes.models if survey else ():
        assert survey is not None
        comments["models", name] = describe(survey.models[name], survey.distances.get(name))
    blocks = {
        key: dict(value) if isinstance(value, Mapping) else value for key, value in wishes.blocks.items()
    }
    for key in ("hand_recipes", "stages", "routes"):
        if key in blocks:
            document[key] = blocks.pop(key)
    evaluations = wishes.evaluations or DEFAULT_EVALUATIONS
    space, space_comments = _space(wishes, survey, method, base, evaluations)
    document["space"] = space | blocks.pop("space", {})
    document["tasks"] = [_task(task) for task in wishes.tasks]
    evaluation, evaluation_comments = _evaluation(wishes, survey, evaluations, splits)
    document["evaluation"] = evaluation | blocks.pop("evaluation", {})
    if not document["evaluation"].get("apply_chat_template"):
        document["evaluation"].pop("fewshot_as_multiturn", None)  # turns of a chat need its template
    search, search_comments = _search(wishes, evaluations)
    document["search"] = search | blocks.pop("search", {})
    document |= _machines(wishes, comments)
    document |= blocks
    comments |= space_comments | evaluation_comments | search_comments
    comments["tasks",] = (
        "lm-eval tasks, groups or tags by name, with their weights in the objective. Your own: docs/tasks.md."
    )
    comments.update(wishes.reasons)
    return Draft(document, comments, _head(survey), _foot(wishes, survey))


def _model(reference: str) -> str | dict[str, str]:
    """The entry of a model: its path alone, or with a revision."""
    parts = split_reference(reference)
    if parts.revision is None or parts.adapter is not None:
        return reference
    return {"path": parts.model, "revision": parts.revision}


def describe(model: ModelFacts, distance: float | None) -> str:
    """Says in a line what a model is.

    Args:
        model: Its facts.
        distance: Its distance from the base, as a share of the base's length; None for the base.

    Returns:
        A phrase.
    """
    size = f"{_short(model.parameters)} parameters, {model.dtype}"
    rows = f", {model.rows} embedding rows" if model.rows else ""
    license_ = f"license {model.license}" if model.license else "license unknown"
    apart = "" if distance is None else f"; {distance:.3g} of the base's length away"
    return f"{model.architecture}, {model.layers} layers, {size}{rows}; {license_}{apart}"


def _short(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)


def _base_reason(survey: Survey | None) -> str:
    what = "Task vectors are taken against it; the merge has its configuration and tokenizer."
    return what if survey is None else f"{what} {survey.base_reason[0].upper()}{survey.base_reason[1:]}."


def _method(wishes: Wishes, survey: Survey | None, experts: int) -> tuple[Method, str]:
    """(the merge method, why)."""
    if wishes.method is not None:
        if wishes.method not in METHODS:
            raise ConfigError(f"unknown method '{wishes.method}'. {suggest(wishes.method, METHODS)}")
        return METHODS[wishes.method], "Merge method, as given; docs/reference/methods.md lists all."
    if survey is None:
        return METHODS["task_arithmetic"], (
            "Sum of task vectors with a weight each: the method to begin with for fine-tunes of one base. "
            "The models were not read, so nobody has looked whether they are."
        )
    if not survey.has_shared_base:
        far = max(survey.distances.values())
        name = "slerp" if experts == 1 else "linear"
        return METHODS[name], (
            f"A model lies {far:.2g} of the base's length away (fine-tunes lie below {FAR}): these models do "
            "not seem to come from one base, and averages of such models are rarely any good. "
            "Stages of routes (docs/routes.md) take whole layers instead."
        )
    overlap = survey.overlap
    told = "" if overlap is None else f"; their task vectors have a mean cosine of {overlap:.2f}"
    if experts >= _MANY_PARENTS or (overlap is not None and overlap < _OPPOSED):
        return METHODS["dare_ties"], (
            f"{experts} fine-tunes of one base{told}: entries that disagree are dropped before the sum; "
            "density, how many of a task vector's entries stay, is searched too."
        )
    return METHODS["task_arithmetic"], (
        f"{experts} fine-tune{'s' if experts > 1 else ''} of one base{told}: a sum of task vectors with a "
        "weight each is the simplest method that can hold them. Where skills interfere: ties, dare_ties, "
        "della (docs/choosing.md)."
    )


def _space(
    wishes: Wishes, survey: Survey | None, method: Method, base: str, evaluations: int
) -> tuple[dict[str, Any], dict[Path, str]]:
    """The block `space` and its comments."""
    experts = tuple(name for name in wishes.models if name != base)
    searched = [param for param in method.params if param.searched]
    models = len(method.searched_models(base, experts))
    of_a_cell = sum(models if param.per == "model" else 1 for param in searched)
    layers = min((m.layers for m in survey.models.values()), default=32) if survey else 32
    groups = _groups(evaluations, of_a_cell, layers)
    if wishes.layer_granularity is not None:
        groups = max(1, layers // wishes.layer_granularity) if wishes.layer_granularity else 1
    given = wishes.blocks.get("space", {})
    groups = len(given["groups"]) if "groups" in given else groups
    components = given.get("components", ["attention", "mlp"])
    genes = (len(components) * groups + 2) * of_a_cell
    is_full = evaluations >= _FULL_COVARIANCE * genes
    comments: dict[Path, str] = {
        ("space",): f"What is searched: {genes} genes at most, groups x components and the two outer parts, "
        f"each with {of_a_cell} number{'s' if of_a_cell > 1 else ''}.",
        ("space", "groups"): f"Layer groups with coefficients of their own, from the bottom. {evaluations} "
        + (
            "evaluations are enough for a full covariance matrix of all genes (20 for each)."
            if is_full
            else "evaluations are fewer than 20 for each gene: the covariance matrix stays diagonal."
        ),
        ("space", "components"): "Parts of a layer that have coefficients of their own; norms take the mean.",
    }
    space: dict[str, Any] = {"groups": groups, "components": components}
    parameters: dict[str, Any] = {}
    for param in searched:
        parameters[param.name], reason = _range(param, method, models, survey)
        comments["space", "parameters", param.name] = reason
    if parameters:
        space["parameters"] = parameters
    return space, comments


def _groups(evaluations: int, of_a_cell: int, layers: int) -> int:
    """The most layer groups whose genes the budget has 20 evaluations for, at least 1."""
    affordable = evaluations / (_FULL_COVARIANCE * max(1, of_a_cell))  # cells: 2 components and 2 outer parts
    return max(1, min(_MOST_GROUPS, layers, int((affordable - 2) // 2)))


def _range(param: Param, method: Method, models: int, survey: Survey | None) -> tuple[dict[str, float], str]:
    """(bounds and start of a parameter, why)."""
    start, why = param.start_for(models), "the start is the method's."
    is_sum = method.task_vector_sum is not None and not method.task_vector_sum.without_base
    normalized = method.param("normalize")
    if param.name == "weight" and is_sum and not (normalized and normalized.default) and survey is not None:
        overlap = survey.overlap or 0.0
        start = 1.0 / (1.0 + (models - 1) * max(0.0, overlap))
        why = (
            "the sum begins where it moves as far along each task vector as that model moved itself "
            f"(mean cosine {overlap:.2f})."
        )
    margin = 0.02 * (param.high - param.low)
    start = min(max(start, param.low + margin), param.high - margin)
    bounds = {"low": param.low, "high": param.high, "start": round(start, 4)}
    return bounds, f"Bounds are the method's; {why}"


def _task(task: TaskWish) -> dict[str, Any]:
    entry: dict[str, Any] = {"task": task.task}
    for key in ("metric", "filter", "num_fewshot"):
        if getattr(task, key) is not None:
            entry[key] = getattr(task, key)
    return entry | ({"weight": task.weight} if task.weight != 1 else {})


def _evaluation(
    wishes: Wishes, survey: Survey | None, evaluations: int, splits: tuple[str, str]
) -> tuple[dict[str, Any], dict[Path, str]]:
    """The block `evaluation` and its comments."""
    items = next(count for below, count in _ITEMS if evaluations < below)
    comments: dict[Path, str] = {
        (
            "evaluation",
            "splits",
        ): f"Which items the search, the choice of the winner and the test see: {splits[1]}.",
        ("evaluation", "items"): f"Items of each task in a generation, another part each time: the standard "
        f"error of an accuracy is up to {50 / math.sqrt(items):.1f} points. Finalists see all search items.",
    }
    block: dict[str, Any] = {"splits": splits[0], "items": items}
    final = max(_LEAST_FINAL, evaluations * items // _FINALS)
    if final < _MOST_FINAL:
        block |= {"validation": final // 2, "test": final}
        comments["evaluation", "validation"] = "Most items of each task that finalists are chosen by."
        comments["evaluation", "test"] = (
            f"Most items of each task for the final score (standard error up to {50 / math.sqrt(final):.1f} "
            f"points), with those above: about {_FINALS} parents, hand recipes and finalists on more items "
            "would take longer than this search. Left out: all items."
        )
    if wishes.include:
        block["include"] = list(wishes.include)
        comments["evaluation", "include"] = "Folders of your task files, which are code: add --allow-tasks."
    if wishes.chat_template is not None:
        template = wishes.chat_template and (survey is None or survey.models[survey.base].has_chat_template)
        block["apply_chat_template"] = template
        comments["evaluation", "apply_chat_template"] = (
            "Prompts by the base's chat template." if template else "The base has no chat template."
        )
    return block, comments


def _search(wishes: Wishes, evaluations: int) -> tuple[dict[str, Any], dict[Path, str]]:
    """The block `search` and its comments."""
    comments: dict[Path, str] = {
        ("search", "evaluations"): "Budget of candidates; parents and hand recipes are not counted.",
        ("search", "sigma"): "First standard deviation, as a share of each range.",
        ("search", "seed"): "The same file and seed give the same candidates.",
    }
    block: dict[str, Any] = {"evaluations": evaluations}
    if (wishes.workers or 0) >= _AUTO_WORKERS:
        block["population"] = "auto"
        comments["search", "population"] = "Candidates of a generation: as many as keep the workers busy."
    return block | {"sigma": 0.15, "seed": 0}, comments


def _machines(wishes: Wishes, comments: dict[Path, str]) -> dict[str, Any]:
    """The blocks `cluster` and `budget`, where something is said of them."""
    blocks: dict[str, Any] = {}
    cluster = {"workers": wishes.workers, "gpus": wishes.gpus}
    if any(value is not None for value in cluster.values()):
        blocks["cluster"] = {key: value for key, value in cluster.items() if value is not None}
        comments["cluster",] = "Where candidates are evaluated; may change from run to run."
    if wishes.gpu_hours is not None:
        blocks["budget"] = {"gpu_hours": wishes.gpu_hours}
        comments["budget",] = "Ends the search early; validation and test of the winner still follow."
    return blocks


def _head(survey: Survey | None) -> list[str]:
    lines = ["A search of evomerge, begun by `evomerge init`. `evomerge plan FILE` checks it before it runs."]
    if survey is None:
        lines.append("The models were not read: groups, bounds and base are guesses.")
    return lines


def _foot(wishes: Wishes, survey: Survey | None) -> list[str]:
    lines = [
        "More that may be said here, each explained in docs/reference/search-file.md:",
        "keep: {TASK: 0.02} ranks candidates last that lose more than that there;",
        "stages: [{stage: learned}, weights] learns weights by gradient first (`evomerge plan` says whether "
        "the tasks allow it); [weights, routes] goes on with routes of layers.",
    ]
    notes = [*wishes.notes, *(survey.warnings if survey else ())]
    if notes:
        lines += ["", "To know:", *(f"- {note}" for note in notes)]
    return lines
