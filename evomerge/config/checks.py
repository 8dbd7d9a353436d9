"""Checks of a search file beyond single keys: undefined names, values that a method does not take.

A function for each block yields (path of the key, sentence) for everything that is wrong in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from evomerge import _yaml
from evomerge.config.schema import Config, RangeConfig
from evomerge.config.stage_kinds import STAGES, check_sequence
from evomerge.config.stage_schema import StageConfig
from evomerge.errors import suggest
from evomerge.evaluation.records import GOLD, LEFT_OUT, SAMPLES

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
    """The merge method, its number of models and its parameters."""
    from evomerge.methods import METHODS  # loads torch

    if config.method not in METHODS:
        yield ("method",), f"unknown method '{config.method}'. {suggest(config.method, METHODS)}"
        return
    method = METHODS[config.method]
    least, most = method.models
    count = len(method.searched_models(config.base, config.parents))
    if not least <= count <= most:
        yield ("models",), f"{method.name} takes {least} to {most} models besides the base, got {count}"
    for name, value in config.space.parameters.items():
        path = ("space", "parameters", name)
        param = method.param(name)
        if param is None:
            names = [p.name for p in method.params]
            yield path, f"{method.name} has no parameter '{name}'. {suggest(name, names)}"
            continue
        is_range = isinstance(value, RangeConfig)
        if param.flag and (is_range or value not in (0, 1)):
            yield path, f"{name} is a switch: true or false, not searched"
        bounds = (value.low, value.high) if isinstance(value, RangeConfig) else (float(value),)
        for number in bounds:
            if not param.hard_low <= number <= param.hard_high:
                allowed = f"[{param.hard_low:g}, {param.hard_high:g}]"
                yield path, f"{name} must be in {allowed}, got {number:g}"


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
    if config.search.race is not None and config.search.pipelined:
        sentence = "a search is raced or pipelined, not both; leave out search.race or search.pipelined"
        yield ("search", "pipelined"), sentence


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
