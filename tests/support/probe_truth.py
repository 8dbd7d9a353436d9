"""What is true of a technique or a decoder on a model: its numbers beside a slow reference that shares
nothing.

The reference scores one request a forward, without a cache, a mask or padding, and decodes by a whole forward
for each token. Requests and prompts are those of real tasks: few-shot blocks, choices of several tokens,
unrelated rows, rows as long as the model.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evomerge.evaluation.inference.generation import GenerationLimits, Generator, TextRules
from evomerge.evaluation.inference.generation_probe import choose_decoder, probe_decoders
from evomerge.evaluation.inference.loglikelihood import Engine
from evomerge.evaluation.inference.loglikelihood_probe import probe
from evomerge.evaluation.inference.requests import Request, Verification
from evomerge.evaluation.inference.selected_logits import RowHead
from tests.support.text_architectures import EOS, MAX_LENGTH, PAD, VOCABULARY, build, tokenizer

OPTIMIZATIONS = ("plain", "prefix", "fork", "tree")
DECODERS = ("slots", "padded", "equal", "single", "whole", "shared")
"""Of evomerge.evaluation.inference, and 'shared': the fastest allowed one with shared prefixes."""
BFLOAT16_REGRET = 0.25  # standard deviations of the logits
FLOAT32_ERROR = 1e-3  # nats a request; a wrong mask or state moves it by O(0.1) and more
NEW_TOKENS = 12
LIMITS = (
    NEW_TOKENS,
    3,
    7,
    NEW_TOKENS,
    1,
    9,
)  # new tokens of each prompt, over and over: rows end one after another


@dataclass(frozen=True, slots=True)
class Reference:
    """sums [n], greedy [n] of requests by the slow path; close [n]: whether a greedy flag hangs on less than
    1e-4; rounding: of its type.
    """

    sums: Tensor
    greedy: Tensor
    close: Tensor
    rounding: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """A verdict and the truth. name: of a technique or decoder; error: nats a request, or the regret of a
    decoder; said: both reasons.
    """

    name: str
    dtype: torch.dtype
    allowed: bool
    right: bool
    error: float
    said: str


@dataclass(frozen=True, slots=True)
class Truth:
    """right: whether a technique's numbers are the model's own; error: nats a request, largest (in bf16
    mean); said: why if not.
    """

    right: bool
    error: float
    said: str = ""


def requests(seed: int, longest: int = MAX_LENGTH) -> list[Request]:
    """What tasks ask for, in an order that mixes them."""
    rnd = random.Random(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(rnd.randrange(3, VOCABULARY) for _ in range(rnd.randint(low, high)))

    found = []
    few_shot = tokens(120, 120)
    for _ in range(4):  # 5-shot, choices of several tokens, one of them the beginning of another, two alike
        context = few_shot + tokens(15, 40)
        choices = [tokens(1, 7) for _ in range(3)]
        found += [
            Request(context, c) for c in (*choices, choices[0] + tokens(1, 3), choices[1][:1] + tokens(2, 2))
        ]
    for _ in range(3):  # 0-shot, choices of one token
        context = tokens(9, 60)
        found += [Request(context, tokens(1, 1)) for _ in range(4)]
    found += [Request(tokens(1, 90), tokens(1, 30)) for _ in range(4)]  # unrelated
    found += [
        Request(tokens(1, 1), tokens(longest - 1, longest - 1)),
        Request(tokens(1, 1), tokens(1, 1)),
    ]  # a whole window; next to nothing
    found += [Request(found[-1].context, tokens(3, 3)), found[0]]  # asked twice
    rnd.shuffle(found)
    return found


def likeliest(model: nn.Module, asked: Sequence[Request]) -> list[Request]:
    """The requests, and for some of their contexts the model's own greedy continuation, so that greedy flags
    are not all false.
    """
    contexts = list(
        dict.fromkeys(r.context for r in asked if len(r.context) < MAX_LENGTH // 2 or len(r.continuation) > 3)
    )[:6]
    return [
        *asked,
        *(Request(c, tuple(out[:4])) for c, out in zip(contexts, decoded(model, contexts, 4), strict=True)),
    ]


@torch.inference_mode()
def reference(model: nn.Module, asked: Sequence[Request]) -> Reference:
    """Each request by a forward of its own, its log-probabilities in float64 from the model's logits."""
    sums, greedy, close = _slow(model, asked)
    rounding = 0.0
    if next(model.parameters()).dtype != torch.float32:
        exact, _, _ = _slow(copy.deepcopy(model).float(), asked)
        rounding = float((sums - exact).abs().mean())
    return Reference(sums, greedy, close, rounding)


@torch.inference_mode()
def _slow(model: nn.Module, asked: Sequence[Request]) -> tuple[Tensor, Tensor, Tensor]:
    sums, greedy, close = [], [], []
    known: dict[Request, int] = {}
    for request in asked:
        if request in known:
            at = known[request]
            sums.append(sums[at])
            greedy.append(greedy[at])
            close.append(close[at])
            continue
        known[request] = len(sums)
        whole = request.context + request.continuation
        logits = (
            model(input_ids=torch.tensor([whole[:-1]]), use_cache=False)
            .logits[0]
            .double()[len(request.context) - 1 :]
        )
        target = torch.tensor(request.continuation)
        own = logits.gather(1, target[:, None])[:, 0]
        others = logits.scatter(1, target[:, None], float("-inf")).amax(1)
        sums.append(float((own - logits.logsumexp(1)).sum()))
        greedy.append(bool((own >= others).all()))
        close.append(float((own - others).min().abs()) < 1e-4)
    return torch.tensor(sums, dtype=torch.float64), torch.tensor(greedy), torch.tensor(close)


def truth(model: nn.Module, technique: str, asked: Sequence[Request], wanted: Reference) -> Truth:
    """Whether a technique scores requests as the reference does, with room for large batches and for small
    ones.
    """
    single = next(model.parameters()).dtype == torch.float32
    worst = 0.0
    for tokens, forward_cost in ((2048, None), (400, 4)):
        with Engine(model, pad_id=PAD, tokens=tokens, forward_cost=forward_cost) as engine:
            try:
                plan = engine.compile(asked, technique)  # type: ignore[arg-type]
                scores, again = engine.run(plan), engine.run(plan)
            except Exception as error:  # a model may raise anything
                return Truth(
                    False, float("nan"), f"{type(error).__name__}: {' '.join(str(error).split())[:70]}"
                )
        if not torch.equal(scores.sums, again.sums):
            return Truth(False, float("nan"), "the second run of a plan differs from the first")
        apart = (scores.sums - wanted.sums).abs()
        error = float(apart.max() if single else apart.mean())
        worst = max(worst, error) if error == error else error
        allowed = FLOAT32_ERROR if single else 3 * wanted.rounding + 1e-3
        if not error <= allowed:
            return Truth(False, error, f"{error:.1e} nats a request, allowed {allowed:.1e}")
        if single and not torch.equal(scores.greedy | wanted.close, wanted.greedy | wanted.close):
            return Truth(False, error, "another greedy flag")
    return Truth(True, worst)


def prompts(seed: int) -> list[tuple[int, ...]]:
    """Fifteen prompts of five lengths, the shortest of two tokens, some of the long ones after one shared
    block.
    """
    rnd = random.Random(seed)
    block = [rnd.randrange(3, VOCABULARY) for _ in range(40)]
    found = []
    for length in (2, 5, 19, 53, 90):
        for number in range(3):
            own = [rnd.randrange(3, VOCABULARY) for _ in range(length)]
            found.append(tuple((block + own)[:length] if length > 40 and number else own))
    rnd.shuffle(found)
    return found


@torch.inference_mode()
def decoded(model: nn.Module, given: Sequence[Sequence[int]], new: int = NEW_TOKENS) -> list[list[int]]:
    """Greedy continuations of at most `new` tokens, the EOS kept: rows of one length together, every token by
    a whole forward.
    """
    found: dict[int, list[int]] = {}
    for length in sorted({len(prompt) for prompt in given}):
        own = [i for i, prompt in enumerate(given) if len(prompt) == length]
        rows = torch.tensor([list(given[i]) for i in own])
        for _ in range(new):
            best = model(input_ids=rows, use_cache=False).logits[:, -1].argmax(-1)
            rows = torch.cat([rows, best[:, None]], 1)
        for i, row in zip(own, rows.tolist(), strict=True):
            out = row[length:]
            found[i] = out[: out.index(EOS) + 1] if EOS in out else out
    return [found[i] for i in range(len(given))]


@torch.inference_mode()
def regret(model: nn.Module, given: Sequence[Sequence[int]], outs: Sequence[Sequence[int]]) -> float:
    """By how much a chosen token's logit falls short of the largest, in units of the logits' standard
    deviation; the worst token.
    """
    worst = 0.0
    for prompt, out in zip(given, outs, strict=True):
        if not out:
            return float("inf")
        logits = (
            model(input_ids=torch.tensor([[*prompt, *out]]), use_cache=False)
            .logits[0, len(prompt) - 1 : -1]
            .float()
        )
        short = logits.amax(-1) - logits.gather(1, torch.tensor(out)[:, None])[:, 0]
        worst = max(worst, float((short / logits.std(-1)).max()))
    return worst


def decoder_truth(
    model: nn.Module,
    decoder: str,
    given: Sequence[tuple[int, ...]],
    wanted: Sequence[Sequence[int]],
    *,
    shares: bool = False,
) -> Truth:
    """Whether a decoder's tokens are those wanted; in bf16 whether each is the likeliest but for rounding.
    shares: prefixes too.
    """
    limits = [LIMITS[i % len(LIMITS)] for i in range(len(given))]
    try:
        with RowHead(model) as head:
            rules = TextRules(tokenizer(), MAX_LENGTH, PAD, frozenset({EOS}))
            batches = GenerationLimits(rows=7, forward_cost=4)
            generator = Generator(model, head, rules, decoder=decoder, shares=shares, limits=batches)
            plan = generator.compile(given, [], limits)
            if shares and not plan.prefixes:
                return Truth(False, float("nan"), "nothing is shared")
            outs, again = generator.run(plan), generator.run(plan)
    except Exception as error:  # a model may raise anything
        return Truth(False, float("nan"), f"{type(error).__name__}: {' '.join(str(error).split())[:70]}")
    if outs != again:
        return Truth(False, float("nan"), "the second run of a plan differs from the first")
    if any(
        len(out) > most or EOS in out[:-1] or (len(out) < most and out[-1:] != [EOS])
        for out, most in zip(outs, limits, strict=True)
    ):
        return Truth(False, float("nan"), "ends elsewhere than at the EOS or the limit")
    short = regret(model, given, outs)
    different = sum(out != list(text)[:most] for out, text, most in zip(outs, wanted, limits, strict=True))
    single = next(model.parameters()).dtype == torch.float32
    right = different == 0 or short < 1e-4 if single else short <= BFLOAT16_REGRET
    if not (
        single or right
    ):  # where rounding moves a token to other experts, transformers' own generation falls as short
        right = short <= max(
            regret(model, given, outs) for outs in (generated(model, given), generated_together(model, given))
        )
    return Truth(right, short, f"{different} of {len(given)} texts differ, regret {short:.2g}")


@torch.inference_mode()
def generated(model: Any, given: Sequence[Sequence[int]]) -> list[list[int]]:
    """What transformers' own greedy generation gives, a prompt at a time: what HFLM says, right or not."""
    return [
        model.generate(
            input_ids=torch.tensor([list(prompt)]),
            max_length=len(prompt) + NEW_TOKENS,
            do_sample=False,
            use_cache=True,
            pad_token_id=PAD,
        )[0, len(prompt) :].tolist()
        for prompt in given
    ]


@torch.inference_mode()
def generated_together(model: Any, given: Sequence[Sequence[int]]) -> list[list[int]]:
    """The same in one batch padded on the left: what HFLM says at a larger batch size."""
    width = max(map(len, given))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + list(prompt) for prompt in given])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in given])
    outs = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_length=width + NEW_TOKENS,
        do_sample=False,
        use_cache=True,
        pad_token_id=PAD,
    )[:, width:].tolist()
    return [out[: out.index(EOS) + 1] if EOS in out else out for out in outs]


def outcomes(name: str, dtypes: Sequence[torch.dtype] = (torch.float32,), seed: int = 1) -> list[Outcome]:
    """Verdict and truth of every technique and decoder of an architecture; what is wrong in float32, which
    comes first, is wrong in every type.
    """
    found: list[Outcome] = []
    wrong: set[str] = set()

    def note(key: str, dtype: torch.dtype, verdict: Verification, true: Truth) -> None:
        if not true.right:
            wrong.add(key)
        found.append(
            Outcome(
                key,
                dtype,
                verdict.allowed,
                key not in wrong,
                true.error,
                f"probe: {verdict.reason}; truth: {true.said or true.error}",
            )
        )

    for dtype in dtypes:
        model = build(name, dtype)
        asked = likeliest(model, requests(seed))
        longest = max(len(r.inputs) for r in asked)
        verdicts = probe(model, span=longest, max_length=MAX_LENGTH, pad_id=PAD)
        wanted = reference(model, asked)
        for technique in OPTIMIZATIONS:
            note(technique, dtype, verdicts[technique], truth(model, technique, asked, wanted))
        given = prompts(seed)
        with RowHead(model) as head:
            verdicts = probe_decoders(
                model, head, span=max(map(len, given)) + NEW_TOKENS, pad_id=PAD, every=True
            )
        texts = decoded(model, given)
        for decoder in DECODERS[:-1]:
            some = slice(6 if decoder in ("single", "whole") else None)  # a row at a time is slow
            note(decoder, dtype, verdicts[decoder], decoder_truth(model, decoder, given[some], texts[some]))
        chosen = choose_decoder(verdicts)
        if chosen in ("slots", "padded", "equal"):
            note("shared", dtype, verdicts["prefix"], decoder_truth(model, chosen, given, texts, shares=True))
    return found
