"""The head of a model card that the Hugging Face Hub reads, made by huggingface_hub's own classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evomerge._escaping import one_line
from evomerge._redaction import scrub
from evomerge.export.licenses import MergedLicense
from evomerge.export.source_models import SourceModel, base_models

TAGS = ("merge", "mergekit", "evomerge")
"""Tags by which merges are found on the Hub."""


@dataclass(frozen=True, slots=True)
class TestResult:
    """What a merge scored in a task on test items.

    Attributes:
        task: The task.
        metric: Its metric.
        value: The mean over the items.
        items: Number of items.
        interval: 95 % interval of the value; None where the metric is no mean of items.
    """

    task: str
    metric: str
    value: float
    items: int
    interval: tuple[float, float] | None = None


def front_matter(
    models: Sequence[SourceModel],
    license: MergedLicense,
    title: str = "",
    results: Sequence[TestResult] = (),
) -> list[str]:
    """Writes the front matter of a merge's card.

    Args:
        models: What it is made of.
        license: Its license; left out where it is not stated.
        title: Name of the model for the Hub's table of results.
        results: On test items; empty for none.

    Returns:
        Lines, the dashes around them included.
    """
    from huggingface_hub import EvalResult, ModelCardData

    found = [
        EvalResult(
            task_type="text-generation",
            dataset_type=_plain(result.task),
            dataset_name=_plain(result.task),
            dataset_split="test",
            metric_type=_plain(result.metric),
            metric_name=_plain(f"{result.metric} on {result.items} held-out items"),
            metric_value=result.value,
            metric_args={"items": result.items}
            | ({"interval_95": list(result.interval)} if result.interval else {}),
        )
        for result in results
    ]
    data = ModelCardData(
        base_model=list(base_models(models)) or None,
        base_model_relation="merge",
        library_name="transformers",
        license=_identifiers(license.identifier),
        license_name=license.name,
        license_link=license.link,
        tags=list(TAGS),
        model_name=_plain(title) if found else None,
        eval_results=found or None,
    )
    return ["---", *data.to_yaml().splitlines(), "---"]


def _identifiers(identifier: str | None) -> Any:
    """One identifier, or a list where a card names several."""
    parts = [] if identifier is None else identifier.split(" and ")
    return parts if len(parts) > 1 else identifier


def _plain(text: str) -> str:
    return scrub(one_line(text))
