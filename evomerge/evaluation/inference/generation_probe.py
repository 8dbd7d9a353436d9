"""Which decoders a model can be trusted with: random prompts are decoded, and every token is scored again by plain rows.

Regret is the largest logit at a token's place, less the logit of the token taken, under plain teacher forcing. Where the
decoder is right it is rounding (up to 0.06 was seen in bfloat16), where it is wrong 0.7 and more. In float32 the logits
behind each token are compared closely: a small leak may move no token of a random prompt, and some of a real one.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from evomerge.evaluation.inference.forward import vocabulary
from evomerge.evaluation.inference.generation import DECODERS, Generator
from evomerge.evaluation.inference.requests import Verification
from evomerge.evaluation.inference.selected_logits import RowHead, device_of, dtype_of

_REGRET = 0.06  # logits
_STEPS = 2.0  # rounding steps of the largest logit that a right decoder may differ by, in half precision
_NEAR, _STEEP = (
    0.15,
    0.05,
)  # half precision: logits differ by less, absolutely or beside the largest; wrong decoders by 1 and more
_SAME, _FACTOR = (
    1e-3,
    8.0,
)  # float32: logits differ by less, or by less than so many times the difference of one row alone
_NEW = (3, 8, 5, 2, 7, 6, 4)  # new tokens of each prompt: rows end one after another
_SLOTS = 3  # fewer than prompts: rows are filled again


def choose_decoder(verdicts: Mapping[str, Verification]) -> str:
    """The allowed decoder that is fastest; 'whole' if none is, which computes every token from the whole text by plain rows."""
    return next((name for name in DECODERS if name in verdicts and verdicts[name].allowed), "whole")


@torch.inference_mode()
def probe_decoders(
    model: nn.Module, head: RowHead, *, span: int, pad_id: int = 0, seed: int = 0
) -> dict[str, Verification]:
    """Verdicts of every decoder, and of 'prefix': whether the allowed ones may share prefixes.

    span: tokens of the longest prompt and its answer that will come, so that a window or chunk which they exceed shows.
    """
    prompts = _prompts(model, random.Random(seed), span)
    alone = _found(model, head, prompts, pad_id, "single")
    noise = alone[1] if isinstance(alone, tuple) else 0.0
    if isinstance(alone, tuple) and noise > _apart(
        dtype_of(model), alone[2]
    ):  # `generate` is then what lm-eval reports, one row at a time
        refused = Verification(
            False,
            f"one row with its own cache differs from a plain forward by {noise:.1e}, and no other decoder can be told right",
        )
        single = Verification(True, f"as `generate` does; {refused.reason}")
        return {**dict.fromkeys(DECODERS, refused), "single": single, "prefix": refused}
    tolerance = max(_SAME, _FACTOR * noise)
    verdicts = {
        name: _verdict(_found(model, head, prompts, pad_id, name), dtype_of(model), tolerance)
        for name in DECODERS
    }
    allowed = [name for name in DECODERS if verdicts[name].allowed and name != "whole"]
    sharing = {
        name: _verdict(_found(model, head, prompts, pad_id, name, shares=True), dtype_of(model), tolerance)
        for name in allowed
    }
    wrong = [f"{name}: {verdict.reason}" for name, verdict in sharing.items() if not verdict.allowed]
    said = (
        "; ".join(wrong)
        if wrong
        else next((v.reason for v in sharing.values()), "no decoder with a cache is allowed")
    )
    return {**verdicts, "prefix": Verification(bool(allowed) and not wrong, said)}


@torch.inference_mode()
def regrets(
    head: RowHead, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
) -> tuple[float, list[Tensor]]:
    """(largest regret of all tokens, logits [len(text), V] of each text) under plain teacher forcing, in float32."""
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


def _found(
    model: nn.Module,
    head: RowHead,
    prompts: Sequence[tuple[int, ...]],
    pad_id: int,
    decoder: str,
    *,
    shares: bool = False,
) -> tuple[float, float, float] | str:
    """(regret, largest difference of logits, largest logit) of a decoder on prompts; or why it cannot run."""
    try:
        generator = Generator(
            model,
            head,
            tokenizer=None,
            max_length=1 << 30,
            pad_id=pad_id,
            eos_ids=frozenset(),
            decoder=decoder,
            shares=shares,
            rows=_SLOTS,
            launch=0,
        )
        plan = generator.compile(prompts, (), _NEW, None)
        if shares and not plan.prefixes:
            return "no cache to share a prefix with"
        texts = generator.texts(plan, trace=True)
    except Exception as error:  # a model may raise anything at inputs it was not made for
        return f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
    worst, plain = regrets(head, plan.prompts, texts.tokens)
    assert texts.trace is not None
    pairs = [(torch.stack(own).to(want.device), want) for own, want in zip(texts.trace, plain, strict=True)]
    return (
        worst,
        max(float((own - want).abs().max()) for own, want in pairs),
        max(float(want.abs().max()) for _, want in pairs),
    )


def _verdict(found: tuple[float, float, float] | str, dtype: torch.dtype, tolerance: float) -> Verification:
    if isinstance(found, str):
        return Verification(False, found)
    regret, difference, largest = found
    said = f"regret {regret:.1e}, logits differ by {difference:.1e}"
    if dtype in (torch.float32, torch.float64):
        return Verification(
            difference <= tolerance * max(1.0, largest) and regret <= _REGRET, said
        )  # NaN compares as wrong
    return Verification(
        regret <= max(_REGRET, _STEPS * torch.finfo(dtype).eps * largest)
        and difference <= _apart(dtype, largest),
        said,
    )


def _apart(dtype: torch.dtype, largest: float) -> float:
    """By how much logits, the largest of them so large, differ where more than rounding is at work."""
    return (
        1e-2 * max(1.0, largest) if dtype in (torch.float32, torch.float64) else max(_NEAR, _STEEP * largest)
    )


def _prompts(model: nn.Module, rnd: random.Random, span: int) -> list[tuple[int, ...]]:
    """Seven prompts: three that begin alike, one of them as long as span, and four short ones of different lengths."""
    size = vocabulary(model)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rnd.randrange(size) for _ in range(count))

    most = max(_NEW)
    shared = tokens(max(16, span - most - 16))
    return [
        shared + tokens(4),
        tokens(9),
        shared + tokens(16),
        tokens(17),
        tokens(2),
        shared + tokens(9),
        tokens(11),
    ]
