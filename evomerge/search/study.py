"""Runs a study: parents and hand recipes, stages that start from each other's best, validation, test.

Resume is replay: the same code runs from the start, and whatever the store already holds is not evaluated
again. A stage may have several islands, searches of their own that share the pool, so that no worker waits
for the last of one generation. Results are stored as they come, and become trials in the order of slots, with
ids that do not depend on who was first. Knows nothing of Ray or lm-eval.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from evomerge.errors import ConfigError, FailureBudget, Paused, StudyError
from evomerge.search import event_loop
from evomerge.search.agreement import AgreementCheck, sure_of_answers
from evomerge.search.dispatch import Dispatch
from evomerge.search.final_selection import FinalSelection, SearchedStage
from evomerge.search.generation_runner import GenerationRunner, ProgressCounter
from evomerge.search.island import Island, IslandSettings
from evomerge.search.learned import Descended, LearnedSearch
from evomerge.search.plan import LearnedOpening, Opening, Plan, Progress, Relaxation, Stage, Start
from evomerge.search.trial_recorder import Candidate
from evomerge.spaces import Baseline, SearchSpace
from evomerge.store import Outcome, Store, Trial
from evomerge.workers import Pool
from evomerge.workers.machine_errors import retry_advice


@dataclass(frozen=True, slots=True)
class StageStart:
    """What a stage begins with. known: trials that its space may encode; parents: of its first candidates."""

    number: int
    known: Sequence[Trial]
    parents: tuple[int, ...]
    first_generation: int


class Study:
    """Runs a plan against a store and a pool.

    Example:
        with Store.open(path, write=True) as store:
            outcome = Study(plan, store, pool).run()

    Attributes:
        plan: What is searched.
        store: That everything is written to; what it holds already is not evaluated again.
        pool: Evaluates recipes.
        show: Called with the progress; may be replaced.
        dispatch: Between the study and its pool; `dispatch.request_stop()` asks the study to end.
        runner: Opens generations.
    """

    def __init__(
        self,
        plan: Plan,
        store: Store,
        pool: Pool,
        show: Callable[[Progress], None] = lambda progress: None,
        dispatch: Dispatch | None = None,
    ) -> None:
        """Makes a study that has run nothing.

        Args:
            plan: What is searched.
            store: Open for writing, with a study begun in it.
            pool: Evaluates recipes; closed by the caller.
            show: Called with the progress.
            dispatch: Of the same store and pool; needed for a grace period, a budget or backups.
        """
        self.plan = plan
        self.store = store
        self.pool = pool
        self.show = show
        self.dispatch = dispatch or Dispatch(pool, store)
        self.runner = GenerationRunner(plan, store, self.dispatch.results, self._show)
        self._finals = FinalSelection(plan, store, self.runner)

    def run(self) -> Outcome:
        """Searches until the budget is reached.

        Returns:
            The outcome, as stored.

        Raises:
            Paused: A stop was requested, or the disk is full; the study may be resumed.
            FailureBudget: Too many candidates failed.
            NothingToExport: No finalist, parent or hand recipe could be scored on the validation items.
            StudyError: The store holds another search, or one that went further than this one would.
        """
        stored = self.store.study()
        self.store.set_state("running")
        try:
            outcome = self._run()
        except Paused:
            with contextlib.suppress(Paused):  # a full disk, or a file that is gone, may be that very reason
                self.store.set_state("paused")
            raise
        except (FailureBudget, ConfigError):
            self.store.set_state("failed")
            raise
        except StudyError:
            if stored is not None:
                self.store.set_state(stored.state)
            raise
        self.store.finish(outcome)
        return outcome

    def _run(self) -> Outcome:
        if (
            self.store.activity.ends() and self.dispatch.exhausted_budget() is None
        ):  # the budget is larger now
            self.store.activity.remove_ends()
        references = self._references()
        best = max(references, key=lambda t: (_score(t), -t.slot))
        searched: list[SearchedStage] = []
        last = 0
        for number, stage in enumerate(self.plan.stages):
            self.runner.recorder.stage = number
            if number and self._budget_ended(number, 0, last):
                break
            opening = stage.open(Start(self.store.recipe(best.recipe_id), best.label))
            if number and opening.hand:
                last += 1
                hand = self._score_baselines(last, opening.hand, f"{stage.name}: hand recipes")
                references = [*references, *hand]
            start = StageStart(number, references, (), last + 1)
            if number:
                known = [best, *(t for t in references if t.stage == number)]
                start = StageStart(number, known, (best.id,), last + 1)
            if isinstance(opening, LearnedOpening):
                searched.append(self._learn(stage, opening, start, references))
            else:
                searched.append(self._evolve(stage, opening, start, references))
            last = searched[-1].last
            if number + 1 < len(self.plan.stages):
                best = self._finals.elect(references, searched).winner
                place = f"stage {number + 1} of {len(self.plan.stages)}, {stage.name}"
                note = f"{place}: candidate {best.id} goes on"
                if all(trial.stage <= number for trial in self.store.trials()):  # else it was said before
                    self.show(Progress(stage.name, 1, 1, None, note))
        return self._finals.outcome(references, searched)

    def _refuse_less(self, stage: Stage, number: int, last: int) -> None:
        """Raises StudyError where a stage ends before what the store holds of it."""
        stored = self.store.usage.last_generation(number)
        if stored > last:
            raise StudyError(
                f"the store holds candidates up to generation {stored}, and a budget of {stage.evaluations} "
                f"evaluations ends at generation {last}; give a budget of what was done, or more"
            )

    def _show(self, progress: Progress) -> None:
        """Whatever `show` is by now."""
        self.show(progress)

    def _references(self) -> list[Trial]:
        """Generation 0: parents and hand recipes, and the greedy soup."""
        if self.plan.objective.keep:
            self.runner.find_best_parents([b for b in self.plan.baselines if b.origin == "parent"])
        trials = self._score_baselines(0, self.plan.baselines, "parents and hand recipes")
        if all(t.score is None for t in trials):
            raise FailureBudget(
                "no parent and no hand recipe could be scored; "
                f"the first failed because: {trials[0].error}{retry_advice(trials[0].error)}"
            )
        return self._greedy_soup(trials) if self.plan.soup else trials

    def _score_baselines(self, number: int, baselines: Sequence[Baseline], label: str) -> list[Trial]:
        """A generation that no optimizer was asked for."""
        candidates = [Candidate(b.origin, b.recipe, label=b.label) for b in baselines]
        counter = ProgressCounter(label, len(candidates))
        return self.runner.complete(self.runner.open(number, candidates, counter))

    def _greedy_soup(self, trials: list[Trial]) -> list[Trial]:
        """Adds the greedy soup: parents from the best down, averaged in if the average does not get worse.

        References:
            Wortsman et al. 2022, "Model soups", arXiv:2203.05482, recipe 1, on the search items.
        """
        assert self.plan.soup is not None
        baselines = list(self.plan.baselines)
        parents = [t for t in trials if t.origin == "parent" and t.score is not None]
        parents.sort(key=lambda t: (-_score(t), t.slot))
        names = [str(t.label) for t in parents[:1]]
        best = _score(parents[0]) if parents else 0.0
        for parent in parents[1:]:
            baselines.append(self.plan.soup((*names, str(parent.label))))
            trials = self._score_baselines(0, baselines, "greedy soup")
            if _score(trials[-1]) >= best:
                names.append(str(parent.label))
                best = _score(trials[-1])
        return trials

    def _evolve(
        self, stage: Stage, opening: Opening, start: StageStart, references: Sequence[Trial]
    ) -> SearchedStage:
        """Runs a stage of an optimizer that learns from scores."""
        begin = start.first_generation
        relaxed: tuple[Trial, ...] = ()
        if opening.relaxation is not None:
            start, relaxed = self._relax(opening.relaxation, start)
            last = start.first_generation - 1
            if self._budget_ended(start.number, 0, last):
                return SearchedStage(stage, begin, last, float(last), relaxed)
        islands = self._search(stage, opening, start)
        first, last = start.first_generation, max(island.last_generation for island in islands)
        self._refuse_less(stage, start.number, last)
        late_after = first - 1 + opening.late * (last - first + 1)
        finalists = self._finals.finalists(islands, [*references, *relaxed], late_after, last)
        return SearchedStage(stage, begin, last, late_after, (*relaxed, *finalists))

    def _relax(self, relaxation: Relaxation, start: StageStart) -> tuple[StageStart, tuple[Trial, ...]]:
        """Descends a relaxation and scores what it is rounded to: (start of the evolution, its trial)."""
        opening = relaxation.opening
        descended = self._descend(opening, start, opening.space.start, start.parents)
        end = descended.finalists[0]
        recipe = relaxation.rounded(end.genome or ())
        candidate = Candidate("mean", recipe, label=relaxation.label, parents=end.parents)
        trials = tuple(
            trial
            for trial in self.runner.score_means(descended.last, {1: candidate})
            if trial.score is not None
        )
        parents = tuple(trial.id for trial in trials) or start.parents
        begun = StageStart(start.number, [*start.known, *trials], parents, descended.last + 1)
        return begun, trials

    def _learn(
        self, stage: Stage, opening: LearnedOpening, start: StageStart, references: Sequence[Trial]
    ) -> SearchedStage:
        """Runs a stage of gradient descent from the best trial that its space can hold.

        The best is the one with the highest mean probability of right answers where it is known of all: it is
        what the stage climbs, and tells more than the metric does on few items.
        """
        encoded = self._encoded(opening.space, start.known)
        genome, parents = opening.space.start, start.parents
        if encoded:
            sureness = [sure_of_answers(opening, self.plan.objective, trial) for trial, _ in encoded]
            known = [mean for mean in sureness if mean is not None]
            best = sureness.index(max(known)) if len(known) == len(encoded) else 0
            genome, parents = encoded[best][1], (encoded[best][0].id,)
        descended = self._descend(opening, start, genome, parents)
        self._refuse_less(stage, start.number, descended.last)
        finalists = self._finals.learned_finalists(descended)
        check = AgreementCheck(opening, self.runner, self._show)
        agreement = check.measure([*finalists, *references])
        if agreement is not None and agreement.sentence:
            self.show(Progress(stage.name, 1, 1, None, agreement.sentence))
        first, last = start.first_generation, descended.last
        return SearchedStage(stage, first, last, float(last), finalists, agreement)

    def _descend(
        self, opening: LearnedOpening, start: StageStart, genome: Sequence[float], parents: tuple[int, ...]
    ) -> Descended:
        """Takes the steps of a descent, from the first generation of its stage on."""

        def budget_ended(generation: int) -> bool:
            return self._budget_ended(start.number, 0, generation)

        search = LearnedSearch(opening, self.runner, self._show, budget_ended)
        return search.run(genome, start.first_generation, parents)

    def _search(self, stage: Stage, opening: Opening, start: StageStart) -> list[Island]:
        """A stage's islands after their last generations."""
        islands = self._islands(stage, opening, start)
        if self.plan.race is None:
            event_loop.run(islands, self.dispatch)
        else:  # the rungs of a race wait for one another: the islands take turns
            for island in islands:
                event_loop.run([island], self.dispatch)
        return islands

    def _islands(self, stage: Stage, opening: Opening, start: StageStart) -> list[Island]:
        """A stage's islands before their first generations."""
        space = opening.space
        encoded = self._encoded(space, start.known)
        first_genome = encoded[0][1] if opening.at_best and encoded else space.start
        if opening.begin is not None:
            first_genome = opening.begin
        count = max(1, self.plan.islands)
        first_trial_id = self.store.last_trial_before(start.first_generation) + 1

        def island(number: int) -> Island:
            settings = IslandSettings(
                number=number,
                count=count,
                evaluations=stage.evaluations,
                space=space,
                injected=encoded[:3],
                parents=start.parents,
                first_generation=start.first_generation,
                first_trial_id=first_trial_id,
                pipelined=self.plan.pipelined,
            )

            def budget_ended(generation: int) -> bool:
                return self._budget_ended(start.number, number, generation)

            optimizer = opening.optimizer(first_genome, number)
            return Island(settings, optimizer, self.runner, budget_ended, self._show)

        return [island(number) for number in range(count)]

    def _encoded(self, space: SearchSpace, known: Sequence[Trial]) -> list[tuple[Trial, tuple[float, ...]]]:
        """Scored trials that a space can hold, with their genomes, the best first."""
        encoded: list[tuple[Trial, tuple[float, ...]]] = []
        for trial in known:
            genome = space.encode(self.store.recipe(trial.recipe_id)) if trial.score is not None else None
            if genome is not None:
                encoded.append((trial, genome))
        encoded.sort(key=lambda pair: (-_score(pair[0]), pair[0].id))
        return encoded

    def _budget_ended(self, stage: int, island: int, generation: int) -> bool:
        """Whether a budget ended an island there; a replay ends where the first run did."""
        ends = self.store.activity.ends()
        if (stage, island) in ends:
            return ends[stage, island].generation <= generation
        cause = self.dispatch.exhausted_budget()
        if cause is None or generation < self.store.usage.last_generation(stage, island):
            return False
        self.store.activity.set_end(stage, island, generation, cause)
        self.show(Progress("search", 1, 1, None, f"after generation {generation}: {cause}"))
        return True


def _score(trial: Trial) -> float:
    return -math.inf if trial.score is None else trial.score
