"""The loop: ask, decode, skip what is known, dispatch, store, tell; then validate the finalists, go on to the next stage from
the best of them, and at the end test the winner.

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

from evomerge import racing, selection
from evomerge.baselines import Baseline
from evomerge.errors import ConfigError, FailureBudget, NothingToExport, Paused, StudyError
from evomerge.evaluation import Evaluation, Items, Role, Standing, ranks
from evomerge.gate import NATS
from evomerge.optimizers import Array, Optimizer
from evomerge.pools import Job, Pool
from evomerge.recipe import Recipe
from evomerge.stages import Opening, Plan, Progress, SearchSpace, Stage, Start
from evomerge.store import Scored, Store, Trial

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Candidate:
    origin: str
    recipe: Recipe
    label: str | None = None
    genome: tuple[float, ...] | None = None
    parents: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class _Searched:
    """A stage that is over. first, last: its generations; after: leaders are of later generations; finalists: the mean of its
    distribution and its leaders."""

    stage: Stage
    first: int
    last: int
    after: float
    finalists: tuple[Trial, ...]


class Study:
    """Runs a plan against a store and a pool; `stop` asks it to end between two evaluations."""

    def __init__(self, plan: Plan, store: Store, pool: Pool, show: Callable[[Progress], None] = lambda progress: None) -> None:
        self.plan, self.store, self.pool, self.show = plan, store, pool, show
        self.stop = False
        self._guarded: dict[str, tuple[str, Evaluation]] = {}  # task of `keep` -> its best parent, that on all search items
        self._stage = 0  # the stage that trials are stored under

    def run(self) -> dict[str, Any]:
        """Searches until the budget is reached and returns the outcome, as stored. Raises Paused if told to stop."""
        self.store.set_state("running")
        try:
            outcome = self._run()
        except Paused:
            self.store.set_state("paused")
            raise
        except (FailureBudget, ConfigError):
            self.store.set_state("failed")
            raise
        self.store.finish(outcome)
        return outcome

    def _run(self) -> dict[str, Any]:
        references = self._references()
        best = max(references, key=lambda t: (_score(t), -t.slot))
        searched: list[_Searched] = []
        last = 0
        for number, stage in enumerate(self.plan.stages):
            self._stage = number
            opening = stage.open(Start(self.store.recipe(best.recipe_id), best.label))
            if number and opening.hand:
                last += 1
                hand = [_Candidate(b.origin, b.recipe, label=b.label) for b in opening.hand]
                references = [*references, *self._generation(last, hand, f"{stage.name}: hand recipes", 0, len(hand))]
            known = references if number == 0 else [best, *(t for t in references if t.stage == number)]
            optimizer, first, last = self._search(stage, opening, known, (best.id,) if number else (), last)
            after = first - 1 + opening.late * (last - first + 1)
            searched.append(_Searched(stage, first, last, after, self._finalists(opening.space, optimizer, references, after, last)))
            if number + 1 < len(self.plan.stages):
                best = self._elected(references, searched)[0]
                note = f"stage {number + 1} of {len(self.plan.stages)}, {stage.name}: candidate {best.id} goes on"
                self.show(Progress(stage.name, 1, 1, None, note))
        return self._select(references, searched)

    def subset(self, generation: int) -> Items:
        """The items that every candidate of a generation is scored on: windows of a seeded shuffle, one after another.

        Generation 0 (parents and hand recipes) and generation 1 share theirs.
        """
        pool, seed = self.plan.items["search"], self.plan.seed
        return {task: _window(ids, *self._turn(generation, task), f"{seed}/{task}") for task, ids in pool.items()}

    def _turn(self, generation: int, task: str) -> tuple[int, int, int]:
        """(how often a task's items have been gone through, which window of them it is, its size)."""
        given, ids = self.plan.per_generation, self.plan.items["search"][task]
        size = min(given if isinstance(given, int) else given[task], len(ids))
        return *divmod(max(0, generation - 1), len(ids) // size), size

    def _epochs(self, trial: Trial, last: int) -> dict[str, int]:
        """Task -> how often its items had been gone through before those of the trial were taken."""
        generation = last + 1 if trial.origin == "mean" and trial.generation == last else trial.generation
        return {task: self._turn(generation, task)[0] for task in self.plan.items["search"]}

    def _references(self) -> list[Trial]:
        candidates = [_Candidate(b.origin, b.recipe, label=b.label) for b in self.plan.baselines]
        if self.plan.objective.keep:
            self._guard([b for b in self.plan.baselines if b.origin == "parent"])
        trials = self._generation(0, candidates, "parents and hand recipes", 0, len(candidates))
        if all(t.score is None for t in trials):
            raise FailureBudget(f"no parent and no hand recipe could be scored; the first failed because: {trials[0].error}")
        return self._soup(candidates, trials) if self.plan.soup else trials

    def _guard(self, parents: Sequence[Baseline]) -> None:
        """Scores the parents on all search items, and finds the best of each task that `keep` names.

        Any generation's floor is then that parent's mean on the generation's own items, less what may be lost.
        """
        objective, pool = self.plan.objective, self.plan.items["search"]
        scored = self._score_all("search", [p.recipe for p in parents], "parents on all search items")
        whole = [(str(p.label), found.evaluation) for p in parents if (found := scored[p.recipe.id]).score is not None]
        if not whole:
            raise FailureBudget(f"no parent could be scored, so that 'keep' has nothing to hold to: {scored[parents[0].recipe.id].evaluation.error}")
        for task, _ in objective.keep:
            values = {label: objective.floors({task: selection.item_means(objective, task, e.items, pool)})[task] for label, e in whole}
            self._guarded[task] = max(whole, key=lambda pair: values[pair[0]])

    def _floors(self, items: Items) -> dict[str, float]:
        """What `keep` asks on these search items."""
        objective = self.plan.objective
        return objective.floors({task: selection.item_means(objective, task, e.items, items) for task, (_, e) in self._guarded.items()})

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

    def _search(
        self, stage: Stage, opening: Opening, references: Sequence[Trial], parents: tuple[int, ...], generation: int
    ) -> tuple[Optimizer, int, int]:
        """(optimizer after a stage's last generation, numbers of its first and last).

        references: what the stage may begin with; parents: of its first candidates; generation: the last before it.
        """
        space, first = opening.space, generation + 1
        known = [(t, space.encode(self.store.recipe(t.recipe_id))) for t in references if t.score is not None]
        encoded = sorted([(t, g) for t, g in known if g is not None], key=lambda pair: (-_score(pair[0]), pair[0].id))
        optimizer = opening.optimizer(encoded[0][1] if opening.at_best and encoded else space.start)
        done = 0
        while done < stage.evaluations:
            generation += 1
            injected = encoded[:3] if generation == first else []
            if injected:
                optimizer.inject([g for _, g in injected])
            genomes = optimizer.ask()
            candidates = [self._candidate(space, genome, slot, injected, parents) for slot, genome in enumerate(genomes)]
            most = max(stage.evaluations, done + len(candidates))
            trials = self._generation(generation, candidates, "search", done, most, optimizer.mu)
            failed, dropped = [t for t in trials if t.score is None and NATS not in t.metrics], [t for t in trials if t.dropped]
            if 2 * len(failed) > len(trials):
                why = f"the first because: {failed[0].error}"
                raise FailureBudget(f"{len(failed)} of {len(trials)} candidates of generation {generation} failed; {why}")
            order = optimizer.tell(genomes, ranks([self._standing(t) for t in trials]))
            parents = tuple(trials[i].id for i in order)
            done += len(trials)
            self.show(Progress("search", done, most, *_summary(generation, trials, dropped, failed)))
        return optimizer, first, generation

    def _candidate(self, space: SearchSpace, genome: Array, slot: int, injected: Sequence[tuple[Trial, Any]], parents: tuple[int, ...]) -> _Candidate:
        genes = tuple(float(g) for g in genome)
        if slot < len(injected):
            source = injected[slot][0]
            return _Candidate("injected", space.decode(genes), source.label, genes, (source.id,))
        return _Candidate("sampled", space.decode(genes), None, genes, parents)

    def _standing(self, trial: Trial) -> Standing | None:
        """What ranks a trial within its generation."""
        if trial.score is None:  # of those that the gate kept out, the less broken are learnt from
            return Standing(-1.0, 0.0, -trial.metrics[NATS], 0.0) if NATS in trial.metrics else None
        reached = math.inf if trial.dropped is None else float(trial.dropped)
        return Standing(reached, -trial.violation, trial.score, self.plan.objective.tie(trial.metrics))

    def _finalists(self, space: SearchSpace, optimizer: Optimizer, references: Sequence[Trial], after: float, last: int) -> tuple[Trial, ...]:
        """A stage's candidates that are validated: the mean of its distribution, and the leaders of its late generations."""
        plan, everything = self.plan, self.store.trials()
        final = [t for t in everything if t.generation == last and t.origin != "mean"]
        genome = tuple(float(g) for g in optimizer.mean)
        mean = _Candidate("mean", space.decode(genome), "mean of the distribution", genome, tuple(t.id for t in final))
        trial = self._evaluate(last, {len(final): mean}, self.subset(last + 1))[len(final)]
        late = [t for t in everything if after < t.generation <= last]
        known = self._estimates([*late, trial, *references], last)
        leaders = selection.leaders(late, known, after, last, lambda t: plan.objective.price(t.costs))
        return tuple(t for t in (trial, *leaders[: plan.finalists - 1]) if t.score is not None)

    def _estimates(self, trials: Sequence[Trial], last: int) -> dict[int, Any]:
        return selection.estimates(self.store, self.plan.objective, self.plan.items["search"], trials, last, lambda t: self._epochs(t, last))

    def _elected(self, references: Sequence[Trial], searched: Sequence[_Searched]) -> tuple[Trial, list[Trial], dict[str, Scored]]:
        """(the best on validation, all that stood for election, their validation scores)."""
        finalists = [t for s in searched for t in s.finalists]
        validated = self._score_all("validation", [self.store.recipe(r) for r in dict.fromkeys(t.recipe_id for t in (*finalists, *references))])
        # parents and hand recipes stand for election too: a search never ends below the best of them
        standing = [t for t in (*finalists, *references) if validated[t.recipe_id].score is not None]
        if not standing:
            raise NothingToExport("no finalist could be scored on the validation items")
        floors = self._validation_floors(references, validated)
        return selection.elect(self.plan.objective, standing, validated, floors)[0], standing, validated

    def _select(self, references: list[Trial], searched: Sequence[_Searched]) -> dict[str, Any]:
        """Scores finalists and references on validation, where the winner is chosen, then winner and references on test."""
        store, objective, last = self.store, self.plan.objective, searched[-1].last
        finalists = [t for s in searched for t in s.finalists]
        winner, standing, validated = self._elected(references, searched)
        late = [t for s in searched for t in store.trials() if s.after < t.generation <= s.last]
        known = self._estimates([*late, *finalists, *references], last)
        tested = self._score_all("test", [store.recipe(t.recipe_id) for t in (winner, *references)])
        p = selection.p_values(objective, winner.recipe_id, [t.recipe_id for t in standing], validated)
        test = tested[winner.recipe_id]
        whole = selection.headline(objective, test)
        best = selection.row(winner, known, validated, tested) | selection.interval(whole)
        best |= selection.selection_luck(selection.headline(objective, store.scored(winner)), whole)
        parents = [(str(t.label), tested[t.recipe_id]) for t in references if t.origin == "parent" and t.recipe_id != winner.recipe_id]
        leads = {t.id: selection.lead(selection.against(objective, test, tested[t.recipe_id])) for t in references}
        return {
            "best": best,
            "references": [selection.row(t, known, validated, tested, p) | leads[t.id] for t in references],
            "finalists": [selection.row(t, known, validated, {}, p) for t in finalists],
            "retention": selection.retention(objective, test, parents),
            "estimates": {str(i): [e.mean, e.error] for i, e in sorted(known.items())},
            "generations": last,
            "stages": [{"stage": s.stage.name, "first": s.first, "last": s.last, "best": self._leader(s, validated)} for s in searched],
        }

    def _leader(self, searched: _Searched, validated: Mapping[str, Scored]) -> int | None:
        """The stage's finalist that is best on validation."""
        scored = [(s, t) for t in searched.finalists if (s := validated[t.recipe_id].score) is not None]
        return max(scored, key=lambda pair: (pair[0], -pair[1].id))[1].id if scored else None

    def _validation_floors(self, references: Sequence[Trial], validated: Mapping[str, Scored]) -> dict[str, float]:
        """What `keep` asks on the validation items; a task whose best parent failed there asks nothing, which is said."""
        metrics = {str(t.label): validated[t.recipe_id].evaluation for t in references if t.origin == "parent"}
        for task, (label, _) in self._guarded.items():
            if metrics[label].error:
                log.warning("'%s' failed on validation, so that 'keep' cannot hold task '%s' there", label, task)
        return self.plan.objective.floors({t: metrics[label].metrics for t, (label, _) in self._guarded.items() if not metrics[label].error})

    def _score_all(self, role: Role, recipes: Sequence[Recipe], stage: str = "") -> dict[str, Scored]:
        """Scores of recipes on all items of a role."""
        items, objective = self.plan.items[role], self.plan.objective
        distinct = list({r.id: r for r in recipes}.values())
        missing = [r for r in distinct if self.store.evaluation(r.id, role, items) is None]
        done = len(distinct) - len(missing)
        for job, evaluation in self._dispatch([Job(i, r, items) for i, r in enumerate(missing)]):
            reported = objective.reported(evaluation)
            score = None if reported is None else reported - objective.price(evaluation.costs)
            point = objective.point(evaluation.metrics) if role == "validation" and score is not None else None
            self.store.add_evaluation(job.recipe, role, items, evaluation, score, reported, point)
            done += 1
            self.show(Progress(stage or role, done, len(distinct)))
        found = {r.id: self.store.evaluation(r.id, role, items) for r in distinct}
        return {i: s for i, s in found.items() if s is not None}

    def _generation(self, number: int, candidates: Sequence[_Candidate], stage: str, done: int, total: int, mu: int = 0) -> list[Trial]:
        """Evaluates the candidates of a generation that the store does not hold yet; returns all its trials.

        mu: how many of the best are learnt from; above 0 the generation is raced, if the plan has a race.
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

        def seen(trial: Trial) -> None:
            trials[trial.slot] = trial
            scores = [t.score for t in trials.values() if t.score is not None and not t.dropped]
            note = f"candidate {trial.id} failed: {trial.error}" if trial.error else ""
            self.show(Progress(stage, done + len(trials), total, max(scores, default=None), note))

        if missing and self.plan.race and mu:
            self._race(number, dict(enumerate(candidates)), mu, seen, lambda note: self.show(Progress(stage, done + len(trials), total, None, note)))
        elif missing:
            self._evaluate(number, missing, self.subset(number), seen)
        return [trials[slot] for slot in range(len(candidates))]

    def _evaluate(
        self, number: int, candidates: Mapping[int, _Candidate], items: Items, seen: Callable[[Trial], None] = lambda trial: None
    ) -> dict[int, Trial]:
        """Scores candidates on items, stores a trial for each and returns them by slot."""
        trials: dict[int, Trial] = {}
        floors = self._floors(items)

        def keep(slot: int, evaluation: Evaluation) -> None:
            trials[slot] = self.store.trial_at(number, slot) or self._add(number, slot, candidates[slot], items, evaluation, floors)
            seen(trials[slot])

        slots: dict[str, list[int]] = {}  # equal recipes are scored once
        for slot, candidate in candidates.items():
            slots.setdefault(candidate.recipe.id, []).append(slot)
        jobs: list[Job] = []
        for recipe, own in slots.items():
            known = self.store.evaluation(recipe, "search", items)
            if known is None:
                jobs.append(Job(own[0], candidates[own[0]].recipe, items))
                continue
            for slot in own:
                keep(slot, known.evaluation)
        for _, evaluation in self._dispatch(jobs):
            for slot in slots[evaluation.recipe_id]:
                keep(slot, evaluation)
        return trials

    def _race(self, number: int, candidates: Mapping[int, _Candidate], mu: int, seen: Callable[[Trial], None], said: Callable[[str], None]) -> None:
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
            jobs = [Job(i, r, part) for i, r in enumerate({r.id: r for r in recipes if r.id not in found}.values())]
            for job, evaluation in self._dispatch(jobs):
                store.add_evaluation(job.recipe, "rung", part, evaluation, None)
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
        c: _Candidate,
        items: Items,
        evaluation: Evaluation,
        floors: Mapping[str, float],
        fate: racing.Raced | None = None,
    ) -> Trial:
        """Stores a candidate's trial. floors: what `keep` asks on these items; fate: in a race."""
        objective = self.plan.objective
        reported = objective.reported(evaluation)
        predicted = fate.predicted if fate else None
        score = math.nan if reported is None else objective.search(evaluation.metrics) if predicted is None else predicted
        score -= objective.price(evaluation.costs)
        scored = math.isfinite(score)
        whole = sum(map(len, self.subset(number).values())) if predicted is not None else None
        return self.store.add_trial(
            generation=number, slot=slot, origin=c.origin, label=c.label, genome=c.genome, parents=c.parents,
            recipe=c.recipe, items=items, evaluation=evaluation, score=score if scored else None, reported=reported if scored else None,
            point=objective.point(evaluation.metrics) if scored and whole is None else None, dropped=fate.dropped if fate else None, whole=whole,
            violation=objective.violation(evaluation.metrics, floors) if scored else 0.0, stage=self._stage,
        )  # fmt: skip

    def _dispatch(self, jobs: Sequence[Job]) -> Iterable[tuple[Job, Evaluation]]:
        """The pool's results; raises Paused between two of them once `stop` is set."""
        if self.stop:
            raise Paused("stopped by a signal; run the same command with --resume to go on")
        for result in self.pool.run(jobs) if jobs else ():
            yield result
            if self.stop:
                raise Paused("stopped by a signal; run the same command with --resume to go on")


def _summary(generation: int, trials: Sequence[Trial], dropped: Sequence[Trial], failed: Sequence[Trial]) -> tuple[float | None, str]:
    """(best score of a generation, a line about it)."""
    scored = [_score(t) for t in trials if t.score is not None]
    best = max((_score(t) for t in trials if t.score is not None and not t.dropped), default=None)
    gated = [t for t in trials if NATS in t.metrics]
    counts = [f"{len(own)} {what}" for own, what in ((dropped, "dropped on the way"), (gated, "kept out by the gate"), (failed, "failed")) if own]
    numbers = [] if best is None else [f"best {best:.3f}", f"median {float(np.median(scored)):.3f}"]
    return best, f"generation {generation}: " + ", ".join([*numbers, *counts])


def _score(trial: Trial) -> float:
    return -math.inf if trial.score is None else trial.score


def _window(ids: Sequence[str], epoch: int, position: int, size: int, key: str) -> tuple[str, ...]:
    """A window of `size` ids of a shuffle; each epoch has a shuffle of its own."""
    shuffled = sorted(ids, key=lambda item: hashlib.sha256(f"{key}/{epoch}/{item}".encode()).digest())
    return tuple(shuffled[position * size : (position + 1) * size])
