"""Greedy generation on a live model: the tokens that lm-eval's HFLM gets at batch size 1, many prompts at a time.

Prompts never change between candidates, so a plan is compiled once and run on every one. Which decoder a model can be
trusted with is decided by `evomerge.evaluation.inference.generation_probe`. Knows nothing of tasks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from evomerge.evaluation.inference import continuous_batching, static_batching
from evomerge.evaluation.inference.forward import LOGITS, Forward
from evomerge.evaluation.inference.generation_plan import Chunk, GenerationPlan, Level, Texts
from evomerge.evaluation.inference.logits_processors import processors
from evomerge.evaluation.inference.prefix_tree import LAUNCH, common, shared_prefixes
from evomerge.evaluation.inference.selected_logits import RowHead
from evomerge.evaluation.inference.shared_prefill import cuts, levels
from evomerge.evaluation.inference.stop_strings import Stops

DECODERS = ("slots", "padded", "equal", "single", "whole")  # the fastest first
_STEP = 1.1  # lengths of prompts that are prefilled together differ by about this factor at most
_GIVEN: Mapping[str, Any] = MappingProxyType({})
_SPLIT = 8  # forwards that a prefix of several chunks must save: what one chunk shares is saved by its levels anyway
_SHARED = 4  # a chunk that shares much may hold so many times the tokens of one forward
_WASTE = 0.15  # most padding of a chunk over its tokens, where it is more than a forward costs
_SPREAD = 64  # most tokens by which prompts of an unpadded batch differ


class Generator:
    """Decodes prompts on one model, whose weights may change between two runs of a plan."""

    def __init__(
        self,
        model: nn.Module,
        head: RowHead,
        *,
        tokenizer: Any,
        max_length: int,
        pad_id: int,
        eos_ids: frozenset[int],
        decoder: str,
        shares: bool = False,
        rows: int = 1024,
        tokens: int = 4096,
        memory: int | None = None,
        launch: int = LAUNCH,
    ) -> None:
        """decoder: of DECODERS, 'single' being 'equal' with one row, and 'whole' without a cache; shares: whether prefixes may
        be shared, both as `probe_decoders` allows.

        eos_ids: of the generation config and the tokenizer. rows: most prompts that run at once; tokens: most inputs of one
        forward; memory: bytes that keys and values of running prompts may take, but one prompt always runs (None: half of what an
        accelerator has left, 1 GiB on a CPU); launch: what a forward costs, in tokens. Raises ValueError for an unknown decoder.
        """
        if decoder not in DECODERS:
            raise ValueError(f"decoder must be one of {', '.join(DECODERS)}, got '{decoder}'")
        self.model, self.tokenizer, self.max_length, self.eos_ids = model, tokenizer, max_length, eos_ids
        self.decoder, self.rows, self.tokens, self.launch = (
            decoder,
            1 if decoder == "single" else rows,
            tokens,
            launch,
        )
        self.forward = Forward(model, head, pad_id)
        if decoder == "whole":
            self.forward.argument = None
        self.memory = _memory(self.forward.device) if memory is None else memory
        self.shares = shares and self.forward.argument is not None
        self._most = max(1, LOGITS // self.forward.vocabulary)
        self._stops: dict[tuple[str, ...], Stops] = {}

    @torch.inference_mode()
    def compile(
        self,
        prompts: Sequence[Sequence[int]],
        stops: Sequence[str],
        max_new: int | Sequence[int],
        settings: Mapping[str, Any] | None = _GIVEN,
    ) -> GenerationPlan:
        """The plan for prompts (token ids), stop strings and the most new tokens, of all or of each.

        settings: of the request, over the model's generation_config (penalties, suppressed tokens); None for its logits alone.
        A prompt that leaves no room for its new tokens loses its beginning, as in HFLM. Raises ValueError for an empty
        prompt, and where new tokens alone fill max_length.
        """
        wanted = [max_new] * len(prompts) if isinstance(max_new, int) else list(max_new)
        found: dict[tuple[tuple[int, ...], int], int] = {}
        places = []
        for prompt, most in zip(prompts, wanted, strict=True):
            room = self.max_length - most
            if not len(prompt) or most < 1 or room < 1:
                raise ValueError(
                    f"{most} new tokens after a prompt of {len(prompt)}; expected a prompt, at least 1 new token and fewer than {self.max_length}"
                )
            places.append(found.setdefault((tuple(prompt[-room:]), most), len(found)))
        unique, limits = tuple(p for p, _ in found), tuple(m for _, m in found)
        length = max((len(p) + m for p, m in found), default=1)
        running = self._running(len(unique), length)
        prefixes, chunks = self._chunks(unique, limits, running)
        kept = tuple(stops)
        if kept not in self._stops:
            self._stops[kept] = Stops(self.tokenizer, kept)
        rules = processors(self.model, unique, limits, settings) if settings is not None else None
        return GenerationPlan(
            unique,
            limits,
            tuple(places),
            self._stops[kept],
            rules,
            self.decoder,
            prefixes,
            chunks,
            running,
            length,
        )

    @torch.inference_mode()
    def run(self, plan: GenerationPlan) -> list[list[int]]:
        """New tokens of each prompt asked for, the one that ends it included. Raises whatever the model raises."""
        texts = self.texts(plan)
        return [list(texts.tokens[place]) for place in plan.places]

    @torch.inference_mode()
    def texts(self, plan: GenerationPlan, *, trace: bool = False) -> Texts:
        """As `run`, but of the distinct prompts. trace: with the logits behind every token."""
        texts = Texts(plan, self.eos_ids, trace=trace)
        (continuous_batching if plan.decoder == "slots" else static_batching).decode(
            plan, self.forward, texts
        )
        return texts

    # ---- compiling ---------------------------------------------------------------------------------------------------------

    def _running(self, prompts: int, length: int) -> int:
        """How many rows of a length fit at once."""
        fit = max(1, self.memory // max(1, self._row_bytes(length)))
        return max(1, min(self.rows, prompts, fit, self._most))

    def _row_bytes(self, length: int) -> int:
        """Bytes of the cache of one row: measured at one and two tokens, for what grows with the length and what does not."""
        if self.forward.argument is None:
            return 0
        one, two = (_bytes(self._cached(n)) for n in (1, 2))
        return one + (two - one) * (length - 1)

    def _cached(self, tokens: int) -> Any:
        ids = torch.full((1, tokens), self.forward.pad_id, device=self.forward.device)
        return self.forward.prefill(ids, windowed=self.decoder != "slots")

    def _chunks(
        self, prompts: Sequence[tuple[int, ...]], limits: Sequence[int], running: int
    ) -> tuple[tuple[Tensor, ...], tuple[Chunk, ...]]:
        """Prefixes, and chunks of the longest prompts first; those of one prefix follow each other."""
        groups: list[tuple[int, list[int]]] = []
        left = list(range(len(prompts)))
        if self.shares:
            groups, left = shared_prefixes(
                [p[:-1] for p in prompts], _SPLIT * self.launch
            )  # a token is left to be read from
        parts = [*groups, (0, left)]
        parts.sort(key=lambda part: -max((len(prompts[i]) for i in part[1]), default=0))
        prefixes: list[Tensor] = []
        chunks: list[Chunk] = []
        for depth, members in parts:
            number = None
            if depth:
                number = len(prefixes)
                prefixes.append(torch.tensor([prompts[members[0]][:depth]], device=self.forward.device))
            way = (
                "equal"
                if self.decoder in ("single", "whole") or (self.decoder == "padded" and depth)
                else self.decoder
            )
            ordered = sorted(members, key=lambda i: (-_size(prompts[i], way), prompts[i]))
            for batch in self._batches(
                [prompts[i][depth:] for i in ordered], [limits[i] for i in ordered], running, way
            ):
                chunks.append(self._chunk(prompts, [ordered[k] for k in batch], number, depth, way))
        return tuple(prefixes), tuple(chunks)

    def _batches(
        self, prompts: Sequence[tuple[int, ...]], limits: Sequence[int], running: int, way: str
    ) -> Iterator[range]:
        """Places of prompts (what follows their prefix), in the order to be prefilled, that make one chunk each."""
        most = running
        if way == "slots" and running < len(prompts):
            most = max(1, running // 4)  # a chunk waits until it fits
        longest = max(limits, default=0)
        spread = min(_SPREAD, longest) if way == "equal" else self.max_length
        saved = self.launch * (1 if way == "slots" else 1 + longest)  # by one chunk less
        start = 0
        while start < len(prompts):
            first = widest = new = total = len(
                prompts[start]
            )  # new: tokens that no other row of the chunk begins with
            end = start + 1
            while end < len(prompts) and end - start < most and first - len(prompts[end]) <= spread:
                size = len(prompts[end])
                widest, total = max(widest, size), total + size
                new += size - (
                    common(prompts[end - 1], prompts[end]) if self.shares and way != "padded" else 0
                )
                every = (end - start + 1) * widest
                if (
                    new > self.tokens
                    or every > _SHARED * self.tokens
                    or every - total > max(saved, _WASTE * total)
                ):
                    break
                end += 1
            yield range(start, end)
            start = end

    def _chunk(
        self, prompts: Sequence[tuple[int, ...]], members: list[int], prefix: int | None, depth: int, way: str
    ) -> Chunk:
        """Tensors of prompts that are prefilled together."""
        device, pad = self.forward.device, self.forward.pad_id
        rests = [prompts[i][depth:] for i in members]
        lengths = tuple(len(prompts[i]) for i in members)
        mask = None
        shared: list[Level] = []
        if way == "padded":
            width = max(map(len, rests))
            ids = [[*[pad] * (width - len(r)), *r] for r in rests]
            mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rests], device=device)
            ends = [width] * len(rests)
            positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
        else:
            width = (max if way == "slots" else min)(map(len, rests))
            depths = cuts(rests, width, self.launch) if self.shares else []
            start = depth
            for tokens, index in levels(rests, depths):
                at = torch.arange(start, start + len(tokens[0]), device=device).expand(len(tokens), -1)
                shared.append(
                    Level(torch.tensor(tokens, device=device), at, torch.tensor(index, device=device))
                )
                start += len(tokens[0])
            rests = [r[start - depth :] for r in rests]
            width -= start - depth
            ends = [min(len(r), width) for r in rests]
            ids = [[*r[:width], *[pad] * (width - len(r))] for r in rests]
            positions = torch.arange(start, start + width, device=device).expand(len(rests), -1)
        rows = torch.tensor([k * width + end - 1 for k, end in enumerate(ends)], device=device)
        return Chunk(
            tuple(members),
            prefix,
            tuple(shared),
            torch.tensor(ids, device=device),
            rows,
            positions,
            mask,
            lengths,
        )


def _size(prompt: Sequence[int], way: str) -> int:
    """What prompts are sorted by: their length, which for slots is rounded so that neighbours may begin alike, too."""
    return math.ceil(math.log(len(prompt), _STEP)) if way == "slots" else len(prompt)


def _memory(device: torch.device) -> int:
    """Bytes for the keys and values of running prompts."""
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 1 << 30


def _bytes(past: Any) -> int:
    """Bytes of the tensors of a cache."""
    values: list[Any] = [value for layer in past.layers for value in vars(layer).values()]
    tensors = [item for value in values for item in (value.values() if isinstance(value, dict) else [value])]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
