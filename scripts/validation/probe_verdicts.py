"""The probe's verdicts against the truth, over many architectures, techniques, decoders and types; writes
results/probe.md.

usage: python scripts/validation/probe_verdicts.py [--rows FILE] [ARCHITECTURE ...]   (with names: only those,
    the table is printed and no file written)

--rows: where what is done is kept, one architecture a line; run again with the same file, it goes on from
there.

The truth is what tests/probe_truth.py finds: realistic requests beside one request a forward, texts beside a
whole forward a token.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

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


def report(found: dict[str, list[Outcome]], failed: dict[str, str], seconds: float) -> list[str]:
    """The lines of results/probe.md."""
    everything = [o for own in found.values() for o in own]
    columns = [*OPTIMIZATIONS, *DECODERS]
    lines = [
        "# The probe against the truth",
        "",
        "Written by `python scripts/validation/probe_verdicts.py`: what the probe allows a model, beside "
        "what is right for it.",
        "",
        f"On {datetime.datetime.now(tz=datetime.UTC).date()}, {platform.machine()}, one thread, Python "
        f"{platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__};",
        f"{seconds / 60:.1f} minutes of processor time.",
        "",
        "Models are tiny and random (tests/text_architectures.py), windows 6 and chunks 16 tokens long; "
        "requests are up to 256 tokens.",
        "Right: in float32 every log-likelihood within 1e-3 nats of one request a forward and every greedy "
        "flag the same; every text that of",
        "a whole forward a token. In bfloat16: right in float32, and on average as near as rounding; texts: "
        "no chosen token's logit short of",
        f"the largest by more than {probe_truth.BFLOAT16_REGRET} standard deviations of the logits, or than "
        "in transformers'",
        "own `generate` on the same prompts, one at a time or in one padded batch: rounding moves tokens to "
        "other experts. What raises is wrong.",
        "Decoders: slots, left-padded rows, rows of equal length, a single row, the whole text anew for "
        "every token; shared: the fastest that is",
        "allowed, with prefixes computed once.",
        "",
        "| type | of | used and right | refused and wrong | refused though right | **used and wrong** |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for dtype in TYPES:
        for kind, names in (("techniques", OPTIMIZATIONS), ("decoders", DECODERS)):
            own = counts([o for o in everything if o.dtype == dtype and o.name in names])
            if own:
                lines.append(
                    f"| {str(dtype).removeprefix('torch.')} | {kind} | "
                    + " | ".join(str(own[key]) for key in MEANING)
                    + " |"
                )
    lines += [
        "",
        f"{len(found)} architectures, {len(everything)} verdicts. "
        + ", ".join(f"{SIGNS[key].strip('*')}: {MEANING[key]}" for key in MEANING)
        + "; float32, then bfloat16 where it differs; . not tried.",
        "",
        "| architecture | " + " | ".join(columns) + " | largest error of what is used, float32 |",
        "| --- |" + " --- |" * (len(columns) + 1),
    ]
    for name, own in found.items():
        cells = []
        for column in columns:
            signs = [
                SIGNS[o.allowed, o.right]
                for dtype in TYPES
                for o in own
                if o.name == column and o.dtype == dtype
            ]
            cells.append(" ".join(dict.fromkeys(signs)) or ".")
        errors = [
            o.error
            for o in own
            if o.allowed and o.dtype == torch.float32 and o.name in OPTIMIZATIONS and o.error == o.error
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {max(errors, default=float('nan')):.1e} |")
    odd = [(name, o) for name, own in found.items() for o in own if o.allowed != o.right]
    if odd:
        lines += ["", "Verdicts that differ from the truth:", ""]
        lines += [
            f"- {name}, {o.name}, {str(o.dtype).removeprefix('torch.')}: {MEANING[o.allowed, o.right]}; "
            f"{o.said}"
            for name, o in odd
        ]
    if failed:
        lines += ["", "Could not be tried:", "", *(f"- {name}: {said}" for name, said in failed.items())]
    return lines


def read(file: Path) -> dict[str, tuple[list[Outcome], float]]:
    """Architecture -> (outcomes, seconds of processor time) of a file of rows."""
    found = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        kept = json.loads(line)
        found[kept["name"]] = (
            [Outcome(**{**o, "dtype": getattr(torch, o["dtype"])}) for o in kept["outcomes"]],
            kept["seconds"],
        )
    return found


def main() -> None:
    """Tries every architecture, then writes the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=Path)
    parser.add_argument("names", nargs="*")
    given = parser.parse_args()
    torch.set_num_threads(1)
    done = read(given.rows) if given.rows else {}
    failed: dict[str, str] = {}
    names = given.names or list(CONFIGS)
    for name in names:
        if name in done:
            continue
        worked = time.process_time()
        try:
            own = probe_truth.outcomes(name, TYPES)
        except Exception as error:  # shown in the report
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            print(f"{name}: {failed[name]}", flush=True)
            continue
        done[name] = own, time.process_time() - worked
        if given.rows:
            kept = [{**dataclasses.asdict(o), "dtype": str(o.dtype).removeprefix("torch.")} for o in own]
            with given.rows.open("a") as file:
                file.write(json.dumps({"name": name, "seconds": done[name][1], "outcomes": kept}) + "\n")
        number = counts(own)
        print(
            f"{name}: "
            + ", ".join(f"{number[key]} {MEANING[key]}" for key in MEANING)
            + f", {done[name][1]:.1f} s",
            flush=True,
        )
        for o in own:
            if o.allowed != o.right:
                print(f"  {o.name} {o.dtype}: {MEANING[o.allowed, o.right]}; {o.said}", flush=True)
    found = {name: done[name][0] for name in names if name in done}
    lines = report(found, failed, sum(done[name][1] for name in found))
    if given.names:
        print("\n".join(lines))
    else:
        (REPOSITORY / "results" / "probe.md").write_text("\n".join(lines) + "\n")
    if failed or any(o.allowed and not o.right for own in found.values() for o in own):
        raise SystemExit("a technique was allowed where it is wrong, or an architecture could not be tried")


if __name__ == "__main__":
    main()
