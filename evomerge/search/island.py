"""An island: one optimizer's search within a stage, advanced when its oldest generation is complete."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.errors import FailureBudget
from evomerge.evaluation import Objective, Standing, ranks
from evomerge.evaluation.perplexity_screen import NATS_PER_TOKEN
from evomerge.optimizers import Array, Optimizer
from evomerge.search.generation import Generation
from evomerge.search.generation_runner import GenerationRunner, ProgressCounter
from evomerge.search.plan import Progress
from evomerge.search.trial_recorder import Candidate
from evomerge.spaces import SearchSpace
from evomerge.store import Trial
from evomerge.workers.machine_errors import retry_advice


@dataclass(frozen=True, slots=True)
class IslandSettings:
    """What sets an island apart from others of its stage.

    Attributes:
        number: From 0.
        count: Islands of the stage, which share its budget evenly.
        evaluations: Budget of the stage.
        space: Decodes genomes.
        injected: Stored trials with their genomes that the first generation begins with.
        parents: Ids of trials that the first candidates come from.
        first_generation: Number of the stage's first generation. Those of the islands take turns: the n-th
            generation, from 0, of island i is `first_generation` + n `count` + i.
        first_trial_id: Id of the stage's first trial.
        pipelined: Whether each generation but the first is asked before the results of the one before it are
            all there.
    """

    number: int
    count: int
    evaluations: int
    space: SearchSpace
    injected: Sequence[tuple[Trial, tuple[float, ...]]]
    parents: tuple[int, ...]
    first_generation: int
    first_trial_id: int
    pipelined: bool = False


@dataclass(frozen=True, slots=True)
class _OpenGeneration:
    """A generation that the optimizer was asked for and is not told of yet."""

    generation: Generation
    genomes: Array


class Island:
    """Asks an optimizer for generations, and tells it of each that is complete, the oldest first.

    A pipelined island has two generations open, so that no worker waits for the last candidates of one; each
    generation then learns from those before the last, whoever is first. No pool is needed:

        island = Island(settings, optimizer, runner, budget_ended=lambda generation: False)
        generations = deque(island.advance())
        while not island.is_finished:
            generation = generations.popleft()
            for job in generation.jobs:
                generation.add(job, evaluate(job.recipe, job.items))
            generations.extend(island.advance())

    Attributes:
        settings: Of this island.
        optimizer: Is asked and told.
        last_generation: Number of the last generation that was asked for.
        is_finished: Whether its share of the budget is used up and every generation told.
    """

    def __init__(
        self,
        settings: IslandSettings,
        optimizer: Optimizer,
        runner: GenerationRunner,
        budget_ended: Callable[[int], bool],
        show: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        """Makes an island that has asked for nothing.

        Args:
            settings: Of this island.
            optimizer: At the start of its search.
            runner: Opens generations.
            budget_ended: Given the last generation that was asked for, says whether a budget ends the island
                there.
            show: Called with the progress after each complete generation.
        """
        self.settings = settings
        self.optimizer = optimizer
        self.last_generation = settings.first_generation + settings.number - settings.count
        self._runner = runner
        self._budget_ended = budget_ended
        self._show = show
        self._share = settings.evaluations / settings.count
        self._parents = settings.parents
        self._asked = 0
        self._is_over = False
        self._replayed = 0  # generations of the store that were told and not shown
        self._open: deque[_OpenGeneration] = deque()
        label = "search" if settings.count == 1 else f"search, island {settings.number + 1}"
        self._counter = ProgressCounter(label, math.ceil(self._share))

    @property
    def is_finished(self) -> bool:
        """Whether its share of the budget is used up and every generation told."""
        return self._is_over and not self._open

    def advance(self) -> list[Generation]:
        """Tells the optimizer of complete generations, in their order, and asks for the next ones.

        To be called once at the start and after each evaluation. Generations that the store holds already are
        opened, told and passed at once, which is how a resumed study replays.

        Returns:
            The generations opened by this call, in their order; their jobs are to be evaluated.

        Raises:
            FailureBudget: More than half of a generation failed.
            StudyError: The replay differs from the store.
        """
        opened: list[Generation] = []
        most_open = 2 if self.settings.pipelined else 1
        while True:
            while not self._is_over and len(self._open) < most_open:
                opened.append(self._ask())
            if not self._open or not self._open[0].generation.is_complete:
                return opened
            self._tell(self._open.popleft())

    def _ask(self) -> Generation:
        """Opens the next generation."""
        settings = self.settings
        injected = [] if self._asked else settings.injected
        if injected:
            self.optimizer.inject([genome for _, genome in injected])
        genomes = self.optimizer.ask()
        self.last_generation += settings.count
        turn = self.last_generation - settings.first_generation
        candidates = [
            self._candidate(genome, slot, turn * len(genomes), injected)
            for slot, genome in enumerate(genomes)
        ]
        self._asked += len(candidates)
        self._counter.total = max(self._counter.total, self._asked)
        generation = self._runner.open(
            self.last_generation,
            candidates,
            self._counter,
            mu=self.optimizer.mu,
            turn=turn if settings.pipelined else 0,
        )
        self._open.append(_OpenGeneration(generation, genomes))
        self._is_over = self._asked >= self._share
        if self._replayed and not generation.was_stored:
            known = "generation is" if self._replayed == 1 else "generations are"
            note = f"{self._replayed} {known} in the store; the search goes on"
            self._show(Progress(self._counter.label, self._counter.done, self._counter.total, None, note))
            self._replayed = 0
        return generation

    def _candidate(
        self, genome: Array, slot: int, ids_before: int, injected: Sequence[tuple[Trial, tuple[float, ...]]]
    ) -> Candidate:
        """The candidate of a genome. ids_before: how many ids of the stage belong to earlier generations."""
        genes = tuple(float(gene) for gene in genome)
        source = injected[slot][0] if slot < len(injected) else None
        return Candidate(
            origin="sampled" if source is None else "injected",
            recipe=self.settings.space.decode(genes),
            label=None if source is None else source.label,
            genome=genes,
            parents=self._parents if source is None else (source.id,),
            island=self.settings.number,
            trial_id=self.settings.first_trial_id + ids_before + slot,
        )

    def _tell(self, oldest: _OpenGeneration) -> None:
        """Tells the optimizer of a complete generation and checks the budget."""
        number, trials = oldest.generation.number, oldest.generation.ordered_trials
        failed = [t for t in trials if t.score is None and NATS_PER_TOKEN not in t.metrics]
        if 2 * len(failed) > len(trials):
            raise FailureBudget(
                f"{len(failed)} of {len(trials)} candidates of generation {number} failed; "
                f"the first because: {failed[0].error}{retry_advice(failed[0].error)}"
            )
        objective = self._runner.plan.objective
        order = self.optimizer.tell(oldest.genomes, ranks([standing(t, objective) for t in trials]))
        self._parents = tuple(trials[slot].id for slot in order)
        best, note = _summary(number, trials)
        if oldest.generation.was_stored:  # was said when it was searched
            self._replayed, note = self._replayed + 1, ""
        ended = number if note else None
        self._show(Progress(self._counter.label, self._counter.done, self._counter.total, best, note, ended))
        self._is_over = self._is_over or self._budget_ended(self.last_generation)


def standing(trial: Trial, objective: Objective) -> Standing | None:
    """What ranks a trial within its generation.

    Args:
        trial: As stored.
        objective: Of the study, for its tie-breaker.

    Returns:
        Its standing; None for a failed candidate. One that the perplexity screen rejected ranks below all
        that were scored, by its perplexity, so that an optimizer learns from the less broken ones.
    """
    if trial.score is None:
        if NATS_PER_TOKEN not in trial.metrics:
            return None
        return Standing(-1.0, 0.0, -trial.metrics[NATS_PER_TOKEN], 0.0)
    rung_reached = math.inf if trial.dropped is None else float(trial.dropped)
    tie_break = objective.tie_break_score(trial.metrics)
    return Standing(rung_reached, -trial.violation, trial.score, tie_break)


def _summary(generation: int, trials: Sequence[Trial]) -> tuple[float | None, str]:
    """(best score of a generation, a line about it)."""
    scores = [t.score for t in trials if t.score is not None]
    best = max((t.score for t in trials if t.score is not None and not t.dropped), default=None)
    parts = [] if best is None else [f"best {best:.3f}", f"median {float(np.median(scores)):.3f}"]
    rejected = [t for t in trials if NATS_PER_TOKEN in t.metrics]
    failed = [t for t in trials if t.score is None and NATS_PER_TOKEN not in t.metrics]
    dropped = [t for t in trials if t.dropped]
    counts = ((dropped, "dropped on the way"), (rejected, "kept out by the gate"), (failed, "failed"))
    parts += [f"{len(some)} {what}" for some, what in counts if some]
    return best, f"generation {generation}: " + ", ".join(parts)
