"""Greedy generation on a live model.

The tokens that lm-eval's HFLM gets at batch size 1, many prompts at a time; in half precision up to
near-ties of two tokens.

Prompts never change between candidates, so a plan is made once and run on every one. Which decoder a model
can be trusted with is decided by `evomerge.evaluation.inference.generation_probe`. Knows nothing of tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from evomerge.evaluation.budgets import Budgets, budgets_of
from evomerge.evaluation.inference import continuous_batching, device_batching, static_batching
from evomerge.evaluation.inference.cuda_graphs import CudaGraphs
from evomerge.evaluation.inference.device_batching import DeviceBatch
from evomerge.evaluation.inference.forward import Forward
from evomerge.evaluation.inference.generation_plan import BatchingRules, GenerationPlan, Texts, make_batches
from evomerge.evaluation.inference.logits_processors import build_processors
from evomerge.evaluation.inference.prefix_tree import FORWARD_COST
from evomerge.evaluation.inference.selected_logits import RowHead
from evomerge.evaluation.inference.stop_strings import Stops

DECODERS = ("device", "slots", "padded", "equal", "single", "whole")
"""The fastest first. 'device': continuous batching whose state lies on the device, for accelerators; 'slots':
the same with its state on the host, a row of one buffer for each running prompt; 'padded':
static batches, padded on the left; 'equal': static batches without padding; 'single': the same with one row;
'whole': without a cache."""
_NO_SETTINGS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class TextRules:
    """How texts begin and end.

    Attributes:
        tokenizer: A transformers tokenizer, for stop strings; may be None where there are none.
        max_length: Most tokens of a prompt and its answer.
        pad_id: Token id that rows are padded with.
        eos_ids: Token ids that end a text: of the generation config and the tokenizer.
    """

    tokenizer: Any
    max_length: int
    pad_id: int
    eos_ids: frozenset[int] = field(default_factory=frozenset)


@dataclass(frozen=True, slots=True)
class GenerationLimits:
    """Limits of batches; where one is None, the device's budget counts, see `budgets`.

    Attributes:
        rows: Most prompts that run at once.
        tokens: Most input tokens of one forward.
        memory: Bytes that keys and values of running prompts may take, but one prompt always runs.
        forward_cost: What one more forward costs, in tokens.
    """

    rows: int | None = None
    tokens: int | None = None
    memory: int | None = None
    forward_cost: int = FORWARD_COST


class Generator:
    """Decodes prompts on one model, whose weights may change between two runs of a plan.

        generator = Generator(model, head, TextRules(tokenizer, 2048, pad_id, eos_ids), decoder="slots")
        plan = generator.compile(prompts, stops=["Q:"], max_new=64)
        texts = generator.run(plan)

    Attributes:
        model: The live model.
        rules: How texts begin and end.
        decoder: Name of the decoder.
        shares: Whether prefixes are shared.
        limits: Limits of batches.
        budgets: Limits of a forward where `limits` give none.
        memory: Bytes that keys and values may take.
        forward: The model's forward.
    """

    def __init__(
        self,
        model: nn.Module,
        head: RowHead,
        rules: TextRules,
        *,
        decoder: str,
        shares: bool = False,
        limits: GenerationLimits | None = None,
        graphs: CudaGraphs | None = None,
        budgets: Budgets | None = None,
    ) -> None:
        """Wraps a model.

        Args:
            model: The live model.
            head: Its `RowHead`.
            rules: How texts begin and end.
            decoder: One of `DECODERS`, as `probe_decoders` allows.
            shares: Whether prefixes may be shared, as `probe_decoders` allows.
            limits: Limits of batches; None for the defaults.
            graphs: Where the steps of the decoder 'device' are captured; None to run each from Python.
            budgets: What `limits` leave open; None for the device's.

        Raises:
            ValueError: The decoder is unknown.
        """
        if decoder not in DECODERS:
            raise ValueError(f"decoder must be one of {', '.join(DECODERS)}, got '{decoder}'")
        self.model, self.rules, self.decoder = model, rules, decoder
        self.limits = limits or GenerationLimits()
        self.forward = Forward(model, head, rules.pad_id)
        if decoder == "whole":
            self.forward.argument = None
        self.budgets = budgets or budgets_of(self.forward.device)
        self.memory = self.budgets.cache if self.limits.memory is None else self.limits.memory
        self.shares = shares and self.forward.argument is not None
        self._max_rows = max(1, self.budgets.logits // self.forward.vocabulary)
        self._stops: dict[tuple[str, ...], Stops] = {}
        self._graphs = graphs
        self._batches: dict[tuple[int, int], DeviceBatch] = {}

    @torch.inference_mode()
    def compile(
        self,
        prompts: Sequence[Sequence[int]],
        stops: Sequence[str],
        max_new: int | Sequence[int],
        settings: Mapping[str, Any] | None = _NO_SETTINGS,
    ) -> GenerationPlan:
        """Plans the decoding of prompts.

        A prompt that leaves no room for its new tokens loses its beginning, as in HFLM.

        Args:
            prompts: Token ids of each prompt.
            stops: Stop strings.
            max_new: Most new tokens, of all or of each.
            settings: Generation settings of the request over the model's generation_config (penalties,
                suppressed tokens); None to use the model's logits alone.

        Returns:
            A plan that can be run any number of times.

        Raises:
            ValueError: A prompt is empty, or new tokens alone fill max_length.
        """
        max_news = [max_new] * len(prompts) if isinstance(max_new, int) else list(max_new)
        numbers: dict[tuple[tuple[int, ...], int], int] = {}
        places = []
        for prompt, new in zip(prompts, max_news, strict=True):
            places.append(numbers.setdefault((self._fitted(prompt, new), new), len(numbers)))
        unique = tuple(prompt for prompt, _ in numbers)
        limits = tuple(new for _, new in numbers)
        length = max((len(prompt) + new for prompt, new in numbers), default=1)
        if self.decoder == "device":
            length = device_batching.bucket_length(length)
        rows = self._rows_at_once(len(unique), length)
        prefixes, chunks = make_batches(unique, limits, self._batching_rules(rows))
        strings = tuple(stops)
        if strings not in self._stops:
            self._stops[strings] = Stops(self.rules.tokenizer, strings)
        processors = None if settings is None else build_processors(self.model, unique, limits, settings)
        return GenerationPlan(
            prompts=unique,
            limits=limits,
            places=tuple(places),
            stops=self._stops[strings],
            processors=processors,
            decoder=self.decoder,
            prefixes=prefixes,
            chunks=chunks,
            rows=rows,
            length=length,
        )

    @torch.inference_mode()
    def run(self, plan: GenerationPlan) -> list[list[int]]:
        """Decodes a plan. Raises whatever the model raises.

        Args:
            plan: Result of `compile`.

        Returns:
            New tokens of each given prompt, the one that ends it included.
        """
        texts = self.texts(plan)
        return [list(texts.tokens[place]) for place in plan.places]

    @torch.inference_mode()
    def texts(self, plan: GenerationPlan, *, trace: bool = False) -> Texts:
        """Decodes the distinct prompts of a plan.

        Args:
            plan: Result of `compile`.
            trace: Whether to keep the logits behind every token.

        Returns:
            The texts, in the order of `plan.prompts`.
        """
        texts = Texts(plan, self.rules.eos_ids, trace=trace)
        if plan.decoder == "device" and plan.processors is None:
            try:
                device_batching.decode(plan, self.forward, texts, self._device_batch(plan))
            except torch.OutOfMemoryError:
                self._batches.clear()  # whoever tries again with less has what the buffers held
                raise
        elif plan.decoder in ("device", "slots"):
            continuous_batching.decode(plan, self.forward, texts)
        else:
            static_batching.decode(plan, self.forward, texts)
        return texts

    def _device_batch(self, plan: GenerationPlan) -> DeviceBatch:
        """Buffers of a plan's size, those of earlier plans as long as memory takes all."""
        key = (plan.rows, plan.length)
        refused = any(batch.refusal for batch in self._batches.values())
        if key not in self._batches:
            needed = plan.rows * self._row_bytes(plan.length)
            if needed + sum(batch.nbytes for batch in self._batches.values()) > self.memory:
                self._batches.clear()
            graphs = None if refused else self._graphs
            self._batches[key] = DeviceBatch(self.forward, *key, self.rules.eos_ids, graphs)
        return self._batches[key]

    # ---- compiling -----------------------------------------------------------------------------------------

    def _fitted(self, prompt: Sequence[int], new: int) -> tuple[int, ...]:
        """A prompt, cut from the left so that its new tokens fit."""
        room = self.rules.max_length - new
        if not len(prompt) or new < 1 or room < 1:
            raise ValueError(
                f"{new} new tokens after a prompt of {len(prompt)}; expected a prompt, at least 1 new token "
                f"and fewer than {self.rules.max_length}"
            )
        return tuple(prompt[-room:])

    def _batching_rules(self, rows: int) -> BatchingRules:
        return BatchingRules(
            decoder="slots" if self.decoder == "device" else self.decoder,
            shares=self.shares,
            rows=rows,
            tokens=self.limits.tokens or self.budgets.prefill,
            forward_cost=self.limits.forward_cost,
            max_length=self.rules.max_length,
            pad_id=self.rules.pad_id,
            device=self.forward.device,
        )

    def _rows_at_once(self, prompts: int, length: int) -> int:
        """How many rows of a length run at once."""
        most = 1 if self.decoder == "single" else self.limits.rows or self.budgets.rows
        fit = max(1, self.memory // max(1, self._row_bytes(length)))
        most = max(1, min(most, fit, self._max_rows))
        return device_batching.bucket_rows(prompts, most) if self.decoder == "device" else min(prompts, most)

    def _row_bytes(self, length: int) -> int:
        """Bytes of the cache of one row.

        Measured at one and two tokens, for what grows with the length and what does not.
        """
        if self.forward.argument is None:
            return 0
        one, two = (_cache_bytes(self._cache_of(tokens)) for tokens in (1, 2))
        return one + (two - one) * (length - 1)

    def _cache_of(self, tokens: int) -> Any:
        ids = torch.full((1, tokens), self.forward.pad_id, device=self.forward.device)
        return self.forward.prefill(ids, windowed=self.decoder not in ("device", "slots"))


def _cache_bytes(past: Any) -> int:
    """Bytes of the tensors of a cache."""
    values: list[Any] = [value for layer in past.layers for value in vars(layer).values()]
    tensors = [item for value in values for item in (value.values() if isinstance(value, dict) else [value])]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
