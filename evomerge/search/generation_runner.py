"""Opens the generations of a study: their items, the jobs the store does not answer, races."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from evomerge.errors import FailureBudget, StudyError
from evomerge.evaluation import Evaluation, Items, Role
from evomerge.recipes import Recipe
from evomerge.search import racing, retention
from evomerge.search.dispatch import Result
from evomerge.search.generation import Generation
from evomerge.search.item_windows import ItemWindows
from evomerge.search.plan import Plan, Progress
from evomerge.search.retention import BestParent
from evomerge.search.trial_recorder import Candidate, TrialRecorder
from evomerge.spaces import Baseline
from evomerge.store import NewEvaluation, Scored, Store, Trial
from evomerge.workers import Job
from evomerge.workers.machine_errors import retry_advice


@dataclass(slots=True)
class ProgressCounter:
    """How far a part of a search is.

    Attributes:
        label: As it is shown, see `Progress.stage`.
        total: Candidates that it will have.
        done: Of them, those that have a trial.
    """

    label: str
    total: int
    done: int = 0


class GenerationRunner:
    """Scores what a study asks for and stores it.

    Example:
        runner = GenerationRunner(plan, store, dispatch.results)
        trials = runner.complete(runner.open(1, candidates, ProgressCounter("search", len(candidates))))

    A program that evaluates recipes itself needs no pool: it takes `Generation.jobs` and calls
    `Generation.add`.

    Attributes:
        plan: Of the study.
        store: That evaluations are read from and written to.
        windows: Items of each generation.
        recorder: Writes trials; its `stage` is the number they are stored under.
        evaluate: Yields the results of jobs as they end.
        best_parents: Task of the retention constraint -> its best parent, once `find_best_parents` was
            called.
    """

    def __init__(
        self,
        plan: Plan,
        store: Store,
        evaluate: Callable[[Sequence[Job]], Iterator[Result]],
        show: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        """Makes a runner for stage 0.

        Args:
            plan: Of the study.
            store: Open for writing.
            evaluate: Yields the results of jobs as they end: `Dispatch.results`.
            show: Called with the progress after each result.
        """
        self.plan = plan
        self.store = store
        self.windows = ItemWindows(plan.items["search"], plan.per_generation, plan.seed)
        self.recorder = TrialRecorder(store, plan.objective)
        self.best_parents: dict[str, BestParent] = {}
        self.evaluate = evaluate
        self._show = show

    def open(
        self,
        number: int,
        candidates: Sequence[Candidate],
        counter: ProgressCounter,
        mu: int = 0,
        turn: int = 0,
    ) -> Generation:
        """Opens a generation: trials that the store holds are taken over, for the others there are jobs.

        Args:
            number: Of the generation in the study.
            candidates: In the order of slots.
            counter: Is advanced with each trial.
            mu: How many of the best an optimizer learns from; above 0 the generation is raced, if the plan
                has a race, and is complete when this returns.
            turn: Jobs of a lower turn begin first, see `Job`.

        Returns:
            The generation; complete if the store held all of it or it was raced.

        Raises:
            StudyError: The store holds other candidates in this place: the replay differs from the first run.
        """
        trials = self.replayed_trials(number, candidates)
        counter.done += len(trials)
        pending = {slot: c for slot, c in enumerate(candidates) if slot not in trials}

        def on_trial(trial: Trial) -> None:
            trials[trial.slot] = trial
            counter.done += 1
            scores = [t.score for t in trials.values() if t.score is not None and not t.dropped]
            note = f"candidate {trial.id} failed: {trial.error}" if trial.error else ""
            best = max(scores, default=None)
            self._show(Progress(counter.label, counter.done, counter.total, best, note, trial=trial))

        was_stored = not pending
        if pending and mu and self.plan.race is not None:
            self._race(number, dict(enumerate(candidates)), mu, on_trial, counter)
            pending = {}
        if not pending:
            return Generation.without_jobs(number, trials, self.recorder, was_stored=was_stored)
        return self._generation(number, pending, trials, on_trial, turn)

    def complete(self, generation: Generation) -> list[Trial]:
        """Evaluates what a generation lacks, when no other is in evaluation.

        Args:
            generation: As `open` returned it.

        Returns:
            Its trials in the order of slots.

        Raises:
            Paused: A stop was requested.
        """
        for job, evaluation in self.evaluate(generation.jobs):
            generation.add(job, evaluation)
        return generation.ordered_trials

    def score_means(self, number: int, candidates: Mapping[int, Candidate]) -> list[Trial]:
        """Scores the means of a stage's distributions, on the items of the generation after its last.

        Args:
            number: The stage's last generation, which the trials are stored under.
            candidates: Slot -> mean; slots that the generation's candidates do not have.

        Returns:
            The trials in the order of slots.
        """
        counter = ProgressCounter("means of the distributions", len(candidates))

        def on_trial(trial: Trial) -> None:
            counter.done += 1
            self._show(Progress(counter.label, counter.done, counter.total, trial=trial))

        generation = self._generation(number, candidates, {}, on_trial, turn=0, items_of=number + 1)
        return self.complete(generation)

    def score_all(self, role: Role, recipes: Sequence[Recipe], label: str = "") -> dict[str, Scored]:
        """Scores recipes on all items of a role; those that the store knows are not scored again.

        Args:
            role: 'search', 'validation' or 'test'.
            recipes: Equal ones are scored once.
            label: Shown as the progress' stage; the role by default.

        Returns:
            Recipe id -> its score: the reported objective less the size penalty.
        """
        items, objective = self.plan.items[role], self.plan.objective
        distinct = list({r.id: r for r in recipes}.values())
        missing = [r for r in distinct if self.store.evaluation(r.id, role, items) is None]
        done = len(distinct) - len(missing)
        jobs = [_job(slot, recipe, items) for slot, recipe in enumerate(missing)]
        for job, evaluation in self.evaluate(jobs):
            reported = objective.reported_score(evaluation)
            score, task_values = None, None
            if reported is not None:
                score = reported - objective.size_penalty(evaluation.costs)
            if score is not None and role == "validation":
                task_values = objective.task_values(evaluation.metrics)
            self.store.add_evaluation(
                NewEvaluation(job.recipe, role, items, evaluation, score, reported, task_values)
            )
            done += 1
            self._show(Progress(label or role, done, len(distinct)))
        stored = {r.id: self.store.evaluation(r.id, role, items) for r in distinct}
        return {recipe_id: scored for recipe_id, scored in stored.items() if scored is not None}

    def find_best_parents(self, parents: Sequence[Baseline]) -> None:
        """Scores the parents on all search items and keeps the best of each task of the retention constraint.

        Args:
            parents: Baselines of origin 'parent', at least one.

        Raises:
            FailureBudget: None of them could be scored.
        """
        label = "parents on all search items"
        scored = self.score_all("search", [p.recipe for p in parents], label)
        whole = [
            BestParent(str(p.label), scored[p.recipe.id].evaluation)
            for p in parents
            if scored[p.recipe.id].score is not None
        ]
        if not whole:
            cause = scored[parents[0].recipe.id].evaluation.error
            raise FailureBudget(
                f"no parent could be scored, so that 'keep' has nothing to compare with: "
                f"{cause}{retry_advice(cause)}"
            )
        self.best_parents = retention.best_parents(self.plan.objective, whole, self.plan.items["search"])

    def replayed_trials(self, number: int, candidates: Sequence[Candidate]) -> dict[int, Trial]:
        """Reads the trials that the store holds of a generation.

        Args:
            number: Of the generation.
            candidates: In the order of slots.

        Returns:
            Slot -> trial.

        Raises:
            StudyError: A trial is of another candidate than the one that has its place now.
        """
        trials: dict[int, Trial] = {}
        for slot, candidate in enumerate(candidates):
            stored = self.recorder.stored_trial(number, slot)
            if stored is None:
                continue
            if stored.recipe_id != candidate.recipe.id or stored.genome != candidate.genome:
                raise StudyError(
                    f"replay differs from the store at generation {number}, slot {slot}: "
                    f"stored recipe {stored.recipe_id}, replayed {candidate.recipe.id}; "
                    "resume with the versions the study began with"
                )
            trials[slot] = stored
        return trials

    def _generation(
        self,
        number: int,
        candidates: Mapping[int, Candidate],
        trials: dict[int, Trial],
        on_trial: Callable[[Trial], None],
        turn: int,
        items_of: int | None = None,
    ) -> Generation:
        """A generation with a job for each distinct recipe that the store does not know on its items."""
        items = self.windows.items(number if items_of is None else items_of)
        floors = retention.floors(self.plan.objective, self.best_parents, items)
        recipe_ids = {
            slot: candidate.recipe.id for slot, candidate in candidates.items()
        }  # each hashes a recipe
        evaluations: dict[str, Evaluation] = {}
        jobs: dict[str, Job] = {}
        for slot, recipe_id in recipe_ids.items():
            if recipe_id in evaluations or recipe_id in jobs:
                continue
            stored = self.store.evaluation(recipe_id, "search", items)
            if stored is None:
                jobs[recipe_id] = _job(slot, candidates[slot].recipe, items, turn)
            else:
                evaluations[recipe_id] = stored.evaluation
        generation = Generation(
            number=number,
            items=items,
            pending=candidates,
            recipe_ids=recipe_ids,
            jobs=tuple(jobs.values()),
            evaluations=evaluations,
            trials=trials,
            recorder=self.recorder,
            floors=floors,
            on_trial=on_trial,
        )
        generation.store_trials()
        return generation

    def _race(
        self,
        number: int,
        candidates: Mapping[int, Candidate],
        mu: int,
        on_trial: Callable[[Trial], None],
        counter: ProgressCounter,
    ) -> None:
        """Races a whole generation and stores a trial for each candidate without one, in the order of slots.

        What a rung adds is stored as it is scored, so that an interrupted race goes on where it was. An
        evaluation on all items that is known, such as a hand recipe's, is read instead.
        """
        items, store, race = self.windows.items(number), self.store, self.plan.race
        assert race is not None

        def score(recipes: Sequence[Recipe], part: Items) -> dict[str, Evaluation]:
            evaluations: dict[str, Evaluation] = {}
            for recipe in recipes:
                on_part = store.evaluation(recipe.id, "rung", part)
                if on_part is not None:
                    evaluations[recipe.id] = on_part.evaluation
                    continue
                on_all = store.evaluation(recipe.id, "search", items)
                if on_all is not None:
                    evaluations[recipe.id] = racing.part_of(on_all.evaluation, part)
            missing = {recipe.id: recipe for recipe in recipes if recipe.id not in evaluations}
            jobs = [_job(slot, recipe, part) for slot, recipe in enumerate(missing.values())]
            for job, evaluation in self.evaluate(jobs):
                store.add_evaluation(NewEvaluation(job.recipe, "rung", part, evaluation, None))
                evaluations[job.recipe.id] = evaluation
                self._show(Progress(counter.label, counter.done, counter.total))
            return evaluations

        recipes = {slot: candidate.recipe for slot, candidate in candidates.items()}
        results = racing.run(recipes, items, race, self.plan.objective, mu, score)
        item_count = sum(map(len, items.values()))
        for slot, result in results.items():
            if self.recorder.stored_trial(number, slot) is None:
                candidate = candidates[slot]
                on_trial(self.recorder.record_raced_trial(number, slot, candidate, result, item_count))


def _job(slot: int, recipe: Recipe, items: Items, turn: int = 0) -> Job:
    """A job; what it costs grows with its layers and items."""
    cost = len(recipe.layers) * sum(map(len, items.values()))
    return Job(slot, recipe, items, float(cost), turn)
