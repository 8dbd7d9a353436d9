"""Requests compiled for a live model: tokenised by HFLM's own rules, scored by the engine, texts cut as HFLM cuts them.

What the engine cannot honour exactly (sampling, beams) goes to HFLM on the same model, and is said.
"""

from __future__ import annotations

import functools
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import nn

from evomerge.errors import CandidateError
from evomerge.evaluation.inference.generation import Generator
from evomerge.evaluation.inference.generation_probe import choose_decoder, probe_decoders
from evomerge.evaluation.inference.logits_processors import refusal
from evomerge.evaluation.inference.loglikelihood import Engine, Rounding
from evomerge.evaluation.inference.loglikelihood_plan import Plan
from evomerge.evaluation.inference.loglikelihood_probe import probe
from evomerge.evaluation.inference.requests import Request, Verification
from evomerge.evaluation.lm_harness.backends.base import Answers
from evomerge.evaluation.lm_harness.backends.hflm import ask, hflm
from evomerge.evaluation.lm_harness.tokenization import Encoding

log = logging.getLogger(__name__)
_TEXTS = 1 << 18  # decoded answers that are remembered


@dataclass(frozen=True, slots=True)
class _Generation:
    """Requests with one set of generation settings. numbers: of the requests; until: stop strings, the EOS text last."""

    plan: Any
    numbers: tuple[int, ...]
    until: tuple[str, ...]


@dataclass(slots=True)
class Prepared:
    """A set of requests, ready to be answered again and again. spans: of each request scored, its place in the plan."""

    requests: list[Any]
    plan: Plan | None = None
    spans: dict[int, tuple[int, int]] = field(default_factory=dict)
    generations: list[_Generation] = field(default_factory=list)
    handed: list[int] = field(default_factory=list)


class CompiledBackend:
    """Answers requests on one live transformers model. Satisfies `evomerge.evaluation.lm_harness.backends.base.Backend`."""

    def __init__(self, model: nn.Module, tokenizer: Any, batch_size: int) -> None:
        """batch_size: of what goes through HFLM; the engine sizes its own batches."""
        self.model, self.tokenizer = model, tokenizer
        self.lm = hflm(model, tokenizer, batch_size)
        self.pad_id = tokenizer.pad_token_id or 0
        self._engine: Engine | None = None
        self._generator: Generator | None = None
        self._verdicts: dict[str, Verification] = {}
        self._decoders: dict[str, Verification] = {}
        self._span = -1
        self._reasons: dict[str, str] = {}
        self._refusals: dict[str, str | None] = {}
        self._encoding = Encoding(self.lm)
        self._prompts: dict[tuple[str, int], list[int]] = {}
        self._text = functools.lru_cache(maxsize=_TEXTS)(self._decode)

    def close(self) -> None:
        """Takes the engine's hook off the model."""
        if self._engine is not None:
            self._engine.head.close()

    def optimizations(self) -> Mapping[str, Verification]:
        """What the probe found of this model, for requests as long as those prepared so far."""
        return {
            **self._verdicts,
            **{f"decoding: {name}": verdict for name, verdict in self._decoders.items()},
        }

    def fallback_reason(self, task: str) -> str | None:
        """Why some of a task's requests go through HFLM; None if none do."""
        return self._reasons.get(task)

    def tokens(self, request: Any) -> int:
        """How many tokens of a log-likelihood request are scored."""
        return self._encoding.tokens(request)

    def prepare(self, requests: Sequence[Any]) -> Prepared:
        """Token ids, plans and tensors of requests. Raises CandidateError for one that the model cannot take at all."""
        prepared = Prepared(list(requests))
        scored: list[Request] = []
        prompts: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(prepared.requests):
            reason = self._refused(request)
            if request.request_type in ("loglikelihood", "loglikelihood_rolling"):
                found = self._encoding(request)
                prepared.spans[number] = (len(scored), len(scored) + len(found))
                scored += found
            elif request.request_type == "generate_until" and reason is None:
                prompts[repr(request.args[1])].append(number)
            else:
                self._reasons[request.task_name] = reason or f"requests of type {request.request_type}"
                prepared.handed.append(number)
        asked = [self._asked(prepared.requests[numbers[0]].args[1]) for numbers in prompts.values()]
        encoded = [
            [self._prompt(prepared.requests[n], most) for n in numbers]
            for (_, most), numbers in zip(asked, prompts.values(), strict=True)
        ]
        longest = [len(r.context) + len(r.continuation) for r in scored]
        longest += [len(p) + most for (_, most), group in zip(asked, encoded, strict=True) for p in group]
        if scored or encoded:
            engine = self._ready(max(longest), bool(encoded))
            if scored:
                prepared.plan = engine.compile(scored)
            for (until, most), group, numbers in zip(asked, encoded, prompts.values(), strict=True):
                assert self._generator is not None
                plan = self._generator.compile(
                    group, until, most, self._settings(prepared.requests[numbers[0]])
                )
                prepared.generations.append(_Generation(plan, tuple(numbers), until))
        return prepared

    def answer(self, prepared: Prepared, rounding: Rounding) -> Answers:
        """The responses of every request, in order. Raises CandidateError for NaN log-likelihoods."""
        answers: Answers = [[] for _ in prepared.requests]
        if prepared.plan is not None:
            assert self._engine is not None
            scores = self._engine.run(prepared.plan, rounding)
            sums, greedy = scores.sums.tolist(), scores.greedy.tolist()
            for number, (start, end) in prepared.spans.items():
                request = prepared.requests[number]
                found = (
                    (sums[start], greedy[start])
                    if request.request_type == "loglikelihood"
                    else sum(sums[start:end])
                )
                answers[number] = [found] * (request.repeats or 1)
        for generation in prepared.generations:
            assert self._generator is not None
            for number, tokens in zip(generation.numbers, self._generator.run(generation.plan), strict=True):
                text = self._text(tuple(tokens), generation.until)
                answers[number] = [text] * (prepared.requests[number].repeats or 1)
        if prepared.handed:
            for number, own in zip(
                prepared.handed,
                ask(self.lm, [prepared.requests[n] for n in prepared.handed], rounding),
                strict=True,
            ):
                answers[number] = own
        return answers

    # ---- the engine, ready for requests of a length ------------------------------------------------------------------------

    def _ready(self, span: int, generates: bool) -> Engine:
        """The engine, probed anew where requests grow longer than every probe so far."""
        most = self.lm.max_length
        if span > self._span:
            self._span = min(most, max(span, 2 * self._span))
            self._verdicts = probe(self.model, span=self._span, max_length=most, pad_id=self.pad_id)
            self._decoders = {}
            log.info(
                "techniques: %s",
                "; ".join(f"{name}: {v.allowed}, {v.reason}" for name, v in self._verdicts.items()),
            )
        if self._engine is None:
            self._engine = Engine(self.model, pad_id=self.pad_id)
        self._engine.verdicts = self._verdicts
        if generates and not self._decoders:
            self._decoders = probe_decoders(
                self.model, self._engine.head, span=self._span, pad_id=self.pad_id
            )
            log.info(
                "decoders: %s",
                "; ".join(f"{name}: {v.allowed}, {v.reason}" for name, v in self._decoders.items()),
            )
            self._generator = Generator(
                self.model,
                self._engine.head,
                tokenizer=self.tokenizer,
                max_length=most,
                pad_id=self.pad_id,
                eos_ids=self._eos(),
                decoder=choose_decoder(self._decoders),
                shares=self._decoders["prefix"].allowed,
            )
        return self._engine

    def _eos(self) -> frozenset[int]:
        """Ids that end a generation: the generation config's and, as HFLM stops at its text, the tokenizer's own."""
        given: Any = getattr(self.model, "generation_config", None)
        ids = getattr(given, "eos_token_id", None)
        own = self.lm.eot_token_id
        return frozenset(
            [
                *([] if ids is None else [ids] if isinstance(ids, int) else ids),
                *([] if own is None else [own]),
            ]
        )

    # ---- HFLM's own rules --------------------------------------------------------------------------------------------------

    def _prompt(self, request: Any, most: int) -> list[int]:
        """Token ids of a prompt, cut from the left so that `most` new tokens fit."""
        key = (request.args[0], most)
        if key not in self._prompts:
            room = self.lm.max_length - most
            if room <= 0:
                raise CandidateError(
                    f"task '{request.task_name}' asks for {most} new tokens of a model with {self.lm.max_length} positions; lower max_gen_toks"
                )
            ids, _ = self.lm.tok_batch_encode(
                [request.args[0]], left_truncate_len=room, truncation=self.lm.truncation
            )
            self._prompts[key] = ids[0].tolist()
        return self._prompts[key]

    def _asked(self, settings: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
        """(stop strings, most new tokens) of generation settings."""
        known = normalize_gen_kwargs(dict(settings), self.lm.max_gen_toks)
        eos = self.lm.tok_decode(self.lm.eot_token_id, skip_special_tokens=False)
        return tuple(handle_stop_sequences(known.get("until"), eos=eos)), int(known["max_gen_toks"])

    def _settings(self, request: Any) -> dict[str, Any]:
        """What lm-eval would pass on to `generate` beside stop strings and the number of new tokens."""
        known = normalize_gen_kwargs(dict(request.args[1]), self.lm.max_gen_toks)
        return {name: value for name, value in known.items() if name not in ("until", "max_gen_toks")}

    def _refused(self, request: Any) -> str | None:
        """Why HFLM itself has to generate; None if it need not."""
        if request.request_type != "generate_until":
            return None
        key = repr(request.args[1])
        if key not in self._refusals:
            self._refusals[key] = refusal(self._settings(request), self.model)
        return self._refusals[key]

    def _decode(self, tokens: tuple[int, ...], until: tuple[str, ...]) -> str:
        return str(postprocess_generated_text(self.lm.tok_decode(list(tokens)), list(until), None))
