"""The probe's verdicts against the truth, over many architectures, techniques, decoders and types; writes
results/probe.md.

usage: python scripts/validation/probe_verdicts.py [--rows FILE] [ARCHITECTURE ...]   (with names: only those,
    the table is printed and no file written)

--rows: where what is done is kept, one architecture a line; run again with the same file, it goes on from
there.

The truth is what tests/support/probe_truth.py finds: realistic requests beside one request a forward, texts
beside a whole forward a token.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from scripts.benchmarks import machine
from scripts.validation import row_file
from tests.support import probe_truth
from tests.support.probe_truth import DECODERS, OPTIMIZATIONS, Outcome
from tests.support.text_architectures import CONFIGS

REPOSITORY = Path(__file__).resolve().parents[2]
TYPES = (torch.float32, torch.bfloat16)
SIGNS = {(True, True): "+", (False, False): "-", (False, True): "(-)", (True, False): "**WRONG**"}
MEANING = {
    (True, True): "used and right",
    (False, False): "refused and wrong",
    (False, True): "refused though right",
    (True, False): "used and wrong",
}


def counts(outcomes: Sequence[Outcome]) -> Counter[tuple[bool, bool]]:
    """(allowed, right) -> how many."""
    return Counter((o.allowed, o.right) for o in outcomes)


def report(outcomes: dict[str, list[Outcome]], failed: dict[str, str], seconds: float) -> list[str]:
    """The lines of results/probe.md.

    Args:
        outcomes: of each architecture.
        failed: architecture -> why it could not be tried.
        seconds: of processor time, for all.
    """
    lines = [*_heading(seconds), *_summary(outcomes), *_table(outcomes)]
    wrong = [(name, o) for name, own in outcomes.items() for o in own if o.allowed != o.right]
    if wrong:
        lines += ["", "Verdicts that differ from the truth:", ""]
        lines += [
            f"- {name}, {o.name}, {_type(o.dtype)}: {MEANING[o.allowed, o.right]}; {o.said}"
            for name, o in wrong
        ]
    if failed:
        lines += ["", "Could not be tried:", ""]
        lines += [f"- {name}: {message}" for name, message in failed.items()]
    return lines


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _heading(seconds: float) -> list[str]:
    return [
        "# The probe against the truth",
        "",
        "Written by `python scripts/validation/probe_verdicts.py`: what the probe allows a model, beside "
        "what is",
        "right for it.",
        "",
        f"{machine.stamp('torch', 'transformers')}; one thread;",
        f"{seconds / 60:.1f} minutes of processor time.",
        "",
        "Models are tiny and random (tests/support/text_architectures.py), windows 6 and chunks 16 tokens "
        "long;",
        "requests are up to 256 tokens. Right: in float32 every log-likelihood within 1e-3 nats of one "
        "request a",
        "forward and every greedy flag the same; every text that of a whole forward a token. In bfloat16: "
        "right in",
        "float32, and on average as near as rounding; texts: no chosen token's logit short of the largest "
        "by more",
        f"than {probe_truth.BFLOAT16_REGRET} standard deviations of the logits, or than in transformers' own",
        "`generate` on the same prompts, one at a time or in one padded batch: rounding moves tokens to "
        "other",
        "experts. What raises is wrong. Decoders: slots, left-padded rows, rows of equal length, a single "
        "row, the",
        "whole text anew for every token; shared: the fastest that is allowed, with prefixes computed once.",
    ]


def _summary(outcomes: dict[str, list[Outcome]]) -> list[str]:
    """Verdicts by type and kind, counted."""
    everything = [o for own in outcomes.values() for o in own]
    lines = [
        "",
        "| type | of | used and right | refused and wrong | refused though right | **used and wrong** |",
        "| --- " * 6 + "|",
    ]
    for dtype in TYPES:
        for kind, names in (("optimizations", OPTIMIZATIONS), ("decoders", DECODERS)):
            number = counts([o for o in everything if o.dtype == dtype and o.name in names])
            if number:
                cells = [_type(dtype), kind, *(str(number[key]) for key in MEANING)]
                lines.append("| " + " | ".join(cells) + " |")
    legend = ", ".join(f"{SIGNS[key].strip('*')}: {MEANING[key]}" for key in MEANING)
    return [
        *lines,
        "",
        f"{len(outcomes)} architectures, {len(everything)} verdicts. {legend}; float32, then bfloat16 where "
        "it",
        "differs; . not tried.",
    ]


def _table(outcomes: dict[str, list[Outcome]]) -> list[str]:
    """A row for each architecture."""
    columns = [*OPTIMIZATIONS, *DECODERS]
    lines = [
        "",
        "| architecture | " + " | ".join(columns) + " | largest error of what is used, float32 |",
        "| --- |" + " --- |" * (len(columns) + 1),
    ]
    for name, own in outcomes.items():
        cells = []
        for column in columns:
            of_column = [o for dtype in TYPES for o in own if o.name == column and o.dtype == dtype]
            signs = [SIGNS[o.allowed, o.right] for o in of_column]
            cells.append(" ".join(dict.fromkeys(signs)) or ".")
        single = [o for o in own if o.allowed and o.dtype == torch.float32 and o.name in OPTIMIZATIONS]
        errors = [o.error for o in single if not math.isnan(o.error)]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {max(errors, default=math.nan):.1e} |")
    return lines


def read(file: Path | None) -> dict[str, tuple[list[Outcome], float]]:
    """Architecture -> (outcomes, seconds of processor time) of a file of rows."""
    return {
        row["name"]: (
            [Outcome(**{**o, "dtype": getattr(torch, o["dtype"])}) for o in row["outcomes"]],
            row["seconds"],
        )
        for row in row_file.read(file)
    }


def write(file: Path | None, name: str, outcomes: Sequence[Outcome], seconds: float) -> None:
    """Adds an architecture to a file of rows."""
    plain = [{**dataclasses.asdict(o), "dtype": _type(o.dtype)} for o in outcomes]
    row_file.append(file, [{"name": name, "seconds": seconds, "outcomes": plain}])


def show(name: str, outcomes: Sequence[Outcome], seconds: float) -> None:
    """Prints an architecture's counts and its wrong verdicts."""
    number = counts(outcomes)
    totals = ", ".join(f"{number[key]} {MEANING[key]}" for key in MEANING)
    print(f"{name}: {totals}, {seconds:.1f} s", flush=True)
    for o in outcomes:
        if o.allowed != o.right:
            print(f"  {o.name} {o.dtype}: {MEANING[o.allowed, o.right]}; {o.said}", flush=True)


def main() -> None:
    """Tries every architecture, then writes the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=Path)
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    torch.set_num_threads(1)
    done = read(args.rows)
    failed: dict[str, str] = {}
    names = args.names or list(CONFIGS)
    for name in names:
        if name in done:
            continue
        began = time.process_time()
        try:
            outcomes = probe_truth.outcomes(name, TYPES)
        except Exception as error:  # shown in the report
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            print(f"{name}: {failed[name]}", flush=True)
            continue
        done[name] = outcomes, time.process_time() - began
        write(args.rows, name, *done[name])
        show(name, *done[name])
    tried = {name: done[name][0] for name in names if name in done}
    lines = report(tried, failed, sum(done[name][1] for name in tried))
    if args.names:
        print("\n".join(lines))
    else:
        (REPOSITORY / "results" / "probe.md").write_text("\n".join(lines) + "\n")
    if failed or any(o.allowed and not o.right for own in tried.values() for o in own):
        raise SystemExit(
            "an optimization was allowed where it is wrong, or an architecture could not be tried"
        )


if __name__ == "__main__":
    main()
