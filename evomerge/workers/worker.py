"""Recipe -> Evaluation on one device, with parents that are opened once. A candidate's failure is a value.

Knows nothing of pools and of Ray.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from evomerge.checkpoints import Parent
from evomerge.checkpoints.checkpoint import file_stamps
from evomerge.errors import CandidateError, CheckpointError, EngineSetupError
from evomerge.evaluation import (
    Answering,
    Differentiable,
    Evaluation,
    Evaluator,
    GradientRequest,
    Items,
    ItemScore,
    Preparing,
    Retaining,
    Slopes,
    Teacher,
    soft_means,
)
from evomerge.evaluation.device_memory import free_unused
from evomerge.evaluation.perplexity_screen import NATS_PER_TOKEN, PerplexityScreen, nats_per_token
from evomerge.merging.layer_devices import devices_of, place_model
from evomerge.merging.live_model import ModelBuilder
from evomerge.merging.model_loading import load_base
from evomerge.methods.fused.magnitude_tables import MagnitudeTables
from evomerge.recipes import Recipe
from evomerge.workers.device import compute_in_full_precision, tables_memory
from evomerge.workers.nan_watch import NanWatch
from evomerge.workers.pool import one_line
from evomerge.workers.taught_texts import TaughtTexts
from evomerge.workers.worker_memory import PlacedParents, WorkerMemory, place

if TYPE_CHECKING:
    from evomerge.evaluation.inference.divergence import Distributions

log = logging.getLogger(__name__)
_MOST_NATS = 1e9  # that are stored of a rejected route: JSON has no infinity
_MOST_REASONS = 3  # that an error gives
_NO_DERIVATIVES = "a route has no derivatives yet; learn weights before routes"


@dataclass(frozen=True, slots=True)
class _Built:
    """What `Worker.prepare` left for `Worker.evaluate`. module: or why there is none."""

    recipe_id: str
    items: Items
    module: nn.Module | Exception
    costs: Mapping[str, float]
    seconds: float

    def taken(self, costs: dict[str, float]) -> nn.Module:
        """The module; adds its size to `costs`, and raises what building it raised."""
        costs |= self.costs
        if isinstance(self.module, Exception):
            raise self.module
        return self.module


class Worker:
    """Builds candidates in a live model, one at a time, and scores them. Satisfies `pool.Scorer`.

        worker = Worker(parents, "base", evaluator, dtype="bfloat16", device="cuda")
        evaluation = worker.evaluate(recipe, evaluator.items("search"))

    Attributes:
        evaluator: scores the live model.
        device: where it is.
        screen: what a route has to pass before it is scored; None for nothing.
        tables: what the kernels remember of the parents between candidates.
        model: the base, loaded once; merges that are no routes are built in it.
        placed: the parents where merges read them, and where that is.
        builder: builds candidates in live models.
        is_open: whether it can evaluate, see `leave_device`.
    """

    def __init__(
        self,
        parents: Mapping[str, Parent],
        base: str,
        evaluator: Evaluator,
        *,
        dtype: str,
        device: str = "cpu",
        screen: PerplexityScreen | None = None,
        memory: WorkerMemory | None = None,
    ) -> None:
        """Loads the parents to where they are kept, and then the base.

        Args:
            parents: name -> opened parent, the base among them.
            base: the parent whose architecture and config candidates have.
            evaluator: scores the live model.
            dtype: the type of the tensors that are scored and shipped.
            device: of the live model: 'cpu', 'cuda' or 'cuda:N'.
            screen: what a route has to pass before it is scored.
            memory: where the models lie; None for all of them on the device, and on a CPU in their files.

        Raises:
            SetupError: where they do not fit.
        """
        compute_in_full_precision()
        self.evaluator = evaluator
        self.device = device
        self.screen = screen
        self._open = functools.partial(place, parents, base, dtype, device, memory)
        self.placed = self._open()
        log.info("parents: %s", self.placed.description)
        devices = device if memory is None else devices_of(memory.plan, memory.devices)
        self.model = place_model(load_base(parents[base], dtype), devices)
        ranks = memory.plan.ranks if memory and memory.plan else tables_memory(device, 0)
        self.tables = MagnitudeTables(build=True, ranks_bytes=ranks)

        def build() -> ModelBuilder:
            return ModelBuilder(parents, self.parents, base, self.model, dtype, devices, self.tables)

        self._make_builder = build
        self.builder = build()
        self._stamps = file_stamps({file for parent in parents.values() for file in parent.files})
        self._nan_watch = NanWatch()
        self._prepared: set[tuple[int, str]] = set()
        self._built: _Built | None = None
        self._taught_texts = TaughtTexts()
        self.is_open = True

    def leave_device(self) -> None:
        """Gives the memory of its card back and evaluates no more: workers of other processes need it.

        The model itself goes to the memory of the machine, since tasks may hold it.
        """
        self.is_open = False
        self.model.to("cpu")
        del self.builder, self._make_builder, self.tables
        self.placed = PlacedParents({}, self.placed.description)
        free_unused()

    @property
    def parents(self) -> Mapping[str, Parent]:
        """Name -> parent, as merges read it."""
        return self.placed.parents

    def prepare(self, recipe: Recipe, items: Items) -> None:
        """Builds a candidate, and plans, probes and compiles what scores it; see `pool.PreparingScorer`.

        Args:
            recipe: what to merge.
            items: task -> ids.

        Raises:
            CheckpointError: where a parent's files are no longer those that were opened.
            EngineSetupError: where an engine that generates texts cannot be had or trusted.
        """
        self._check_parent_files()
        started = time.perf_counter()
        costs: dict[str, float] = {}
        built: nn.Module | Exception
        try:
            built = self.module(recipe, items, costs, checked=False)
            if isinstance(self.evaluator, Preparing):
                self.evaluator.prepare(built, items)
        except EngineSetupError:
            raise
        except Exception as error:  # which `evaluate` makes the candidate's result
            built = error
        self._built = _Built(recipe.id, items, built, costs, time.perf_counter() - started)

    def evaluate(self, recipe: Recipe, items: Items) -> Evaluation:
        """Scores a recipe on items; what `prepare` built last is not built again.

        Args:
            recipe: what to merge.
            items: task -> ids.

        Returns:
            The evaluation, with seconds of each step and costs; whatever goes wrong with the candidate is in
            its `error`.

        Raises:
            CheckpointError: where a parent's files are no longer those that were opened: no candidate is to
                blame.
            EngineSetupError: where an engine that generates texts cannot be had or trusted.
        """
        self._check_parent_files()
        seconds: dict[str, float] = {}
        costs: dict[str, float] = {}
        screened: dict[str, float] = {}
        built, self._built = self._built, None
        try:
            started = time.perf_counter()
            if built is not None and (built.recipe_id, built.items) == (recipe.id, items):
                module = built.taken(costs)
                seconds["merge"] = built.seconds
            else:
                module = self.module(recipe, items, costs, checked=False)
                seconds["merge"] = time.perf_counter() - started
            if self.screen is not None and module is not self.model:
                self._pass_screen(self.screen, module, seconds, screened)
            started = time.perf_counter()
            scores, metrics = self._score(module, items)
            seconds["score"] = time.perf_counter() - started
            self.builder.check_values()  # with the scores: nothing waits for the device before
            if self.placed.is_lost:
                raise ConnectionResetError("the process that held the parents ended while they were read")
            _check_finite(metrics)
            return Evaluation(recipe.id, scores, metrics, seconds, costs=costs)
        except EngineSetupError:
            raise
        except Exception as error:  # the one place where a candidate's failure becomes data
            log.debug("candidate %s failed", recipe.id, exc_info=True)
            reason = one_line(self._first_cause(error))
            return Evaluation(recipe.id, (), screened, seconds, error=reason, costs=costs)

    def _first_cause(self, error: Exception) -> Exception:
        """Of a candidate's failure: a merged value that is not finite, else what was raised."""
        try:
            self.builder.check_values()
        except Exception as cause:
            return cause
        return error

    def slopes(self, recipe: Recipe, items: Items, request: GradientRequest) -> Evaluation:
        """Scores a recipe by a differentiable loss, with the derivatives by its coefficients.

        Args:
            recipe: what to merge: sums of task vectors in the base's shape.
            items: task -> ids.
            request: the loss.

        Returns:
            The evaluation with its `slopes`; whatever goes wrong with the candidate is in its `error`.

        Raises:
            CheckpointError: see `evaluate`.
        """

        def measure(seconds: dict[str, float]) -> Evaluation:
            if not isinstance(self.evaluator, Differentiable):
                raise CandidateError("these tasks have no differentiable loss; search weights instead")
            started = time.perf_counter()
            taught = None if request.teacher is None else self._taught(request.teacher, items)
            module = self.module(recipe, items)
            seconds["merge"] = time.perf_counter() - started
            started = time.perf_counter()
            scores, slopes = self._backward(recipe, module, items, request, taught)
            seconds["backward" if request.derivatives else "score"] = time.perf_counter() - started
            numbers = itertools.chain((slopes.loss,), slopes.partials.values(), *slopes.rows.values())
            if not all(map(math.isfinite, numbers)):
                raise CandidateError("the gradient of the loss is not finite")
            return Evaluation(recipe.id, scores, soft_means(scores), seconds, slopes=slopes)

        return self._measured(recipe, "slopes", measure)

    def _taught(self, teacher: Teacher, items: Items) -> Distributions:
        """The teacher's distributions on the texts of items."""
        if not isinstance(self.evaluator, Retaining):
            raise CandidateError("these tasks cannot tell a text's tokens, which retain needs")
        texts = [teacher.texts[item] for ids in items.values() for item in ids]
        lacks = self._taught_texts.lacks(teacher, texts)
        if lacks and self.module(teacher.recipe, items) is not self.model:
            raise CandidateError(_NO_DERIVATIVES)
        compute = functools.partial(self.evaluator.distributions, self.model)
        return self._taught_texts.distributions(teacher, texts, compute)

    def _backward_divergence(
        self, module: nn.Module, taught: Distributions, items: Items, request: GradientRequest
    ) -> tuple[tuple[ItemScore, ...], float]:
        """Divergences of the items' texts, and their weighted sum; adds its gradient to the parameters."""
        assert isinstance(self.evaluator, Retaining)
        pairs = [(task, item) for task, ids in items.items() for item in ids]
        weights = [request.weights[task] for task, _ in pairs]
        found = self.evaluator.backward_divergence(module, taught, weights)
        scores = tuple(ItemScore(task, item, own) for (task, item), own in zip(pairs, found, strict=True))
        return scores, math.fsum(weight * own for weight, own in zip(weights, found, strict=True))

    def answers(self, recipe: Recipe, items: Items) -> Evaluation:
        """Scores a recipe and collects what the model answers.

        Args:
            recipe: what to merge.
            items: task -> ids.

        Returns:
            The evaluation with its `answers`; whatever goes wrong with the candidate is in its `error`.

        Raises:
            CheckpointError: see `evaluate`.
        """

        def measure(seconds: dict[str, float]) -> Evaluation:
            if not isinstance(self.evaluator, Answering):
                raise CandidateError("the answers of these tasks are not known, so they cannot be labels")
            started = time.perf_counter()
            module = self.module(recipe, items)
            seconds["merge"] = time.perf_counter() - started
            started = time.perf_counter()
            scores, metrics, answers = self.evaluator.answers(module, items)
            seconds["score"] = time.perf_counter() - started
            return Evaluation(recipe.id, scores, metrics, seconds, answers=answers)

        return self._measured(recipe, "answers", measure)

    def _measured(
        self, recipe: Recipe, what: str, measure: Callable[[dict[str, float]], Evaluation]
    ) -> Evaluation:
        """What `measure` makes of a recipe; what it raises is in the evaluation's `error`, as in `evaluate`.

        what: for the log; measure: is given the seconds of each step to fill.
        """
        self._check_parent_files()
        self._built = None
        seconds: dict[str, float] = {}
        try:
            return measure(seconds)
        except Exception as error:
            log.debug("%s of candidate %s failed", what, recipe.id, exc_info=True)
            return Evaluation(recipe.id, (), {}, seconds, error=one_line(error))

    def _backward(
        self,
        recipe: Recipe,
        module: nn.Module,
        items: Items,
        request: GradientRequest,
        taught: Distributions | None,
    ) -> tuple[tuple[ItemScore, ...], Slopes]:
        """Scores of items, the loss and, where they are wanted, its derivatives."""
        assert isinstance(self.evaluator, Differentiable)
        if not request.derivatives:
            scores, loss = self.evaluator.backward(module, items, request)
            return scores, Slopes(loss, {})
        if module is not self.model:
            raise CandidateError(_NO_DERIVATIVES)
        with self.builder.coefficient_slopes(recipe) as found:
            if taught is None:
                scores, loss = self.evaluator.backward(module, items, request)
            else:
                scores, loss = self._backward_divergence(module, taught, items, request)
        rows = {key: tuple(of.float().tolist()) for key, of in sorted(found.rows.items())}
        return scores, Slopes(loss, dict(sorted(found.partials.items())), rows)

    def module(
        self, recipe: Recipe, items: Items, costs: dict[str, float] | None = None, *, checked: bool = True
    ) -> nn.Module:
        """The live model of a recipe, ready to be scored.

        Args:
            recipe: what to merge.
            items: that it is to be scored on: task -> ids.
            costs: filled with its layers and parameters; None where nobody needs them.
            checked: see `ModelBuilder.build`.

        Returns:
            The model, until the next recipe is built.

        Raises:
            CandidateError: for a route that no plain checkpoint can hold, and whatever a merge raises.
        """
        candidate = self.builder.build(recipe, checked=checked)
        self._nan_watch.add(candidate.module)
        if candidate.routed is not None and isinstance(self.evaluator, Preparing):
            key = (id(candidate.module), json.dumps([[task, list(ids)] for task, ids in items.items()]))
            if key not in self._prepared:
                # optimizations are verified on the same route in every worker, whatever it scores first
                candidate.install_reference()
                self.evaluator.prepare(candidate.module, items)
                self._prepared.add(key)
        candidate.install()
        if reasons := self.builder.reasons(candidate):
            raise CandidateError(f"this route is no plain checkpoint: {'; '.join(reasons[:_MOST_REASONS])}")
        if costs is not None:
            costs |= self.builder.costs(candidate)
        return candidate.module

    def _check_parent_files(self) -> None:
        """Raises CheckpointError for a parent's file that was changed since it was opened.

        Takes the parents anew where the process that held them has ended.
        """
        if self.placed.is_lost:
            log.warning("the process that held the parents has ended; they are opened anew")
            self._built = None
            self.placed = self._open()
            self.builder = self._make_builder()
        now = file_stamps(self._stamps)
        changed = [file for file, stamp in now.items() if self._stamps[file] != stamp]
        if changed:
            raise CheckpointError(
                f"{changed[0]} was changed or deleted while the search reads it; "
                "bring back the file that was there and resume"
            )

    def _pass_screen(
        self,
        screen: PerplexityScreen,
        module: nn.Module,
        seconds: dict[str, float],
        screened: dict[str, float],
    ) -> None:
        """Raises CandidateError for a route that the screen rejects, and notes its value in `screened`."""
        started = time.perf_counter()
        nats = nats_per_token(module, screen.texts)
        seconds["gate"] = time.perf_counter() - started
        rejection = screen.rejection(nats)
        if rejection:
            screened[NATS_PER_TOKEN] = min(nats, _MOST_NATS)
            raise CandidateError(rejection)

    def _score(self, module: nn.Module, items: Items) -> tuple[tuple[ItemScore, ...], dict[str, float]]:
        """Scores of items and metrics of tasks; raises CandidateError where the logits are NaN."""
        self._nan_watch.reset()
        scores, metrics = self.evaluator.score(module, items)
        if self._nan_watch.has_seen():  # a text generated from NaN would else be scored as a wrong answer
            raise CandidateError("the model's logits are NaN")
        return scores, metrics


def _check_finite(metrics: Mapping[str, float]) -> None:
    for task, value in metrics.items():
        if not math.isfinite(value):
            raise CandidateError(f"task '{task}' gave the metric {value}")
