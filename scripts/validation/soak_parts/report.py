"""What results/soak.md says: each part's table, what was run on what, and how."""

from __future__ import annotations

import platform
import shlex
import sqlite3
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.benchmarks import machine
from scripts.validation.soak_parts import pieces

TITLES = {
    "drivers": "Drivers killed",
    "workers": "Workers that die",
    "machines": "Machines that fail",
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
    "machines": """\
At 30 % of all attempts, a function of candidate, attempt and seed, the machine fails, by one of: a
full disk (ENOSPC), too many open files (EMFILE), no memory (ENOMEM), a process killed (SIGKILL), a
process stopped (SIGSTOP), a start that takes 2.5 times what scoring may take. One process, which a
kill ends and which is then started again, and is not stopped; two processes; two workers of a local
Ray. The limits on numbers of failures are the defaults, those in seconds are about a second.
Compared with an unbroken run in one process, as above.""",
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


def put(file: Path, name: str, data: Any, lines: Sequence[str]) -> None:
    """Writes one part into a report: in the place of what it said of it before, or at its end."""
    title = f"## {TITLES[name]}"
    section = [
        title,
        "",
        f"Written by `{shlex.join(['scripts/validation/soak.py', *sys.argv[1:]])}`,",
        f"{machine.stamp('ray', 'cma')},",
        f"SQLite {sqlite3.sqlite_version}; {platform.system()}, shared with other work: "
        "times are no measure.",
        f"{_SAID[name]}",
        f"On the sources {', '.join(sorted(set(_codes(data))))}.",
        "",
        *lines,
    ]
    before, _, rest = file.read_text(encoding="utf-8").partition(f"{title}\n")
    following = rest.partition("\n## ")
    after = f"\n## {following[2]}" if following[1] else ""
    file.write_text(f"{before.rstrip()}\n\n" + "\n".join(section) + "\n" + after, encoding="utf-8")


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
