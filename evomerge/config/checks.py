"""Checks of a search file beyond single keys: undefined names, values that a method does not take.

A function for each block yields (path of the key, sentence) for everything that is wrong in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from evomerge import _yaml
from evomerge.config.schema import Config, RangeConfig
from evomerge.config.stage_kinds import STAGES, check_sequence
from evomerge.config.stage_schema import StageConfig
from evomerge.errors import suggest
from evomerge.evaluation.records import GOLD, LEFT_OUT, SAMPLES
from evomerge.optimizers import optimizer_for

if TYPE_CHECKING:
    from evomerge.methods import Method

Problem = tuple[_yaml.Key, str]
"""(path of the key, what is wrong there and what to do)."""


def problems(config: Config) -> Iterator[Problem]:
    """Checks the blocks of a search file against one another and against the merge methods.

    Args:
        config: Settings whose blocks are valid each for itself.

    Yields:
        What is wrong, the most fundamental first.
    """
    if config.base not in config.models:
        sentence = f"base '{config.base}' is not among the models. {suggest(config.base, config.models)}"
        yield ("base",), sentence
    yield from _method(config)
    yield from _space(config)
    yield from _start(config)
    yield from _stages(config)
    yield from _routes(config)
    yield from _tasks(config)


def _method(config: Config) -> Iterator[Problem]:
    """The merge methods, their number of models and their parameters."""
    from evomerge.methods import METHODS  # loads torch

    unknown = [name for name in config.methods if name not in METHODS]
    for name in unknown:
        yield ("method",), f"unknown method '{name}'. {suggest(name, METHODS)}"
    if config.chooses_methods:
        yield from _choice_of_methods(config)
    if unknown:
        return
    methods = [METHODS[name] for name in config.methods]
    for method in methods:
        least, most = method.models
        count = len(method.searched_models(config.base, config.parents))
        if not least <= count <= most:
            yield ("models",), f"{method.name} takes {least} to {most} models besides the base, got {count}"
    for name, value in config.space.parameters.items():
        yield from _parameter(methods, name, value)


def _choice_of_methods(config: Config) -> Iterator[Problem]:
    """A list of methods, of which each layer group gets one, and the stages that can search it."""
    for name in dict.fromkeys(config.methods):
        if config.methods.count(name) > 1:
            yield ("method",), f"method '{name}' is listed twice; a list names each method once"
    if len(config.methods) < 2:
        one = config.methods[0] if config.methods else "task_arithmetic"
        sentence = (
            f"a list of methods to choose from has two or more, got {len(config.methods)}; "
            f"for a single method write method: {one}"
        )
        yield ("method",), sentence
    if "learned" in config.kinds:
        sentence = (
            "a learned stage follows the gradient of one method's weights, and this search chooses among "
            "several; name one method, or take a stage of weights"
        )
        yield ("stages", config.kinds.index("learned")), sentence
    elif config.kinds[0] != "weights":
        sentence = (
            "a list of methods is for a first stage of weights, which chooses one for each layer group; "
            f"this search begins with {config.kinds[0]}, so name one method"
        )
        yield ("method",), sentence


def _parameter(methods: Sequence[Method], name: str, value: RangeConfig | bool | float) -> Iterator[Problem]:
    """A range or number of a parameter, which every method that has the parameter takes."""
    path = ("space", "parameters", name)
    found = [(method, param) for method in methods if (param := method.param(name)) is not None]
    if not found:
        names = list(dict.fromkeys(p.name for method in methods for p in method.params))
        yield path, f"{_either(methods)} has no parameter '{name}'. {suggest(name, names)}"
    bounds = (value.low, value.high) if isinstance(value, RangeConfig) else (float(value),)
    for method, param in found:
        of_method = f" for {method.name}" if len(methods) > 1 else ""
        if param.flag and (isinstance(value, RangeConfig) or value not in (0, 1)):
            yield path, f"{name} is a switch{of_method}: true or false, not searched"
        for number in bounds:
            if not param.hard_low <= number <= param.hard_high:
                allowed = f"[{param.hard_low:g}, {param.hard_high:g}]"
                yield path, f"{name} must be in {allowed}{of_method}, got {number:g}"


def _either(methods: Sequence[Method]) -> str:
    """Methods as the subject of a sentence."""
    if len(methods) == 1:
        return methods[0].name
    return f"none of {', '.join(method.name for method in methods)}"


def _space(config: Config) -> Iterator[Problem]:
    """Layer groups and components."""
    groups, components = config.space.groups, config.space.components
    if isinstance(groups, tuple) and (not groups or min(groups) < 1):
        yield ("space", "groups"), f"groups are sizes of at least 1, got {list(groups)}"
    if isinstance(groups, int) and groups < 1:
        yield ("space", "groups"), f"groups must be at least 1, got {groups}"
    for component in components:
        if components.count(component) > 1:
            yield ("space", "components"), f"component '{component}' is listed twice"


def _start(config: Config) -> Iterator[Problem]:
    """Where the search of weights starts, and labels of hand recipes that mean something else."""
    start, labels = config.search.start, tuple(config.hand_recipes)
    if start not in ("space", "best", *labels):
        sentence = (
            f"start is space, best or a label of hand_recipes. {suggest(start, ['space', 'best', *labels])}"
        )
        yield ("search", "start"), sentence
    for label in labels:
        if label in ("space", "best", *config.models):
            yield ("hand_recipes", label), f"'{label}' is a word of its own or a model; give another label"


_EVOLVED = ("evaluations", "population", "sigma")
_LEARNED = ("steps", "genome", "items", "rate", "surrogate", "labels")
_RETENTION = (
    *("retain", "retain_weight", "retain_items", "teacher", "decay", "trust", "trust_rms", "check"),
    "patience",
)
_RELAXED = ("steps", "items", "rate", "surrogate")
"""Keys of a stage that evolves, of a learned one, of its retention, and those that relaxed routes share."""


def _keys_of(stage: StageConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(keys that a stage may have, keys of other stages)."""
    if STAGES[stage.stage].is_learned:
        return _LEARNED, ("method", *_EVOLVED)
    if stage.stage != "routes":
        return _EVOLVED, ("method", *_LEARNED, *_RETENTION)
    if stage.method == "relaxed":
        own = ("method", *_EVOLVED, *_RELAXED)
        return own, (*(name for name in _LEARNED if name not in _RELAXED), *_RETENTION)
    return ("method", *_EVOLVED), (*_LEARNED, *_RETENTION)


def _stages(config: Config) -> Iterator[Problem]:
    """The order of the stages, and what cannot be had together."""
    if sentence := check_sequence(config.kinds):
        yield ("stages",), sentence
    for i, stage in enumerate(config.stages):
        own, foreign = _keys_of(stage)
        for name in foreign:
            if getattr(stage, name) is not None:
                keys = f"{', '.join(own[:-1])} and {own[-1]}"
                yield ("stages", i, name), f"a stage of {stage.stage} has {keys}, and no {name}"
        if stage.method == "relaxed" and config.routes.genome == "indicator":
            sentence = (
                "method: relaxed ends at one layer for each depth, which genome: indicator need not hold; "
                "take genome: categorical or conditional"
            )
            yield ("stages", i, "method"), sentence
        if STAGES[stage.stage].is_learned:
            yield from _learned(config, i)
            yield from _labels(config, i)
    yield from _optimizer(config)
    if config.search.race is not None and config.search.pipelined:
        sentence = "a search is raced or pipelined, not both; leave out search.race or search.pipelined"
        yield ("search", "pipelined"), sentence


def _optimizer(config: Config) -> Iterator[Problem]:
    """Whether the optimizer takes the genomes of the stages of weights."""
    for position, kind in enumerate(config.kinds):
        if kind == "weights":
            try:
                optimizer_for(config.search.optimizer, categorical=config.chooses_methods and position == 0)
            except ValueError as error:
                yield ("search", "optimizer"), str(error)
                return


def _learned(config: Config, i: int) -> Iterator[Problem]:
    """What keeps a learned stage near its start, and two of them in a row."""
    stage, before = config.stages[i], config.stages[i - 1] if i else None
    if before and before.stage == stage.stage and (before.genome or "tensor") == (stage.genome or "tensor"):
        sentence = "two learned stages of one genome follow one another; give the first more steps"
        yield ("stages", i), sentence
    if stage.genome == "row":
        if not config.keep and (stage.retain is None or stage.retain_weight == 0):
            yield (
                ("stages", i, "genome"),
                "genome: row has thousands of weights and forgets what no task asks for, as fine-tuning "
                "does; name texts by retain, or what must not be lost by keep",
            )
        if i + 1 < len(config.stages):
            sentence = "a stage with genome: row is the last; no later one can hold its weights"
            yield ("stages", i, "genome"), sentence
    for name in ("retain_weight", "retain_items", "teacher"):
        if getattr(stage, name) is not None and stage.retain is None:
            yield ("stages", i, name), f"{name} belongs to retain, a file of texts; add it, or leave it out"
    if stage.teacher is not None and stage.teacher not in config.models:
        sentence = f"'{stage.teacher}' is not among the models. {suggest(stage.teacher, config.models)}"
        yield ("stages", i, "teacher"), sentence
    if stage.patience is not None and stage.check is None:
        yield ("stages", i, "patience"), "patience counts checks; give check, the steps between two of them"


def _labels(config: Config, position: int) -> Iterator[Problem]:
    """Whose answers stand for the right ones in a learned stage."""
    tasks = [task.task for task in config.tasks]
    labels = config.stages[position].labels or {}
    for task, source in labels.items():
        path = ("stages", position, "labels", task)
        if task not in tasks:
            yield path, f"'{task}' is not among the tasks. {suggest(task, tasks)}"
        words = (GOLD, SAMPLES, LEFT_OUT)
        if source not in (*words, *config.models):
            allowed = [*config.models, *words]
            yield path, f"'{source}' is no model whose answers could be labels. {suggest(source, allowed)}"
        elif source in words and source in config.models:
            yield path, f"'{source}' is a model and a kind of labels too; give the model another name"
    if labels and all(labels.get(task) == LEFT_OUT for task in tasks):
        sentence = "labels leave every task out, so that nothing is learned; give one of them labels or gold"
        yield ("stages", position, "labels"), sentence


def _routes(config: Config) -> Iterator[Problem]:
    """Models that routes name."""
    named: list[Problem] = [(("routes", "models", i), name) for i, name in enumerate(config.routes.models)]
    if config.routes.start != "best":
        named.append((("routes", "start"), config.routes.start))
    for path, name in named:
        if name not in config.models:
            yield path, f"'{name}' is not among the models. {suggest(name, config.models)}"


def _tasks(config: Config) -> Iterator[Problem]:
    """Tasks, and what names one of them."""
    names = [task.task for task in config.tasks]
    for i, name in enumerate(names):
        if name in names[:i]:
            yield ("tasks", i, "task"), f"task '{name}' is listed twice; give it one entry and a weight"
    counts = config.evaluation.items
    naming: list[tuple[_yaml.Key, Sequence[str]]] = [(("keep",), list(config.keep))]
    if isinstance(counts, dict):
        naming.append((("evaluation", "items"), list(counts)))
    for path, named in naming:
        for name in named:
            if name not in names:
                yield (*path, name), f"'{name}' is not among the tasks. {suggest(name, names)}"
