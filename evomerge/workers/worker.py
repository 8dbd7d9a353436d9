"""One device, parents opened once: Recipe -> Evaluation. A candidate's failure is a value. Knows nothing of Ray."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping

import torch
from torch import nn

from evomerge._redaction import scrub
from evomerge.checkpoints import Parent, total_bytes
from evomerge.checkpoints.checkpoint import file_stamps
from evomerge.errors import CandidateError, CheckpointError, EvomergeError
from evomerge.evaluation import Evaluation, Evaluator, Items, Preparing
from evomerge.evaluation import perplexity_screen as gating
from evomerge.evaluation.perplexity_screen import PerplexityScreen
from evomerge.merging import parent_placement
from evomerge.merging.live_model import ModelBuilder
from evomerge.merging.model_loading import load
from evomerge.methods.fused.magnitude_tables import MagnitudeTables
from evomerge.recipes import Recipe

log = logging.getLogger(__name__)


class Worker:
    """Makes candidates live, one at a time, and scores them."""

    def __init__(
        self,
        parents: Mapping[str, Parent],
        base: str,
        evaluator: Evaluator,
        *,
        dtype: str,
        device: str = "cpu",
        gate: PerplexityScreen | None = None,
    ) -> None:
        """dtype: the type of the tensors that are scored and shipped. gate: what a route has to pass before it is scored.

        Loads the base once as the resident model.
        """
        self.evaluator, self.device, self.gate = evaluator, device, gate
        self.known = MagnitudeTables(build=True, ranks_bytes=_spare() // 4)
        self.model = load(parents[base], dtype).to(device)
        host = (
            0 if device == "cpu" else _spare()
        )  # on a CPU the page cache serves all processes; a copy would not
        self.places = parent_placement.choose_placements(
            {name: total_bytes(p) for name, p in parents.items()},
            base,
            parent_placement.free_memory(device),
            host,
        )
        log.info("parents: %s", parent_placement.describe(self.places))
        self.parents = {
            name: parent_placement.place_parent(parent, self.places[name], device)
            for name, parent in parents.items()
        }
        self.live = ModelBuilder(parents, self.parents, base, self.model, dtype, device, self.known)
        self._stamps = file_stamps({file for parent in parents.values() for file in parent.files})
        self._finite = True
        self._watched: set[int] = set()
        self._prepared: set[tuple[int, str]] = set()

    def evaluate(self, recipe: Recipe, items: Items) -> Evaluation:
        """Scores a recipe on items; whatever goes wrong is in the evaluation's `error`.

        Raises CheckpointError where a parent's files are no longer those that were opened: no candidate is to blame.
        """
        if changed := [
            file for file, stamp in file_stamps(self._stamps).items() if self._stamps[file] != stamp
        ]:
            raise CheckpointError(
                f"{changed[0]} was changed or deleted while the search reads it; bring back the file that was there and resume"
            )
        seconds: dict[str, float] = {}
        metrics: dict[str, float] = {}
        costs: dict[str, float] = {}
        try:
            started = time.perf_counter()
            module = self.module(recipe, items, costs)
            seconds["merge"] = time.perf_counter() - started
            if self.gate is not None and module is not self.model:
                started = time.perf_counter()
                found = gating.nats_per_token(module, self.gate.texts)
                seconds["gate"] = time.perf_counter() - started
                if refusal := self.gate.rejection(found):
                    metrics = {gating.NATS_PER_TOKEN: min(found, 1e9)}
                    raise CandidateError(refusal)
            started = time.perf_counter()
            self._finite = True
            scores, metrics = self.evaluator.score(module, items)
            seconds["score"] = time.perf_counter() - started
            if not self._finite:
                raise CandidateError("the model's logits are NaN")
            for task, value in metrics.items():
                if not math.isfinite(value):
                    raise CandidateError(f"task '{task}' gave the metric {value}")
            return Evaluation(recipe.id, scores, metrics, seconds, costs=costs)
        except Exception as error:  # the one place where a candidate's failure becomes data
            log.debug("candidate %s failed", recipe.id, exc_info=True)
            cause = scrub(
                str(error) if isinstance(error, EvomergeError) else f"{type(error).__name__}: {error}"
            )
            kept = (
                {gating.NATS_PER_TOKEN: metrics[gating.NATS_PER_TOKEN]}
                if gating.NATS_PER_TOKEN in metrics
                else {}
            )
            return Evaluation(recipe.id, (), kept, seconds, error=" ".join(cause.split()), costs=costs)

    def module(self, recipe: Recipe, items: Items, costs: dict[str, float] | None = None) -> nn.Module:
        """The live model of a recipe, ready to be scored on items. costs: is told its layers and parameters.

        Raises CandidateError for a route that no plain checkpoint can hold, and whatever a merge raises.
        """
        view = self.live.view(recipe)
        self._watch_head(view.module)
        if view.routed is not None and isinstance(self.evaluator, Preparing):
            key = (id(view.module), json.dumps([[task, list(ids)] for task, ids in items.items()]))
            if (
                key not in self._prepared
            ):  # techniques are probed on the same route in every worker, whatever it scores first
                view.settle()
                self.evaluator.prepare(view.module, items)
                self._prepared.add(key)
        view.install()
        if reasons := self.live.reasons(view):
            raise CandidateError(f"this route is no plain checkpoint: {'; '.join(reasons[:3])}")
        if costs is not None:
            costs |= self.live.costs(view)
        return view.module

    def _watch_head(self, model: nn.Module) -> None:
        head = model.get_output_embeddings()  # type: ignore[operator]
        if id(model) not in self._watched and isinstance(head, nn.Module):
            head.register_forward_hook(self._watch)
            self._watched.add(id(model))

    def _watch(self, head: nn.Module, inputs: object, logits: torch.Tensor) -> None:
        """A generation of NaN logits would otherwise be scored as a wrong answer."""
        self._finite = self._finite and not bool(torch.isnan(logits.sum(dtype=torch.float32)))


def _spare() -> int:
    """Bytes of memory that are free now; half a gigabyte where the system does not say."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 1 << 29
