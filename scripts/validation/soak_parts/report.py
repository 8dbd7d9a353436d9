"""What results/soak.md says: each part's table, what was run on what, and how."""

from __future__ import annotations

import platform
import shlex
import sqlite3
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from scripts.benchmarks import machine
from scripts.validation.soak_parts import pieces

TITLES = {
    "drivers": "Drivers killed",
    "workers": "Workers that die",
    "races": "Two drivers at once",
    "inputs": "Mutated inputs",
    "damage": "Damaged stores",
}
_SAID = {
    "drivers": """\
A study by CMA-ES in two stages, on a landscape without models, whose driver gets SIGKILL at random
moments; with Ray, two islands and two workers of a local cluster, which dies with its driver.
Acknowledged: another connection reads the evaluation in the store, which is noted and synced in a
diary. Repeated: a worker begins it once more after that. Compared with a run that nobody broke off:
all tables but those of attempts and runs, without times.""",
    "workers": """\
Two workers of a Ray pool, who kill themselves in an attempt with this probability (a function of
candidate, attempt and seed). The pool's limits are raised, so that a candidate that is unlucky
three times is not called poison and the pool never gives up. Compared with an unbroken run in one
process, as above.""",
    "races": """\
Two processes started together, or up to 50 ms apart, on one study. The winner goes on beside the
loser, and gets SIGKILL at the end of the race; in two thirds of the races the study is one that was
under way.""",
    "inputs": """\
Bytes, stretches and structure changed, deep nesting, aliases, huge numbers, one file inside
another. Read: what was read can be written and read again, and spans a search space, or opens as a
checkpoint with every tensor. Refused: one EvomergeError of one line of at most 2,000 characters.
Wrong: anything else, or more than 2 s of processor time.""",
    "damage": """\
Bits, digits, pages and whole files damaged at random; each store is opened to read, and another
copy to write. Over: of a study that came to its end; killed: its driver was, and the log lies
beside it; backup: the copy alone; journal: without a write-ahead log. Not counted as damage: an
older backup in place of a backup.""",
}


def text(results: Mapping[str, tuple[Any, Sequence[str]]], sizes: Mapping[str, Any]) -> str:
    """The report of parts: name -> (data, lines)."""
    packages = ("ray", "torch", "cma", "PyYAML", "pydantic", "safetensors")
    out = [
        "# The soak",
        "",
        f"Written by `{shlex.join(['scripts/validation/soak.py', *sys.argv[1:]])}`,",
        f"{machine.stamp(*packages)},",
        f"SQLite {sqlite3.sqlite_version}; {platform.system()},",
        "shared with other work: times are no measure. SIGKILL leaves what the kernel holds, so nothing "
        "here is a loss of power.",
        f"Sizes: {', '.join(f'{name} {value}' for name, value in sizes.items())}.",
        f"The package's sources at the end: {pieces.code()}; each part says on which it was begun.",
    ]
    for name, (data, lines) in results.items():
        codes = sorted(set(_codes(data)))
        out += [
            "",
            f"## {TITLES[name]}",
            "",
            f"{_SAID[name]}\nBegun on the sources {', '.join(codes)}.",
            "",
            *lines,
        ]
    return "\n".join(out) + "\n"


def _codes(data: Any) -> Iterator[str]:
    """Every 'code' in nested data."""
    if isinstance(data, dict):
        own = data.get("code", [])
        yield from [own] if isinstance(own, str) else own
        for value in data.values():
            yield from _codes(value)
    elif isinstance(data, list):
        for value in data:
            yield from _codes(value)
