"""The blocks of a search file, each a model of pydantic: names, types, bounds, and what else one block alone can tell."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from evomerge.optimizers import OPTIMIZERS, optimizer_for


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


def _optimizer_name(value: str) -> str:
    if value not in OPTIMIZERS:
        raise ValueError(f"should be one of {', '.join(OPTIMIZERS)}")
    return value


OptimizerName = Annotated[str, AfterValidator(_optimizer_name)]
_ITEMS = 100
Counts = Annotated[int | dict[str, int], BeforeValidator(_counts)]
Share = Annotated[Number, Field(gt=0)]
Measure = Literal["metric", "probability", "logprob"]
_METRIC: dict[Measure, float] = {"metric": 1.0}
Shares = Annotated[
    dict[Measure, Share],
    Field(min_length=1),
    BeforeValidator(lambda value: {value: 1.0} if isinstance(value, str) else value),
]


class Strict(BaseModel):
    """A block that knows all of its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(Strict):
    """A parent: a folder (from the working directory) or a Hugging Face repository, with an optional revision."""

    path: str = Field(min_length=1)
    revision: str | None = None


class RangeConfig(Strict):
    """Bounds of a searched parameter and where the search starts; low < start < high."""

    low: Number
    high: Number
    start: Number

    @model_validator(mode="after")
    def _inside(self) -> RangeConfig:
        if not self.low < self.start < self.high:
            raise ValueError(f"start {self.start:g} must lie inside ({self.low:g}, {self.high:g})")
        return self


class SpaceConfig(Strict):
    """groups: how many layer groups, or their sizes from the bottom; a parameter is a range, or a number that fixes it."""

    groups: Whole | tuple[Whole, ...] = 4
    components: tuple[Literal["attention", "mlp", "other"], ...] = Field(
        default=("attention", "mlp"), min_length=1
    )
    embeddings: bool = True
    head: bool = True
    parameters: dict[str, RangeConfig | bool | float] = Field(default_factory=dict)


class TaskConfig(Strict):
    """A task of the objective: an lm-eval task, group or tag, or a Python function.

    metric, filter: the task's first unless named; weight: its share. search: what candidates are ranked by, the metric,
    the probability or mean log-probability of the right answer, or measure -> share. items: role -> document numbers or item ids of
    exactly its items, or a file with one a line. python: 'module:function' in place of a task, see
    `evomerge.evaluation.python_tasks`, with a name and whether higher scores are better.
    """

    task: str
    metric: str | None = None
    filter: str | None = None
    weight: Number = Field(default=1.0, gt=0)
    search: Shares = Field(default_factory=lambda: dict(_METRIC))
    num_fewshot: Whole | None = Field(default=None, ge=0)
    items: (
        dict[
            Literal["search", "validation", "test"],
            Annotated[tuple[Whole | str, ...], Field(min_length=1)] | str,
        ]
        | None
    ) = None
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
        if self.python is not None and (self.metric, self.filter, self.num_fewshot, self.items) != (
            None,
            None,
            None,
            None,
        ):
            raise ValueError(
                "a python task has no metric, filter, num_fewshot or items: its function decides"
            )
        if self.name is not None and self.name != self.task:
            raise ValueError("a python task has a name in place of a task")
        return self


class EvaluationConfig(Strict):
    """items: items of each task that a generation is scored on, or task -> items, 100 of a task that is not named;
    validation, test: most items of each task, null for all.

    search: most items of each task that generations take theirs from. splits: 'declared', 'hash' or 'hash-train', see
    `evomerge.evaluation.lm_harness.TaskSpec`; include: folders of task YAML files. duplicates, allow_benchmark_test,
    training_texts, overlap, overlap_ngram: see `evomerge.evaluation.lm_harness.items.Rules`. Of a group, all these counts are of
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


class RaceConfig(Strict):
    """rungs: shares of a generation's items after which candidates are dropped, the last 1; error: how often, at most, a
    generation may lose one of its best. See `evomerge.search.racing`."""

    rungs: tuple[Number, ...] = Field(default=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 1.0), min_length=1)
    error: Number = Field(default=0.05, gt=0, lt=1)


class SearchConfig(Strict):
    """evaluations: budget of the search, parents and hand recipes not counted. sigma: initial deviation in ranges.

    population: None for CMA-ES' default. diagonal: None chooses it when evaluations < 20 per gene.
    start: 'space' starts at the parameters' own starts, 'best' at the best hand recipe the space can hold.
    finalists: how many candidates are re-scored on validation, the distribution's mean always among them.
    tie_break: soft score that decides between equal ones, None for the probability where tasks have one. race: drop
    candidates on few items; None scores each on all items of its generation. islands: searches side by side that share the
    budget and the workers. 'auto', of islands and population: as many as keep the workers busy that the study begins with.
    pipelined: ask each generation before the last results of the one before it, so that no worker waits for a straggler; each
    learns from those before the last, which takes more evaluations for the same score. optimizer: of searches of weights, a
    name of `evomerge.optimizers.OPTIMIZERS` that takes numbers alone; routes have their own.
    """

    evaluations: Whole = Field(default=500, ge=1)
    population: Annotated[Whole, Field(ge=4)] | Literal["auto"] | None = None
    sigma: Number = Field(default=0.15, gt=0)
    seed: Whole = Field(default=0, ge=0, lt=2**31)
    diagonal: bool | None = None
    start: Literal["space", "best"] = "space"
    finalists: Whole = Field(default=6, ge=1)
    tie_break: Literal["probability", "logprob", "none"] | None = None
    race: RaceConfig | None = None
    islands: Annotated[Whole, Field(ge=1, le=64)] | Literal["auto"] = 1
    pipelined: bool = False
    optimizer: OptimizerName = "cma"

    @field_validator("optimizer")
    @classmethod
    def _takes_numbers(cls, name: str) -> str:
        optimizer_for(name, categorical=False)
        return name


class StageConfig(Strict):
    """A stage of a search: weights, or routes of layers. What is not given is the search's own."""

    stage: Literal["weights", "routes"]
    evaluations: Whole | None = Field(default=None, ge=1)
    population: Whole | None = Field(default=None, ge=4)
    sigma: Number | None = Field(default=None, gt=0)


class GateConfig(Strict):
    """tokens: of the search's prompts that a route is looked at on, None for a hundredth of what a candidate is scored on, 64 to
    2,000; factor: how many times the best parent's perplexity it may have."""

    tokens: Whole | None = Field(default=None, ge=16)
    factor: Number = Field(default=20.0, gt=1)


class RoutesConfig(Strict):
    """Routes of layers, see `evomerge.spaces.routes`.

    genome: 'categorical' is a choice at each position of one model's path, 'conditional' the same as numbers; 'indicator'
    switches all layers of all models, `repeats` times over (arXiv 2403.13187). start: model that gives embeddings and head
    and whose path it begins at; 'best': the best so far, on validation, in a first stage on the search items, a parent or
    stack by hand. embeddings: of any model, which is one more choice, or of the start. models: those whose layers are used,
    all unless named. layers: [least, most], from half to twice the start's unless given. changes: how many positions a
    first candidate changes. spans: lengths of inserted spans. scales: a factor of the hidden state for each hop, between
    any two layers, or none; in scale_range. penalty: what a layer more than the base has costs of the score. stacks:
    mergekit passthrough files to begin with. gate: None scores every route in full. optimizer: a name of
    `evomerge.optimizers.OPTIMIZERS` that takes the genome; 'elitist' for choices and 'cma' for numbers unless named.
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
    optimizer: OptimizerName | None = None

    @model_validator(mode="after")
    def _ordered(self) -> RoutesConfig:
        if self.layers is not None and not 1 <= self.layers[0] <= self.layers[1]:
            raise ValueError(f"layers are [least, most], both at least 1, got {list(self.layers)}")
        if not 0 < self.scale_range[0] < 1 < self.scale_range[1]:
            raise ValueError(f"scale_range must hold 1 and lie above 0, got {list(self.scale_range)}")
        if self.optimizer is not None:
            optimizer_for(self.optimizer, categorical=self.genome == "categorical")
        if self.scales == "matrix" and self.genome != "indicator":
            raise ValueError(
                "scales: matrix belongs to genome: indicator; a conditional genome has scales: hop or none"
            )
        return self


class LimitsConfig(Strict):
    """What a candidate and a worker may do before they are put an end to, see `evomerge.workers.scheduler.Limits`. factor: times the
    running median that a candidate may take; floor: seconds it always may; memory: bytes a worker may grow by."""

    factor: Number = Field(default=4.0, gt=1)
    floor: Number = Field(default=60.0, gt=0)
    memory: Number | None = Field(default=None, gt=0)


class ClusterConfig(Strict):
    """Where candidates are evaluated; may change from run to run. ray: 'local' starts a cluster on this machine, 'auto'
    joins the one it belongs to, else its address; None is no Ray. workers: as many as fit unless given; cpus, gpus: of
    each, in shares too, at most one GPU, which is the default where the cluster has any. grace: seconds that what is in
    flight has once a signal came. backup: minutes between copies of the store, None makes none."""

    ray: str | None = None
    workers: Whole | None = Field(default=None, ge=1)
    gpus: Number | None = Field(default=None, ge=0, le=1)  # a model over several is not built
    cpus: Number = Field(default=1.0, ge=0)
    grace: Number = Field(default=600.0, ge=0)
    backup: Number | None = Field(default=30.0, gt=0)
    limits: LimitsConfig = Field(default_factory=LimitsConfig)


class BudgetConfig(Strict):
    """What a search may use up beside its evaluations; may change from run to run. hours: of the driver, over all its runs;
    gpu_hours: of workers at work, times the GPUs of each; cost: gpu_hours times price."""

    hours: Share | None = None
    gpu_hours: Share | None = None
    cost: Share | None = None
    price: Number = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _priced(self) -> BudgetConfig:
        if self.cost is not None and not self.price:
            raise ValueError("cost needs the price of a GPU hour")
        return self


class Config(Strict):
    """A whole search. objective: weighted 'mean' or 'geometric' mean of the tasks, or the 'worst' of them.

    keep: task -> x: a candidate that falls more than x below the best parent there ranks after all that do not.
    stages: of the search, each from the best of the one before; search.evaluations is the budget of each that has none of its own.
    reuse: earlier studies, by name or path, whose evaluations are read instead of made again.
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
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    budget: BudgetConfig = Field(default_factory=BudgetConfig)
    reuse: tuple[str, ...] = ()

    @field_validator("stages", mode="before")
    @classmethod
    def _stage_names(cls, value: Any) -> Any:
        return (
            [{"stage": v} if isinstance(v, str) else v for v in value]
            if isinstance(value, list | tuple)
            else value
        )

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
