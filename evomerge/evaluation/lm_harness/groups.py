"""Groups of tasks as lm-eval aggregates them: one number from the metrics of the leaves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evomerge.errors import TaskError, suggest


@dataclass(frozen=True, slots=True)
class Group:
    """A group or tag that is one term of the objective.

    members: its leaf tasks, sub-groups' included. sizes: weight of each in the group's metric: with lm-eval's
    `weight_by_size` the number of the leaf's test items before any limit, so that a share is the same in every role and
    the whole test split gives lm-eval's own number; else 1.
    """

    name: str
    members: tuple[str, ...]
    sizes: tuple[int, ...]
    metric: str
    higher_is_better: bool

    def shares(self) -> tuple[tuple[str, float], ...]:
        """(leaf, share of the group's metric) with shares that sum to one, each leaf once."""
        total: dict[str, int] = {}
        for member, size in zip(self.members, self.sizes, strict=True):
            total[member] = total.get(member, 0) + size
        return tuple((member, size / math.fsum(self.sizes)) for member, size in total.items())


@dataclass(frozen=True, slots=True)
class Wish:
    """What a group says of its number. metric, filter: None for each leaf's first; by_size: whether large leaves weigh more.

    aggregated: False where lm-eval reports no number for it (a tag, or a group without `aggregate_metric_list`).
    """

    metric: str | None
    filter: str | None
    by_size: bool
    aggregated: bool


def group_metric(values: Sequence[float], sizes: Sequence[int]) -> float:
    """lm-eval's mean of its leaves' metrics [n] with weights [n], operation by operation (`aggregate_subtask_metrics`)."""
    return sum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)


def add_groups(metrics: dict[str, float], groups: Mapping[str, Group]) -> None:
    """Adds each group's metric, and its soft scores, to metrics that hold those of all its leaves."""
    for name, group in groups.items():
        for suffix in ("", ":probability", ":logprob"):
            values = [metrics.get(f"{member}{suffix}") for member in group.members]
            known = [value for value in values if value is not None]
            if len(known) == len(values):
                metrics[f"{name}{suffix}"] = group_metric(known, group.sizes)


def wish(name: str, group: Any | None, metric: str | None, filter_name: str | None) -> Wish:
    """The number that is asked of a group: the metric of that name, or its first. group: lm-eval's, None for a tag.

    Raises TaskError for a metric or filter that the group does not aggregate.
    """
    listed = list(group.aggregate_metric_list or ()) if group is not None else []
    if not listed:
        return Wish(metric, filter_name, by_size=False, aggregated=False)
    found = [
        a
        for a in listed
        if metric in (None, a.metric)
        and (filter_name is None or a.filter_list is None or filter_name in a.filter_list)
    ]
    if not found:
        known = [f"{a.metric}" for a in listed]
        wanted = metric or filter_name or ""
        raise TaskError(f"group '{name}' aggregates no '{wanted}'. {suggest(wanted, known)}")
    chosen = filter_name or (found[0].filter_list[0] if found[0].filter_list else None)
    return Wish(found[0].metric, chosen, found[0].weight_by_size, aggregated=True)
