"""The blocks of a search file as pydantic models: every key with its type, bounds, default and description.

The text under a key is its description, from which `evomerge.config.reference` makes the reference of all
keys; pydantic does not read it, since that would cost a tenth of a second at every start. A block checks what
it can tell of itself alone; `evomerge.config.checks` checks blocks against one another.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from evomerge.config.block import Strict
from evomerge.config.listener_schema import NotifyConfig, TrackerConfig
from evomerge.config.stage_kinds import LEARNED_STEPS, STAGES
from evomerge.config.stage_schema import RoutesConfig, StageConfig
from evomerge.config.value_types import (
    BackendName,
    Counts,
    EngineOption,
    Measure,
    Name,
    Number,
    OptimizerName,
    Positive,
    Shares,
    Whole,
)
from evomerge.evaluation.lm_harness.backends import DEFAULT_BACKEND

STUDY_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""What a study may be called."""
_DEFAULT_ITEMS = 100
_METRIC_ALONE: dict[Measure, float] = {"metric": 1.0}


class ModelConfig(Strict):
    """A parent model; written as text alone, the text is its path."""

    path: str = Field(min_length=1)
    """Folder of the model, from the folder of the search file, or a repository of the Hugging Face hub."""
    revision: Name | None = None
    """Branch, tag or commit of the repository."""

    @property
    def reference(self) -> str:
        """Path and revision as one text: PATH or PATH@REVISION."""
        return f"{self.path}@{self.revision}" if self.revision else self.path


class RangeConfig(Strict):
    """Bounds of a searched parameter and where the search starts: low < start < high."""

    low: Number
    """Lower bound."""
    high: Number
    """Upper bound."""
    start: Number
    """Where the search starts."""

    @model_validator(mode="after")
    def _inside(self) -> RangeConfig:
        if not self.low < self.start < self.high:
            raise ValueError(f"start {self.start:g} must lie inside ({self.low:g}, {self.high:g})")
        return self


class SpaceConfig(Strict):
    """Which coefficients of the merge method are searched."""

    groups: Whole | tuple[Whole, ...] = 4
    """Number of layer groups that have coefficients of their own, or the groups' sizes from the bottom."""
    components: tuple[Literal["attention", "mlp", "other"], ...] = Field(
        default=("attention", "mlp"), min_length=1
    )
    """Parts of a layer that are searched, each with coefficients of its own; 'other' is neither of the first
    two."""
    embeddings: bool = True
    """Whether the embeddings are searched, with coefficients of their own."""
    head: bool = True
    """Whether the output head is searched, with coefficients of its own."""
    parameters: dict[str, RangeConfig | bool | float] = Field(default_factory=dict)
    """Parameter of the method -> its range, or a number that fixes it; weights are searched also where left
    out."""


class TaskConfig(Strict):
    """A task of the objective: an lm-eval task, group or tag, or a Python function."""

    task: Name
    """Name of the task, group or tag in lm-eval."""
    metric: Name | None = None
    """Metric of the task; its first unless named."""
    filter: Name | None = None
    """lm-eval's filter of the task's answers; its first unless named."""
    weight: Number = Field(default=1.0, gt=0)
    """Weight of the task in the objective."""
    search: Shares = Field(default_factory=lambda: dict(_METRIC_ALONE))
    """What candidates are ranked by: metric, probability or logprob of the right answer, or a share of
    each."""
    num_fewshot: Whole | None = Field(default=None, ge=0)
    """Number of examples in a prompt; the task's own unless given."""
    items: (
        dict[
            Literal["search", "validation", "test"],
            Annotated[tuple[Whole | str, ...], Field(min_length=1)] | str,
        ]
        | None
    ) = None
    """Role -> exactly its items, as document numbers or item ids, or a file with one a line; dealt by a rule
    unless given."""
    python: str | None = Field(default=None, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """'module:function' that scores candidates in place of a task, see `evomerge.evaluation.python_tasks`."""
    loss: str | None = Field(default=None, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """'module:function' of a Python task's loss for learned stages, `evomerge.evaluation.python_losses`."""
    name: Name | None = None
    """Name of a Python task."""
    higher_is_better: bool | None = None
    """Whether higher values are better; needed where a metric does not say, true of a Python task."""

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
        if self.python is None and self.name is not None:
            raise ValueError("name belongs to a task with python: module:function")
        if self.python is None and self.loss is not None:
            raise ValueError("loss belongs to a task with python: module:function")
        if self.python is not None and self.name is None:
            raise ValueError("a python task needs a name, not a task")
        settings_of_lm_eval = (self.metric, self.filter, self.num_fewshot, self.items)
        if self.python is not None and any(value is not None for value in settings_of_lm_eval):
            raise ValueError(
                "a python task has no metric, filter, num_fewshot or items: its function decides"
            )
        if self.name is not None and self.name != self.task:
            raise ValueError("a python task has a name in place of a task")
        return self


class EngineConfig(Strict):
    """How an engine that generates texts is opened, see `evaluation.backend`."""

    process: Literal["child", "worker"] = "child"
    """'child': a process of its own, started again where it dies; 'worker': the worker's own process."""
    push: Literal["auto", "in-place", "reload"] = "auto"
    """How weights get in: into the engine's own tensors, by its loader, or in place wherever that can be."""
    rows: Whole = Field(default=256, ge=1)
    """Most prompts that run at once."""
    cache_gb: Number = Field(default=4.0, gt=0)
    """Memory for keys and values, in GB."""
    tensor_parallel: Whole = Field(default=1, ge=1)
    """Devices that share the model."""
    threads: Whole = Field(default=1, ge=1)
    """CPU threads of a child."""
    options: dict[EngineOption, int | float | bool] = Field(default_factory=dict)
    """Further arguments of vLLM's LLM that say how it computes, none that has it run other code."""


class EvaluationConfig(Strict):
    """How tasks are evaluated, and the roles of their items. Of a group, counts are of each of its tasks."""

    items: Counts = _DEFAULT_ITEMS
    """Items of each task that a generation is scored on, or task -> items, 100 of a task that is not
    named."""
    validation: Whole | None = Field(default=None, ge=2)
    """Most items of each task that finalists are chosen by; all unless given."""
    test: Whole | None = Field(default=None, ge=2)
    """Most items of each task for the final score; all unless given."""
    search: Whole | None = Field(default=None, ge=1)
    """Most items of each task that generations take theirs from; all unless given."""
    splits: Literal["declared", "hash", "hash-train", "validation"] = "hash"
    """Which items have which role: the task's own splits, by hash, or a search on its validation items."""
    duplicates: Literal["refuse", "drop"] = "refuse"
    """What happens to an item in two declared splits: an error, or it is kept in the later role only."""
    allow_benchmark_test: bool = False
    """Whether a task of lm-eval may be dealt by hash, so that the search sees the benchmark's own test
    items."""
    training_texts: tuple[str, ...] = ()
    """Files of texts that models were trained on, in which items are looked for."""
    overlap: Literal["warn", "drop"] = "warn"
    """What happens to items that share overlap_ngram words in a row with the training texts."""
    overlap_ngram: Whole = Field(default=13, ge=1)
    """Number of words in a row that are an overlap."""
    backend: BackendName = DEFAULT_BACKEND
    """What answers tasks: 'compiled' in memory, 'lm-eval' by its HFLM, 'vllm' for texts, or 'auto', the
    faster of these."""
    engine: EngineConfig = Field(default_factory=EngineConfig)
    """How vLLM is opened, where the backend is 'vllm' or 'auto'."""
    batch_size: Whole = Field(default=64, ge=1)
    """Batch size of what goes through lm-eval's HFLM."""
    include: tuple[str, ...] = ()
    """Folders of lm-eval task files."""
    apply_chat_template: bool = False
    """Whether prompts are written by the base model's chat template."""
    fewshot_as_multiturn: bool = False
    """Whether examples of a prompt are turns of a chat."""
    system_instruction: str | None = None
    """System message of every prompt."""

    def items_of(self, task: str) -> int:
        """Looks up the size of a generation's part of a task.

        Args:
            task: Name of a task or group of the search file.

        Returns:
            Number of items of the task, or of each task of the group, that a generation is scored on.
        """
        return self.items if isinstance(self.items, int) else self.items.get(task, _DEFAULT_ITEMS)


class RaceConfig(Strict):
    """Racing: candidates that are clearly behind are dropped on few items, see `evomerge.search.racing`."""

    rungs: tuple[Number, ...] = Field(default=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 1.0), min_length=1)
    """Shares of a generation's items after which candidates are dropped; the last is 1."""
    error: Number = Field(default=0.05, gt=0, lt=1)
    """How often, at most, a generation may lose one of its best candidates."""


class SearchConfig(Strict):
    """How the space is searched."""

    evaluations: Whole = Field(default=500, ge=1, le=10**9)
    """Budget of candidates; parents and hand recipes are not counted."""
    population: Annotated[Whole, Field(ge=4)] | Literal["auto"] | None = None
    """Candidates of a generation; CMA-ES' default unless given; 'auto' keeps the workers busy that the study
    begins with."""
    sigma: Number = Field(default=0.15, gt=0)
    """Initial standard deviation, in ranges of the parameters."""
    seed: Whole = Field(default=0, ge=0, lt=2**31)
    """Seed of everything that is random."""
    diagonal: bool | None = None
    """Whether the covariance matrix is diagonal; unless given, it is with fewer than 20 evaluations for each
    gene."""
    start: Name = "space"
    """'space' starts at the parameters' starts, 'best' at the best hand recipe that fits, or a label of
    hand_recipes."""
    finalists: Whole = Field(default=6, ge=1)
    """Candidates that are scored again on validation items, the distribution's mean always among them."""
    tie_break: Literal["probability", "logprob", "none"] | None = None
    """Soft metric that decides between equal scores; the probability, where tasks have one, unless given."""
    race: RaceConfig | None = None
    """Drops candidates on few items; each is scored on all items of its generation where left out."""
    islands: Annotated[Whole, Field(ge=1, le=64)] | Literal["auto"] = 1
    """Searches side by side that share budget and workers; 'auto' keeps the workers busy that the study
    begins with."""
    pipelined: bool = False
    """Asks each generation before the last results of the one before, so that no worker waits; takes more
    evaluations."""
    optimizer: OptimizerName = "cma"
    """Optimizer of searches of weights, where cma is CatCMA for a list of methods; routes have their own."""


class LimitsConfig(Strict):
    """What ends a candidate or a worker, see `evomerge.workers.Limits`."""

    factor: Number = Field(default=4.0, gt=1)
    """How many times the running median scoring may take; ten times that for a process that computes."""
    floor: Number = Field(default=60.0, gt=0)
    """Seconds that a candidate may always take."""
    opening: Number = Field(default=3600.0, gt=0)
    """Seconds that a worker may take to open, and to merge, probe and compile before it scores."""
    memory: Number | None = Field(default=None, gt=0)
    """Bytes that a worker's memory may grow by; no limit unless given."""


class ClusterConfig(Strict):
    """Where candidates are evaluated; may change from run to run."""

    ray: str | None = None
    """'local' starts a Ray cluster on this machine, 'auto' joins the one it belongs to, else an address; null
    uses no Ray."""
    workers: Whole | None = Field(default=None, ge=1)
    """Number of workers; as many as fit unless given."""
    gpus: Number | None = Field(default=None, ge=0, le=64)
    """GPUs of each worker, a share of one or a whole number; one, where the cluster has any, unless given."""
    cpus: Number = Field(default=1.0, ge=0)
    """CPUs of each worker."""
    grace: Number = Field(default=600.0, ge=0)
    """Seconds that candidates in flight have to finish after a signal."""
    backup: Number | None = Field(default=30.0, gt=0)
    """Minutes between copies of the study's file; null makes none."""
    limits: LimitsConfig = Field(default_factory=LimitsConfig)
    """What ends a candidate or a worker."""

    @field_validator("gpus")
    @classmethod
    def _whole_or_share(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            raise ValueError(f"must be a whole number or a share of one, got {gpus:g}")
        return gpus


class BudgetConfig(Strict):
    """What a search may use up beside its evaluations; may change from run to run."""

    hours: Positive | None = None
    """Hours of the driver, over all its runs."""
    gpu_hours: Positive | None = None
    """Hours of workers at work, times the GPUs of each."""
    cost: Positive | None = None
    """Cost: gpu_hours times price."""
    price: Number = Field(default=0.0, ge=0)
    """Price of a GPU hour."""

    @model_validator(mode="after")
    def _priced(self) -> BudgetConfig:
        if self.cost is not None and not self.price:
            raise ValueError("cost needs the price of a GPU hour")
        return self


class Config(Strict):
    """A whole search file, as `evomerge.config.load` reads it::

    settings, text = load("demo")
    print(settings.study, settings.method, settings.parents)
    """

    study: str = Field(pattern=STUDY_NAME)
    """Name of the study and of its folder: letters, digits, '.', '_' and '-', at most 64."""
    models: dict[Name, ModelConfig] = Field(min_length=2)
    """Name -> parent model."""
    license: Literal["any", "permissive"] | Annotated[tuple[Name, ...], Field(min_length=1)] = "any"
    """Licenses that all models must have: 'permissive', or names of the Hub; also read inside models."""
    base: str
    """Name of the model that the others are compared with, whose shape the merge has."""
    method: str | tuple[str, ...]
    """Merge method, or a list of which the search chooses one for each layer group."""
    out_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the merged tensors that are scored and written."""
    space: SpaceConfig = Field(default_factory=SpaceConfig)
    """Which coefficients of the merge method are searched."""
    tasks: tuple[TaskConfig, ...] = Field(min_length=1)
    """Tasks of the objective."""
    objective: Literal["mean", "geometric", "worst"] = "mean"
    """Weighted mean or geometric mean of the tasks, or the worst of them."""
    keep: dict[str, Annotated[Number, Field(ge=0)]] = Field(default_factory=dict)
    """Retention constraints, task -> x: who falls more than x below the best parent there ranks after all who
    do not."""
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    """How tasks are evaluated and which of their items have which role."""
    search: SearchConfig = Field(default_factory=SearchConfig)
    """How the space is searched."""
    stages: tuple[StageConfig, ...] = Field(default=(StageConfig(stage="weights"),), min_length=1)
    """Stages of the search, each from the best of the one before."""
    hand_recipes: dict[Name, str] = Field(default_factory=dict)
    """Label -> mergekit file of a merge of the search's models that is scored beside the hand recipes."""
    routes: RoutesConfig = Field(default_factory=RoutesConfig)
    """Routes of layers, where a stage searches them."""
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    """Where candidates are evaluated; may change from run to run."""
    budget: BudgetConfig = Field(default_factory=BudgetConfig)
    """What a search may use up beside its evaluations; may change from run to run."""
    reuse: tuple[str, ...] = ()
    """Earlier studies, by name or path, whose evaluations are read instead of made again."""
    trackers: tuple[TrackerConfig, ...] = ()
    """Trackers that the search is written to; may change from run to run."""
    notify: tuple[NotifyConfig, ...] = ()
    """Who is told of the end and of new bests; may change from run to run, and needs --allow-notify."""

    @field_validator("trackers", mode="before")
    @classmethod
    def _trackers_by_name(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        return [{"name": tracker} if isinstance(tracker, str) else tracker for tracker in value]

    @field_validator("stages", mode="before")
    @classmethod
    def _stages_by_kind(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        return [{"stage": stage} if isinstance(stage, str) else stage for stage in value]

    @field_validator("models", mode="before")
    @classmethod
    def _models_by_path(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: {"path": model} if isinstance(model, str) else model for name, model in value.items()}

    @property
    def methods(self) -> tuple[str, ...]:
        """The merge methods that a layer group may have: one, or those that the search chooses from."""
        return (self.method,) if isinstance(self.method, str) else self.method

    @property
    def chooses_methods(self) -> bool:
        """Whether the search chooses the method of each layer group."""
        return not isinstance(self.method, str)

    @property
    def kinds(self) -> tuple[str, ...]:
        """What each stage searches, names of `evomerge.config.stage_kinds.STAGES`."""
        return tuple(stage.stage for stage in self.stages)

    @property
    def budgets(self) -> tuple[int, ...]:
        """Evaluations of each stage; of a learned one its steps."""
        return tuple(
            stage.steps or LEARNED_STEPS
            if STAGES[stage.stage].is_learned
            else stage.evaluations or self.search.evaluations
            for stage in self.stages
        )

    @property
    def merges_weights(self) -> bool:
        """Whether a stage searches the coefficients of a merge of whole models."""
        return any(STAGES[kind].of_weights for kind in self.kinds)

    @property
    def follows_gradients(self) -> bool:
        """Whether a stage follows the gradient of the tasks' losses."""
        return any(STAGES[stage.stage].is_learned or stage.method == "relaxed" for stage in self.stages)

    @property
    def parents(self) -> tuple[str, ...]:
        """The models that are mixed: all but the base, in the order written."""
        return tuple(name for name in self.models if name != self.base)
