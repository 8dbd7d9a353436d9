"""Derivatives of a loss by the coefficients of one tensor of a merge, from the gradient by it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from evomerge.merging.merge import Merge
from evomerge.merging.row_weights import row_weights
from evomerge.merging.tensor_plan import Step
from evomerge.methods import method, row_sums, task_vector_slopes


def is_plain(merge: Merge, step: Step) -> bool:
    """Whether a step sums whole task vectors by one weight each, see `task_vector_slopes.is_plain`.

    Args:
        merge: The merge.
        step: One of its `steps`, with a mix whose method `has_slopes`.

    Returns:
        True if it does.
    """
    assert step.mix is not None
    rule = method(step.mix.method)
    values = merge.values_of(step)
    return row_weights(step) is None and task_vector_slopes.is_plain(rule, values)


def slopes_of_products(merge: Merge, step: Step, products: Sequence[float]) -> dict[tuple[str, str], float]:
    """Computes what `slopes` does from the dot products of the gradient with each source's task vector.

    Args:
        merge: The merge.
        step: One of its `steps` that `is_plain`.
        products: One number for each source.

    Returns:
        As `slopes`.
    """
    assert step.mix is not None
    values = merge.values_of(step)
    slopes = task_vector_slopes.slopes_of_products(values, products)
    return task_vector_slopes.by_source(step.mix.sources, slopes)


def slopes(
    merge: Merge, step: Step, gradient: Tensor, rows: Tensor | slice | None = None
) -> dict[tuple[str, str], float]:
    """Computes the derivatives of a loss by the coefficients of one output tensor.

    Args:
        merge: The merge.
        step: One of its `steps`, with a mix whose method `has_slopes`.
        gradient: Of the loss by the output tensor, on the merging device.
        rows: The rows that it is of, where the step `is_plain`; None for all.

    Returns:
        (parameter, source model) -> derivative; the model is '' for a parameter of the merge. Nothing for
        a tensor whose rows have weights of their own, see `row_slopes`.
    """
    assert step.mix is not None
    if row_weights(step) is not None:
        return {}
    rule = method(step.mix.method)
    values = merge.values_of(step)
    inputs = merge.inputs(step)
    sources, base = inputs.sources, inputs.base
    if rows is not None:
        sources, base = [source[rows] for source in sources], None if base is None else base[rows]
    keys = inputs.mask_keys if rule.randomized else [0] * len(sources)
    slopes = task_vector_slopes.slopes(rule, sources, base, values, keys, gradient)
    return task_vector_slopes.by_source(step.mix.sources, slopes)


def row_slopes(merge: Merge, step: Step, gradient: Tensor) -> dict[str, Tensor]:
    """Computes the derivatives of a loss by the weights of the rows of one output tensor.

    Args:
        merge: The merge.
        step: One of its `steps`.
        gradient: Of the loss by the output tensor, on the merging device.

    Returns:
        Source model -> [rows] derivatives in float64; nothing for a tensor without weights by row.
    """
    weights = row_weights(step)
    if weights is None or step.mix is None:
        return {}
    inputs = merge.inputs(step)
    values = merge.values_of(step)
    found = row_sums.row_slopes(inputs.sources, inputs.base, values, weights, gradient)
    return {model: slopes for (model, _), slopes in zip(step.mix.sources, found, strict=True)}
