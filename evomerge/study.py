"""The loop: ask, decode, skip what is known, dispatch, store, tell; then validate the finalists and test the winner.

Resume is replay: the same code runs from the start, and whatever the store already holds is not evaluated again.
Knows nothing of Ray or lm-eval.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evomerge.baselines import Baseline
from evomerge.errors import FailureBudget, NothingToExport, Paused, StudyError
from evomerge.evaluation import Evaluation, Items, Objective, Role
from evomerge.optimizers import Array, Optimizer
from evomerge.pools import Job, Pool
from evomerge.recipe import Recipe
from evomerge.space import Space
from evomerge.statistics import paired
from evomerge.store import Scored, Store, Trial

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Progress:
    """What a user may be shown. stage: 'parents and hand recipes', 'search', 'validation' or 'test'.

    best: the stage's best objective so far; note: a line worth printing, or ''.
    """

    stage: str
    done: int
    total: int
    best: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """A search ready to run. optimizer: makes one from its starting genome; items: all items of each role;
    per_generation: items of each task a generation is scored on; evaluations: budget of the search; soup: makes the
    average of some parents, for a greedy soup among the hand recipes."""

    space: Space
    baselines: Sequence[Baseline]
    objective: Objective
    optimizer: Callable[[Sequence[float]], Optimizer]
    items: Mapping[Role, Items]
    per_generation: int
    evaluations: int
    finalists: int
    start_at_best: bool
    seed: int
    soup: Callable[[Sequence[str]], Baseline] | None = None


@dataclass(frozen=True, slots=True)
class _Candidate:
    origin: str
    recipe: Recipe
    label: str | None = None
    genome: tuple[float, ...] | None = None
    parents: tuple[int, ...] = ()


class Study:
    """Runs a plan against a store and a pool; `stop` asks it to end between two evaluations."""

    def __init__(self, plan: Plan, store: Store, pool: Pool, show: Callable[[Progress], None] = lambda progress: None) -> None:
        self.plan, self.store, self.pool, self.show = plan, store, pool, show
        self.stop = False

    def run(self) -> dict[str, Any]:
        """Searches until the budget is reached and returns the outcome, as stored. Raises Paused if told to stop."""
        self.store.set_state("running")
        try:
            references = self._references()
            optimizer, last = self._search(references)
            outcome = self._select(references, optimizer, last)
        except Paused:
            self.store.set_state("paused")
            raise
        except FailureBudget:
            self.store.set_state("failed")
            raise
        self.store.finish(outcome)
        return outcome

    def subset(self, generation: int) -> Items:
        """The items that every candidate of a generation is scored on: windows of a seeded shuffle, one after another.

        Generation 0 (parents and hand recipes) and generation 1 share theirs.
        """
        turn = max(0, generation - 1)
        return {task: _window(ids, turn, self.plan.per_generation, f"{self.plan.seed}/{task}") for task, ids in self.plan.items["search"].items()}

    def _references(self) -> list[Trial]:
        candidates = [_Candidate(b.origin, b.recipe, label=b.label) for b in self.plan.baselines]
        trials = self._generation(0, candidates, "parents and hand recipes", 0, len(candidates))
        if all(t.score is None for t in trials):
            raise FailureBudget(f"no parent and no hand recipe could be scored; the first failed because: {trials[0].error}")
        return self._soup(candidates, trials) if self.plan.soup else trials

    def _soup(self, candidates: list[_Candidate], trials: list[Trial]) -> list[Trial]:
        """Adds the greedy soup: parents from the best down, each averaged in if the average does not get worse.

        Wortsman et al. 2022, "Model soups", arXiv:2203.05482, recipe 1, on the search items.
        """
        assert self.plan.soup is not None
        order = sorted([t for t in trials if t.origin == "parent" and t.score is not None], key=lambda t: (-_score(t), t.slot))
        names, best = [str(t.label) for t in order[:1]], _score(order[0]) if order else 0.0
        for parent in order[1:]:
            tried = self.plan.soup((*names, str(parent.label)))
            candidates = [*candidates, _Candidate(tried.origin, tried.recipe, label=tried.label)]
            trials = self._generation(0, candidates, "greedy soup", 0, len(candidates))
            if _score(trials[-1]) >= best:
                names, best = [*names, str(parent.label)], _score(trials[-1])
        return trials

    def _search(self, references: list[Trial]) -> tuple[Optimizer, int]:
        """(optimizer after the last generation, number of that generation)."""
        plan = self.plan
        known = [(t, plan.space.encode(self.store.recipe(t.recipe_id))) for t in references if t.score is not None]
        encoded = sorted([(t, g) for t, g in known if g is not None], key=lambda pair: (-_score(pair[0]), pair[0].slot))
        start = encoded[0][1] if plan.start_at_best and encoded else (0.0,) * len(plan.space.axes)
        optimizer = plan.optimizer(start)
        parents: tuple[int, ...] = ()
        generation = done = 0
        while done < plan.evaluations:
            generation += 1
            injected = encoded[:3] if generation == 1 else []
            if injected:
                optimizer.inject([g for _, g in injected])
            genomes = optimizer.ask()
            candidates = [self._candidate(genome, slot, injected, parents) for slot, genome in enumerate(genomes)]
            trials = self._generation(generation, candidates, "search", done, max(plan.evaluations, done + len(candidates)))
            failed = [t for t in trials if t.score is None]
            if 2 * len(failed) > len(trials):
                first = f"the first because: {failed[0].error}"
                raise FailureBudget(f"{len(failed)} of {len(trials)} candidates of generation {generation} failed; {first}")
            order = optimizer.tell(genomes, [t.score for t in trials])
            parents = tuple(trials[i].id for i in order)
            done += len(trials)
            best = max(_score(t) for t in trials)
            middle = float(np.median([_score(t) for t in trials if t.score is not None]))
            note = f"generation {generation}: best {best:.3f}, median {middle:.3f}" + (f", {len(failed)} failed" if failed else "")
            self.show(Progress("search", done, max(plan.evaluations, done), best, note))
        return optimizer, generation

    def _candidate(self, genome: Array, slot: int, injected: Sequence[tuple[Trial, Any]], parents: tuple[int, ...]) -> _Candidate:
        genes = tuple(float(g) for g in genome)
        if slot < len(injected):
            source = injected[slot][0]
            return _Candidate("injected", self.plan.space.decode(genes), source.label, genes, (source.id,))
        return _Candidate("sampled", self.plan.space.decode(genes), None, genes, parents)

    def _select(self, references: list[Trial], optimizer: Optimizer, last: int) -> dict[str, Any]:
        """Scores finalists and references on validation, where the winner is chosen, then winner and references on test."""
        plan, store = self.plan, self.store
        everything = store.trials()
        final = [t for t in everything if t.generation == last and t.origin != "mean"]
        genome = tuple(float(g) for g in optimizer.mean)
        mean = _Candidate("mean", plan.space.decode(genome), "mean of the distribution", genome, tuple(t.id for t in final))
        trial = self._evaluate(last, {len(final): mean}, self.subset(last + 1))[len(final)]
        late = [t for t in everything if t.score is not None and t.origin in ("sampled", "injected") and t.generation > 0.75 * last]
        leaders = _distinct(sorted(late, key=lambda t: (-_score(t), t.id)))
        finalists = [t for t in (trial, *leaders[: plan.finalists - 1]) if t.score is not None]
        validated = self._score_all("validation", [*finalists, *references])
        # parents and hand recipes stand for election too: a search never ends below the best of them
        standing = [t for t in (*finalists, *references) if validated[t.recipe_id].score is not None]
        if not standing:
            raise NothingToExport("no finalist could be scored on the validation items")
        ranked = sorted(standing, key=lambda t: -(validated[t.recipe_id].score or 0.0))
        winner = ranked[0]
        tested = self._score_all("test", [winner, *references])
        return {
            "best": self._row(winner, validated, tested),
            "references": [self._row(t, validated, tested) | self._against(winner, t, tested) for t in references],
            "finalists": [self._row(t, validated, {}) for t in finalists],
            "generations": last,
        }

    def _row(self, trial: Trial, validated: Mapping[str, Scored], tested: Mapping[str, Scored]) -> dict[str, Any]:
        row: dict[str, Any] = {"id": trial.id, "origin": trial.origin, "label": trial.label, "recipe": trial.recipe_id}
        row["search"] = trial.score
        for role, scored in (("validation", validated), ("test", tested)):
            if trial.recipe_id in scored:
                found = scored[trial.recipe_id]
                row[role] = found.score
                row[f"{role}_metrics"] = dict(found.evaluation.metrics)
                if found.evaluation.error:
                    row["error"] = found.evaluation.error
        if trial.error:
            row["error"] = trial.error
        return row

    def _against(self, winner: Trial, other: Trial, tested: Mapping[str, Scored]) -> dict[str, Any]:
        """The winner's lead over a reference on the test items, paired."""
        if not self.plan.objective.is_mean_of_items:
            return {}
        pair = (tested[winner.recipe_id].evaluation.items, tested[other.recipe_id].evaluation.items)
        lead = paired(*pair, self.plan.objective.shares())
        return {"lead": lead.mean, "lead_error": lead.error} if math.isfinite(lead.error) else {}

    def _score_all(self, role: Role, trials: Sequence[Trial]) -> dict[str, Scored]:
        """Scores of the trials' recipes on all items of a role."""
        items = self.plan.items[role]
        recipes = {t.recipe_id: self.store.recipe(t.recipe_id) for t in trials}
        missing = [r for r in recipes.values() if self.store.evaluation(r.id, role, items) is None]
        done = len(recipes) - len(missing)
        for job, evaluation in self._dispatch([Job(i, r, items) for i, r in enumerate(missing)]):
            self.store.add_evaluation(job.recipe, role, items, evaluation, self._objective(evaluation))
            done += 1
            self.show(Progress(role, done, len(recipes)))
        found = {i: self.store.evaluation(i, role, items) for i in recipes}
        return {i: s for i, s in found.items() if s is not None}

    def _generation(self, number: int, candidates: Sequence[_Candidate], stage: str, done: int, total: int) -> list[Trial]:
        """Evaluates the candidates of a generation that the store does not hold yet; returns all its trials."""
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

        def seen(trial: Trial) -> None:
            trials[trial.slot] = trial
            scores = [t.score for t in trials.values() if t.score is not None]
            note = f"candidate {trial.id} failed: {trial.error}" if trial.error else ""
            self.show(Progress(stage, done + len(trials), total, max(scores, default=None), note))

        if missing:
            self._evaluate(number, missing, self.subset(number), seen)
        return [trials[slot] for slot in range(len(candidates))]

    def _evaluate(
        self, number: int, candidates: Mapping[int, _Candidate], items: Items, seen: Callable[[Trial], None] = lambda trial: None
    ) -> dict[int, Trial]:
        """Scores candidates on items, stores a trial for each and returns them by slot."""
        trials: dict[int, Trial] = {}

        def keep(slot: int, evaluation: Evaluation, score: float | None) -> None:
            c = candidates[slot]
            trials[slot] = self.store.trial_at(number, slot) or self.store.add_trial(
                generation=number, slot=slot, origin=c.origin, label=c.label, genome=c.genome, parents=c.parents,
                recipe=c.recipe, items=items, evaluation=evaluation, score=score,
            )  # fmt: skip
            seen(trials[slot])

        jobs: dict[str, Job] = {}  # equal recipes are scored once
        for slot, candidate in candidates.items():
            known = self.store.evaluation(candidate.recipe.id, "search", items)
            if known is not None:
                keep(slot, known.evaluation, known.score)
            else:
                jobs.setdefault(candidate.recipe.id, Job(slot, candidate.recipe, items))
        for job, evaluation in self._dispatch(list(jobs.values())):
            for slot, candidate in candidates.items():
                if candidate.recipe.id == job.recipe.id:
                    keep(slot, evaluation, self._objective(evaluation))
        return trials

    def _dispatch(self, jobs: Sequence[Job]) -> Iterable[tuple[Job, Evaluation]]:
        """The pool's results; raises Paused between two of them once `stop` is set."""
        if self.stop:
            raise Paused("stopped by a signal; run the same command with --resume to go on")
        for result in self.pool.run(jobs) if jobs else ():
            yield result
            if self.stop:
                raise Paused("stopped by a signal; run the same command with --resume to go on")

    def _objective(self, evaluation: Evaluation) -> float | None:
        if evaluation.error is not None:
            return None
        score = self.plan.objective(evaluation.metrics)
        return score if math.isfinite(score) else None


def _score(trial: Trial) -> float:
    return -math.inf if trial.score is None else trial.score


def _distinct(trials: Iterable[Trial]) -> list[Trial]:
    return list({t.recipe_id: t for t in reversed(list(trials))}.values())[::-1]


def _window(ids: Sequence[str], turn: int, size: int, key: str) -> tuple[str, ...]:
    """The turn-th window of `size` ids of a shuffle; a new shuffle once the ids are used up."""
    size = min(size, len(ids))
    windows = len(ids) // size
    epoch, position = divmod(turn, windows)
    shuffled = sorted(ids, key=lambda item: hashlib.sha256(f"{key}/{epoch}/{item}".encode()).digest())
    return tuple(shuffled[position * size : (position + 1) * size])
