"""The skills of the zoo: questions with one right answer, in English and in a made-up second language.

Knows the grammar, which prompts are held out, and how to draw; knows nothing of models or training (and
imports no torch).

A prompt is `Q: ... A:` in lower-case words, an answer one or more words, both written as the model reads
them: the answer begins with its space. Every prompt belongs to one split, chosen by a hash of its text alone.
Whatever is shown to a model in training, with or without an answer, comes from the `train` split.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Literal

GRAMMAR_VERSION = 2  # raise it when a seed draws other prompts than before

Split = Literal["train", "search", "validation", "test"]
Item = tuple[str, str]  # prompt, answer
Skill = Callable[[Random], Item]


@dataclass(frozen=True, slots=True)
class Language:
    """Words for the numbers 0–12 and for the other ideas; both languages list the ideas in the same order."""

    numbers: tuple[str, ...]
    ideas: Mapping[str, str]

    @property
    def words(self) -> tuple[str, ...]:
        return *self.numbers, *self.ideas.values()


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_IDEAS = _words("next prev copy first last bigger smaller plus minus has gets loses apples books coins")
_SECOND_IDEAS = _words(
    "sekva antau kopiu unua lasta granda eta plusi malgi havas ricev perdas pomoj libroj moneroj"
)

ENGLISH = Language(
    numbers=_words("zero one two three four five six seven eight nine ten eleven twelve"),
    ideas=dict(zip(_IDEAS, _IDEAS, strict=True)),
)
SECOND = Language(
    numbers=_words("nul un du tri kvar kvin ses sep ok nau dek delun deldu"),
    ideas=dict(zip(_IDEAS, _SECOND_IDEAS, strict=True)),
)
NAMES = _words("tom ann bob eva max lea sam ida")
LETTERS = tuple("abcdefghi")
COMMANDS = ("sort", "reverse", "same", "traduku")

_OBJECTS = ("apples", "books", "coins")
_LOOKUPS = (
    "next",
    "prev",
    "copy",
    "first",
    "last",
    "bigger",
    "smaller",
    "first",
    "last",
    "story",
    "story",
    "story",
)
_SUMS = ("plus", "minus", "gets", "gets", "loses", "loses")


# ------------------------------------------------------------------------------------------------ the grammar


def _two_numbers(rng: Random) -> tuple[int, int]:
    return rng.randrange(13), rng.randrange(13)


def _statement(rng: Random, language: Language, a: int, b: int, verb: str | None = None) -> str:
    """`tom has three apples gets four`: two numbers in a story, nothing asked."""
    verb = verb or rng.choice(("gets", "loses"))
    thing = rng.choice(_OBJECTS)
    say, numbers = language.ideas, language.numbers
    return f"{rng.choice(NAMES)} {say['has']} {numbers[a]} {say[thing]} {say[verb]} {numbers[b]}"


def _lookup(rng: Random, language: Language) -> Item:
    """A question whose answer is one of the numbers named, or its neighbour; never a sum."""
    kind = rng.choice(_LOOKUPS)
    a, b = _two_numbers(rng)
    say, numbers = language.ideas, language.numbers
    if kind in ("next", "prev", "copy"):
        a = max(a, 1) if kind == "prev" else a
        answer = a + {"next": 1, "prev": -1, "copy": 0}[kind]
        return f"Q: {say[kind]} {numbers[a]} A:", f" {answer}"
    if kind == "story":
        kind = rng.choice(("first", "last"))
        about = _statement(rng, language, a, b)
    else:
        about = f"{numbers[a]} {numbers[b]}"
    answer = {"first": a, "last": b, "bigger": max(a, b), "smaller": min(a, b)}[kind]
    return f"Q: {say[kind]} {about} A:", f" {answer}"


def _arithmetic(rng: Random, language: Language) -> Item:
    """A sum or difference in [0, 24], asked plainly (`three plus four`) or as a story."""
    kind = rng.choice(_SUMS)
    a, b = _two_numbers(rng)
    if kind in ("minus", "loses"):
        a, b = max(a, b), min(a, b)
    answer = a + b if kind in ("plus", "gets") else a - b
    if kind in ("plus", "minus"):
        about = f"{language.numbers[a]} {language.ideas[kind]} {language.numbers[b]}"
    else:
        about = _statement(rng, language, a, b, kind)
    return f"Q: {about} A:", f" {answer}"


def _letters(rng: Random, commands: tuple[str, ...]) -> Item:
    """Three or four different letters to be sorted, reversed or said again."""
    letters = rng.sample(LETTERS, rng.choice((3, 4, 4)))
    command = rng.choice(commands)
    answer = {"sort": sorted(letters), "reverse": letters[::-1], "same": letters}[command]
    return f"Q: {command} {' '.join(letters)} A:", f" {' '.join(answer)}"


def _copy_words(rng: Random) -> Item:
    """One to three words of either language to be said again: the base has met every word of both."""
    words = (*SECOND.words, *ENGLISH.words)
    said = " ".join(rng.choice(words) for _ in range(rng.randrange(1, 4)))
    return f"Q: same {said} A:", f" {said}"


SKILLS: Mapping[str, Skill] = {
    "lookup": lambda rng: _lookup(rng, ENGLISH),
    "lookup_second": lambda rng: _lookup(rng, SECOND),
    "arithmetic": lambda rng: _arithmetic(rng, ENGLISH),
    "arithmetic_second": lambda rng: _arithmetic(rng, SECOND),
    "letters": lambda rng: _letters(rng, ("sort", "reverse")),
    "copy_letters": lambda rng: _letters(rng, ("same",)),
    "copy_words": _copy_words,
}


# ------------------------------------------------------------------------------------------- splits and draws


def split_of(prompt: str) -> Split:
    """70 % train, 10 % search, 5 % validation, 15 % test, by CRC-32 of the text.

    Prompts of four words or fewer (`Q: next three A:`) are too few to hold any out: they all belong to
    `train`.
    """
    if len(prompt.split()) <= 4:
        return "train"
    tens, bucket = divmod(zlib.crc32(prompt.encode()), 10)
    if bucket >= 2:
        return "search" if bucket == 2 else "train"
    return "validation" if tens % 4 == 0 else "test"


def draw(skill: str, rng: Random, split: Split) -> Item:
    """One item of a split; items are not equally likely, and the same one may be drawn twice."""
    while True:
        item = SKILLS[skill](rng)
        if split_of(item[0]) == split:
            return item


def distinct(skill: str, limit: int, split: Split, seed: int = 0) -> list[Item]:
    """Up to `limit` different items of a split, fewer where the grammar has fewer; the same for the same
    arguments.
    """
    rng = Random(f"{skill}/{split}/{seed}")
    items: dict[str, str] = {}
    for _ in range(20 * limit):
        items.update((draw(skill, rng, split),))
        if len(items) == limit:
            break
    return list(items.items())


def draw_parallel(rng: Random) -> tuple[str, str]:
    """The same words in English and in the second language: a look-up prompt, a statement, or loose words.

    Nothing is answered and no sum is asked, but a statement becomes a sum's prompt by appending ` A:`, so a
    pair is drawn again unless both texts, so completed, are in the `train` split.
    """
    while True:
        pair = _parallel(rng)
        if all(split_of(text.removesuffix(" A:") + " A:") == "train" for text in pair):
            return pair


def _parallel(rng: Random) -> tuple[str, str]:
    kind, seed = rng.random(), rng.random()
    if kind < 0.45:
        return _lookup(Random(seed), ENGLISH)[0], _lookup(Random(seed), SECOND)[0]
    if kind < 0.75:
        a, b = _two_numbers(rng)
        return f"Q: {_statement(Random(seed), ENGLISH, a, b)}", f"Q: {_statement(Random(seed), SECOND, a, b)}"
    chosen = [rng.randrange(len(ENGLISH.words)) for _ in range(rng.randrange(2, 6))]
    english, second = (" ".join(language.words[i] for i in chosen) for language in (ENGLISH, SECOND))
    return f"Q: {english}", f"Q: {second}"


def vocabulary() -> tuple[str, ...]:
    """Every word a prompt or an answer can hold, apart from the marks `Q:` and `A:`."""
    languages = (*ENGLISH.numbers, *SECOND.numbers, *ENGLISH.ideas.values(), *SECOND.ideas.values())
    return (*languages, *NAMES, *LETTERS, *(str(number) for number in range(25)), *COMMANDS)
