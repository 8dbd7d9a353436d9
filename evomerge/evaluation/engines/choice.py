"""Whether an engine or our own decoder generates a task's texts; measured in results/bench_vllm.md."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TextVolume:
    """What a candidate generates for a task.

    Attributes:
        prompts: How many texts.
        new_tokens: Most new tokens of each.
    """

    prompts: int
    new_tokens: int


_LEAST_PROMPTS, _LEAST_NEW = 64, 128
_LEAST_PARAMETERS = 3_000_000_000  # below it a step of either takes as long as Python does


def why_not_faster(volume: TextVolume, parameters: int, device: str) -> str | None:
    """Whether an engine is expected to be faster than our decoder.

    Args:
        volume: Of one candidate and task.
        parameters: Of the model.
        device: Such as 'cpu' or 'cuda'.

    Returns:
        Why it is not; None where it is: long texts of many prompts, by a large model on an accelerator.
    """
    if device == "cpu":
        return "on a CPU an engine gains little"
    if parameters < _LEAST_PARAMETERS:
        return f"the model has fewer than {_LEAST_PARAMETERS / 1e9:g}e9 parameters"
    if volume.prompts < _LEAST_PROMPTS or volume.new_tokens < _LEAST_NEW:
        return (
            f"{volume.prompts} prompts of {volume.new_tokens} new tokens are fewer than "
            f"{_LEAST_PROMPTS} of {_LEAST_NEW}"
        )
    return None
