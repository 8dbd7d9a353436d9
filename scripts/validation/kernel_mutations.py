"""Breaks the Triton kernels on purpose, one way at a time, and runs the test that has to see it.

    python -m scripts.validation.kernel_mutations [--only NAME ...] [--out results/kernel_mutations.md]

Each mutation is a replacement in a copy of the repository. The named test must pass in the copy as it is and
fail in the mutated one. No GPU: tests run in Triton's interpreter, or read machine code.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.benchmarks import machine

REPOSITORY = Path(__file__).resolve().parents[2]
COPIED = ("evomerge", "scripts", "tests", "search_spaces", "evaluators", "pyproject.toml")
KERNELS = "evomerge/methods/fused"
SUMS = "tests/methods/fused/test_triton_sums.py"
CODE = "tests/scripts/test_machine_code.py"


@dataclass(frozen=True)
class Mutation:
    """A fault.

    Attributes:
        name: In words.
        file: Where it is put, below `KERNELS`.
        before: Text that is there once.
        after: What takes its place.
        test: The test that must fail.
    """

    name: str
    file: str
    before: str
    after: str
    test: str

    @property
    def is_interpreted(self) -> bool:
        """Whether the test runs in Triton's interpreter."""
        return not self.test.startswith(CODE)


MUTATIONS = (
    Mutation(
        "fused multiply-add allowed",
        "triton_kernels.py",
        '"enable_fp_fusion": False',
        '"enable_fp_fusion": True',
        f"{CODE}::test_operations_are_exact_loads_are_wide_and_nothing_is_spilled[dare_linear, 3 parents-90]",
    ),
    Mutation(
        "multiplication with the reciprocal of the divisor",
        "triton_sums.py",
        "total = tl.div_rn(total, tl.load(totals + DIVISOR))",
        "total = total * tl.div_rn(1.0, tl.load(totals + DIVISOR))",
        f"{SUMS}::test_sums_are_divided_exactly",
    ),
    Mutation(
        "Triton's own division, which is approximate",
        "triton_sums.py",
        "total = tl.div_rn(total, tl.load(totals + DIVISOR))",
        "total = total / tl.load(totals + DIVISOR)",
        f"{CODE}::test_operations_are_exact_loads_are_wide_and_nothing_is_spilled[linear, 3 parents-90]",
    ),
    Mutation(
        "threshold off by one",
        "triton_sums.py",
        "tl.where(index <= tl.load(last), tl.load(floats), tl.load(floats + 1))",
        "tl.where(index < tl.load(last), tl.load(floats), tl.load(floats + 1))",
        f"{SUMS}::test_equal_magnitudes_are_cut_at_their_index",
    ),
    Mutation(
        "hash without the cut at its bound",
        "triton_sums.py",
        "d = tl.where(hashes <= tl.load(integers + BOUND), d, 0.0)",
        "d = tl.where(hashes <= 2147483647, d, 0.0)",
        f"{SUMS}::test_densities_of_nothing_and_of_everything[dare_ties]",
    ),
    Mutation(
        "hash without the cut to 32 bits",
        "triton_elements.py",
        "return (x ^ key.to(tl.uint32, bitcast=True)) * odd.to(tl.uint32, bitcast=True)",
        "wide = (x ^ key.to(tl.uint32, bitcast=True)).to(tl.uint64) * odd.to(tl.uint32, bitcast=True)\n"
        "    return (wide >> 32).to(tl.uint32)",
        f"{SUMS}::test_densities_of_nothing_and_of_everything[dare_ties]",
    ),
    Mutation(
        "NaN lost in the maximum of elected signs",
        "triton_sums.py",
        "propagate_nan=tl.PropagateNan.ALL",
        "propagate_nan=tl.PropagateNan.NONE",
        f"{SUMS}::test_what_is_not_finite_is_flagged_in_its_row_and_subnormals_are_kept[torch.float32]",
    ),
    Mutation(
        "rounding to bfloat16 half up",
        "triton_elements.py",
        "(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16",
        "(bits + 0x8000) >> 16",
        f"{SUMS}::test_roundings_halfway_between_two_numbers_and_sums_of_exactly_zero[linear]",
    ),
)


def copied(folder: Path) -> Path:
    """A copy of what the tests need."""
    for name in COPIED:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder


def mutated(text: str, mutation: Mutation) -> str:
    """The text of a file with the fault; raises ValueError where the place is not there once."""
    if text.count(mutation.before) != 1:
        raise ValueError(
            f"{mutation.name}: {text.count(mutation.before)} places in {mutation.file}, not one: "
            "the kernel has changed, change the mutation with it"
        )
    return text.replace(mutation.before, mutation.after)


def outcome(folder: Path, mutation: Mutation) -> str:
    """'passed', 'failed' or another end of pytest, of the mutation's test in a copy."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": str(int(mutation.is_interpreted))}
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", mutation.test],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    ends = {0: "passed", 1: "failed"}
    return ends.get(
        finished.returncode, f"pytest ended with {finished.returncode}: {finished.stdout[-2000:]}"
    )


def is_caught(folder: Path, mutation: Mutation) -> tuple[str, str]:
    """(outcome as it is, outcome with the fault) in a copy, which is as before afterwards."""
    file = folder / KERNELS / mutation.file
    before = file.read_text(encoding="utf-8")
    broken = mutated(before, mutation)
    sound = outcome(folder, mutation)
    file.write_text(broken, encoding="utf-8")
    try:
        return sound, outcome(folder, mutation)
    finally:
        file.write_text(before, encoding="utf-8")


def report(names: Sequence[str]) -> tuple[str, bool]:
    """(Markdown, whether every fault was caught)."""
    lines = ["| fault | test | without | with |", "| --- | --- | --- | --- |"]
    is_right = True
    with tempfile.TemporaryDirectory() as scratch:
        folder = copied(Path(scratch))
        for mutation in MUTATIONS:
            if names and mutation.name not in names:
                continue
            sound, broken = is_caught(folder, mutation)
            is_right &= (sound, broken) == ("passed", "failed")
            lines.append(f"| {mutation.name} | `{mutation.test}` | {sound} | {broken} |")
            print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines), is_right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", default=(), help="names of mutations")
    parser.add_argument("--out", type=Path, help="write the table there")
    given = parser.parse_args()
    table, is_right = report(given.only)
    head = (
        "# Faults put into the Triton kernels\n\n"
        f"`python -m scripts.validation.kernel_mutations`; {machine.stamp('torch', 'triton')}.\n"
        "No GPU: tests run in Triton's interpreter or read machine code. Every fault must make its test "
        "fail.\n\n"
    )
    if given.out:
        given.out.write_text(f"{head}{table}\n", encoding="utf-8")
    else:
        print(table)
    sys.exit(not is_right)


if __name__ == "__main__":
    main()
