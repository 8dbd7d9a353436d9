"""The weights of a tensor's rows, where a recipe has a weight for each row (`evomerge.recipes.PerRow`)."""

from __future__ import annotations

from collections.abc import Iterable

from evomerge.errors import CheckpointError
from evomerge.merging.tensor_plan import Step
from evomerge.recipes import Filtered, PerRow


def row_weights(step: Step) -> list[tuple[float, ...]] | None:
    """Reads the weights of one output tensor's rows.

    Args:
        step: The plan of the tensor.

    Returns:
        For each source [rows]; None for a tensor with one weight a source.
    """
    value = None if step.mix is None else dict(step.mix.params).get("weight")
    if step.mix is None or not isinstance(value, tuple) or not any(isinstance(s, PerRow) for s in value):
        return None
    found: list[tuple[float, ...]] = []
    for setting, name in zip(value, step.inputs, strict=True):
        if isinstance(setting, PerRow):
            found.append(setting.at(name))
        else:
            number = setting.at(name) if isinstance(setting, Filtered) else setting
            found.append((1.0 if number is None else number,))
    if all(len(weights) == 1 for weights in found):
        return None
    rows = step.info.shape[0]
    return [weights * rows if len(weights) == 1 else weights for weights in found]


def check_rows_of_steps(steps: Iterable[Step]) -> None:
    """Checks that each weight of a row has its row.

    Args:
        steps: The output tensors of a merge.

    Raises:
        CheckpointError: A recipe has more or fewer weights for a tensor than it has rows; names it.
    """
    for step in steps:
        value = None if step.mix is None else dict(step.mix.params).get("weight")
        for setting, name in zip(value if isinstance(value, tuple) else (), step.inputs, strict=False):
            weights = setting.at(name) if isinstance(setting, PerRow) else (0.0,)
            if len(weights) > 1 and (not step.info.shape or len(weights) != step.info.shape[0]):
                raise CheckpointError(
                    f"the recipe has {len(weights)} weights for the rows of '{step.name}', which is "
                    f"{list(step.info.shape)}; use the models that the weights were learned for"
                )
