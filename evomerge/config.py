"""The search file: one YAML document, checked field by field; errors name file, line, column and the nearest right key."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from evomerge import data, documents
from evomerge.errors import ConfigError, suggest


def _no_truth(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("should be a number")
    return value


Whole = Annotated[int, BeforeValidator(_no_truth)]
Number = Annotated[float, BeforeValidator(_no_truth)]


def _counts(value: Any) -> Any:
    for n in value.values() if isinstance(value, dict) else (value,):
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise ValueError(f"should be a whole number of at least 1, or one for each task named, got {n!r}")
    return value


_ITEMS = 100
Counts = Annotated[int | dict[str, int], BeforeValidator(_counts)]
Share = Annotated[Number, Field(gt=0)]
Measure = Literal["metric", "probability", "logprob"]
_METRIC: dict[Measure, float] = {"metric": 1.0}
Shares = Annotated[dict[Measure, Share], Field(min_length=1), BeforeValidator(lambda value: {value: 1.0} if isinstance(value, str) else value)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(_Strict):
    """A parent: a folder (from the working directory) or a Hugging Face repository, with an optional revision."""

    path: str = Field(min_length=1)
    revision: str | None = None


class RangeConfig(_Strict):
    """Bounds of a searched parameter and where the search starts; low < start < high."""

    low: Number
    high: Number
    start: Number

    @model_validator(mode="after")
    def _inside(self) -> RangeConfig:
        if not self.low < self.start < self.high:
            raise ValueError(f"start {self.start:g} must lie inside ({self.low:g}, {self.high:g})")
        return self


class SpaceConfig(_Strict):
    """groups: how many layer groups, or their sizes from the bottom; a parameter is a range, or a number that fixes it."""

    groups: Whole | tuple[Whole, ...] = 4
    components: tuple[Literal["attention", "mlp", "other"], ...] = Field(default=("attention", "mlp"), min_length=1)
    embeddings: bool = True
    head: bool = True
    parameters: dict[str, RangeConfig | bool | float] = Field(default_factory=dict)


class TaskConfig(_Strict):
    """A task of the objective: an lm-eval task, group or tag, or a Python function.

    metric, filter: the task's first unless named; weight: its share. search: what candidates are ranked by, the metric,
    the probability or mean log-probability of the right answer, or measure -> share. items: role -> document numbers or item ids of
    exactly its items, or a file with one a line. python: 'module:function' in place of a task, see
    `evomerge.python_tasks`, with a name and whether higher scores are better.
    """

    task: str
    metric: str | None = None
    filter: str | None = None
    weight: Number = Field(default=1.0, gt=0)
    search: Shares = Field(default_factory=lambda: dict(_METRIC))
    num_fewshot: Whole | None = Field(default=None, ge=0)
    items: dict[Literal["search", "validation", "test"], Annotated[tuple[Whole | str, ...], Field(min_length=1)] | str] | None = None
    python: str | None = Field(default=None, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    name: str | None = Field(default=None, min_length=1)
    higher_is_better: bool = True

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if not isinstance(value, dict) or value.get("python") is None or "task" in value:
            return value
        if "name" not in value:
            raise ValueError("a python task needs a name")
        return {**value, "task": value["name"]}

    @model_validator(mode="after")
    def _one_kind(self) -> TaskConfig:
        if self.python is None and (self.name is not None or not self.higher_is_better):
            raise ValueError("name and higher_is_better belong to a task with python: module:function")
        if self.python is not None and self.name is None:
            raise ValueError("a python task needs a name, not a task")
        if self.python is not None and (self.metric, self.filter, self.num_fewshot, self.items) != (None, None, None, None):
            raise ValueError("a python task has no metric, filter, num_fewshot or items: its function decides")
        if self.name is not None and self.name != self.task:
            raise ValueError("a python task has a name in place of a task")
        return self


class EvaluationConfig(_Strict):
    """items: items of each task that a generation is scored on, or task -> items, 100 of a task that is not named;
    validation, test: most items of each task, null for all.

    search: most items of each task that generations take theirs from. splits: 'declared', 'hash' or 'hash-train', see
    `evomerge.lm_harness.TaskSpec`; include: folders of task YAML files. duplicates, allow_benchmark_test,
    training_texts, overlap, overlap_ngram: see `evomerge.lm_harness.items.Rules`. Of a group, all these counts are of
    each of its tasks. backend: 'resident' compiles requests for the live model, 'lm-eval' hands all to lm-eval's own
    HFLM; batch_size: of what goes through that.
    """

    items: Counts = _ITEMS
    validation: Whole | None = Field(default=None, ge=2)
    test: Whole | None = Field(default=None, ge=2)
    search: Whole | None = Field(default=None, ge=1)
    splits: Literal["declared", "hash", "hash-train"] = "hash"
    duplicates: Literal["refuse", "drop"] = "refuse"
    allow_benchmark_test: bool = False
    training_texts: tuple[str, ...] = ()
    overlap: Literal["warn", "drop"] = "warn"
    overlap_ngram: Whole = Field(default=13, ge=1)
    backend: Literal["resident", "lm-eval"] = "resident"
    batch_size: Whole = Field(default=64, ge=1)
    include: tuple[str, ...] = ()
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = False
    system_instruction: str | None = None

    def items_of(self, task: str) -> int:
        """How many items of a task, or of each task of a group, a generation is scored on."""
        return self.items if isinstance(self.items, int) else self.items.get(task, _ITEMS)


class RaceConfig(_Strict):
    """rungs: shares of a generation's items after which candidates are dropped, the last 1; error: how often, at most, a
    generation may lose one of its best. See `evomerge.racing`."""

    rungs: tuple[Number, ...] = Field(default=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 1.0), min_length=1)
    error: Number = Field(default=0.05, gt=0, lt=1)


class SearchConfig(_Strict):
    """evaluations: budget of the search, parents and hand recipes not counted. sigma: initial deviation in ranges.

    population: None for CMA-ES' default. diagonal: None chooses it when evaluations < 20 per gene.
    start: 'space' starts at the parameters' own starts, 'best' at the best hand recipe the space can hold.
    finalists: how many candidates are re-scored on validation, the distribution's mean always among them.
    tie_break: soft score that decides between equal ones, None for the probability where tasks have one. race: drop
    candidates on few items; None scores each on all items of its generation.
    """

    evaluations: Whole = Field(default=500, ge=1)
    population: Whole | None = Field(default=None, ge=4)
    sigma: Number = Field(default=0.15, gt=0)
    seed: Whole = Field(default=0, ge=0, lt=2**31)
    diagonal: bool | None = None
    start: Literal["space", "best"] = "space"
    finalists: Whole = Field(default=6, ge=1)
    tie_break: Literal["probability", "logprob", "none"] | None = None
    race: RaceConfig | None = None


class StageConfig(_Strict):
    """A stage of a search: weights, or routes of layers. What is not given is the search's own."""

    stage: Literal["weights", "routes"]
    evaluations: Whole | None = Field(default=None, ge=1)
    population: Whole | None = Field(default=None, ge=4)
    sigma: Number | None = Field(default=None, gt=0)


class GateConfig(_Strict):
    """tokens: of the search's prompts that a route is looked at on; factor: how many times the best parent's perplexity it may have."""

    tokens: Whole = Field(default=2000, ge=16)
    factor: Number = Field(default=20.0, gt=1)


class RoutesConfig(_Strict):
    """Routes of layers, see `evomerge.route_space`.

    genome: 'categorical' is a choice at each position of one model's path, 'conditional' the same as numbers; 'indicator'
    switches all layers of all models, `repeats` times over (arXiv 2403.13187). start: model that gives embeddings and head
    and whose path it begins at; 'best': the best so far, on validation, in a first stage on the search items, a parent or
    stack by hand. embeddings: of any model, which is one more choice, or of the start. models: those whose layers are used,
    all unless named. layers: [least, most], from half to twice the start's unless given. changes: how many positions a
    first candidate changes. spans: lengths of inserted spans. scales: a factor of the hidden state for each hop, between
    any two layers, or none; in scale_range. penalty: what a layer more than the base has costs of the score. stacks:
    mergekit passthrough files to begin with. gate: None scores every route in full. optimizer: 'elitist' for choices and
    'cma' for numbers unless named; 'random' samples without learning.
    """

    genome: Literal["categorical", "conditional", "indicator"] = "categorical"
    start: str = "best"
    embeddings: Literal["any", "start"] = "any"
    models: tuple[str, ...] = ()
    layers: tuple[Whole, Whole] | None = None
    changes: Number = Field(default=2.0, gt=0)
    repeats: Whole = Field(default=2, ge=1, le=8)
    spans: tuple[Annotated[Whole, Field(ge=1)], ...] = Field(default=(1, 2), min_length=1)
    scales: Literal["none", "hop", "matrix"] = "none"
    scale_range: tuple[Number, Number] = (0.4, 1.5)
    penalty: Number = Field(default=0.0, ge=0)
    stacks: tuple[str, ...] = ()
    gate: GateConfig | None = Field(default_factory=GateConfig)
    optimizer: Literal["elitist", "cma", "random"] | None = None

    @model_validator(mode="after")
    def _ordered(self) -> RoutesConfig:
        if self.layers is not None and not 1 <= self.layers[0] <= self.layers[1]:
            raise ValueError(f"layers are [least, most], both at least 1, got {list(self.layers)}")
        if not 0 < self.scale_range[0] < 1 < self.scale_range[1]:
            raise ValueError(f"scale_range must hold 1 and lie above 0, got {list(self.scale_range)}")
        if self.optimizer == "elitist" and self.genome != "categorical":
            raise ValueError("optimizer: elitist changes choices, which only genome: categorical has; use cma")
        if self.scales == "matrix" and self.genome != "indicator":
            raise ValueError("scales: matrix belongs to genome: indicator; a conditional genome has scales: hop or none")
        return self


class Config(_Strict):
    """A whole search. objective: weighted 'mean' or 'geometric' mean of the tasks, or the 'worst' of them.

    keep: task -> x: a candidate that falls more than x below the best parent there ranks after all that do not.
    stages: of the search, each from the best of the one before; search.evaluations is the budget of each that has none of its own.
    """

    study: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    models: dict[str, ModelConfig] = Field(min_length=2)
    base: str
    method: str
    out_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    space: SpaceConfig = Field(default_factory=SpaceConfig)
    tasks: tuple[TaskConfig, ...] = Field(min_length=1)
    objective: Literal["mean", "geometric", "worst"] = "mean"
    keep: dict[str, Annotated[Number, Field(ge=0)]] = Field(default_factory=dict)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    search: SearchConfig = Field(default_factory=SearchConfig)
    stages: tuple[StageConfig, ...] = Field(default=(StageConfig(stage="weights"),), min_length=1)
    routes: RoutesConfig = Field(default_factory=RoutesConfig)

    @field_validator("stages", mode="before")
    @classmethod
    def _stage_names(cls, value: Any) -> Any:
        return [{"stage": v} if isinstance(v, str) else v for v in value] if isinstance(value, list | tuple) else value

    @field_validator("models", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: {"path": v} if isinstance(v, str) else v for k, v in value.items()}
        return value

    @property
    def kinds(self) -> tuple[str, ...]:
        """What each stage searches: 'weights' or 'routes'."""
        return tuple(stage.stage for stage in self.stages)

    @property
    def budgets(self) -> tuple[int, ...]:
        """Evaluations of each stage."""
        return tuple(stage.evaluations or self.search.evaluations for stage in self.stages)

    @property
    def parents(self) -> tuple[str, ...]:
        """The models that are mixed: all but the base, in the order written."""
        return tuple(name for name in self.models if name != self.base)


def load(reference: str) -> tuple[Config, str]:
    """(configuration, its YAML verbatim) from a file, or from a shipped search space of that name."""
    shipped = data.search_spaces()
    path = Path(reference)
    if not path.is_file() and reference in shipped:
        path = shipped[reference]
    if not path.exists():
        raise ConfigError(f"there is no search file '{reference}'. {suggest(reference, shipped)} These are shipped; or give a path.")
    document = documents.read(path)
    return check(document), document.text


def stored(study: str, text: str, overrides: Mapping[str, int]) -> tuple[Config, str]:
    """The configuration of a stored study, flags applied, and its YAML."""
    return override(check(documents.parse(text, f"{study} (stored)")), overrides), text


def rename(text: str, study: str) -> tuple[Config, str]:
    """The configuration under another study name, in the settings and in its YAML."""
    document = documents.parse(text, "the search file")
    lines = text.splitlines(keepends=True)
    line = document.marks.get(("study",), (0, 0))[0] - 1
    if line < 0 or not re.match(r"""["']?study["']?\s*:\s*[^\s#]""", lines[line]):
        raise ConfigError("--study needs a search file with its `study:` name on one line")
    lines[line] = f"study: {json.dumps(study)}\n"
    renamed = "".join(lines)
    return check(documents.parse(renamed, f"--study {study}")), renamed


def override(settings: Config, overrides: Mapping[str, int]) -> Config:
    """The settings with `evaluations`, of the last stage, or `seed` of the search replaced."""
    try:
        given = dict(overrides)
        if len(settings.stages) > 1 and "evaluations" in given:
            last = settings.stages[-1].model_dump() | {"evaluations": given.pop("evaluations")}
            settings = settings.model_copy(update={"stages": (*settings.stages[:-1], StageConfig.model_validate(last))})
        elif "evaluations" in given:
            settings = settings.model_copy(update={"stages": (settings.stages[0].model_copy(update={"evaluations": None}),)})
        return settings.model_copy(update={"search": SearchConfig.model_validate(settings.search.model_dump() | given)})
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"--{_sentence(first, first['loc'])}") from None


def check(document: documents.Document) -> Config:
    """The configuration in a document; raises ConfigError for the first thing wrong in it."""
    if not isinstance(document.data, dict):
        raise ConfigError(f"{document.where()} must be a mapping with keys such as study, models, base, method, tasks")
    try:
        config = Config.model_validate(document.data)
    except ValidationError as error:
        # of all that is wrong, a misspelt key says most, then what lies deepest
        placed = [(e, _path(e["loc"], document.data)) for e in error.errors()]
        first, path = min(placed, key=lambda pair: (_unlike(pair[0], pair[1]), -len(pair[1])))
        raise ConfigError(f"{document.where(path)} {_sentence(first, path)}") from None
    from evomerge.methods import METHODS

    def fail(path: documents.Key, message: str) -> ConfigError:
        return ConfigError(f"{document.where(path)} {message}")

    if config.base not in config.models:
        raise fail(("base",), f"base '{config.base}' is not among the models. {suggest(config.base, config.models)}")
    if config.method not in METHODS:
        raise fail(("method",), f"unknown method '{config.method}'. {suggest(config.method, METHODS)}")
    method = METHODS[config.method]
    least, most = method.models
    if not least <= len(config.parents) <= most:
        raise fail(("models",), f"{method.name} takes {least} to {most} models besides the base, got {len(config.parents)}")
    for name, value in config.space.parameters.items():
        place = ("space", "parameters", name)
        param = method.param(name)
        if param is None:
            raise fail(place, f"{method.name} has no parameter '{name}'. {suggest(name, [p.name for p in method.params])}")
        if param.flag and (isinstance(value, RangeConfig) or value not in (0, 1)):
            raise fail(place, f"{name} is a switch: true or false, not searched")
        for number in (value.low, value.high) if isinstance(value, RangeConfig) else (float(value),):
            if not param.hard_low <= number <= param.hard_high:
                raise fail(place, f"{name} must be in [{param.hard_low:g}, {param.hard_high:g}], got {number:g}")
    if isinstance(config.space.groups, tuple) and (not config.space.groups or min(config.space.groups) < 1):
        raise fail(("space", "groups"), f"groups are sizes of at least 1, got {list(config.space.groups)}")
    if isinstance(config.space.groups, int) and config.space.groups < 1:
        raise fail(("space", "groups"), f"groups must be at least 1, got {config.space.groups}")
    for component in config.space.components:
        if config.space.components.count(component) > 1:
            raise fail(("space", "components"), f"component '{component}' is listed twice")
    if config.kinds not in _STAGES:
        known = "; ".join(", ".join(kinds) for kinds in _STAGES)
        raise fail(("stages",), f"stages are one of: {known}; got {', '.join(config.kinds)}")
    routed: list[tuple[documents.Key, str]] = [(("routes", "models", i), m) for i, m in enumerate(config.routes.models)]
    routed += [(("routes", "start"), config.routes.start)] if config.routes.start != "best" else []
    for where, name in routed:
        if name not in config.models:
            raise fail(where, f"'{name}' is not among the models. {suggest(name, config.models)}")
    names = [t.task for t in config.tasks]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise fail(("tasks", i, "task"), f"task '{name}' is listed twice; give it one entry and a weight")
    sizes = config.evaluation.items
    asked: list[tuple[documents.Key, Sequence[str]]] = [(("keep",), list(config.keep))]
    asked += [(("evaluation", "items"), list(sizes))] if isinstance(sizes, dict) else []
    for path, named in asked:
        for name in named:
            if name not in names:
                raise fail((*path, name), f"'{name}' is not among the tasks. {suggest(name, names)}")
    return config


_STAGES = (("weights",), ("routes",), ("weights", "routes"), ("routes", "weights"), ("weights", "routes", "weights"))


def _unlike(error: Any, path: documents.Key) -> bool:
    """False for an unknown key that resembles a known one."""
    return error["type"] != "extra_forbidden" or not get_close_matches(str(path[-1]), _known(path[:-1]))


def _path(loc: Sequence[str | int], data: Any) -> documents.Key:
    """pydantic's location without the names of its own types: only steps the document has, and a last missing key."""
    path: list[str | int] = []
    for i, part in enumerate(loc):
        step: Any = data
        if (isinstance(data, dict) and part in data) or (isinstance(data, list) and isinstance(part, int)):
            data = step[part]
            path.append(part)
        elif i == len(loc) - 1 and isinstance(data, dict):
            path.append(part)
    return tuple(path)


def _sentence(error: Any, path: documents.Key) -> str:
    """One sentence for one pydantic error."""
    name = ".".join(str(p) for p in path) or "the file"
    if error["type"] == "extra_forbidden":
        return f"unknown key '{name}'. {suggest(str(path[-1]), _known(path[:-1]))}"
    if error["type"] == "missing":
        return f"'{name}' is missing; it is required"
    message = error["msg"].removeprefix("Value error, ")
    seen = error.get("input")
    shown = f", got {seen!r}" if isinstance(seen, str | int | float | bool | type(None)) else ""
    return f"{name}: {message[0].lower()}{message[1:]}{shown}"


def _known(path: documents.Key) -> list[str]:
    """The keys allowed at a path."""
    model: type[BaseModel] = Config
    steps: dict[str, type[BaseModel]] = {
        "models": ModelConfig,
        "space": SpaceConfig,
        "parameters": RangeConfig,
        "tasks": TaskConfig,
        "evaluation": EvaluationConfig,
        "search": SearchConfig,
        "race": RaceConfig,
        "stages": StageConfig,
        "routes": RoutesConfig,
        "gate": GateConfig,
    }
    for part in path:
        model = steps.get(str(part), model)
    return list(model.model_fields)
