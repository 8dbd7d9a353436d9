"""One device, parents opened once: Recipe -> Evaluation. A candidate's failure is a value. Knows nothing of Ray."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping

import torch
from torch import nn

from evomerge import merge, placement
from evomerge.checkpoint import Parent
from evomerge.errors import CandidateError, EvomergeError, SetupError
from evomerge.evaluation import Evaluation, Evaluator, Items
from evomerge.fused import Tables
from evomerge.recipe import Recipe
from evomerge.resident import Resident

log = logging.getLogger(__name__)


class Worker:
    """Merges candidates into one resident model and scores it."""

    def __init__(self, parents: Mapping[str, Parent], base: str, evaluator: Evaluator, *, dtype: str, device: str = "cpu") -> None:
        """dtype: the type of the tensors that are scored and shipped. Loads the base once as the resident model."""
        self.evaluator, self.device = evaluator, device
        self.known = Tables(build=True, ranks_bytes=_spare() // 4)
        self.model = load(parents[base], dtype).to(device)
        self.resident = Resident(self.model, parents[base].tensors)
        host = 0 if device == "cpu" else _spare()  # on a CPU the page cache serves all processes; a copy would not
        self.places = placement.plan({name: p.nbytes for name, p in parents.items()}, base, placement.free_memory(device), host)
        log.info("parents: %s", placement.said(self.places))
        self.parents = {name: placement.held(parent, self.places[name], device) for name, parent in parents.items()}
        self._finite = True
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        if isinstance(head, nn.Module):
            head.register_forward_hook(self._watch)

    def evaluate(self, recipe: Recipe, items: Items) -> Evaluation:
        """Scores a recipe on items; whatever goes wrong is in the evaluation's `error`."""
        seconds: dict[str, float] = {}
        try:
            started = time.perf_counter()
            merge.into(recipe, self.parents, self.resident, self.known, self.device)
            seconds["merge"] = time.perf_counter() - started
            started = time.perf_counter()
            self._finite = True
            scores, metrics = self.evaluator.score(self.model, items)
            seconds["score"] = time.perf_counter() - started
            if not self._finite:
                raise CandidateError("the model's logits are NaN")
            for task, value in metrics.items():
                if not math.isfinite(value):
                    raise CandidateError(f"task '{task}' gave the metric {value}")
            return Evaluation(recipe.id, scores, metrics, seconds)
        except Exception as error:  # the one place where a candidate's failure becomes data
            log.debug("candidate %s failed", recipe.id, exc_info=True)
            cause = str(error) if isinstance(error, EvomergeError) else f"{type(error).__name__}: {error}"
            return Evaluation(recipe.id, (), {}, seconds, error=" ".join(cause.split()))

    def _watch(self, head: nn.Module, inputs: object, logits: torch.Tensor) -> None:
        """A generation of NaN logits would otherwise be scored as a wrong answer."""
        self._finite = self._finite and not bool(torch.isnan(logits.sum(dtype=torch.float32)))


def load(checkpoint: Parent, dtype: str) -> nn.Module:
    """The checkpoint as a live transformers model in evaluation mode. Never runs code from the checkpoint."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    refusal = ""
    for kind in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
        try:
            model = kind.from_pretrained(checkpoint.path, dtype=getattr(torch, dtype), trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            refusal = refusal or str(error).splitlines()[0]
            continue
        module: nn.Module = model.eval()
        return module.requires_grad_(False)
    raise SetupError(f"transformers cannot load {checkpoint.path}: {refusal}")


def _spare() -> int:
    """Bytes of memory that are free now; half a gigabyte where the system does not say."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 1 << 29


def load_tokenizer(checkpoint: Parent) -> object:
    """The checkpoint's tokenizer."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(checkpoint.path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise SetupError(f"transformers cannot load the tokenizer of {checkpoint.path}: {str(error).splitlines()[0]}") from None
