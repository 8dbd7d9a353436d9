"""The blocks of the search file that say what its stages search."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from evomerge.config.block import Strict
from evomerge.config.value_types import LearnedGenome, Number, OptimizerName, StageName, Whole
from evomerge.optimizers import optimizer_for


class StageConfig(Strict):
    """A stage of a search; written as text alone, the text is its kind."""

    stage: StageName
    """What is searched: weights of a merge method, by evolution or learned by their gradient, or routes."""
    evaluations: Whole | None = Field(default=None, ge=1, le=10**9)
    """Budget of the stage; search.evaluations unless given."""
    population: Whole | None = Field(default=None, ge=4)
    """Candidates of a generation; search.population unless given."""
    sigma: Number | None = Field(default=None, gt=0)
    """Initial standard deviation; search.sigma unless given."""
    method: Literal["relaxed"] | None = None
    """`relaxed` chooses each depth's model by gradient before routes evolve; evolution alone unless given."""
    steps: Whole | None = Field(default=None, ge=1)
    """Steps of gradient descent: 40 of a learned stage and 24 of relaxed routes unless given."""
    genome: LearnedGenome | None = None
    """What a learned weight is of: tensor (from 32 items a task on), layer_component, row, axis of space."""
    items: Whole | None = Field(default=None, ge=1)
    """Items of each task that a step of gradient descent is scored on; 30 unless given."""
    rate: Number | None = Field(default=None, gt=0, le=1)
    """Size of the first step of gradient descent; .1, and .3 of relaxed routes, unless given."""
    surrogate: Literal["logprob", "probability", "margin"] | None = None
    """What gradient descent climbs: logprob (unless given), probability or margin of the right answer."""
    labels: dict[str, str] | None = Field(default=None, min_length=1)
    """Task -> whose answers a learned stage climbs: gold, a model's, samples (models' right ones) or none."""
    retain: str | None = Field(default=None, min_length=1)
    """File of texts whose next-token distributions a learned stage keeps: a line, paragraph or JSON "text"
    each."""
    retain_weight: Number | None = Field(default=None, ge=0)
    """Weight of the retained texts' mean divergence, in nats, in the loss; 1 unless given."""
    retain_items: Whole | None = Field(default=None, ge=1)
    """Retained texts that a step takes; 64 unless given."""
    teacher: str | None = None
    """Model whose distributions on retained texts are kept; the learned stage's start unless given."""
    decay: Number | None = Field(default=None, ge=0)
    """Pull of learned weights towards the stage's start, a share of the rate in each step; 0 unless given."""
    trust: Number | None = Field(default=None, gt=0)
    """Largest distance of any learned weight from the stage's start; no bound unless given."""
    trust_rms: Number | None = Field(default=None, gt=0)
    """Largest root mean square of learned weights' distances from the start; no bound unless given."""
    check: Whole | None = Field(default=None, ge=1)
    """Steps between two scorings of a learned stage on all validation items; none unless given."""
    patience: Whole | None = Field(default=None, ge=1)
    """Checks in a row without a better one that end a learned stage; all steps are taken unless given."""

    @field_validator("genome", mode="before")
    @classmethod
    def _is_built(cls, value: Any) -> Any:
        if value == "svd":
            raise ValueError("is not built for singular directions; use row (finer) or tensor (coarser)")
        return value

    @field_validator("surrogate", mode="before")
    @classmethod
    def _no_entropy(cls, value: Any) -> Any:
        if value == "entropy":
            raise ValueError(
                "entropy is not offered: it falls as a model grows sure of wrong answers, and a merge that "
                "climbs it ends below its start; where there are no right answers, write "
                "labels: {TASK: MODEL} for a model whose answers stand for them"
            )
        return value


class PerplexityScreenConfig(Strict):
    """Early rejection of routes whose perplexity on right answers is far above the parents'."""

    tokens: Whole | None = Field(default=None, ge=16)
    """Tokens that a route is screened on; a hundredth of what a candidate is scored on, 64 to 2,000, unless
    given."""
    factor: Number = Field(default=20.0, gt=1)
    """How many times the best parent's perplexity a route may have."""


class RoutesConfig(Strict):
    """Routes of layers, see `evomerge.spaces.routes`."""

    genome: Literal["categorical", "conditional", "indicator"] = "categorical"
    """A choice at each position of one model's path, the same as numbers, or switches of all layers (arXiv
    2403.13187)."""
    start: str = "best"
    """Model that gives embeddings and head, and whose path a route begins at; 'best' is the best so far."""
    embeddings: Literal["any", "start"] = "any"
    """Embeddings and head of any model, which is one more choice, or of the start."""
    models: tuple[str, ...] = ()
    """Models whose layers are used; all where left out."""
    layers: tuple[Whole, Whole] | None = None
    """Least and most layers of a route; half to twice the start's unless given."""
    expected_mutations: Number = Field(default=2.0, gt=0)
    """How many positions a first candidate changes, on average."""
    repeats: Whole = Field(default=2, ge=1, le=8)
    """How many times over an indicator genome has all layers of all models."""
    spans: tuple[Annotated[Whole, Field(ge=1)], ...] = Field(default=(1, 2), min_length=1)
    """Lengths of inserted spans of layers."""
    scales: Literal["none", "hop", "matrix"] = "none"
    """Factors of the hidden state: none, one for each hop, or one between any two layers."""
    scale_range: tuple[Number, Number] = (0.4, 1.5)
    """Bounds of these factors, around 1."""
    penalty: Number = Field(default=0.0, ge=0)
    """What a layer more than the base has costs of the score."""
    stacks: tuple[str, ...] = ()
    """mergekit passthrough files of stacks to begin with."""
    perplexity_screen: PerplexityScreenConfig | None = Field(default_factory=PerplexityScreenConfig)
    """Early rejection by perplexity; null scores every route in full."""
    optimizer: OptimizerName | None = None
    """Optimizer, which takes the genome; elitist for choices and cma for numbers unless given."""

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
