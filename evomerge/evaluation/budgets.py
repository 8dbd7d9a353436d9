"""How much one forward may hold: budgets of tokens, logits, rows and caches, by the kind of device.

Plans follow from them, and the bits of scores from plans. So a budget depends on how large a card is and
never on what is free there at the moment: all workers on one kind of card have the same plans, and a study
stores the budgets among its facts. Those of cards are on paper: none was measured on one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Budgets:
    """Limits of one forward.

    Attributes:
        tokens: Most input tokens of a forward that scores log-likelihoods.
        prefill: Most input tokens of a forward that begins texts.
        logits: Most elements of logits of a forward.
        rows: Most prompts that are decoded at once.
        cache: Bytes that keys and values of running prompts may take, but one prompt always runs.
    """

    tokens: int
    prefill: int
    logits: int
    rows: int
    cache: int

    def to_json(self) -> dict[str, int]:
        """The budgets as a study stores them."""
        return asdict(self)

    def halved(self) -> Budgets:
        """Half of each, for a card that has less room than its kind should; at least 1."""
        return Budgets(**{name: max(1, limit // 2) for name, limit in asdict(self).items()})


CPU = Budgets(tokens=1024, prefill=4096, logits=1 << 26, rows=1024, cache=_GIB)
"""On a CPU more tokens a forward are no faster."""


def of_card(memory: int) -> Budgets:
    """Budgets of a card.

    Args:
        memory: All its memory in bytes.

    Returns:
        Forwards of 16,384 tokens, 8,192 where there is less than 32 GiB; logits may take up to a 64th of the
        memory in half precision, caches a 16th, both rounded down to a power of two.
    """
    tokens = 16_384 if memory >= 32 * _GIB else 8_192
    return Budgets(
        tokens=tokens,
        prefill=tokens,
        logits=max(CPU.logits, min(1 << 30, _power_of_two(memory // 128))),
        rows=1024,
        cache=max(_GIB, _power_of_two(memory // 16)),
    )


def budgets_of(device: torch.device) -> Budgets:
    """Budgets of a device.

    Args:
        device: Where a model is.

    Returns:
        Those of its kind; those of a CPU for any device but a CUDA card.
    """
    if device.type != "cuda":
        return CPU
    return of_card(torch.cuda.get_device_properties(device).total_memory)


def _power_of_two(number: int) -> int:
    """The largest power of two that is not above a number of at least 1."""
    return 1 << (number.bit_length() - 1)
