"""Verifies which decoders a model can be trusted with.

Decodes random prompts and scores every token again by plain rows.

Regret is the largest logit at a token's place, less the logit of the token taken, under plain teacher
forcing. Where the decoder is right it is rounding (up to 0.06 was seen in bfloat16), where it is wrong 0.7
and more. In float32 the logits behind each token are compared closely: a small leak may move no token of a
random prompt, and some of a real one.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from evomerge.evaluation.inference.forward import vocabulary
from evomerge.evaluation.inference.generation import DECODERS, GenerationLimits, Generator, TextRules
from evomerge.evaluation.inference.requests import Verification
from evomerge.evaluation.inference.selected_logits import RowHead, device_of, dtype_of

_MAX_REGRET = 0.06  # logits
_EPSILONS = 2.0  # rounding steps of the largest logit that a right decoder may differ by, in half precision
# Half precision: logits differ by less, absolutely or relative to the largest; wrong decoders by 1 and more.
_HALF_ABSOLUTE, _HALF_RELATIVE = 0.15, 0.05
# float32: logits differ by less, or by less than so many times the difference of one row alone.
_FLOAT32_TOLERANCE, _NOISE_FACTOR = 1e-3, 8.0
_NEW = (3, 7, 5, 2, 6)  # new tokens of each prompt: rows end one after another
_ROWS = 3  # fewer than short prompts: rows are filled again
_SHORT_ONLY = ("single", "whole")  # a row at a time: nothing but the model's own cache, or none, can be wrong


@dataclass(frozen=True, slots=True)
class _Measurement:
    """regret: largest of all tokens; difference: largest of two logits; largest: the largest logit's size."""

    regret: float
    difference: float
    largest: float


def choose_decoder(verifications: Mapping[str, Verification]) -> str:
    """Chooses the fastest decoder that is allowed.

    Args:
        verifications: Result of `probe_decoders`.

    Returns:
        Its name; 'whole' if none is allowed, which computes every token from the whole text by plain rows.
    """
    for name in DECODERS:
        if name in verifications and verifications[name].allowed:
            return name
    return "whole"


@torch.inference_mode()
def probe_decoders(
    model: nn.Module, head: RowHead, *, span: int, pad_id: int = 0, seed: int = 0, every: bool = False
) -> dict[str, Verification]:
    """Verifies decoders on a model, the fastest first, until one is right.

    All are tried on short prompts. At the length that will come, where a forward is dear, the fastest decode
    two prompts that share their beginning; rows without a shared one take the same steps.

    Args:
        model: The live model.
        head: Its `RowHead`.
        span: Tokens of the longest prompt and its answer that will come, so that a window or chunk shorter
            than that has an effect.
        pad_id: Token id that rows are padded with.
        seed: Of the random prompts.
        every: Whether those slower than the first right one are tried too.

    Returns:
        Decoder -> verification, 'device' on an accelerator alone, and 'prefix' -> whether the allowed ones
        may share prefixes.
    """
    trial = _Trial(model, head, pad_id, *_prompts(model, random.Random(seed), span))
    decoders = [name for name in DECODERS if name != "device" or device_of(model).type != "cpu"]
    single = trial.measure("single", trial.short)
    noise = single.difference if isinstance(single, _Measurement) else 0.0
    if isinstance(single, _Measurement) and noise > _difference_limit(trial.dtype, single.largest):
        return _only_single(decoders, noise)
    trial.tolerance = max(_FLOAT32_TOLERANCE, _NOISE_FACTOR * noise)
    verifications: dict[str, Verification] = {}
    sharing: dict[str, Verification] = {}
    for name in decoders:
        right = next((known for known, verification in verifications.items() if verification.allowed), None)
        if right is not None and not every:
            verifications[name] = Verification(False, f"not needed: '{right}' is faster")
            continue
        measured = single if name == "single" else trial.measure(name, trial.short)
        verifications[name] = trial.judged(measured)
        if verifications[name].allowed and name not in _SHORT_ONLY:
            verifications[name], sharing[name] = trial.long_verdicts(name)
    return {**verifications, "prefix": _of_all(sharing)}


def _of_all(sharing: Mapping[str, Verification]) -> Verification:
    """Whether prefixes may be shared, from what was found of each decoder that is right without."""
    if not sharing:
        return Verification(False, "no decoder with a cache was tried at length")
    wrong = [
        f"{name}: {verification.reason}" for name, verification in sharing.items() if not verification.allowed
    ]
    return Verification(not wrong, "; ".join(wrong) or next(iter(sharing.values())).reason)


def _only_single(decoders: Sequence[str], noise: float) -> dict[str, Verification]:
    """For a model whose single rows differ from a plain forward.

    `generate` is what lm-eval reports, one row at a time.
    """
    refused = Verification(
        False,
        f"one row with its own cache differs from a plain forward by {noise:.1e}, "
        "and no other decoder can be told right",
    )
    single = Verification(True, f"as `generate` does; {refused.reason}")
    return {**dict.fromkeys(decoders, refused), "single": single, "prefix": refused}


@torch.inference_mode()
def regrets(
    head: RowHead, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
) -> tuple[float, list[Tensor]]:
    """Scores generated tokens by plain teacher forcing, in float32.

    Args:
        head: The model's `RowHead`.
        prompts: Token ids of prompts.
        texts: Token ids generated after each, at least one.

    Returns:
        (largest regret of all tokens, logits [len(text), V] of each text).
    """
    device = device_of(head.model)
    worst, plain = 0.0, []
    for prompt, text in zip(prompts, texts, strict=True):
        ids = torch.tensor([[*prompt, *text[:-1]]], device=device)
        rows = torch.arange(len(prompt) - 1, ids.shape[1], device=device)
        logits = head(rows, ids, use_cache=False).float()
        taken = logits.gather(1, torch.tensor(list(text), device=device)[:, None])[:, 0]
        worst = max(worst, float((logits.max(-1).values - taken).max()))
        plain.append(logits)
    return worst, plain


class _Trial:
    """A model and what its decoders are tried on.

    short, long: prompts; tolerance: by which logits of a right decoder differ in float32.
    """

    def __init__(
        self,
        model: nn.Module,
        head: RowHead,
        pad_id: int,
        short: Sequence[tuple[int, ...]],
        long: Sequence[tuple[int, ...]],
    ) -> None:
        self.model, self.head, self.pad_id = model, head, pad_id
        self.short, self.long = short, long
        self.dtype = dtype_of(model)
        self.tolerance = _FLOAT32_TOLERANCE
        self._plain: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[float, Tensor]] = {}

    def long_verdicts(self, decoder: str) -> tuple[Verification, Verification]:
        """(whether a decoder is right at length, whether it may share prefixes there)."""
        shared = self.judged(self.measure(decoder, self.long, shares=True))
        if shared.allowed:
            return shared, shared
        return self.judged(self.measure(decoder, self.long)), shared

    def measure(
        self, decoder: str, prompts: Sequence[tuple[int, ...]], *, shares: bool = False
    ) -> _Measurement | str:
        """Measures a decoder on prompts; or says why it cannot run."""
        rules = TextRules(tokenizer=None, max_length=1 << 30, pad_id=self.pad_id)
        limits = GenerationLimits(rows=_ROWS, forward_cost=0)
        try:
            generator = Generator(self.model, self.head, rules, decoder=decoder, shares=shares, limits=limits)
            plan = generator.compile(prompts, (), _NEW[: len(prompts)], None)
            if shares and not plan.prefixes:
                return "no cache to share a prefix with"
            texts = generator.texts(plan, trace=True)
        except Exception as error:  # a model may raise anything at inputs it was not made for
            return f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
        assert texts.trace is not None
        plain = [self._scored(*pair) for pair in zip(plan.prompts, texts.tokens, strict=True)]
        pairs = [
            (torch.stack(rows).to(want.device), want)
            for rows, (_, want) in zip(texts.trace, plain, strict=True)
        ]
        return _Measurement(
            regret=max(regret for regret, _ in plain),
            difference=max(float((rows - want).abs().max()) for rows, want in pairs),
            largest=max(float(want.abs().max()) for _, want in pairs),
        )

    def _scored(self, prompt: tuple[int, ...], text: Sequence[int]) -> tuple[float, Tensor]:
        """(regret, logits) of a text, computed once: decoders that are right write the same."""
        key = (prompt, tuple(text))
        if key not in self._plain:
            regret, (logits,) = regrets(self.head, [prompt], [text])
            self._plain[key] = regret, logits
        return self._plain[key]

    def judged(self, measured: _Measurement | str) -> Verification:
        """See `_judged`."""
        return _judged(measured, self.dtype, self.tolerance)


def _judged(measured: _Measurement | str, dtype: torch.dtype, tolerance: float) -> Verification:
    """Whether a decoder is right. NaN compares as wrong."""
    if isinstance(measured, str):
        return Verification(False, measured)
    reason = f"regret {measured.regret:.1e}, logits differ by {measured.difference:.1e}"
    if dtype in (torch.float32, torch.float64):
        exact = measured.difference <= tolerance * max(1.0, measured.largest)
        return Verification(exact and measured.regret <= _MAX_REGRET, reason)
    rounding = _EPSILONS * torch.finfo(dtype).eps * measured.largest
    near = measured.difference <= _difference_limit(dtype, measured.largest)
    return Verification(measured.regret <= max(_MAX_REGRET, rounding) and near, reason)


def _difference_limit(dtype: torch.dtype, largest: float) -> float:
    """By how much logits, the largest of them so large, differ where more than rounding is at work."""
    if dtype in (torch.float32, torch.float64):
        return 1e-2 * max(1.0, largest)
    return max(_HALF_ABSOLUTE, _HALF_RELATIVE * largest)


def _prompts(
    model: nn.Module, rnd: random.Random, span: int
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """(five short prompts, two that begin alike, one of them as long as span, and a short one)."""
    size = vocabulary(model)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rnd.randrange(size) for _ in range(count))

    shared = tokens(max(16, span - max(_NEW) - 16))
    short = [tokens(9), tokens(17), tokens(2), tokens(11), tokens(5)]
    return short, [shared + tokens(4), tokens(7), shared + tokens(16)]
