"""What panels are made of: the rows of a study's file at one moment, each table read once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from evomerge.errors import StudyError
from evomerge.evaluation import Attempt, Objective
from evomerge.recipes import Recipe
from evomerge.reports.activity import study_activity
from evomerge.reports.summary import study_summary
from evomerge.reports.tally import rank
from evomerge.store import Store, StudyRow, Trial, TrialReader
from evomerge.store.score_check import stored_objective


@dataclass
class Snapshot:
    """The rows of an open study, read when they are first asked for::

        with Store.open(path) as store:
            panels = study_panels(Snapshot(store))

    Attributes:
        store: An open study.
        recipes: Recipe id -> recipe, kept from one snapshot to the next by whoever makes several.
        reader: What reads the trials, kept in the same way.
        now: When it was made, in Unix seconds.
    """

    store: Store
    recipes: dict[str, Recipe] = field(default_factory=dict)
    reader: TrialReader = field(default_factory=TrialReader)
    now: float = field(default_factory=time.time)

    @cached_property
    def study(self) -> StudyRow:
        """The study's own row.

        Raises:
            StudyError: The file holds no study yet.
        """
        row = self.store.study()
        if row is None:
            raise StudyError(f"{self.store.path.parent.name} holds no study yet")
        return row

    @cached_property
    def trials(self) -> list[Trial]:
        """All trials, by generation and slot."""
        return self.store.trials(self.reader)

    @cached_property
    def by_id(self) -> dict[int, Trial]:
        """Number -> trial."""
        return {trial.id: trial for trial in self.trials}

    @cached_property
    def summary(self) -> dict[str, Any]:
        """See `evomerge.reports.study_summary`; the file is not checked as a whole."""
        return study_summary(self.store, check=False, trials=self.trials)

    @cached_property
    def activity(self) -> dict[str, Any]:
        """See `evomerge.reports.study_activity`."""
        return study_activity(self.store)

    @cached_property
    def attempts(self) -> list[Attempt]:
        """All attempts, in the order they were stored."""
        return self.store.activity.attempts()

    @cached_property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return list(self.study.facts.tasks)

    @cached_property
    def objective(self) -> Objective | None:
        """What the search maximizes; None in a study that did not store it."""
        return stored_objective(self.study.facts)

    @cached_property
    def depths(self) -> dict[str, int]:
        """Base -> number of layers, see `evomerge.reports.route_text.depths`."""
        parents = (self.recipe(trial.recipe_id) for trial in self.parents)
        return {recipe.base: len(recipe.layers) for recipe in parents}

    @cached_property
    def parents(self) -> list[Trial]:
        """The parents' trials."""
        return [trial for trial in self.trials if trial.origin == "parent"]

    @cached_property
    def references(self) -> list[Trial]:
        """Trials of parents and hand recipes."""
        return [trial for trial in self.trials if trial.generation == 0]

    @cached_property
    def searched(self) -> list[Trial]:
        """Candidates of the search, without means of distributions."""
        return [trial for trial in self.trials if trial.generation > 0 and trial.origin != "mean"]

    @cached_property
    def ranked(self) -> list[Trial]:
        """Candidates of the search that were scored in full, the best first."""
        scored = [trial for trial in self.searched if trial.score is not None and trial.dropped is None]
        return sorted(scored, key=rank, reverse=True)

    @cached_property
    def generations(self) -> dict[int, list[Trial]]:
        """Generation, from 1 -> its candidates."""
        found: dict[int, list[Trial]] = {}
        for trial in self.searched:
            found.setdefault(trial.generation, []).append(trial)
        return found

    @cached_property
    def has_several_depths(self) -> bool:
        """Whether candidates differ in their number of layers."""
        return len({trial.costs["layers"] for trial in self.trials if "layers" in trial.costs}) > 1

    @property
    def best(self) -> Trial | None:
        """The winner, or the best candidate so far."""
        row: Mapping[str, Any] | None = self.summary["best"]
        return None if row is None else self.by_id.get(int(row["id"]))

    def recipe(self, recipe_id: str) -> Recipe:
        """Reads a recipe once.

        Args:
            recipe_id: Its id.

        Returns:
            The recipe.
        """
        if recipe_id not in self.recipes:
            self.recipes[recipe_id] = self.store.recipe(recipe_id)
        return self.recipes[recipe_id]

    def name(self, trial: Trial) -> str:
        """What a reader calls a trial.

        Args:
            trial: A trial.

        Returns:
            Its label, or its number.
        """
        return trial.label or f"#{trial.id}"

    def best_parent(self) -> Trial | None:
        """The parent with the highest score on the search items.

        Returns:
            Its trial, None where none could be scored.
        """
        scored = [trial for trial in self.parents if trial.reported is not None]
        return max(scored, key=lambda trial: trial.reported or 0.0, default=None)

    def elites(self, generation: int, most: int) -> Iterator[Trial]:
        """The better half of a generation's candidates; of a step of a learned stage the step itself.

        Args:
            generation: Its number, from 1.
            most: How many at most.

        Yields:
            Trials, the best first.
        """
        trials = self.generations[generation]
        scored = [trial for trial in trials if trial.score is not None]
        if not scored:
            yield from (trial for trial in trials if trial.origin == "learned")
            return
        half = max(1, min(most, len(scored) // 2))
        yield from sorted(scored, key=lambda trial: (trial.violation, -(trial.score or 0.0)))[:half]
