"""What keeps a learned stage from forgetting: a teacher's distributions on texts, and an early end.

Texts to be retained are shards of a step like its items: chosen by the study's seed, stored with their
derivatives, read again on resume. Checks score the genome by the tasks' own metrics on the validation items;
they are stored as any validation is, so that a resumed search ends where the first run did.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from evomerge.evaluation import GradientRequest, Items, Teacher
from evomerge.search.generation_runner import GenerationRunner
from evomerge.search.item_windows import ItemWindows
from evomerge.search.plan import EarlyStopping, LearnedOpening
from evomerge.search.trial_recorder import Candidate


@dataclass(frozen=True, slots=True)
class Retained:
    """The texts of a learned stage whose distributions are kept.

    Attributes:
        teacher: Whose distributions, with all texts.
        weight: Of the texts' mean divergence in the loss.
        windows: Which texts each step takes. Their task is named by a hash of teacher, texts and weight, so
            that no evaluation is read that another teacher or weight gave.
    """

    teacher: Teacher
    weight: float
    windows: ItemWindows

    def request(self, step: int) -> tuple[Items, GradientRequest]:
        """The texts of a step, and what is asked of them.

        Args:
            step: Its number in the stage, from 1.

        Returns:
            (task -> ids, the request with the texts' teacher).
        """
        items = self.windows.items(step)
        ids = [text for of_task in items.values() for text in of_task]
        weights = {task: self.weight / len(ids) for task in items}
        teacher = Teacher(self.teacher.recipe, {text: self.teacher.texts[text] for text in ids})
        return items, GradientRequest(weights, teacher=teacher)


def retained_texts(opening: LearnedOpening, start: Sequence[float], seed: int) -> Retained | None:
    """The texts that a learned stage keeps.

    Args:
        opening: The stage.
        start: Genome that it begins at.
        seed: Of the study, which keys the choice of texts.

    Returns:
        The texts; None without any, or with a weight of 0.
    """
    given = opening.retained
    if given is None or not given.weight:
        return None
    teacher = given.teacher or opening.space.decode(start)
    named = json.dumps([teacher.id, sorted(given.texts), given.weight])
    task = f"retain:{hashlib.sha256(named.encode()).hexdigest()[:12]}"
    windows = ItemWindows({task: tuple(given.texts)}, given.items, seed)
    return Retained(Teacher(teacher, given.texts), given.weight, windows)


def retained_count(opening: LearnedOpening) -> int:
    """How many texts a step of a learned stage takes.

    Args:
        opening: The stage.

    Returns:
        Their number; 0 without any, or with a weight of 0.
    """
    given = opening.retained
    return 0 if given is None or not given.weight else min(given.items, len(given.texts))


class Checks:
    """The checks of a learned stage on validation items.

    Attributes:
        best: The best candidate so far; None before the first check, or where none could be scored.
    """

    def __init__(self, stopping: EarlyStopping | None, runner: GenerationRunner) -> None:
        """Makes the checks before the first one.

        Args:
            stopping: When they are made; None for never.
            runner: Scores candidates, and reads those that are scored.
        """
        self._stopping, self._runner = stopping, runner
        self.best: Candidate | None = None
        self._best_score, self._best_step, self._since, self._step = -math.inf, 0, 0, 0

    def is_due(self, step: int) -> bool:
        """Whether a check is made after a step.

        Args:
            step: Steps taken.

        Returns:
            True if it is.
        """
        return self._stopping is not None and step % self._stopping.every == 0

    def make(self, step: int, candidate: Candidate) -> None:
        """Makes a check.

        Args:
            step: Steps taken.
            candidate: After them.
        """
        scored = self._runner.score_all("validation", [candidate.recipe], f"learned, check at step {step}")
        score = scored[candidate.recipe.id].score
        self._step, self._since = step, self._since + 1
        if score is not None and score > self._best_score:
            self.best, self._best_score, self._best_step, self._since = candidate, score, step, 0

    @property
    def ended(self) -> bool:
        """Whether the stage ends here: too many checks in a row were not above the best one."""
        patience = None if self._stopping is None else self._stopping.patience
        return patience is not None and self._since >= patience

    def note(self) -> str:
        """Says why a stage ended early."""
        return (
            f"the learned stage ends after step {self._step}: {self._since} checks on validation items were "
            f"not above that of step {self._best_step}, {self._best_score:.4f}"
        )
