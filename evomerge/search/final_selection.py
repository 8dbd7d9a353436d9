"""The end of a search: finalists of each stage, the winner by validation, the test of the winner."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from evomerge.errors import NothingToExport, StudyError
from evomerge.evaluation.estimates import Estimate
from evomerge.search import selection
from evomerge.search.generation_runner import GenerationRunner
from evomerge.search.island import Island
from evomerge.search.learned import Descended
from evomerge.search.plan import Plan, Stage
from evomerge.search.trial_recorder import Candidate
from evomerge.store import Agreement, Outcome, Scored, StageOutcome, Store, Trial

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SearchedStage:
    """A stage whose search is over.

    Attributes:
        stage: As planned.
        first: Number of its first generation.
        last: Number of its last generation.
        late_after: Finalists come from generations after this, a number that need not be whole.
        finalists: The means of its distributions and the leaders of its late generations.
        agreement: Of a learned stage, whether its surrogate follows the metrics.
    """

    stage: Stage
    first: int
    last: int
    late_after: float
    finalists: tuple[Trial, ...]
    agreement: Agreement | None = None


@dataclass(frozen=True, slots=True)
class Election:
    """What validation decides.

    Attributes:
        winner: The best on validation.
        standing: All trials that were compared.
        validated: Recipe id -> its validation score.
    """

    winner: Trial
    standing: Sequence[Trial]
    validated: Mapping[str, Scored]


class FinalSelection:
    """Chooses finalists, validates them, and tests the winner.

    The winner is chosen on validation items; test items are scored only for the winner and the references,
    once it is chosen.
    """

    def __init__(self, plan: Plan, store: Store, runner: GenerationRunner) -> None:
        """Makes the final selection of a study.

        Args:
            plan: Of the study.
            store: With its trials.
            runner: Scores what is not scored yet.
        """
        self.plan = plan
        self.store = store
        self.runner = runner

    def finalists(
        self, islands: Sequence[Island], references: Sequence[Trial], late_after: float, last: int
    ) -> tuple[Trial, ...]:
        """A stage's candidates for validation: means of its distributions and leaders of late generations.

        Args:
            islands: Of the stage, after their last generations.
            references: Parents and hand recipes, which take part in the estimates.
            late_after: Leaders come from generations after this.
            last: The stage's last generation.

        Returns:
            The trials, those that could be scored.
        """
        trials = self.store.trials()
        means = self._score_means(islands, trials, last)
        late = [t for t in trials if late_after < t.generation <= last]
        estimates = self._estimates([*late, *means, *references], last)
        leaders = selection.leaders(late, estimates, late_after, last, self._size_penalty)
        chosen = (*means, *leaders[: self.plan.finalists - 1])
        return tuple(t for t in chosen if t.score is not None)

    def learned_finalists(self, descended: Descended) -> tuple[Trial, ...]:
        """The candidates of a learned stage for validation, scored by the tasks' own metrics.

        Args:
            descended: The stage.

        Returns:
            The trials, those that could be scored; the end of the descent first.
        """
        chosen = [replace(c, origin="mean") for c in descended.finalists[: self.plan.finalists]]
        slots = range(1, 1 + len(chosen))  # slot 0 is the last step's
        trials = self.runner.score_means(descended.last, dict(zip(slots, chosen, strict=True)))
        return tuple(trial for trial in trials if trial.score is not None)

    def elect(self, references: Sequence[Trial], searched: Sequence[SearchedStage]) -> Election:
        """Scores finalists and references on the validation items and chooses the best.

        Args:
            references: Parents and hand recipes, which may win too: a search never ends below the best of
                them.
            searched: The stages so far.

        Returns:
            The winner and what it was compared with.

        Raises:
            NothingToExport: None of them could be scored.
        """
        finalists = [t for stage in searched for t in stage.finalists]
        recipe_ids = dict.fromkeys(t.recipe_id for t in (*finalists, *references))
        validated = self.runner.score_all("validation", [self.store.recipe(r) for r in recipe_ids])
        standing = [t for t in (*finalists, *references) if validated[t.recipe_id].score is not None]
        if not standing:
            raise NothingToExport("no finalist could be scored on the validation items")
        floors = self._validation_floors(references, validated)
        winner = selection.elect(self.plan.objective, standing, validated, floors)[0]
        return Election(winner, standing, validated)

    def outcome(self, references: Sequence[Trial], searched: Sequence[SearchedStage]) -> Outcome:
        """Chooses the winner, tests it and the references, and sums the search up.

        Args:
            references: Parents and hand recipes.
            searched: All stages.

        Returns:
            The outcome that `Study.run` returns.

        Raises:
            NothingToExport: As `elect`.
            StudyError: An outcome is stored that was chosen among more finalists.
        """
        store, objective, last = self.store, self.plan.objective, searched[-1].last
        finalists = [t for stage in searched for t in stage.finalists]
        self._refuse_fewer(finalists, last)
        election = self.elect(references, searched)
        winner, validated = election.winner, election.validated
        trials = store.trials()
        late = [t for s in searched for t in trials if s.late_after < t.generation <= s.last]
        estimates = self._estimates([*late, *finalists, *references], last)
        recipes = [store.recipe(t.recipe_id) for t in (winner, *references)]
        tested = self.runner.score_all("test", recipes)
        standing = [t.recipe_id for t in election.standing]
        p = selection.p_values(objective, winner.recipe_id, standing, validated)
        test = tested[winner.recipe_id]
        headline = selection.headline(objective, test)
        best = selection.row(winner, estimates, validated, tested)
        best |= selection.interval(headline, objective, test)
        best |= selection.selection_bias_columns(
            selection.headline(objective, store.scored(winner)), headline
        )
        parents = [
            (str(t.label), tested[t.recipe_id])
            for t in references
            if t.origin == "parent" and t.recipe_id != winner.recipe_id
        ]
        leads = {
            t.id: selection.lead(
                selection.against(objective, test, tested[t.recipe_id]), objective, test, tested[t.recipe_id]
            )
            for t in references
        }
        return Outcome(
            best=best,
            references=tuple(
                selection.row(t, estimates, validated, tested, p) | leads[t.id] for t in references
            ),
            finalists=tuple(selection.row(t, estimates, validated, {}, p) for t in finalists),
            retention=tuple(selection.retention(objective, test, parents)),
            estimates={trial_id: (e.mean, e.error) for trial_id, e in sorted(estimates.items())},
            generations=last,
            stages=tuple(
                StageOutcome(s.stage.name, s.first, s.last, _best_finalist(s, validated), s.agreement)
                for s in searched
            ),
        )

    def _score_means(self, islands: Sequence[Island], trials: Sequence[Trial], last: int) -> list[Trial]:
        """Trials of the means of a stage's distributions, in slots after those of its last generation."""
        stage = self.runner.recorder.stage
        sampled = [t for t in trials if t.stage == stage and t.origin != "mean" and t.genome is not None]
        first_slot = 1 + max(t.slot for t in sampled if t.generation == last)
        candidates: dict[int, Candidate] = {}
        for number, island in enumerate(islands):
            of_island = [t for t in sampled if t.island == number]
            final = [t.id for t in of_island if t.generation == of_island[-1].generation]
            genome = tuple(float(gene) for gene in island.optimizer.mean)
            candidates[first_slot + number] = Candidate(
                origin="mean",
                recipe=island.settings.space.decode(genome),
                label="mean of the distribution",
                genome=genome,
                parents=tuple(final),
                island=number,
            )
        return self.runner.score_means(last, candidates)

    def _refuse_fewer(self, finalists: Sequence[Trial], last: int) -> None:
        """Raises StudyError where an outcome of as many generations was chosen among more finalists."""
        study = self.store.study()
        stored = None if study is None else study.outcome
        if stored is not None and stored.generations >= last and len(stored.finalists) > len(finalists):
            raise StudyError(
                f"the winner that is stored was chosen among {len(stored.finalists)} finalists, and would be "
                f"replaced by one of {len(finalists)}; give search.finalists its value of before, or more"
            )

    def _size_penalty(self, trial: Trial) -> float:
        return self.plan.objective.size_penalty(trial.costs)

    def _estimates(self, trials: Sequence[Trial], last: int) -> dict[int, Estimate]:
        """Trial id -> its objective over all search items."""
        windows = self.runner.windows
        return selection.estimates(
            self.store,
            self.plan.objective,
            windows.pool,
            trials,
            last,
            lambda trial: windows.epochs(trial, last),
        )

    def _validation_floors(
        self, references: Sequence[Trial], validated: Mapping[str, Scored]
    ) -> dict[str, float]:
        """What the retention constraint requires on the validation items.

        A task whose best parent failed there is not constrained, which is logged.
        """
        parents = {
            str(t.label): validated[t.recipe_id].evaluation for t in references if t.origin == "parent"
        }
        metrics: dict[str, Mapping[str, float]] = {}
        for task, best in self.runner.best_parents.items():
            if parents[best.label].error:
                log.warning(
                    "'%s' failed on validation, so that 'keep' cannot constrain task '%s' there",
                    best.label,
                    task,
                )
            else:
                metrics[task] = parents[best.label].metrics
        return self.plan.objective.floors(metrics)


def _best_finalist(searched: SearchedStage, validated: Mapping[str, Scored]) -> int | None:
    """Id of the stage's finalist that is best on validation; None where none could be scored."""
    best: tuple[float, int] | None = None
    for trial in searched.finalists:
        score = validated[trial.recipe_id].score
        if score is None:
            continue
        key = (score, -trial.id)
        best = key if best is None else max(best, key)
    return None if best is None else -best[1]
