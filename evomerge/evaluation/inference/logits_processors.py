"""What transformers' `generate` does beside taking the likeliest token.

It is asked of `generate` itself instead of read off a list.

A model's generation_config may penalise repetitions, suppress tokens or forbid an early end, also when
decoding is greedy. `generate` is called with a decoding method of ours (`custom_generate`) that only records
what it is given.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evomerge.evaluation.inference.selected_logits import device_of

_INERT = {  # of no effect on greedy decoding, whatever their value
    "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "early_stopping", "length_penalty", "use_cache", "pad_token_id", "tokenizer", "return_dict_in_generate",
    "output_scores", "output_logits",
}  # fmt: skip
_STATELESS = {  # processors whose answer depends on the row's ids and scores alone
    "RepetitionPenaltyLogitsProcessor", "NoRepeatNGramLogitsProcessor",
    "EncoderRepetitionPenaltyLogitsProcessor", "EncoderNoRepeatNGramLogitsProcessor",
    "SequenceBiasLogitsProcessor", "NoBadWordsLogitsProcessor",
    "MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor", "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor", "InfNanRemoveLogitsProcessor", "ExponentialDecayLengthPenalty",
    "SuppressTokensLogitsProcessor", "SuppressTokensAtBeginLogitsProcessor", "LogitNormalization",
}  # fmt: skip
_MUST_BE_ONE = {"num_beams", "num_return_sequences"}
_CRITERIA = {"MaxLengthCriteria", "EosTokenCriteria"}


@dataclass(frozen=True, slots=True)
class _Preparation:
    """What `generate` prepared for one prompt."""

    mode: str
    config: Any
    processors: Any
    criteria: tuple[str, ...]


def unsupported_reason(settings: Mapping[str, Any], model: nn.Module) -> str | None:
    """Checks whether requests can be decoded here.

    Args:
        settings: Generation settings that lm-eval would pass on to `generate`, without stop strings and the
            number of new tokens.
        model: The live model.

    Returns:
        Why they cannot be decoded here (sampling, beams, ...); None if they can.
    """
    if settings.get("do_sample") is None and settings.get("temperature"):
        return f"temperature {settings['temperature']} asks for sampling"
    if settings.get("do_sample"):
        return "do_sample asks for sampling"
    for name in sorted(_MUST_BE_ONE):
        if (settings.get(name) or 1) != 1:
            return f"{name} is {settings[name]}, and only the likeliest token is followed"
    from transformers import GenerationMixin

    if not isinstance(model, GenerationMixin) or type(model).generate is not GenerationMixin.generate:
        return f"{type(model).__name__} generates in a way of its own"
    return _unsupported_by_config(model, effective_settings(settings))


def effective_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Selects the settings that may change which token is likeliest, such as a penalty.

    Args:
        settings: Generation settings.

    Returns:
        Those that are set and have an effect on greedy decoding.
    """
    without_effect = _INERT | _MUST_BE_ONE
    return {name: v for name, v in settings.items() if v is not None and name not in without_effect}


def build_processors(
    model: nn.Module, prompts: Sequence[Sequence[int]], limits: Sequence[int], settings: Mapping[str, Any]
) -> list[Any] | None:
    """Collects the logits processors that `generate` builds at batch size 1.

    Args:
        model: The live model.
        prompts: Token ids.
        limits: Most new tokens of each prompt.
        settings: Settings that `unsupported_reason` accepts.

    Returns:
        Of each prompt its processors; None if there are none at all.
    """
    effective = effective_settings(settings)
    from transformers import GenerationMixin

    if not isinstance(model, GenerationMixin) or not prompts:
        return None
    if not len(_preparation(model, prompts[0], limits[0], effective).processors):
        return None
    return [
        _preparation(model, prompt, limit, effective).processors
        for prompt, limit in zip(prompts, limits, strict=True)
    ]


def process(processors: Any, prompt: Sequence[int], tokens: Sequence[int], logits: Tensor) -> Tensor:
    """Applies logits processors to one row, in float32 as `generate` does.

    Args:
        processors: Those of the prompt, from `build_processors`.
        prompt: Token ids of the prompt.
        tokens: Token ids generated so far.
        logits: [V] logits after them.

    Returns:
        [V] scores.
    """
    ids = torch.tensor([[*prompt, *tokens]], device=logits.device)
    scores: Tensor = processors(ids, logits[None].to(torch.float32, copy=True))
    return scores[0]


def _unsupported_by_config(model: nn.Module, settings: Mapping[str, Any]) -> str | None:
    """What in the settings or in the model's own generation_config cannot be honoured; None if all can."""
    source = "the model's generation_config"
    if settings:
        source = f"{', '.join(sorted(settings))} in the generation settings"
    try:
        preparation = _preparation(model, [1, 1], 3, settings)
    except Exception as error:  # generate refuses it by itself: so it does behind lm-eval
        return f"generate does not take {source}: {' '.join(str(error).split())[:120]}"
    if preparation.mode != "greedy_search":
        return f"{source} asks for {preparation.mode}"
    if preparation.config.max_new_tokens is not None:
        return f"{source} sets max_new_tokens, which goes before lm-eval's"
    foreign = [type(p).__name__ for p in preparation.processors if type(p).__name__ not in _STATELESS]
    foreign += [name for name in preparation.criteria if name not in _CRITERIA]
    if foreign:
        return f"{source} asks for {', '.join(foreign)}"
    return f"{source} asks for token healing" if preparation.config.token_healing else None


def _preparation(model: Any, prompt: Sequence[int], limit: int, settings: Mapping[str, Any]) -> _Preparation:
    """What `generate` passes to its decoding method for one prompt and `limit` new tokens."""
    recorded: list[_Preparation] = []

    def record(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **rest: Any,
    ) -> Tensor:
        names = tuple(type(c).__name__ for c in stopping_criteria)
        mode = str(generation_config.get_generation_mode().value)
        recorded.append(_Preparation(mode, generation_config, logits_processor, names))
        return input_ids

    ids = torch.tensor([list(prompt)], device=device_of(model))
    logger = logging.getLogger("transformers.generation.utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_length=len(prompt) + limit,
                do_sample=False,
                use_cache=True,
                custom_generate=record,
                **settings,
            )
    finally:
        logger.setLevel(level)
    return recorded[0]
