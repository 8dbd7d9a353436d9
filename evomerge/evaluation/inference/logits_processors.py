"""What transformers' `generate` would do beside taking the likeliest token: asked of `generate` itself, not read off a list.

A model's generation_config may penalise repetitions, suppress tokens or forbid an early end, also when decoding is greedy.
`generate` is called with a decoding method of ours that only writes down what it is given.
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
    "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "early_stopping", "length_penalty",
    "use_cache", "pad_token_id", "tokenizer", "return_dict_in_generate", "output_scores", "output_logits",
}  # fmt: skip
_STATELESS = {  # whose answer depends on the row's ids and scores alone
    "RepetitionPenaltyLogitsProcessor", "NoRepeatNGramLogitsProcessor", "EncoderRepetitionPenaltyLogitsProcessor",
    "EncoderNoRepeatNGramLogitsProcessor", "SequenceBiasLogitsProcessor", "NoBadWordsLogitsProcessor", "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor", "ForcedBOSTokenLogitsProcessor", "ForcedEOSTokenLogitsProcessor", "InfNanRemoveLogitsProcessor",
    "ExponentialDecayLengthPenalty", "SuppressTokensLogitsProcessor", "SuppressTokensAtBeginLogitsProcessor", "LogitNormalization",
}  # fmt: skip
_ONE = {"num_beams", "num_return_sequences"}  # 1, or refused
_CRITERIA = {"MaxLengthCriteria", "EosTokenCriteria"}


@dataclass(frozen=True, slots=True)
class _Greedy:
    """What `generate` prepared for one prompt."""

    mode: str
    config: Any
    processors: Any
    criteria: tuple[str, ...]


def refusal(settings: Mapping[str, Any], model: nn.Module) -> str | None:
    """Why requests with these generation settings cannot be decoded here; None if they can.

    settings: what lm-eval would pass on to `generate`, without stop strings and the number of new tokens.
    """
    if settings.get("do_sample") is None and settings.get("temperature"):
        return f"temperature {settings['temperature']} asks for sampling"
    if settings.get("do_sample"):
        return "do_sample asks for sampling"
    for name in sorted(_ONE):
        if (settings.get(name) or 1) != 1:
            return f"{name} is {settings[name]}, and only the likeliest token is followed"
    from transformers import GenerationMixin

    if not isinstance(model, GenerationMixin) or type(model).generate is not GenerationMixin.generate:
        return f"{type(model).__name__} generates in a way of its own"
    return _refused(model, effective(settings))


def effective(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that may change what is likeliest, such as a penalty."""
    return {
        name: value for name, value in settings.items() if value is not None and name not in _INERT | _ONE
    }


def processors(
    model: nn.Module, prompts: Sequence[Sequence[int]], limits: Sequence[int], settings: Mapping[str, Any]
) -> list[Any] | None:
    """Of each prompt, the logits processors that `generate` builds for it at batch size 1; None if there are none at all.

    limits: most new tokens of each prompt; settings: as for `refusal`, which has nothing against them.
    """
    asked = effective(settings)
    from transformers import GenerationMixin

    if (
        not isinstance(model, GenerationMixin)
        or not prompts
        or not len(_prepared(model, prompts[0], limits[0], asked).processors)
    ):
        return None
    return [
        _prepared(model, prompt, limit, asked).processors
        for prompt, limit in zip(prompts, limits, strict=True)
    ]


def process(rules: Any, prompt: Sequence[int], tokens: Sequence[int], logits: Tensor) -> Tensor:
    """Scores [V], in float32 as in `generate`, of one row with logits [V] after its prompt and generated tokens."""
    ids = torch.tensor([[*prompt, *tokens]], device=logits.device)
    scores: Tensor = rules(ids, logits[None].to(torch.float32, copy=True))
    return scores[0]


def _refused(model: nn.Module, settings: Mapping[str, Any]) -> str | None:
    """What in the settings or in the model's own generation_config cannot be honoured; None if all can."""
    whose = (
        f"{', '.join(sorted(settings))} in the generation settings"
        if settings
        else "the model's generation_config"
    )
    try:
        found = _prepared(model, [1, 1], 3, settings)
    except Exception as error:  # generate refuses it by itself: so it does behind lm-eval
        return f"generate does not take {whose}: {' '.join(str(error).split())[:120]}"
    if found.mode != "greedy_search":
        return f"{whose} asks for {found.mode}"
    if found.config.max_new_tokens is not None:
        return f"{whose} sets max_new_tokens, which goes before lm-eval's"
    foreign = [type(p).__name__ for p in found.processors if type(p).__name__ not in _STATELESS]
    foreign += [name for name in found.criteria if name not in _CRITERIA]
    if foreign:
        return f"{whose} asks for {', '.join(foreign)}"
    return f"{whose} asks for token healing" if found.config.token_healing else None


def _prepared(model: Any, prompt: Sequence[int], limit: int, settings: Mapping[str, Any]) -> _Greedy:
    """What `generate` hands its decoding method for one prompt and `limit` new tokens."""
    found: list[_Greedy] = []

    def write_down(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **rest: Any,
    ) -> Tensor:
        names = tuple(type(c).__name__ for c in stopping_criteria)
        mode = str(generation_config.get_generation_mode().value)
        found.append(_Greedy(mode, generation_config, logits_processor, names))
        return input_ids

    ids = torch.tensor([list(prompt)], device=device_of(model))
    quiet = logging.getLogger("transformers.generation.utils")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_length=len(prompt) + limit,
                do_sample=False,
                use_cache=True,
                custom_generate=write_down,
                **settings,
            )
    finally:
        quiet.setLevel(level)
    return found[0]
