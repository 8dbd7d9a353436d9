"""Types of values in a search file, with the checks that pydantic's own types lack."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from evomerge.config.stage_kinds import STAGES
from evomerge.evaluation.lm_harness.backends import BACKENDS, RENAMED_BACKENDS
from evomerge.optimizers import OPTIMIZERS
from evomerge.reports.trackers.tracker import TRACKERS


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("should be a number")
    return value


def _counts(value: Any) -> Any:
    for count in value.values() if isinstance(value, dict) else (value,):
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(
                f"should be a whole number of at least 1, or one for each task named, got {count!r}"
            )
    return value


def _stage_name(value: str) -> str:
    if value not in STAGES:
        raise ValueError(f"should be one of {', '.join(STAGES)}")
    return value


def _optimizer_name(value: str) -> str:
    if value not in OPTIMIZERS:
        raise ValueError(f"should be one of {', '.join(OPTIMIZERS)}")
    return value


def _backend_name(value: str) -> str:
    value = RENAMED_BACKENDS.get(value, value)
    if value not in BACKENDS:
        raise ValueError(f"should be one of {', '.join(BACKENDS)}")
    return value


def _tracker_name(value: str) -> str:
    if value not in TRACKERS:
        raise ValueError(f"should be one of {', '.join(TRACKERS)}")
    return value


def _printable(value: str) -> str:
    if not value.isprintable() or value != value.strip():
        raise ValueError("should be printable text without spaces around it")
    return value


Name = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_printable)]
"""A name of a model, task or the like, which tables and reports show."""
Whole = Annotated[int, BeforeValidator(_no_truth_value)]
"""A whole number."""
Number = Annotated[float, BeforeValidator(_no_truth_value)]
"""A finite number."""
Positive = Annotated[Number, Field(gt=0)]
"""A number above 0."""
Counts = Annotated[int | dict[str, int], BeforeValidator(_counts)]
"""A count, or one for each task that is named."""
OptimizerName = Annotated[str, AfterValidator(_optimizer_name)]
"""A key of `evomerge.optimizers.OPTIMIZERS`."""
StageName = Annotated[str, AfterValidator(_stage_name)]
"""A name of `evomerge.config.stage_kinds.STAGES`."""
BackendName = Annotated[str, AfterValidator(_backend_name)]
"""A key of `evomerge.evaluation.lm_harness.backends.BACKENDS`."""
TrackerName = Annotated[str, AfterValidator(_tracker_name)]
"""A key of `evomerge.reports.trackers.TRACKERS`."""
EngineOption = Literal[
    "block_size",
    "cpu_offload_gb",
    "disable_custom_all_reduce",
    "enable_chunked_prefill",
    "enforce_eager",
    "gpu_memory_utilization",
    "max_num_batched_tokens",
]
"""An argument of vLLM's `LLM` that a search file may give."""
Measure = Literal["metric", "probability", "logprob"]
"""What an item is scored by: the task's metric, or a soft metric, the probability or mean log-probability of
the right answer."""
Shares = Annotated[
    dict[Measure, Positive],
    Field(min_length=1),
    BeforeValidator(lambda value: {value: 1.0} if isinstance(value, str) else value),
]
"""Measure -> share of it in what a search sees; a measure alone has all of it."""
LearnedGenome = Literal["tensor", "layer_component", "space", "row"]
"""What a learned stage has a weight for, see `evomerge.launch.learned_spaces`."""
