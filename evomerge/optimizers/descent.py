"""Gradient descent on a genome: Adam with a cosine schedule, replayed from stored gradients.

Coefficients of a merge want rates of .05 to .2, two orders of magnitude above those of fine-tuning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.optimizers.base import Array
from evomerge.optimizers.pending import GRID

_BETAS = (0.9, 0.99)
_EPSILON = 1e-8  # beside the square root of the second moment, relative to the largest gradient seen


@dataclass(frozen=True, slots=True)
class Leash:
    """What holds a descent near its start.

    Attributes:
        decay: Each step moves a gene by this share of the rate towards the start, as AdamW's weight decay
            does towards 0.
        trust: Largest distance of any gene from the start; None for no bound.
        trust_rms: Largest root mean square of all genes' distances from the start; None for no bound.
    """

    decay: float = 0.0
    trust: float | None = None
    trust_rms: float | None = None

    def hold(self, genome: Array, start: Array) -> Array:
        """Projects a genome into the trust region.

        Args:
            genome: [n] genome.
            start: [n] genome of the start.

        Returns:
            [n] the genome, or the nearest one along the way of each bound.
        """
        if self.trust is not None:
            genome = np.clip(genome, start - self.trust, start + self.trust)
        if self.trust_rms is not None:
            rms = float(np.sqrt(np.mean((genome - start) ** 2)))
            if rms > self.trust_rms:
                genome = start + (genome - start) * (self.trust_rms / rms)
        return genome


class Descent:
    """Asks for one genome at a time and is told the gradient of a loss there.

    Deterministic: the same gradients give the same genomes, so that a search resumes by replaying stored
    ones. A step that failed is taken back by half, and the next one begins there.

        descent = Descent(start, rate=0.05, steps=40)
        for _ in range(40):
            descent.tell(gradient(descent.ask()))
    """

    def __init__(
        self, start: Sequence[float], *, rate: float, steps: int, leash: Leash | None = None
    ) -> None:
        """Makes a descent at its start.

        Args:
            start: [n] genome.
            rate: Size of the first step of each gene, above 0; it falls to 0 by a cosine.
            steps: Steps of the schedule, at least 1.
            leash: What holds it near its start; None for nothing.

        Raises:
            ValueError: A rate or a number of steps out of range.
        """
        if not rate > 0 or steps < 1:
            raise ValueError(f"a descent has a rate above 0 and at least 1 step, got {rate} and {steps}")
        self._rate, self._steps = rate, steps
        self._leash = leash or Leash()
        self._x = np.asarray(start, dtype=np.float64)
        self._start = self._before = self._x
        self._first = np.zeros_like(self._x)
        self._second = np.zeros_like(self._x)
        self._taken = 0

    def ask(self) -> Array:
        """The genome to be evaluated next, on a grid of 2**-14, of shape [n]."""
        return np.round(self._x / GRID) * GRID

    def tell(self, gradient: Sequence[float] | None) -> None:
        """Takes a step.

        Args:
            gradient: [n] derivatives of the loss at the genome that was asked for; None where it failed.

        Raises:
            ValueError: Another length, or a value that is not finite.
        """
        if gradient is None:
            self._x = (self._x + self._before) / 2
            return
        g = np.asarray(gradient, dtype=np.float64)
        if g.shape != self._x.shape or not np.isfinite(g).all():
            raise ValueError(f"a gradient has {len(self._x)} finite numbers, got {g.shape}")
        self._taken += 1
        first, second = _BETAS
        self._first = first * self._first + (1 - first) * g
        self._second = second * self._second + (1 - second) * g * g
        mean = self._first / (1 - first**self._taken)
        size = np.sqrt(self._second / (1 - second**self._taken))
        progress = min(1.0, (self._taken - 1) / self._steps)
        rate = self._rate * 0.5 * (1 + math.cos(math.pi * progress))
        self._before = self._x
        moved = self._x - rate * mean / (size + _EPSILON)
        if self._leash.decay:
            moved = moved - rate * self._leash.decay * (self._x - self._start)
        self._x = self._leash.hold(moved, self._start)
