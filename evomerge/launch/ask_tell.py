"""Ask and tell: a search whose candidates are evaluated by the caller. Needs no tasks and builds no model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from evomerge.errors import ConfigError, StudyError
from evomerge.evaluation import Evaluation, Items
from evomerge.launch.search_request import SearchRequest, load
from evomerge.optimizers import OPTIMIZERS, Optimizer, OptimizerSettings
from evomerge.recipes import Recipe
from evomerge.spaces import SearchSpace
from evomerge.store import NewTrial, Store, StudyFacts

if TYPE_CHECKING:
    from evomerge.search import Stage

Score = float | Mapping[str, float] | None
"""Of a candidate, higher is better: a number, numbers by task, or None for a candidate that failed."""
_SIGMA = 0.15  # initial deviation, in ranges, of a space that comes without a search file
_MAX_KNOWN_GENERATIONS = 20  # in a row, after which a search has nothing new to ask
_ITEMS: Items = {}  # what a stored evaluation was made on is the caller's business


@dataclass(frozen=True, slots=True)
class Candidate:
    """A recipe that a search asks to be evaluated.

    Attributes:
        generation: From 1.
        slot: Its place in its generation, from 0.
        genome: The numbers that the recipe was decoded from.
        recipe: What to merge.
        score: What it was told to be worth; None before, and for one that failed.
        metrics: The numbers by task that it was told, if any.
    """

    generation: int
    slot: int
    genome: tuple[float, ...]
    recipe: Recipe
    score: float | None = None
    metrics: Mapping[str, float] | None = None


def _mean(metrics: Mapping[str, float]) -> float:
    return math.fsum(metrics.values()) / len(metrics) if metrics else math.nan


class AskTell:
    """Searches by ask and tell; the caller evaluates the candidates.

        search = AskTell("demo", seed=0)
        for generation in range(10):
            for candidate in search.ask():
                search.tell(candidate, my_score(candidate.recipe))
        print(search.best.score, search.best.recipe)

    The search is a function of its settings and of the scores: the same scores give the same candidates, in
    whatever order a generation is told. A recipe that is proposed again has the score that it was told first
    and is not asked again. With a store, scores are kept, and the same program goes on where it ended. A
    context manager where there is a store.
    """

    def __init__(
        self,
        search: SearchRequest | SearchSpace | Mapping[str, Any] | str | Path,
        *,
        seed: int | None = None,
        population: int | None = None,
        sigma: float | None = None,
        objective: Callable[[Mapping[str, float]], float] = _mean,
        store: Path | str | None = None,
    ) -> None:
        """Opens the parents of a search file, whose first stage is searched, or takes a space as it is.

        Args:
            search: A search file, the name of a shipped one, its content, what `load` gave, or a space.
            seed: Of the optimizer; None for the search file's, or 0.
            population: Candidates of a generation; None for the search file's, or the
                optimizer's own choice.
            sigma: Initial standard deviation, in ranges of the parameters; None for the search file's, or
                0.15.
            objective: Makes one number, higher is better, of scores by task; their mean unless given.
            store: File to keep the scores in, such as 'results/mine/study.db'; None keeps them in memory.

        Raises:
            ConfigError: For a search file that is wrong.
            StudyError: For a store of another search.
        """
        first: _First
        if isinstance(search, SearchRequest | Mapping | str | Path):
            first = _First.of_request(load(search), seed, population, sigma)
        else:
            first = _First.of_space(search, seed, population, sigma)
        self.space: SearchSpace = first.space
        self.optimizer: Optimizer = first.optimizer
        self._objective = objective
        self._generation = 0
        self._pending: dict[int, Candidate] = {}  # slot -> candidate that is asked and not told
        self._told: dict[int, Candidate] = {}  # slot -> candidate of this generation that is told
        self._genomes: Any = None  # [population, n] of this generation, as the optimizer asked
        self._known: dict[str, Candidate] = {}  # recipe id -> the candidate that was told first
        self._best: Candidate | None = None
        self._store = None if store is None else _open_store(Path(store), first)
        self._stored = {} if self._store is None else _stored_candidates(self._store)
        self._known.update({c.recipe.id: c for c in reversed(list(self._stored.values()))})

    def ask(self) -> list[Candidate]:
        """The candidates to evaluate next: what is not told of this generation, else a new generation.

        Returns:
            Candidates in the order of their slots; none where generation after generation proposed nothing
            new.

        Raises:
            StudyError: If the store holds another recipe in the place of one.
        """
        for _ in range(_MAX_KNOWN_GENERATIONS):
            if self._pending:
                break
            self._begin_generation()
        return [self._pending[slot] for slot in sorted(self._pending)]

    def tell(self, candidate: Candidate, score: Score) -> None:
        """Takes the score of a candidate; the optimizer learns when the whole generation is told.

        Args:
            candidate: One that `ask` gave.
            score: Higher is better; by task, which `objective` makes one number of; None, NaN or infinity for
                one that failed.

        Raises:
            ConfigError: If the candidate is not asked, or is told already.
        """
        asked = self._pending.get(candidate.slot)
        if asked is None or candidate.generation != self._generation or asked.recipe != candidate.recipe:
            raise ConfigError(
                f"candidate {candidate.slot} of generation {candidate.generation} is not waiting for a "
                "score; tell each candidate of `ask` once"
            )
        metrics = dict(score) if isinstance(score, Mapping) else None
        value = self._objective(score) if isinstance(score, Mapping) else score
        if value is not None and not math.isfinite(value):
            value = None
        told = replace(asked, score=None if value is None else float(value), metrics=metrics)
        if self._store is not None:
            _add(self._store, told)
        self._take(told)

    @property
    def generation(self) -> int:
        """The number of the generation that is asked, from 1; 0 before the first."""
        return self._generation

    @property
    def best(self) -> Candidate | None:
        """The candidate with the highest score so far, the first of equals; None before any."""
        return self._best

    @property
    def mean(self) -> Recipe:
        """The recipe at the centre of the search distribution."""
        return self.space.decode(tuple(float(gene) for gene in self.optimizer.mean))

    def close(self) -> None:
        """Closes the store, if there is one; the search can go on with it later."""
        if self._store is not None:
            self._store.set_state("paused")
            self._store.close()
            self._store = None

    def __enter__(self) -> AskTell:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin_generation(self) -> None:
        """Asks the optimizer; what is known already is told at once."""
        self._generation += 1
        self._genomes = self.optimizer.ask()
        self._told = {}
        known = []
        for slot, row in enumerate(self._genomes):
            genome = tuple(float(gene) for gene in row)
            candidate = Candidate(self._generation, slot, genome, self.space.decode(genome))
            stored = self._stored.get((self._generation, slot))
            if stored is not None and stored.recipe != candidate.recipe:
                raise StudyError(
                    f"the store holds recipe {stored.recipe.id} as candidate {slot} of generation "
                    f"{self._generation}, this search asks for {candidate.recipe.id}: it was begun with "
                    "other settings; use another file"
                )
            self._pending[slot] = candidate
            if candidate.recipe.id in self._known:
                known.append(candidate)
        for candidate in known:
            before = self._known[candidate.recipe.id]
            told = replace(candidate, score=before.score, metrics=before.metrics)
            if self._store is not None and (candidate.generation, candidate.slot) not in self._stored:
                _add(self._store, told)
            self._take(told)

    def _take(self, told: Candidate) -> None:
        first = self._known.setdefault(told.recipe.id, told)
        told = replace(told, score=first.score, metrics=first.metrics)  # as a replay will read it
        self._told[told.slot] = told
        del self._pending[told.slot]
        if told.score is not None and (self._best is None or told.score > (self._best.score or -math.inf)):
            self._best = told
        if not self._pending:
            self.optimizer.tell(self._genomes, [self._told[slot].score for slot in range(len(self._genomes))])


@dataclass(frozen=True, slots=True)
class _First:
    """The first stage of a search, open. text: what is stored as its settings."""

    space: SearchSpace
    optimizer: Optimizer
    name: str
    seed: int
    text: str

    @classmethod
    def of_request(
        cls, request: SearchRequest, seed: int | None, population: int | None, sigma: float | None
    ) -> _First:
        from evomerge.launch.opening import open_parents
        from evomerge.launch.stages import open_stages, reference_recipes
        from evomerge.launch.weight_space import is_diagonal, make_space
        from evomerge.search import LearnedOpening, Start

        settings = request.effective_settings
        search = {"seed": seed, "population": population, "sigma": sigma}
        stage = {"population": population, "sigma": sigma}
        settings = settings.model_copy(
            update={
                "search": _replaced(settings.search, search),
                "stages": (_replaced(settings.stages[0], stage),),
            }
        )
        parents = open_parents({name: (m.path, m.revision) for name, m in settings.models.items()})
        space = make_space(settings, parents)
        facts = StudyFacts(diagonal=is_diagonal(settings, space), budgets=settings.budgets)
        first: Stage = open_stages(settings, space, parents, facts)[0]
        base = reference_recipes(settings, space, parents)[0]
        opening = first.open(Start(base.recipe, base.label))
        if isinstance(opening, LearnedOpening):
            raise ConfigError(
                "ask and tell takes scores, and a learned stage takes gradients; begin with weights or routes"
            )
        optimizer = opening.optimizer(opening.space.start, 0)
        return cls(opening.space, optimizer, settings.study, settings.search.seed, request.text)

    @classmethod
    def of_space(
        cls, space: SearchSpace, seed: int | None, population: int | None, sigma: float | None
    ) -> _First:
        settings = OptimizerSettings(sigma=sigma or _SIGMA, population=population, seed=seed or 0)
        optimizer = OPTIMIZERS["cma"].make(space.start, settings)
        return cls(space, optimizer, "ask and tell", seed or 0, "")


def _replaced(block: Any, values: Mapping[str, Any]) -> Any:
    """A block of the settings with the values that are not None."""
    given = {key: value for key, value in values.items() if value is not None}
    return type(block).model_validate(block.model_dump() | given)


def _open_store(path: Path, first: _First) -> Store:
    path.parent.mkdir(parents=True, exist_ok=True)
    store = Store.open(path, write=True)
    row = store.study()
    if row is None:
        axes = tuple(str(axis.name) for axis in first.space.axes)
        store.begin(first.name, first.seed, first.text, {}, StudyFacts(axes=axes))
    elif (row.config, row.seed) != (first.text, first.seed):
        store.close()
        raise StudyError(f"{path} was begun with another search file or seed; use another file")
    else:
        store.set_state("running")
    return store


def _stored_candidates(store: Store) -> dict[tuple[int, int], Candidate]:
    """(generation, slot) -> candidate of a store, in the order in which they were told."""
    candidates: dict[tuple[int, int], Candidate] = {}
    for trial in sorted(store.trials(), key=lambda trial: trial.id):
        recipe, metrics = store.recipe(trial.recipe_id), dict(trial.metrics) or None
        candidates[trial.generation, trial.slot] = Candidate(
            trial.generation, trial.slot, trial.genome or (), recipe, trial.score, metrics
        )
    return candidates


def _add(store: Store, told: Candidate) -> None:
    error = None if told.score is not None else "told that it failed"
    metrics: Mapping[str, float] = {} if error else told.metrics or {}
    store.add_trial(
        NewTrial(
            generation=told.generation,
            slot=told.slot,
            origin="sampled",
            label=None,
            genome=told.genome,
            parents=(),
            recipe=told.recipe,
            items=_ITEMS,
            evaluation=Evaluation(told.recipe.id, (), metrics, {}, error),
            score=told.score,
        )
    )
