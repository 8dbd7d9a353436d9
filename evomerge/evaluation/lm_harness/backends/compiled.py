"""Requests compiled for a live model.

Tokenised by HFLM's own rules, scored by our inference, texts cut as HFLM cuts them.

What our inference cannot honour exactly (sampling, beams) goes to HFLM on the same model, and
`fallback_reason` says why.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import nn

from evomerge.errors import CandidateError
from evomerge.evaluation.budgets import Budgets, budgets_of
from evomerge.evaluation.inference import divergence, kv_cache
from evomerge.evaluation.inference.divergence import Distributions
from evomerge.evaluation.inference.generation import Generator, TextRules
from evomerge.evaluation.inference.generation_plan import GenerationPlan
from evomerge.evaluation.inference.generation_probe import choose_decoder, probe_decoders
from evomerge.evaluation.inference.logits_processors import unsupported_reason
from evomerge.evaluation.inference.loglikelihood import Engine
from evomerge.evaluation.inference.loglikelihood_plan import LoglikelihoodPlan
from evomerge.evaluation.inference.loglikelihood_probe import probe
from evomerge.evaluation.inference.requests import Request, Verification
from evomerge.evaluation.inference.selected_logits import device_of
from evomerge.evaluation.inference.target_logprobs import Rounding
from evomerge.evaluation.inference.verification_cache import span_bucket, verified
from evomerge.evaluation.lm_harness.backends.base import Answers
from evomerge.evaluation.lm_harness.backends.hflm import answer_by_hflm, make_hflm
from evomerge.evaluation.lm_harness.tokenization import RequestTokenizer

log = logging.getLogger(__name__)
_TEXTS = 1 << 18  # decoded answers that are cached


@dataclass(frozen=True, slots=True)
class _Generation:
    """Requests with one set of generation settings.

    numbers: of the requests; until: stop strings, the EOS text last.
    """

    plan: GenerationPlan
    numbers: tuple[int, ...]
    until: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts of requests with one set of generation settings.

    Attributes:
        settings: What lm-eval would pass on to `generate` beside what follows.
        until: Stop strings, the EOS text last.
        max_new: Most new tokens.
        numbers: Of the requests.
        ids: Token ids of each request's prompt.
    """

    settings: Mapping[str, Any]
    until: tuple[str, ...]
    max_new: int
    numbers: tuple[int, ...]
    ids: list[list[int]]


@dataclass(slots=True)
class Prepared:
    """A set of requests, ready to be answered again and again.

    Attributes:
        requests: lm-eval's requests.
        plan: Of all log-likelihoods; None without any.
        spans: Number of a log-likelihood request -> (start, end) of its pieces in the plan.
        generations: Requests of generated texts, by their settings.
        by_hflm: Numbers of the requests that HFLM answers.
    """

    requests: list[Any]
    plan: LoglikelihoodPlan | None = None
    spans: dict[int, tuple[int, int]] = field(default_factory=dict)
    generations: list[_Generation] = field(default_factory=list)
    by_hflm: list[int] = field(default_factory=list)


class CompiledBackend:
    """Answers requests on one live transformers model.

    Satisfies `evomerge.evaluation.lm_harness.backends.base.Backend`.

    Attributes:
        model: The live model.
        tokenizer: Its tokenizer.
        lm: An `HFLM` over the model, for its rules and as fallback.
        pad_id: Token id that rows are padded with.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, batch_size: int) -> None:
        """See `BackendFactory`.

        Our inference sizes its own batches; batch_size is of what goes through HFLM.
        """
        self.model, self.tokenizer = model, tokenizer
        self.lm = make_hflm(model, tokenizer, batch_size)
        self.pad_id = tokenizer.pad_token_id or 0
        self._engine: Engine | None = None
        self._generator: Generator | None = None
        self._budgets: Budgets | None = None  # the device's
        self._verifications: dict[str, Verification] = {}
        self._decoders: dict[str, Verification] = {}
        self._span = -1  # length of scored requests that the verifications hold for
        self._text_span = -1  # length of prompts and texts that the decoders are verified for
        self._fallback_reasons: dict[str, str] = {}  # by task
        self._unsupported: dict[str, str | None] = {}  # by generation settings
        self._tokenize = RequestTokenizer(self.lm)
        self._prompt_ids: dict[tuple[str, int], list[int]] = {}
        self._text = functools.lru_cache(maxsize=_TEXTS)(self._decode)

    def close(self) -> None:
        """See `Backend.close`."""
        if self._engine is not None:
            self._engine.head.close()

    def halve_budgets(self) -> None:
        """See `ShrinkableBackend.halve_budgets`. Captured graphs are dropped."""
        self._budgets = (self._budgets or budgets_of(device_of(self.model))).halved()
        self.close()
        self._engine = self._generator = None

    def optimizations(self) -> Mapping[str, Verification]:
        """See `Backend.optimizations`. They hold for requests as long as those prepared so far."""
        decoders = {f"decoding: {name}": verification for name, verification in self._decoders.items()}
        return {**self._verifications, **decoders}

    def fallback_reason(self, task: str) -> str | None:
        """See `Backend.fallback_reason`."""
        return self._fallback_reasons.get(task)

    def tokens(self, request: Any) -> int:
        """See `Backend.tokens`."""
        return self._tokenize.tokens(request)

    def prepare(self, requests: Sequence[Any]) -> Prepared:
        """See `Backend.prepare`.

        Verifies optimizations where the model is new or requests are longer than before.
        """
        prepared = self._empty(requests)
        scored: list[Request] = []
        generated: dict[str, list[int]] = defaultdict(list)  # by generation settings
        for number, request in enumerate(prepared.requests):
            reason = self._unsupported_reason(request)
            if request.request_type in ("loglikelihood", "loglikelihood_rolling"):
                pieces = self._tokenize(request)
                prepared.spans[number] = (len(scored), len(scored) + len(pieces))
                scored += pieces
            elif request.request_type == "generate_until" and reason is None:
                generated[repr(request.args[1])].append(number)
            else:
                reason = reason or f"requests of type {request.request_type}"
                self._fallback_reasons[request.task_name] = reason
                prepared.by_hflm.append(number)
        prompts = [self._prompts(prepared.requests, numbers) for numbers in generated.values()]
        if scored:
            self._expect_span(max(len(request.context) + len(request.continuation) for request in scored))
            prepared.plan = self._verified_engine().compile(scored)
        if prompts:
            self._expect_text_span(max(len(ids) + group.max_new for group in prompts for ids in group.ids))
            self._plan_texts(prepared, prompts)
        return prepared

    def _empty(self, requests: Sequence[Any]) -> Prepared:
        """Requests of which nothing is planned yet."""
        return Prepared(list(requests))

    def _plan_texts(self, prepared: Prepared, groups: Sequence[Prompts]) -> None:
        """Plans how texts are generated."""
        generator = self._verified_generator()
        for group in groups:
            plan = generator.compile(group.ids, group.until, group.max_new, group.settings)
            prepared.generations.append(_Generation(plan, group.numbers, group.until))

    def answer(self, prepared: Prepared, rounding: Rounding) -> Answers:
        """See `Backend.answer`."""
        answers: Answers = [[] for _ in prepared.requests]
        if prepared.plan is not None:
            self._answer_loglikelihoods(prepared, prepared.plan, rounding, answers)
        for generation in prepared.generations:
            assert self._generator is not None
            texts = self._generator.run(generation.plan)
            for number, tokens in zip(generation.numbers, texts, strict=True):
                text = self._text(tuple(tokens), generation.until)
                answers[number] = [text] * (prepared.requests[number].repeats or 1)
        if prepared.by_hflm:
            requests = [prepared.requests[number] for number in prepared.by_hflm]
            for number, responses in zip(
                prepared.by_hflm, answer_by_hflm(self.lm, requests, rounding), strict=True
            ):
                answers[number] = responses
        return answers

    # ---- gradients -----------------------------------------------------------------------------------------

    def prepare_gradients(self, requests: Sequence[Any]) -> Prepared:
        """See `DifferentiableBackend.prepare_gradients`. Recurrent states are not shared."""
        prepared = self.prepare(requests)
        assert prepared.plan is not None
        if prepared.plan.optimization != "plain" and not kv_cache.carries_gradients(self.model):
            assert self._engine is not None
            pieces = [piece for request in prepared.requests for piece in self._tokenize(request)]
            prepared.plan = self._engine.compile(pieces, "plain")
        return prepared

    def sums(self, prepared: Prepared) -> list[float]:
        """See `DifferentiableBackend.sums`."""
        assert self._engine is not None
        assert prepared.plan is not None
        found = self._engine.run(prepared.plan).sums.tolist()
        return [math.fsum(found[start:end]) for start, end in prepared.spans.values()]

    def backward(self, prepared: Prepared, slopes_of: Callable[[Sequence[float]], Sequence[float]]) -> None:
        """See `DifferentiableBackend.backward`."""
        assert self._engine is not None
        plan, spans = prepared.plan, prepared.spans.values()
        assert plan is not None

        def of_distinct(sums: torch.Tensor) -> torch.Tensor:
            pieces = sums[plan.places].tolist()
            slopes = slopes_of([math.fsum(pieces[start:end]) for start, end in spans])
            of_pieces = [
                slope for slope, (start, end) in zip(slopes, spans, strict=True) for _ in range(start, end)
            ]
            given = torch.tensor(of_pieces, dtype=torch.float64)
            return torch.zeros(plan.size, dtype=torch.float64).index_add(0, plan.places, given)

        self._engine.differentiate(plan, of_distinct)

    def distributions(self, texts: Sequence[str]) -> Distributions:
        """See `RetainingBackend.distributions`. A text is cut at the model's length."""
        ids = [list(self.lm.tok_encode(text))[: self.lm.max_length] for text in texts]
        empty = next((text for text, own in zip(texts, ids, strict=True) if not own), None)
        if empty is not None:
            raise CandidateError(f"a text to be retained has no tokens: {empty[:80]!r}")
        return divergence.distributions(self._opened_engine().forward, ids)

    def backward_divergence(self, teacher: Distributions, weights: Sequence[float]) -> list[float]:
        """See `RetainingBackend.backward_divergence`."""
        return divergence.backward(self._opened_engine().forward, teacher, weights)

    def _answer_loglikelihoods(
        self, prepared: Prepared, plan: LoglikelihoodPlan, rounding: Rounding, answers: Answers
    ) -> None:
        """Scores the plan and writes the responses of its requests."""
        assert self._engine is not None
        scores = self._engine.run(plan, rounding)
        sums, greedy = scores.sums.tolist(), scores.greedy.tolist()
        for number, (start, end) in prepared.spans.items():
            request = prepared.requests[number]
            response: Any = (sums[start], greedy[start])
            if request.request_type == "loglikelihood_rolling":
                response = sum(sums[start:end])
            answers[number] = [response] * (request.repeats or 1)

    # ---- verified inference, for requests of a length ------------------------------------------------------

    def expect(self, requests: Sequence[Any]) -> None:
        """See `SpanningBackend.expect`."""
        for request in requests:
            with contextlib.suppress(CandidateError):  # which is raised again where the request is asked
                self._expect(request)

    def _expect(self, request: Any) -> None:
        """Takes note of a request that will come; of nothing where HFLM answers it."""
        if request.request_type in ("loglikelihood", "loglikelihood_rolling"):
            pieces = self._tokenize(request)
            self._expect_span(max(len(piece.context) + len(piece.continuation) for piece in pieces))
        elif request.request_type == "generate_until" and self._unsupported_reason(request) is None:
            group = self._prompts([request], [0])
            self._expect_text_span(len(group.ids[0]) + group.max_new)

    def _expect_span(self, span: int) -> None:
        """Has optimizations verified anew where requests are longer than all before."""
        if span > self._span:
            self._span = min(self.lm.max_length, span_bucket(span))
            self._verifications = {}

    def _expect_text_span(self, span: int) -> None:
        """Has decoders verified anew where prompts and texts are longer than all before."""
        if span > self._text_span:
            self._text_span = min(self.lm.max_length, span_bucket(span))
            self._decoders = {}

    def _verified_engine(self) -> Engine:
        """The engine with the optimizations that are allowed at this length."""
        engine = self._opened_engine()
        if not self._verifications:

            def measure() -> dict[str, Verification]:
                return probe(self.model, span=self._span, max_length=self.lm.max_length, pad_id=self.pad_id)

            self._verifications = self._verified("optimizations", self._span, measure)
        engine.verifications = self._verifications
        return engine

    def _opened_engine(self) -> Engine:
        """The engine, perhaps not verified yet."""
        if self._engine is None:
            self._engine = Engine(self.model, pad_id=self.pad_id, budgets=self._budgets)
        return self._engine

    def _verified_generator(self) -> Generator:
        """The generator with the fastest decoder that is allowed."""
        engine = self._opened_engine()
        if self._generator is None or not self._decoders:

            def measure() -> dict[str, Verification]:
                return probe_decoders(self.model, engine.head, span=self._text_span, pad_id=self.pad_id)

            self._decoders = self._verified("decoders", self._text_span, measure)
            rules = TextRules(self.tokenizer, self.lm.max_length, self.pad_id, self._eos_ids())
            self._generator = Generator(
                self.model,
                engine.head,
                rules,
                decoder=choose_decoder(self._decoders),
                shares=self._decoders["prefix"].allowed,
                graphs=engine.graphs,
                budgets=self._budgets,
            )
        return self._generator

    def _verified(
        self, kind: str, span: int, measure: Callable[[], dict[str, Verification]]
    ) -> dict[str, Verification]:
        """Verifies optimizations where neither this process, its study nor this machine has done so."""
        settings = {"pad_id": self.pad_id, "max_length": self.lm.max_length}
        verifications = verified(kind, self.model, span, settings, measure)
        _log_verifications(kind, verifications)
        return verifications

    def _eos_ids(self) -> frozenset[int]:
        """Ids that end a generation.

        The generation config's and, as HFLM stops at its text, the tokenizer's own.
        """
        config: Any = getattr(self.model, "generation_config", None)
        configured = getattr(config, "eos_token_id", None)
        ids: set[int] = set()
        if isinstance(configured, int):
            ids.add(configured)
        elif configured is not None:
            ids.update(configured)
        if self.lm.eot_token_id is not None:
            ids.add(self.lm.eot_token_id)
        return frozenset(ids)

    # ---- HFLM's own rules ----------------------------------------------------------------------------------

    def _prompts(self, requests: Sequence[Any], numbers: Sequence[int]) -> Prompts:
        """The prompts of requests that have one set of generation settings."""
        first = requests[numbers[0]]
        normalized = normalize_gen_kwargs(dict(first.args[1]), self.lm.max_gen_toks)
        eos = self.lm.tok_decode(self.lm.eot_token_id, skip_special_tokens=False)
        until = tuple(handle_stop_sequences(normalized.get("until"), eos=eos))
        max_new = int(normalized["max_gen_toks"])
        ids = [self._tokenized_prompt(requests[number], max_new) for number in numbers]
        return Prompts(self._generation_settings(first), until, max_new, tuple(numbers), ids)

    def _tokenized_prompt(self, request: Any, max_new: int) -> list[int]:
        """Token ids of a prompt, cut from the left so that its new tokens fit."""
        key = (request.args[0], max_new)
        if key not in self._prompt_ids:
            room = self.lm.max_length - max_new
            if room <= 0:
                raise CandidateError(
                    f"task '{request.task_name}' asks for {max_new} new tokens of a model with "
                    f"{self.lm.max_length} positions; lower max_gen_toks"
                )
            ids, _ = self.lm.tok_batch_encode(
                [request.args[0]], left_truncate_len=room, truncation=self.lm.truncation
            )
            self._prompt_ids[key] = ids[0].tolist()
        return self._prompt_ids[key]

    def _generation_settings(self, request: Any) -> dict[str, Any]:
        """What lm-eval would pass on to `generate` beside stop strings and the number of new tokens."""
        normalized = normalize_gen_kwargs(dict(request.args[1]), self.lm.max_gen_toks)
        return {name: value for name, value in normalized.items() if name not in ("until", "max_gen_toks")}

    def _unsupported_reason(self, request: Any) -> str | None:
        """Why HFLM itself has to generate; None if it need not."""
        if request.request_type != "generate_until":
            return None
        key = repr(request.args[1])
        if key not in self._unsupported:
            self._unsupported[key] = unsupported_reason(self._generation_settings(request), self.model)
        return self._unsupported[key]

    def _decode(self, tokens: tuple[int, ...], until: tuple[str, ...]) -> str:
        return str(postprocess_generated_text(self.lm.tok_decode(list(tokens)), list(until), None))


def _log_verifications(what: str, verifications: Mapping[str, Verification]) -> None:
    parts = [f"{name}: {v.allowed}, {v.reason}" for name, v in verifications.items()]
    log.info("%s: %s", what, "; ".join(parts))
