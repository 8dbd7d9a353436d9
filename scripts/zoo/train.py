"""Training one model of the zoo, by one process or by a team of equals, and scoring it.

Knows nothing of files. Every member of a team draws the same batches, takes its share of the rows, and adds
the gradients of all in the same order, so that all hold the same weights to the last bit. A member has one
thread: matrices this small gain nothing from two (108 ms a step against 96).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from itertools import islice
from multiprocessing.synchronize import Barrier
from random import Random
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from scripts.zoo import llama, skills
from scripts.zoo.llama import Weights
from scripts.zoo.plan import ALIGNED_LAYER, ARCHITECTURE, BASE, Rates, Training

PAD, END = 0, 2  # token ids, fixed by the order of the tokenizer's special tokens
T = TypeVar("T")
_WINDOW = 16  # batches among which rows are exchanged so that a batch holds rows of like length
_WARMUP, _FLOOR = 40, 0.03  # steps; smallest share of the learning rate


# ------------------------------------------------------------------------------------------------ data


class Row(NamedTuple):
    prompt: list[int]
    answer: list[int]  # ends with END
    replay: bool = False  # train on the base's distribution instead of the answer


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows padded on the right, replayed rows first; the tokens at `positions` (see `llama.place`) predict
    `targets`.
    """

    tokens: Tensor  # [rows, length]
    positions: Tensor  # [n]
    targets: Tensor  # [n]
    row_of: Tensor  # [n]
    replayed_rows: int
    replayed: int  # how many of the n belong to replayed rows


class Encoder:
    """Text to token ids, a word with the space before it at a time: no token of the byte-level tokenizer
    crosses one.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.vocabulary = tokenizer.get_vocab_size()
        self._word: Callable[[str], list[int]] = cache(lambda word: tokenizer.encode(word).ids)

    def __call__(self, text: str) -> list[int]:
        return [token for word in text.replace(" ", "\n ").split("\n") for token in self._word(word)]

    def row(self, item: skills.Item, replay: bool = False) -> Row:
        return Row(self(item[0]), [*self(item[1]), END], replay)


def collate(rows: Sequence[Row]) -> Batch:
    rows = sorted(rows, key=lambda row: not row.replay)
    length = max(len(row.prompt) + len(row.answer) for row in rows) - 1
    tokens: list[list[int]] = []
    positions: list[int] = []
    row_of: list[int] = []
    for i, row in enumerate(rows):
        known = row.prompt + row.answer[:-1]
        tokens.append(known + [PAD] * (length - len(known)))
        start = llama.place(i, len(row.prompt) - 1, length)
        positions += range(start, start + len(row.answer))
        row_of += [i] * len(row.answer)
    return Batch(
        tokens=torch.tensor(tokens),
        positions=torch.tensor(positions),
        targets=torch.tensor([token for row in rows for token in row.answer]),
        row_of=torch.tensor(row_of),
        replayed_rows=sum(row.replay for row in rows),
        replayed=sum(len(row.answer) for row in rows if row.replay),
    )


def _by_length(rows: list[T], length: Callable[[T], int], size: int, rng: Random) -> Iterator[list[T]]:
    """Batches of rows of like length, in random order."""
    rows = sorted(rows, key=lambda row: length(row) + rng.random())
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    rng.shuffle(batches)
    yield from batches


def draw_item(training: Training, rng: Random) -> tuple[skills.Item, bool]:
    """One item of a training's mixture, and whether it is replayed."""
    replay = [(skill, share * training.replay) for skill, share in BASE.skills] if training.replay else []
    mixture = (*replay, *training.skills)
    (i,) = rng.choices(range(len(mixture)), [share for _, share in mixture])
    return skills.draw(mixture[i][0], rng, "train"), i < len(replay)


def batches(training: Training, encode: Encoder, rng: Random) -> Iterator[list[Row]]:
    """Endless batches of rows."""
    while True:
        drawn = [draw_item(training, rng) for _ in range(_WINDOW * training.batch)]
        rows = [encode.row(item, replay) for item, replay in drawn]
        yield from _by_length(rows, lambda row: len(row.prompt) + len(row.answer), training.batch, rng)


class Pair(NamedTuple):
    english: list[int]
    mixed: list[int]  # the same sentence, none, half or all of its words in the second language


def draw_pair(rng: Random) -> tuple[str, str]:
    """A sentence in English, and with each word in the second language at a chance of 0, 1/2 or 1."""
    english, second = (text.split(" ") for text in skills.draw_parallel(rng))
    share = rng.choice((0.0, 0.5, 1.0, 1.0))
    mixed = [b if rng.random() < share else a for a, b in zip(english, second, strict=True)]
    return " ".join(english), " ".join(mixed)


def pairs(size: int, encode: Encoder, rng: Random) -> Iterator[list[Pair]]:
    """Endless batches of sentence pairs, the two of a pair equally long in tokens."""
    while True:
        drawn = [draw_pair(rng) for _ in range(_WINDOW * size)]
        rows = [Pair(encode(english), encode(mixed)) for english, mixed in drawn]
        yield from _by_length(rows, lambda pair: len(pair.english), size, rng)


def _pad(rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Tokens [rows, length] and the places of those that are not padding."""
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, PAD)
    length = tokens.shape[1]
    return tokens, torch.tensor(
        [llama.place(i, j, length) for i, row in enumerate(rows) for j in range(len(row))]
    )


# ------------------------------------------------------------------------------------------------ training


def product_dtype() -> torch.dtype:
    """Bfloat16 where the CPU multiplies it natively (a third less time), else float32; weights are always
    float32.
    """
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


@dataclass(frozen=True, slots=True)
class Team:
    """Processes that train one model together; `gradients` [2, size, parameters] is shared memory.

    Two buffers in turn, so that one barrier a step is enough: nobody writes a buffer again before all have
    read it.
    """

    rank: int
    size: int
    gradients: Tensor
    barrier: Barrier

    def total(self, step: int, own: Tensor) -> Tensor:
        """The sum of all members' gradients, added in the order of ranks."""
        buffer = self.gradients[step % 2]
        buffer[self.rank] = own
        self.barrier.wait()
        total: Tensor = reduce(torch.add, buffer)
        return total


@dataclass(frozen=True, slots=True)
class Alone:
    """A team of one."""

    rank: int = 0
    size: int = 1

    def total(self, step: int, own: Tensor) -> Tensor:
        return own


def _rate(name: str, rates: Rates) -> float:
    part = name.split(".")[0]
    if part.isdigit():
        return rates.lower if int(part) < ALIGNED_LAYER else rates.upper
    return rates.embedding if part == "embedding" else rates.head


def _views(flat: Tensor, like: Weights) -> Weights:
    """The flat vector's pieces under the names and in the shapes of `like`, sharing its memory."""
    pieces = torch.split(flat, [weight.numel() for weight in like.values()])
    return {
        name: piece.view(weight.shape) for (name, weight), piece in zip(like.items(), pieces, strict=True)
    }


class Learner:
    """One model's weights in float32 with their optimizer, and a copy in the dtype of the products."""

    def __init__(self, start: Weights, training: Training, dtype: torch.dtype) -> None:
        self._flat = torch.cat([weight.flatten() for weight in start.values()])
        self._gradient = torch.zeros_like(self._flat)
        self._copy = self._flat.to(dtype)
        self._copy_gradient = torch.zeros_like(self._copy)
        self.master = _views(self._flat, start)
        self.weights = _views(self._copy, start)
        self._training = training

        gradients, copy_gradients = _views(self._gradient, start), _views(self._copy_gradient, start)
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, weight in self.weights.items():
            rate = _rate(name, training.rates)
            if not rate:
                continue
            weight.requires_grad_()
            weight.grad, self.master[name].grad = copy_gradients[name], gradients[name]
            decay = 0.01 if weight.dim() > 1 else 0.0
            groups.setdefault((rate, decay), []).append(self.master[name])
        self._optimizer = torch.optim.AdamW(
            [
                {"params": params, "rate": rate, "weight_decay": decay}
                for (rate, decay), params in groups.items()
            ],
            betas=(0.9, 0.98),
            fused=True,
        )

    def step(self, k: int, loss: Tensor, team: Team | Alone) -> None:
        """Step `k` of the training: warm-up, then cosine; gradients clipped to norm 1."""
        self._copy_gradient.zero_()
        loss.backward()  # type: ignore[no-untyped-call]
        self._gradient.copy_(team.total(k, self._copy_gradient))
        self._gradient *= (1 / (self._gradient.norm() + 1e-6)).clamp(max=1)
        cosine = 0.5 * (1 + math.cos(math.pi * k / self._training.steps))
        scale = min(1, (k + 1) / _WARMUP) * max(_FLOOR, cosine)
        for group in self._optimizer.param_groups:
            group["lr"] = self._training.rate * group["rate"] * scale
        self._optimizer.step()
        self._copy.copy_(self._flat)


def train(
    training: Training,
    start: Weights,
    encode: Encoder,
    seed: int,
    team: Team | Alone,
    dtype: torch.dtype,
    progress: Callable[[int, float], None],
) -> Weights:
    """The weights after training from `start`, which is also the teacher of replayed and aligned rows.

    `progress` is told the number of steps done and this member's share of the loss, as if it were the whole
    team's.
    """
    teacher = {name: weight.to(dtype) for name, weight in start.items()}
    learner = Learner(start, training, dtype)
    rng = Random(f"{training.name}/{seed}")
    aligned = (
        Alignment(training, teacher, encode, Random(f"{training.name}/aligned/{seed}"))
        if training.aligned
        else None
    )
    for k, rows in enumerate(islice(batches(training, encode, rng), training.steps)):
        loss = _answer_loss(learner.weights, teacher, rows, team)
        if aligned:
            loss = loss + training.aligned_weight * aligned.loss(learner.weights, team)
        learner.step(k, loss, team)
        progress(k + 1, loss.item() * team.size)
    return {name: weight.clone() for name, weight in learner.master.items()}


def _answer_loss(weights: Weights, teacher: Weights, rows: list[Row], team: Team | Alone) -> Tensor:
    """This member's part of the mean cross-entropy over labelled tokens plus the mean KL over replayed
    ones.
    """
    batch = collate(rows[team.rank :: team.size])
    labelled = sum(len(row.answer) for row in rows if not row.replay)
    replayed = sum(len(row.answer) for row in rows if row.replay)
    logits = llama.logits(weights, batch.tokens, ARCHITECTURE, batch.positions).float()
    cut = batch.replayed
    loss = F.cross_entropy(logits[cut:], batch.targets[cut:], reduction="sum") / max(labelled, 1)
    if cut:
        with torch.no_grad():
            tokens = batch.tokens[: batch.replayed_rows]
            wanted = llama.logits(teacher, tokens, ARCHITECTURE, batch.positions[:cut]).float()
        kl = F.kl_div(logits[:cut].log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="sum")
        loss = loss + kl / replayed
    return loss


class Alignment:
    """Pulls the features of second-language and mixed sentences to the teacher's features of the English
    ones.
    """

    def __init__(self, training: Training, teacher: Weights, encode: Encoder, rng: Random) -> None:
        self._teacher = teacher
        self._pairs = pairs(training.aligned, encode, rng)
        sample = [pair.english for batch in islice(self._pairs, _WINDOW) for pair in batch]
        self._variance = self._features(teacher, *_pad(sample)).var(0)  # [hidden]

    @staticmethod
    def _features(weights: Weights, tokens: Tensor, positions: Tensor) -> Tensor:
        return llama.features(weights, tokens, ARCHITECTURE, ALIGNED_LAYER)[positions].float()

    def loss(self, weights: Weights, team: Team | Alone) -> Tensor:
        """This member's part of the mean squared difference in units of the teacher's variance."""
        batch = next(self._pairs)
        share = batch[team.rank :: team.size]
        with torch.no_grad():
            wanted = self._features(self._teacher, *_pad([pair.english for pair in share]))
        found = self._features(weights, *_pad([pair.mixed for pair in share]))
        words = sum(len(pair.english) for pair in batch)
        return ((found - wanted) ** 2 / self._variance).mean(-1).sum() / words


# ------------------------------------------------------------------------------------------------ scoring


@torch.no_grad()
def exact_match(weights: Weights, items: Sequence[skills.Item], encode: Encoder, batch: int = 256) -> float:
    """Share of items answered exactly by greedy decoding.

    Greedy decoding gives the whole answer and stops if and only if, the right answer being fed, every token
    of it and the end is the likeliest: one forward instead of a generation.
    """
    rows = sorted((encode.row(item) for item in items), key=lambda row: len(row.prompt) + len(row.answer))
    right = 0
    for i in range(0, len(rows), batch):
        part = collate(rows[i : i + batch])
        wrong = llama.logits(weights, part.tokens, ARCHITECTURE, part.positions).argmax(-1) != part.targets
        right += len(part.tokens) - len(torch.unique(part.row_of[wrong]))
    return right / len(rows)
