"""Groups of tasks as lm-eval aggregates them: one number from the metrics of their subtasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evomerge.errors import TaskError, suggest
from evomerge.evaluation.records import SOFT_METRICS, soft_metric_name


@dataclass(frozen=True, slots=True)
class Group:
    """A group or tag that is one term of the objective.

    Attributes:
        name: Its name.
        members: Its subtasks, those of its sub-groups included.
        sizes: Weight of each member in the group's metric. With lm-eval's `weight_by_size` that is the number
            of the member's test items before any limit, so that a share is the same in every role and the
            whole test split gives lm-eval's own number; else 1.
        metric: Name of the metric.
        higher_is_better: Its direction.
    """

    name: str
    members: tuple[str, ...]
    sizes: tuple[int, ...]
    metric: str
    higher_is_better: bool

    def shares(self) -> tuple[tuple[str, float], ...]:
        """(subtask, share of the group's metric) pairs, shares summing to one, each subtask once."""
        total: dict[str, int] = {}
        for member, size in zip(self.members, self.sizes, strict=True):
            total[member] = total.get(member, 0) + size
        return tuple((member, size / math.fsum(self.sizes)) for member, size in total.items())


@dataclass(frozen=True, slots=True)
class GroupMetric:
    """Which number of a group is wanted.

    Attributes:
        metric: Name of the metric; None for the first of each subtask.
        filter: Name of the filter; None for the first of each subtask.
        by_size: Whether subtasks weigh by their number of items.
        aggregated: False where lm-eval reports no number for it (a tag, or a group without
            `aggregate_metric_list`).
    """

    metric: str | None
    filter: str | None
    by_size: bool
    aggregated: bool


def group_metric(values: Sequence[float], sizes: Sequence[int]) -> float:
    """Aggregates metrics as lm-eval does, operation by operation (`aggregate_subtask_metrics`).

    Args:
        values: [n] metrics of the members.
        sizes: [n] their weights.

    Returns:
        The weighted mean.
    """
    return sum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)


def add_group_metrics(metrics: dict[str, float], groups: Mapping[str, Group]) -> None:
    """Adds each group's metric and soft metrics, where all of its members have them.

    Args:
        metrics: Metrics of the members by name, which are extended.
        groups: Name -> group.
    """
    for name, group in groups.items():
        keys = [(name, list(group.members))]
        for soft_metric in SOFT_METRICS:
            members = [soft_metric_name(member, soft_metric) for member in group.members]
            keys.append((soft_metric_name(name, soft_metric), members))
        for key, members in keys:
            if all(member in metrics for member in members):
                metrics[key] = group_metric([metrics[member] for member in members], group.sizes)


def choose_group_metric(
    name: str, group: Any | None, metric: str | None, filter_name: str | None
) -> GroupMetric:
    """Chooses the number that is wanted of a group.

    Args:
        name: Name of the group or tag.
        group: lm-eval's group; None for a tag.
        metric: The metric that is asked for; None for the group's first.
        filter_name: The filter that is asked for; None for the group's first.

    Returns:
        The choice.

    Raises:
        TaskError: The group does not aggregate that metric or filter.
    """
    listed = list(group.aggregate_metric_list or ()) if group is not None else []
    if not listed:
        return GroupMetric(metric, filter_name, by_size=False, aggregated=False)
    matching = [
        entry
        for entry in listed
        if metric in (None, entry.metric)
        and (filter_name is None or entry.filter_list is None or filter_name in entry.filter_list)
    ]
    if not matching:
        wanted = metric or filter_name or ""
        available = [str(entry.metric) for entry in listed]
        raise TaskError(f"group '{name}' aggregates no '{wanted}'. {suggest(wanted, available)}")
    first = matching[0]
    chosen_filter = filter_name or (first.filter_list[0] if first.filter_list else None)
    return GroupMetric(first.metric, chosen_filter, first.weight_by_size, aggregated=True)
