"""A small text engine over transformers, with a prefix cache as real ones have, and faults on request."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from evomerge.evaluation.engines.engine import EngineError, EngineModel, EngineSettings, Progress, Pushed

PATH = "tests.support.toy_engine:ToyEngine"


class ToyEngine:
    """Satisfies `TextEngine`: a row a step, by plain forwards.

    What a prefix is continued by is remembered, and forgotten at a push, unless the option `stale` is set.
    Other options: `skips`, a name on disk that pushes leave out; `fault` ('kill', 'exit', 'hang', 'raise')
    at step number `at`; `closed` when opened.
    """

    def __init__(self, model: EngineModel, settings: EngineSettings) -> None:
        if settings.options.get("closed"):
            raise EngineError("the toy stays closed")
        config = transformers.AutoConfig.from_pretrained(model.folder)
        torch.manual_seed(1)
        self.model: Any = transformers.AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, model.dtype)
        )
        self.model.eval().requires_grad_(False)
        self.options = dict(settings.options)
        self.cache: dict[tuple[int, ...], tuple[int, float]] = {}
        self.rows: dict[int, tuple[list[int], int, int]] = {}
        self.end_ids: frozenset[int] = frozenset()
        self.steps = 0

    def facts(self) -> Mapping[str, str]:
        return {"engine": "toy 1"}

    def push(self, tensors: Mapping[str, Tensor]) -> Pushed:
        own = self.model.state_dict()
        for name, tensor in tensors.items():
            if name != self.options.get("skips"):
                own[name].copy_(tensor)
        self.model.tie_weights()
        if not self.options.get("stale"):
            self.cache.clear()
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        return Pushed("in-place", "toy", len(tensors), size)

    def start(self, prompts: Sequence[Sequence[int]], limits: Sequence[int], end_ids: Sequence[int]) -> None:
        self.rows = {
            row: (list(ids), len(ids), limit)
            for row, (ids, limit) in enumerate(zip(prompts, limits, strict=True))
        }
        self.end_ids = frozenset(end_ids)

    def step(self) -> list[Progress]:
        self.steps += 1
        if self.options.get("fault") and self.steps >= int(self.options.get("at", 1)):
            _fail(str(self.options["fault"]))
        made = []
        for row, (ids, length, limit) in list(self.rows.items()):
            token, logprob = self._next(tuple(ids))
            ids.append(token)
            is_finished = token in self.end_ids or len(ids) == length + limit
            if is_finished:
                del self.rows[row]
            made.append(Progress(row, (token,), (logprob,), is_finished))
        return made

    @torch.inference_mode()
    def _next(self, ids: tuple[int, ...]) -> tuple[int, float]:
        if ids not in self.cache:
            logits = self.model(input_ids=torch.tensor([ids])).logits[0, -1].float()
            token = int(logits.argmax())
            logprob = float(torch.log_softmax(logits, -1)[token])
            self.cache[ids] = token, math.nan if bool(logits.isnan().any()) else logprob
        return self.cache[ids]

    def abort(self, rows: Sequence[int]) -> None:
        for row in rows:
            self.rows.pop(row, None)

    def close(self) -> None:
        self.rows.clear()


def _fail(fault: str) -> None:
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "exit":
        print("the toy leaves", flush=True)
        os._exit(7)
    elif fault == "hang":
        time.sleep(3600)
    raise ValueError("the toy raises")
