"""A generation of a study: the items that its candidates are scored on, their jobs, their trials in the store. Asks no optimizer.

Evaluations are stored as they come and become trials in the order of slots, with ids that do not depend on who was first.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass

from evomerge.errors import FailureBudget, StudyError
from evomerge.evaluation import Evaluation, Items, Role, Standing
from evomerge.evaluation.perplexity_screen import NATS_PER_TOKEN
from evomerge.recipes import Recipe
from evomerge.search import racing, selection
from evomerge.search.dispatch import Dispatch, Result
from evomerge.search.plan import Plan, Progress
from evomerge.spaces import Baseline
from evomerge.store import NewEvaluation, NewTrial, Scored, Trial
from evomerge.workers import Job

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A recipe to be tried, and where it comes from: see `evomerge.store.Trial`. trial_id: None for the next free one."""

    origin: str
    recipe: Recipe
    label: str | None = None
    genome: tuple[float, ...] | None = None
    parents: tuple[int, ...] = ()
    island: int = 0
    trial_id: int | None = None


@dataclass(slots=True)
class Tally:
    """How far a search is. stage: as it is shown; total: candidates that it will have; done: of them, those that have a trial."""

    stage: str
    total: int
    done: int = 0


class Generations:
    """Scores what a study asks for and keeps it. stage: the number that trials are stored under."""

    def __init__(self, plan: Plan, dispatch: Dispatch, show: Callable[[Progress], None]) -> None:
        self.plan, self.store, self.dispatch, self.show = plan, dispatch.store, dispatch, show
        self.stage = 0
        self.guarded: dict[
            str, tuple[str, Evaluation]
        ] = {}  # task of `keep` -> its best parent, that on all search items

    def subset(self, generation: int) -> Items:
        """The items that every candidate of a generation is scored on: windows of a seeded shuffle, one after another.

        Generation 0 (parents and hand recipes) and generation 1 share theirs.
        """
        pool, seed = self.plan.items["search"], self.plan.seed
        return {
            task: _window(ids, *self._turn(generation, task), f"{seed}/{task}") for task, ids in pool.items()
        }

    def _turn(self, generation: int, task: str) -> tuple[int, int, int]:
        """(how often a task's items have been gone through, which window of them it is, its size)."""
        given, ids = self.plan.per_generation, self.plan.items["search"][task]
        size = min(given if isinstance(given, int) else given[task], len(ids))
        return *divmod(max(0, generation - 1), len(ids) // size), size

    def epochs(self, trial: Trial, last: int) -> dict[str, int]:
        """Task -> how often its items had been gone through before those of the trial were taken."""
        generation = last + 1 if trial.origin == "mean" and trial.generation == last else trial.generation
        return {task: self._turn(generation, task)[0] for task in self.plan.items["search"]}

    def standing(self, trial: Trial) -> Standing | None:
        """What ranks a trial within its generation."""
        if trial.score is None:  # of those that the gate kept out, the less broken are learnt from
            return (
                Standing(-1.0, 0.0, -trial.metrics[NATS_PER_TOKEN], 0.0)
                if NATS_PER_TOKEN in trial.metrics
                else None
            )
        reached = math.inf if trial.dropped is None else float(trial.dropped)
        return Standing(
            reached, -trial.violation, trial.score, self.plan.objective.tie_break_score(trial.metrics)
        )

    def guard(self, parents: Sequence[Baseline]) -> None:
        """Scores the parents on all search items, and finds the best of each task that `keep` names.

        Any generation's floor is then that parent's mean on the generation's own items, less what may be lost.
        """
        objective, pool = self.plan.objective, self.plan.items["search"]
        scored = self.score_all("search", [p.recipe for p in parents], "parents on all search items")
        whole = [
            (str(p.label), found.evaluation)
            for p in parents
            if (found := scored[p.recipe.id]).score is not None
        ]
        if not whole:
            raise FailureBudget(
                f"no parent could be scored, so that 'keep' has nothing to hold to: {scored[parents[0].recipe.id].evaluation.error}"
            )
        for task, _ in objective.keep:
            values = {
                label: objective.floors({task: selection.item_means(objective, task, e.items, pool)})[task]
                for label, e in whole
            }
            self.guarded[task] = max(whole, key=lambda pair: values[pair[0]])

    def floors(self, items: Items) -> dict[str, float]:
        """What `keep` asks on these search items."""
        objective = self.plan.objective
        return objective.floors(
            {
                task: selection.item_means(objective, task, e.items, items)
                for task, (_, e) in self.guarded.items()
            }
        )

    def score_all(self, role: Role, recipes: Sequence[Recipe], stage: str = "") -> dict[str, Scored]:
        """Scores of recipes on all items of a role."""
        items, objective = self.plan.items[role], self.plan.objective
        distinct = list({r.id: r for r in recipes}.values())
        missing = [r for r in distinct if self.store.evaluation(r.id, role, items) is None]
        done = len(distinct) - len(missing)
        for job, evaluation in self.dispatch.each([_job(i, r, items) for i, r in enumerate(missing)]):
            reported = objective.reported_score(evaluation)
            score = None if reported is None else reported - objective.size_penalty(evaluation.costs)
            point = (
                objective.task_values(evaluation.metrics)
                if role == "validation" and score is not None
                else None
            )
            self.store.add_evaluation(
                NewEvaluation(job.recipe, role, items, evaluation, score, reported, point)
            )
            done += 1
            self.show(Progress(stage or role, done, len(distinct)))
        found = {r.id: self.store.evaluation(r.id, role, items) for r in distinct}
        return {i: s for i, s in found.items() if s is not None}

    def run(
        self, number: int, candidates: Sequence[Candidate], tally: Tally, mu: int = 0, turn: int = 0
    ) -> Generator[Sequence[Job], Result, list[Trial]]:
        """Evaluates the candidates of a generation that the store does not hold yet; returns all its trials.

        mu: how many of the best are learnt from; above 0 the generation is raced, if the plan has a race. turn: see `Job`.
        """
        trials: dict[int, Trial] = {}
        for slot, candidate in enumerate(candidates):
            stored = self.store.trial_at(number, slot)
            if stored is not None:
                if stored.recipe_id != candidate.recipe.id or stored.genome != candidate.genome:
                    raise StudyError(
                        f"replay differs from the store at generation {number}, slot {slot}: stored recipe {stored.recipe_id}, "
                        f"replayed {candidate.recipe.id}; resume with the versions the study began with"
                    )
                trials[slot] = stored
        missing = {slot: c for slot, c in enumerate(candidates) if slot not in trials}
        tally.done += len(trials)

        def seen(trial: Trial) -> None:
            trials[trial.slot] = trial
            tally.done += 1
            scores = [t.score for t in trials.values() if t.score is not None and not t.dropped]
            note = f"candidate {trial.id} failed: {trial.error}" if trial.error else ""
            self.show(Progress(tally.stage, tally.done, tally.total, max(scores, default=None), note))

        if missing and self.plan.race and mu:

            def said(note: str) -> None:
                self.show(Progress(tally.stage, tally.done, tally.total, None, note))

            self._race(number, dict(enumerate(candidates)), mu, seen, said)
        elif missing:
            yield from self.evaluate(number, missing, self.subset(number), seen, turn)
        return [trials[slot] for slot in range(len(candidates))]

    def evaluate(
        self,
        number: int,
        candidates: Mapping[int, Candidate],
        items: Items,
        seen: Callable[[Trial], None] = lambda trial: None,
        turn: int = 0,
    ) -> Generator[Sequence[Job], Result, dict[int, Trial]]:
        """Scores candidates on items, stores a trial for each in the order of slots and returns them by slot.

        An evaluation that comes before those of earlier slots is stored at once, its trial with theirs.
        """
        floors = self.floors(items)
        ids = {
            slot: c.recipe.id for slot, c in candidates.items()
        }  # a hash of the whole recipe, each time it is asked for
        found: dict[str, Evaluation] = {}  # equal recipes are scored once
        jobs: dict[str, Job] = {}
        for slot, recipe_id in ids.items():
            if recipe_id in found or recipe_id in jobs:
                continue
            if known := self.store.evaluation(recipe_id, "search", items):
                found[recipe_id] = known.evaluation
            else:
                jobs[recipe_id] = _job(slot, candidates[slot].recipe, items, turn)
        waiting, trials = deque(ids), dict[int, Trial]()

        def keep() -> None:
            while waiting and ids[waiting[0]] in found:
                slot = waiting.popleft()
                trials[slot] = self.store.trial_at(number, slot) or self._add(
                    number, slot, candidates[slot], items, found[ids[slot]], floors
                )
                seen(trials[slot])

        keep()
        asked: Sequence[Job] = list(jobs.values())
        for _ in jobs:
            job, evaluation = yield asked
            recipe_id, asked = ids[job.slot], ()
            found[recipe_id] = evaluation
            if waiting and ids[waiting[0]] != recipe_id:
                score, reported, point = self._scores(evaluation)
                self.store.add_evaluation(
                    NewEvaluation(job.recipe, "search", items, evaluation, score, reported, point)
                )
            keep()
        return trials

    def _scores(self, evaluation: Evaluation) -> tuple[float | None, float | None, tuple[float, ...] | None]:
        """(what ranks it, the objective by the tasks' metrics, its point on the front) of an evaluation on all items of a generation."""
        objective = self.plan.objective
        reported = objective.reported_score(evaluation)
        score = (
            math.nan
            if reported is None
            else objective.search_score(evaluation.metrics) - objective.size_penalty(evaluation.costs)
        )
        return (
            (score, reported, objective.task_values(evaluation.metrics))
            if math.isfinite(score)
            else (None, None, None)
        )

    def _race(
        self,
        number: int,
        candidates: Mapping[int, Candidate],
        mu: int,
        seen: Callable[[Trial], None],
        said: Callable[[str], None],
    ) -> None:
        """Races a whole generation and stores a trial for each candidate that has none yet, in the order of slots.

        What a rung adds is stored as it is scored, so that a race broken off goes on where it was. An evaluation on all
        items that is known, such as a hand recipe's, is read instead.
        """
        items, store = self.subset(number), self.store

        def score(recipes: Sequence[Recipe], part: Items) -> dict[str, Evaluation]:
            found: dict[str, Evaluation] = {}
            for recipe in recipes:
                if known := store.evaluation(recipe.id, "rung", part):
                    found[recipe.id] = known.evaluation
                elif whole := store.evaluation(recipe.id, "search", items):
                    found[recipe.id] = racing.part_of(whole.evaluation, part)
            jobs = [
                _job(i, r, part)
                for i, r in enumerate({r.id: r for r in recipes if r.id not in found}.values())
            ]
            for job, evaluation in self.dispatch.each(jobs):
                store.add_evaluation(NewEvaluation(job.recipe, "rung", part, evaluation, None))
                found[job.recipe.id] = evaluation
                said("")
            return found

        assert self.plan.race is not None
        recipes = {slot: c.recipe for slot, c in candidates.items()}
        for slot, fate in racing.run(recipes, items, self.plan.race, self.plan.objective, mu, score).items():
            if store.trial_at(number, slot) is None:
                seen(self._add(number, slot, candidates[slot], fate.items, fate.evaluation, {}, fate))

    def _add(
        self,
        number: int,
        slot: int,
        c: Candidate,
        items: Items,
        evaluation: Evaluation,
        floors: Mapping[str, float],
        fate: racing.Raced | None = None,
    ) -> Trial:
        """Stores a candidate's trial. floors: what `keep` asks on these items; fate: in a race."""
        objective = self.plan.objective
        score, reported, point = self._scores(evaluation)
        whole = None
        if fate is not None and fate.predicted is not None and score is not None:
            score, point = fate.predicted - objective.size_penalty(evaluation.costs), None
            whole = sum(map(len, self.subset(number).values()))
        return self.store.add_trial(
            NewTrial(
                generation=number,
                slot=slot,
                origin=c.origin,
                label=c.label,
                genome=c.genome,
                parents=c.parents,
                recipe=c.recipe,
                items=items,
                evaluation=evaluation,
                score=score,
                reported=reported,
                task_values=point,
                dropped=fate.dropped if fate else None,
                whole=whole,
                violation=0.0 if score is None else objective.violation(evaluation.metrics, floors),
                stage=self.stage,
                island=c.island,
                trial_id=c.trial_id,
            )
        )


def _job(slot: int, recipe: Recipe, items: Items, turn: int = 0) -> Job:
    """A job; what it costs grows with its layers and items."""
    return Job(slot, recipe, items, float(len(recipe.layers) * sum(map(len, items.values()))), turn)


def _window(ids: Sequence[str], epoch: int, position: int, size: int, key: str) -> tuple[str, ...]:
    """A window of `size` ids of a shuffle; each epoch has a shuffle of its own."""
    shuffled = sorted(ids, key=lambda item: hashlib.sha256(f"{key}/{epoch}/{item}".encode()).digest())
    return tuple(shuffled[position * size : (position + 1) * size])
