"""What is trained, as data: the architecture and one `Training` a model.

Imports no torch, so that it is quick to hash.

The recipe was chosen so that the models can be merged: experts start from a base that knows a little of
everything, stay near it (a share of each batch is held to the base's own answers by KL divergence) and hence
end with small, nearly orthogonal task vectors. Experts trained freely on the same data move three times as
far and every merge collapses.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

ALIGNED_LAYER = (
    2  # the alignment loss compares the features that enter this layer; the layers below it count as lower
)


@dataclass(frozen=True, slots=True)
class Architecture:
    """A Llama, untied, without biases."""

    hidden: int = 128
    intermediate: int = 384
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    max_length: int = 128
    rope_theta: float = 10_000.0
    epsilon: float = 1e-6

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads


@dataclass(frozen=True, slots=True)
class Rates:
    """Learning rate of each part, as a multiple of the training's; 0 freezes it."""

    embedding: float = 1.0
    lower: float = 1.0
    upper: float = 1.0
    head: float = 1.0  # with the final norm


@dataclass(frozen=True, slots=True)
class Training:
    """One model's training.

    `skills` are shares of a batch; the rest, `replay`, are base prompts under KL to the base.
    """

    name: str
    steps: int
    batch: int
    rate: float
    skills: tuple[tuple[str, float], ...]
    rates: Rates
    replay: float = 0.0
    aligned: int = 0  # sentence pairs a step under the alignment loss
    aligned_weight: float = 0.0


ARCHITECTURE = Architecture()

BASE = Training(
    name="base",
    steps=1100,
    batch=64,
    rate=2e-3,
    skills=(
        ("lookup", 0.66),
        ("copy_letters", 0.08),
        ("copy_words", 0.14),
        ("arithmetic", 0.02),
        ("letters", 0.10),
    ),
    rates=Rates(),
)
EXPERTS = (
    Training(
        name="math",
        steps=500,
        batch=64,
        rate=1e-3,
        skills=(("arithmetic", 0.6),),
        replay=0.4,
        rates=Rates(embedding=0.3, lower=0.3, head=0.0),
    ),
    Training(
        name="lang",
        steps=500,
        batch=32,
        rate=1e-3,
        skills=(("lookup_second", 0.7),),
        replay=0.3,
        rates=Rates(embedding=15.0, lower=0.5, upper=0.5, head=0.0),
        aligned=64,
        aligned_weight=3.0,
    ),
    Training(
        name="string",
        steps=600,
        batch=64,
        rate=1e-3,
        skills=(("letters", 0.6),),
        replay=0.4,
        rates=Rates(embedding=0.0, head=0.0),
    ),
)

SECOND_EXPERTS = (
    Training(
        name="symbols",
        steps=700,
        batch=64,
        rate=1e-3,
        skills=(("arithmetic", 0.35), ("letters", 0.25)),
        replay=0.4,
        rates=Rates(embedding=0.3, lower=0.6, head=0.0),
    ),
    replace(EXPERTS[1], name="second"),
    Training(
        name="copies",
        steps=400,
        batch=64,
        rate=1e-3,
        skills=(("copy_letters", 0.3), ("copy_words", 0.3)),
        replay=0.4,
        rates=Rates(embedding=0.0, head=0.0),
    ),
)
"""Another split of the skills: sums and letters in one expert, and one whose skills no task asks for."""
ZOOS = {"first": EXPERTS, "second": SECOND_EXPERTS}
"""Name of a zoo -> its experts, trained from a base of the same recipe."""


def shares(experts: Sequence[Training], members: int) -> list[list[Training]]:
    """Who trains which experts, each alone: longest first, each to the member with the least to do."""
    plan: list[list[Training]] = [[] for _ in range(members)]
    for training in sorted(experts, key=_rows, reverse=True):
        min(plan, key=lambda share: sum(map(_rows, share))).append(training)
    return plan


def _rows(training: Training) -> int:
    return training.steps * (training.batch + training.aligned // 2)
