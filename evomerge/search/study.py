"""The loop: ask, decode, skip what is known, dispatch, store, tell; then validate the finalists, go on to the next stage from
the best of them, and at the end test the winner.

Resume is replay: the same code runs from the start, and whatever the store already holds is not evaluated again. A stage may
have several islands, searches of their own that share the pool, so that no worker waits for the last of one generation.
Results are stored as they come, and become trials in the order of slots, with ids that do not depend on who was first.
Knows nothing of Ray or lm-eval.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from evomerge.errors import ConfigError, FailureBudget, NoRoom, NothingToExport, Paused
from evomerge.evaluation import ranks
from evomerge.evaluation.perplexity_screen import NATS_PER_TOKEN
from evomerge.optimizers import Array, Optimizer
from evomerge.search import selection
from evomerge.search.dispatch import Dispatch, Line, Result
from evomerge.search.generation_runner import Candidate, Generations, Tally
from evomerge.search.plan import Opening, Plan, Progress, Stage, Start
from evomerge.spaces import SearchSpace
from evomerge.store import Outcome, Scored, StageOutcome, Store, Trial
from evomerge.workers import Job, Pool

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Island:
    """A search of a stage. of: how many there are; first: the stage's first generation; id: of its first trial.

    Generations of the islands take turns in their numbers: the n-th of island i is first + n of + i."""

    number: int
    of: int
    stage: Stage
    space: SearchSpace
    optimizer: Optimizer
    injected: Sequence[tuple[Trial, Any]]
    parents: tuple[int, ...]
    first: int
    id: int


@dataclass(frozen=True, slots=True)
class _Searched:
    """A stage that is over. first, last: its generations; after: leaders are of later generations; finalists: the means of its
    distributions and its leaders."""

    stage: Stage
    first: int
    last: int
    after: float
    finalists: tuple[Trial, ...]


class Study:
    """Runs a plan against a store and a pool; `dispatch.stop` asks it to end."""

    def __init__(
        self,
        plan: Plan,
        store: Store,
        pool: Pool,
        show: Callable[[Progress], None] = lambda progress: None,
        dispatch: Dispatch | None = None,
    ) -> None:
        """dispatch: of the same store and pool, where it has a grace or a budget to keep."""
        self.plan, self.store, self.pool, self.show = plan, store, pool, show
        self.dispatch = dispatch or Dispatch(pool, store)
        self.generations = Generations(plan, self.dispatch, lambda progress: self.show(progress))

    def run(self) -> Outcome:
        """Searches until the budget is reached and returns the outcome, as stored. Raises Paused if told to stop."""
        self.store.set_state("running")
        try:
            outcome = self._run()
        except Paused:
            with contextlib.suppress(NoRoom):  # it may be that very reason
                self.store.set_state("paused")
            raise
        except (FailureBudget, ConfigError):
            self.store.set_state("failed")
            raise
        self.store.finish(outcome)
        return outcome

    def _run(self) -> Outcome:
        if self.store.activity.ends() and self.dispatch.spent() is None:  # the budget is larger now
            self.store.activity.remove_ends()
        references = self._references()
        best = max(references, key=lambda t: (_score(t), -t.slot))
        searched: list[_Searched] = []
        last = 0
        for number, stage in enumerate(self.plan.stages):
            self.generations.stage = number
            if number and self._over(number, 0, last):
                break
            opening = stage.open(Start(self.store.recipe(best.recipe_id), best.label))
            if number and opening.hand:
                last += 1
                hand = [Candidate(b.origin, b.recipe, label=b.label) for b in opening.hand]
                references = [*references, *self._hand(last, hand, f"{stage.name}: hand recipes")]
            known = references if number == 0 else [best, *(t for t in references if t.stage == number)]
            first = last + 1
            islands, last = self._search(stage, opening, known, (best.id,) if number else (), first)
            after = first - 1 + opening.late * (last - first + 1)
            searched.append(
                _Searched(stage, first, last, after, self._finalists(islands, references, after, last))
            )
            if number + 1 < len(self.plan.stages):
                best = self._elected(references, searched)[0]
                note = f"stage {number + 1} of {len(self.plan.stages)}, {stage.name}: candidate {best.id} goes on"
                self.show(Progress(stage.name, 1, 1, None, note))
        return self._select(references, searched)

    def _references(self) -> list[Trial]:
        candidates = [Candidate(b.origin, b.recipe, label=b.label) for b in self.plan.baselines]
        if self.plan.objective.keep:
            self.generations.guard([b for b in self.plan.baselines if b.origin == "parent"])
        trials = self._hand(0, candidates, "parents and hand recipes")
        if all(t.score is None for t in trials):
            raise FailureBudget(
                f"no parent and no hand recipe could be scored; the first failed because: {trials[0].error}"
            )
        return self._soup(candidates, trials) if self.plan.soup else trials

    def _hand(self, number: int, candidates: Sequence[Candidate], stage: str) -> list[Trial]:
        """A generation that nobody asked an optimizer for."""
        return self.dispatch.together(
            [self.generations.run(number, candidates, Tally(stage, len(candidates)))]
        )[0]

    def _soup(self, candidates: list[Candidate], trials: list[Trial]) -> list[Trial]:
        """Adds the greedy soup: parents from the best down, each averaged in if the average does not get worse.

        Wortsman et al. 2022, "Model soups", arXiv:2203.05482, recipe 1, on the search items.
        """
        assert self.plan.soup is not None
        order = sorted(
            [t for t in trials if t.origin == "parent" and t.score is not None],
            key=lambda t: (-_score(t), t.slot),
        )
        names, best = [str(t.label) for t in order[:1]], _score(order[0]) if order else 0.0
        for parent in order[1:]:
            tried = self.plan.soup((*names, str(parent.label)))
            candidates = [*candidates, Candidate(tried.origin, tried.recipe, label=tried.label)]
            trials = self._hand(0, candidates, "greedy soup")
            if _score(trials[-1]) >= best:
                names, best = [*names, str(parent.label)], _score(trials[-1])
        return trials

    def _search(
        self,
        stage: Stage,
        opening: Opening,
        references: Sequence[Trial],
        parents: tuple[int, ...],
        first: int,
    ) -> tuple[list[_Island], int]:
        """(a stage's islands after their last generations, the number of the last of all).

        references: what the stage may begin with; parents: of its first candidates; first: its first generation.
        """
        space = opening.space
        known = [(t, space.encode(self.store.recipe(t.recipe_id))) for t in references if t.score is not None]
        encoded = sorted(
            [(t, g) for t, g in known if g is not None], key=lambda pair: (-_score(pair[0]), pair[0].id)
        )
        start = encoded[0][1] if opening.at_best and encoded else space.start
        count = max(1, self.plan.islands)
        begun = self.store.last_trial_before(first) + 1
        islands = [
            _Island(i, count, stage, space, opening.optimizer(start, i), encoded[:3], parents, first, begun)
            for i in range(count)
        ]
        if self.plan.race:  # rungs wait for one another: the islands take turns
            lasts = [last for island in islands for last in self.dispatch.together([self._evolve(island)])]
        else:
            lasts = self.dispatch.together([self._evolve(island) for island in islands])
        return islands, max(lasts)

    def _evolve(self, island: _Island) -> Generator[Sequence[Job], Result, int]:
        """An island's generations, up to its share of the budget; returns the number of the last.

        A pipelined search asks each generation but the first before it is told of the one before: that no worker waits for
        the last candidates, whoever is first, for the same trajectory. Each generation learns from those before the last.
        """
        stage, optimizer, parents = island.stage, island.optimizer, island.parents
        share = stage.evaluations / island.of
        asked, number, over = 0, island.first + island.number - island.of, False
        tally = Tally("search" if island.of == 1 else f"search, island {island.number + 1}", math.ceil(share))
        line, begun = Line[list[Trial]](), deque[tuple[int, Array]]()
        while True:
            while not over and len(begun) <= self.plan.pipelined:
                injected = island.injected if not asked else []
                if injected:
                    optimizer.inject([g for _, g in injected])
                genomes = optimizer.ask()
                number += island.of
                first_id = island.id + (number - island.first) * len(genomes)
                candidates = [
                    replace(
                        self._candidate(island.space, genome, slot, injected, parents),
                        island=island.number,
                        trial_id=first_id + slot,
                    )
                    for slot, genome in enumerate(genomes)
                ]
                asked += len(candidates)
                tally.total = max(tally.total, asked)
                turn = number - island.first if self.plan.pipelined else 0
                line.begin(self.generations.run(number, candidates, tally, optimizer.mu, turn))
                begun.append((number, genomes))
                over = asked >= share
            if not begun:
                return number
            told, genomes = begun.popleft()
            trials = yield from line.first()
            failed, dropped = (
                [t for t in trials if t.score is None and NATS_PER_TOKEN not in t.metrics],
                [t for t in trials if t.dropped],
            )
            if 2 * len(failed) > len(trials):
                why = f"the first because: {failed[0].error}"
                raise FailureBudget(
                    f"{len(failed)} of {len(trials)} candidates of generation {told} failed; {why}"
                )
            order = optimizer.tell(genomes, ranks([self.generations.standing(t) for t in trials]))
            parents = tuple(trials[i].id for i in order)
            self.show(
                Progress(tally.stage, tally.done, tally.total, *_summary(told, trials, dropped, failed))
            )
            over = over or self._over(self.generations.stage, island.number, number)

    def _over(self, stage: int, island: int, generation: int) -> bool:
        """Whether a budget ended an island there; a replay ends where the first run did."""
        ends = self.store.activity.ends()
        if (stage, island) in ends:
            return ends[stage, island].generation <= generation
        if (cause := self.dispatch.spent()) is None:
            return False
        self.store.activity.set_end(stage, island, generation, cause)
        self.show(Progress("search", 1, 1, None, f"after generation {generation}: {cause}"))
        return True

    def _candidate(
        self,
        space: SearchSpace,
        genome: Array,
        slot: int,
        injected: Sequence[tuple[Trial, Any]],
        parents: tuple[int, ...],
    ) -> Candidate:
        genes = tuple(float(g) for g in genome)
        if slot < len(injected):
            source = injected[slot][0]
            return Candidate("injected", space.decode(genes), source.label, genes, (source.id,))
        return Candidate("sampled", space.decode(genes), None, genes, parents)

    def _finalists(
        self, islands: Sequence[_Island], references: Sequence[Trial], after: float, last: int
    ) -> tuple[Trial, ...]:
        """A stage's candidates that are validated: the means of its distributions, and the leaders of its late generations."""
        plan, everything = self.plan, self.store.trials()
        asked = [
            t
            for t in everything
            if t.stage == self.generations.stage and t.origin != "mean" and t.genome is not None
        ]
        slot = 1 + max(t.slot for t in asked if t.generation == last)
        candidates: dict[int, Candidate] = {}
        for i, island in enumerate(islands):
            own = [t for t in asked if t.island == i]
            final = [t.id for t in own if t.generation == own[-1].generation]
            genome = tuple(float(g) for g in island.optimizer.mean)
            candidates[slot + i] = Candidate(
                "mean", island.space.decode(genome), "mean of the distribution", genome, tuple(final), i
            )
        (found,) = self.dispatch.together(
            [self.generations.evaluate(last, candidates, self.generations.subset(last + 1))]
        )
        means = list(found.values())
        late = [t for t in everything if after < t.generation <= last]
        known = self._estimates([*late, *means, *references], last)
        leaders = selection.leaders(late, known, after, last, lambda t: plan.objective.size_penalty(t.costs))
        return tuple(t for t in (*means, *leaders[: plan.finalists - 1]) if t.score is not None)

    def _estimates(self, trials: Sequence[Trial], last: int) -> dict[int, Any]:
        objective, pool = self.plan.objective, self.plan.items["search"]
        return selection.estimates(
            self.store, objective, pool, trials, last, lambda t: self.generations.epochs(t, last)
        )

    def _elected(
        self, references: Sequence[Trial], searched: Sequence[_Searched]
    ) -> tuple[Trial, list[Trial], dict[str, Scored]]:
        """(the best on validation, all that stood for election, their validation scores)."""
        finalists = [t for s in searched for t in s.finalists]
        recipes = [
            self.store.recipe(r) for r in dict.fromkeys(t.recipe_id for t in (*finalists, *references))
        ]
        validated = self.generations.score_all("validation", recipes)
        # parents and hand recipes stand for election too: a search never ends below the best of them
        standing = [t for t in (*finalists, *references) if validated[t.recipe_id].score is not None]
        if not standing:
            raise NothingToExport("no finalist could be scored on the validation items")
        floors = self._validation_floors(references, validated)
        return selection.elect(self.plan.objective, standing, validated, floors)[0], standing, validated

    def _select(self, references: list[Trial], searched: Sequence[_Searched]) -> Outcome:
        """Scores finalists and references on validation, where the winner is chosen, then winner and references on test."""
        store, objective, last = self.store, self.plan.objective, searched[-1].last
        finalists = [t for s in searched for t in s.finalists]
        winner, standing, validated = self._elected(references, searched)
        late = [t for s in searched for t in store.trials() if s.after < t.generation <= s.last]
        known = self._estimates([*late, *finalists, *references], last)
        tested = self.generations.score_all(
            "test", [store.recipe(t.recipe_id) for t in (winner, *references)]
        )
        p = selection.p_values(objective, winner.recipe_id, [t.recipe_id for t in standing], validated)
        test = tested[winner.recipe_id]
        whole = selection.headline(objective, test)
        best = selection.row(winner, known, validated, tested) | selection.interval(whole)
        best |= selection.selection_luck(selection.headline(objective, store.scored(winner)), whole)
        parents = [
            (str(t.label), tested[t.recipe_id])
            for t in references
            if t.origin == "parent" and t.recipe_id != winner.recipe_id
        ]
        leads = {
            t.id: selection.lead(selection.against(objective, test, tested[t.recipe_id])) for t in references
        }
        return Outcome(
            best=best,
            references=tuple(selection.row(t, known, validated, tested, p) | leads[t.id] for t in references),
            finalists=tuple(selection.row(t, known, validated, {}, p) for t in finalists),
            retention=tuple(selection.retention(objective, test, parents)),
            estimates={trial_id: (e.mean, e.error) for trial_id, e in sorted(known.items())},
            generations=last,
            stages=tuple(
                StageOutcome(s.stage.name, s.first, s.last, self._leader(s, validated)) for s in searched
            ),
        )

    def _leader(self, searched: _Searched, validated: Mapping[str, Scored]) -> int | None:
        """The stage's finalist that is best on validation."""
        scored = [(s, t) for t in searched.finalists if (s := validated[t.recipe_id].score) is not None]
        return max(scored, key=lambda pair: (pair[0], -pair[1].id))[1].id if scored else None

    def _validation_floors(
        self, references: Sequence[Trial], validated: Mapping[str, Scored]
    ) -> dict[str, float]:
        """What `keep` asks on the validation items; a task whose best parent failed there asks nothing, which is said."""
        metrics = {
            str(t.label): validated[t.recipe_id].evaluation for t in references if t.origin == "parent"
        }
        guarded = self.generations.guarded
        for task, (label, _) in guarded.items():
            if metrics[label].error:
                log.warning(
                    "'%s' failed on validation, so that 'keep' cannot hold task '%s' there", label, task
                )
        return self.plan.objective.floors(
            {t: metrics[label].metrics for t, (label, _) in guarded.items() if not metrics[label].error}
        )


def _summary(
    generation: int, trials: Sequence[Trial], dropped: Sequence[Trial], failed: Sequence[Trial]
) -> tuple[float | None, str]:
    """(best score of a generation, a line about it)."""
    scored = [_score(t) for t in trials if t.score is not None]
    best = max((_score(t) for t in trials if t.score is not None and not t.dropped), default=None)
    gated = [t for t in trials if NATS_PER_TOKEN in t.metrics]
    counts = [
        f"{len(own)} {what}"
        for own, what in (
            (dropped, "dropped on the way"),
            (gated, "kept out by the gate"),
            (failed, "failed"),
        )
        if own
    ]
    numbers = [] if best is None else [f"best {best:.3f}", f"median {float(np.median(scored)):.3f}"]
    return best, f"generation {generation}: " + ", ".join([*numbers, *counts])


def _score(trial: Trial) -> float:
    return -math.inf if trial.score is None else trial.score
