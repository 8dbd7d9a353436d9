"""Texts by vLLM, with a candidate's weights written into it; log-likelihoods by our own inference.

Which texts those are is decided by task: all of them, or for `auto` those that vLLM is expected to generate
faster. What our decoder does not take, lm-eval answers.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import nn

from evomerge.errors import EngineSetupError
from evomerge.evaluation.engines.choice import TextVolume, why_not_faster
from evomerge.evaluation.engines.engine import EngineSettings
from evomerge.evaluation.engines.installed import vllm_version
from evomerge.evaluation.engines.live_engine import LiveEngine
from evomerge.evaluation.inference.logits_processors import build_processors
from evomerge.evaluation.inference.requests import Verification
from evomerge.evaluation.inference.selected_logits import device_of
from evomerge.evaluation.inference.stop_strings import Stops
from evomerge.evaluation.inference.target_logprobs import Rounding
from evomerge.evaluation.lm_harness.backends.base import Answers
from evomerge.evaluation.lm_harness.backends.compiled import CompiledBackend, Prepared, Prompts
from evomerge.merging.routing.routed_model import is_routed

log = logging.getLogger(__name__)
_CHECKED_PROMPTS = 2  # of each task, the shortest
_CHECKED_TOKENS = 8  # new ones of each


@dataclass(frozen=True, slots=True)
class _EngineTexts:
    """Texts of the engine, with one set of generation settings.

    ids: of the distinct prompts; until: stop strings, the EOS text last; numbers: of the requests; places: of
    each request, its prompt.
    """

    ids: tuple[tuple[int, ...], ...]
    max_new: int
    stops: Stops
    until: tuple[str, ...]
    numbers: tuple[int, ...]
    places: tuple[int, ...]


@dataclass(slots=True)
class EnginePrepared(Prepared):
    """A set of requests, some of which the engine answers.

    Attributes:
        engine_texts: Those, by their settings.
    """

    engine_texts: list[_EngineTexts] = field(default_factory=list)


class VllmBackend(CompiledBackend):
    """Answers requests with one live model, whose weights vLLM is given before it generates.

    A model that takes routes is no model of vLLM's: our own decoder generates its texts.

    Attributes:
        chooses: Whether vLLM generates only what it is expected to be faster at.
    """

    chooses: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        batch_size: int,
        engine: EngineSettings | None = None,
        prompts: Mapping[str, int] | None = None,
    ) -> None:
        """See `BackendFactory`.

        Args:
            model: The live model.
            tokenizer: Its tokenizer.
            batch_size: Of what goes through HFLM.
            engine: How vLLM is opened; None for the defaults.
            prompts: Task -> items that a candidate may be scored on.

        Raises:
            EngineSetupError: There is no vLLM, and texts are not chosen.
        """
        super().__init__(model, tokenizer, batch_size)
        self._settings = engine or EngineSettings()
        self._prompt_counts = dict(prompts or {})
        self._live: LiveEngine | None = None
        self._reasons: dict[str, str | None] = {}  # task -> why the engine does not generate its texts
        self._shortest: dict[str, list[tuple[int, ...]]] = {}  # task -> prompts that the engine is checked by
        self._stop_rules: dict[tuple[str, ...], Stops] = {}
        if not self.chooses and not is_routed(model):
            vllm_version(self._settings.python)

    def close(self) -> None:
        """See `Backend.close`."""
        super().close()
        if self._live is not None:
            self._live.close()

    def optimizations(self) -> Mapping[str, Verification]:
        """See `Backend.optimizations`. The engine's is there once it is open."""
        found = dict(super().optimizations())
        if self._live is not None and self._live.verification is not None:
            found["engine"] = self._live.verification
        return found

    def answered_by(self, task: str) -> str | None:
        """See `EngineBackend.answered_by`."""
        if self._reasons.get(task, "not asked") is not None:
            return None
        settings = self._settings
        shared = f", {settings.tensor_parallel} devices" if settings.tensor_parallel > 1 else ""
        options = "".join(f", {name} {value}" for name, value in sorted(settings.options.items()))
        version = vllm_version(settings.python)
        return f"vllm {version}: greedy, at most {settings.rows} at once{shared}{options}"

    # ---- what the engine generates -------------------------------------------------------------------------

    def _empty(self, requests: Sequence[Any]) -> EnginePrepared:
        return EnginePrepared(list(requests))

    def _plan_texts(self, prepared: Prepared, groups: Sequence[Prompts]) -> None:
        """Plans the engine's texts, and has our decoder plan the others."""
        assert isinstance(prepared, EnginePrepared)
        others = []
        for group in groups:
            tasks = [prepared.requests[number].task_name for number in group.numbers]
            takes = [self._why_not(task, group) is None for task in tasks]
            if any(takes):
                prepared.engine_texts.append(self._engine_texts(group, takes))
                for task, ids, is_taken in zip(tasks, group.ids, takes, strict=True):
                    if is_taken:
                        self._note_prompt(task, tuple(ids))
            if not all(takes):
                rest = [i for i, is_taken in enumerate(takes) if not is_taken]
                numbers = tuple(group.numbers[i] for i in rest)
                others.append(replace(group, numbers=numbers, ids=[group.ids[i] for i in rest]))
        if others:
            super()._plan_texts(prepared, others)

    def _why_not(self, task: str, group: Prompts) -> str | None:
        """Why our own decoder generates the texts of a task; None where the engine does."""
        if task not in self._reasons:
            self._reasons[task] = self._reason(task, group)
            if self._reasons[task] is not None:
                log.info("texts of '%s': our own decoder, %s", task, self._reasons[task])
        return self._reasons[task]

    def _reason(self, task: str, group: Prompts) -> str | None:
        if is_routed(self.model):
            return "layers of routes change"
        if build_processors(self.model, group.ids[:1], [group.max_new], group.settings) is not None:
            return "its logits are processed before a token is taken"
        return self._why_not_chosen(task, group) if self.chooses else None

    def _why_not_chosen(self, task: str, group: Prompts) -> str | None:
        """Why vLLM is not expected to be faster at the texts of a task, or is not there."""
        volume = TextVolume(self._prompt_counts.get(task, len(group.ids)), group.max_new)
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        reason = why_not_faster(volume, parameters, device_of(self.model).type)
        if reason is None:
            try:
                vllm_version(self._settings.python)
            except EngineSetupError:
                reason = "vLLM is not installed"
        return reason

    def _engine_texts(self, group: Prompts, takes: Sequence[bool]) -> _EngineTexts:
        distinct: dict[tuple[int, ...], int] = {}
        places = [
            distinct.setdefault(tuple(ids), len(distinct))
            for ids, is_taken in zip(group.ids, takes, strict=True)
            if is_taken
        ]
        if group.until not in self._stop_rules:
            self._stop_rules[group.until] = Stops(self.tokenizer, group.until)
        return _EngineTexts(
            tuple(distinct),
            group.max_new,
            self._stop_rules[group.until],
            group.until,
            tuple(number for number, is_taken in zip(group.numbers, takes, strict=True) if is_taken),
            tuple(places),
        )

    def _note_prompt(self, task: str, ids: tuple[int, ...]) -> None:
        """Keeps the shortest prompts of a task: what the engine is checked by."""
        known = self._shortest.setdefault(task, [])
        if ids not in known:
            self._shortest[task] = sorted((*known, ids), key=len)[:_CHECKED_PROMPTS]

    # ---- answering -----------------------------------------------------------------------------------------

    def ready(self, prepared: Prepared) -> None:
        """See `EngineBackend.ready`."""
        assert isinstance(prepared, EnginePrepared)
        if prepared.engine_texts:
            self._verified_live()

    def answer(self, prepared: Prepared, rounding: Rounding) -> Answers:
        """See `Backend.answer`."""
        assert isinstance(prepared, EnginePrepared)
        answers = super().answer(prepared, rounding)
        for group in prepared.engine_texts:
            texts = self._verified_live().texts(
                group.ids, [group.max_new] * len(group.ids), self._eos_ids(), group.stops.hit
            )
            for number, place in zip(group.numbers, group.places, strict=True):
                text = self._text(tuple(texts[place].tokens), group.until)
                answers[number] = [text] * (prepared.requests[number].repeats or 1)
        return answers

    def _verified_live(self) -> LiveEngine:
        """The engine, open and checked, for texts as long as those that were prepared."""
        if self._live is None or self._live.max_length < self._text_span:
            if self._live is not None:
                self._live.close()
            self._live = LiveEngine(self.model, self._settings, self._text_span)
        prompts = [ids for shortest in self._shortest.values() for ids in shortest]
        self._live.verify(self._opened_engine().head, prompts, _CHECKED_TOKENS)
        return self._live


class AutoBackend(VllmBackend):
    """Has vLLM generate what it is expected to be faster at, and our own decoder everything else.

    It does without vLLM where there is none.
    """

    chooses: ClassVar[bool] = True
