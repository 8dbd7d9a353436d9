"""Every method against mergekit 0.1.5 over the whole matrix of tests/support/parity_cases.py; writes
results/parity.md.

usage: python scripts/validation/mergekit_parity.py [--rows FILE]   (needs scripts/make_mergekit_env; 20
    minutes on two cores)

--rows: where the cells that are done are kept, one line each; run again with the same file, it goes on from
there.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template
from typing import Any

import torch

from evomerge.errors import EvomergeError
from evomerge.export.recipe_file import merge_recipe_file
from evomerge.methods import METHODS
from scripts.benchmarks import machine
from scripts.validation import row_file
from tests.support import parity_cases
from tests.support.parity_cases import ARCHITECTURES, FORMS, TYPES, VARIANTS, Cell

REPOSITORY = Path(__file__).resolve().parents[2]
BATCH = 120
POLICIES = ("mergekit", "float32")
EXPERTS = "mergekit makes one tensor of a layer's experts first"
NAMES = "filters see other names for the experts"


def batch(cells: Sequence[Cell], folder: Path, zoo: Path) -> Iterable[dict[str, Any]]:
    """One row for each cell."""
    files = {}
    for number, cell in enumerate(cells):
        files[cell] = folder / f"{number}.yaml"
        files[cell].write_text(
            Template(parity_cases.text(cell)).substitute(
                parity_cases.models(zoo, cell.architecture, cell.types)
            )
        )
    process = parity_cases.start(
        [(file, file.with_suffix(".theirs")) for file in files.values()], [cell.seed for cell in files]
    )
    refused: dict[tuple[Cell, str], str] = {}
    for cell, file in files.items():
        for policy in POLICIES if not METHODS[cell.method].randomized else ():
            try:
                merge_recipe_file(file, file.with_suffix(f".{policy}"), policy=policy)
            except EvomergeError as error:
                refused[cell, policy] = re.sub(r"/[^ ,')]*/", "", str(error))
    errors = parity_cases.finish(process)
    for cell, file in files.items():
        theirs = file.with_suffix(".theirs")
        row: dict[str, Any] = {"cell": [cell.variant, cell.parents, cell.types, cell.form, cell.architecture]}
        if str(theirs) in errors:
            row["theirs"] = re.sub(r"/[^ ,')]*/", "", errors[str(theirs)])
        elif METHODS[cell.method].randomized:
            row["z"] = parity_cases.deviations(cell, file, theirs)
        else:
            for policy in POLICIES:
                if (cell, policy) in refused:
                    row[policy] = {"refused": refused[cell, policy]}
                else:
                    row[policy] = as_json(parity_cases.difference(file.with_suffix(f".{policy}"), theirs))
        yield row


def as_json(difference: parity_cases.Difference) -> dict[str, Any]:
    """The fields of a difference that a row holds."""
    return {
        "worst": difference.worst,
        "unequal": difference.unequal,
        "further": difference.further,
        "relative": difference.relative,
        "widened": difference.widened,
    }


def report(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The lines of results/parity.md."""
    cells = {Cell(*row["cell"]): row for row in rows}
    exact = [v for v in VARIANTS if not METHODS[Cell(v, 1, "", "", "").method].randomized]
    sampled = [v for v in VARIANTS if v not in exact]
    return [
        *_heading(cells),
        *_exact_table(cells, exact),
        *_explanations(cells),
        *_float32_table(cells, exact),
        *_sampled_table(cells, sampled),
    ]


def _unexplained(cells: dict[Cell, dict[str, Any]]) -> list[Cell]:
    """Cells whose tensors differ though both programs merge the same ones under the same names."""
    return [
        cell
        for cell, row in cells.items()
        if row.get("mergekit", {}).get("worst", 0) > 1 and not (cell.other_unit or cell.other_names)
    ]


def _heading(cells: dict[Cell, dict[str, Any]]) -> list[str]:
    code = (
        "import importlib.metadata as m;"
        "print(*(f'{n} {m.version(n)}' for n in ('mergekit', 'torch', 'transformers')), sep=', ')"
    )
    python = parity_cases.ENVIRONMENT / "bin" / "python"
    theirs = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    absent = [cell for cell in parity_cases.matrix() if not cell.exists]
    return [
        "# Every method against mergekit",
        "",
        "Written by `python scripts/validation/mergekit_parity.py`: the same recipe file through both "
        "programs,",
        "every tensor compared element by element.",
        "",
        f"{machine.stamp('torch')}; against {theirs}.",
        "",
        f"The matrix: {len(VARIANTS)} methods (nuslerp and multislerp with and without a base) x 1, 2 and 3 "
        "parents",
        f"x the forms {', '.join(FORMS)} x the types float32 and bfloat16 on",
        f"{', '.join(ARCHITECTURES)}, and on llama also",
        "; ".join(t for t in TYPES if t not in ("float32", "bfloat16")) + ".",
        "bfloat16 is mergekit's `dtype`, in which it computes; what follows 'to' is the `out_dtype`; "
        "'stored' names",
        "no type, 'mixed' has parents in two. Models are tiny and random, four layers deep. 'fused' has the "
        "experts",
        "of a layer as one tensor on disk, as transformers 5 holds them; mixtral is also tried as it is on "
        "the hub.",
        "",
        f"{len(cells) + len(absent)} cells: {len(absent)} that cannot be, as the method takes another "
        "number of",
        f"models, and {len(cells)} merged.",
        f"Unexplained differences under the policy `mergekit`: {len(_unexplained(cells))}.",
    ]


def _exact_table(cells: dict[Cell, dict[str, Any]], variants: Sequence[str]) -> list[str]:
    """Methods without chance, merged by the policy 'mergekit'."""
    lines = [
        "",
        "## The policy `mergekit`, methods that do not sample",
        "",
        "within 1: cells with no element further away than one unit in the last place of the output's type. "
        "apart:",
        "cells that differ by more, all of them mixtral as it is on the hub, where the two merge other "
        "tensors or",
        "their filters see other names; with 'mixtral fused' both see the same.",
        "",
        "| method | cells | bitwise | within 1 | worst but for those apart, ulp | apart | mergekit fails "
        "| evomerge refuses |",
        "| --- " * 8 + "|",
    ]
    for variant in variants:
        rows = {cell: row for cell, row in cells.items() if cell.variant == variant}
        both = {cell: row["mergekit"] for cell, row in rows.items() if "worst" in row.get("mergekit", {})}
        apart = [c for c, result in both.items() if result["worst"] > 1 and (c.other_unit or c.other_names)]
        worst = [result["worst"] for cell, result in both.items() if cell not in apart]
        columns = [
            variant,
            len(rows),
            sum(ulps == 0 for ulps in worst),
            sum(ulps <= 1 for ulps in worst),
            max(worst, default=0),
            len(apart),
            sum("theirs" in row for row in rows.values()),
            sum("refused" in row.get("mergekit", {}) for row in rows.values()),
        ]
        lines.append("| " + " | ".join(map(str, columns)) + " |")
    return lines


def _explanations(cells: dict[Cell, dict[str, Any]]) -> list[str]:
    """Why cells differ, fail or are refused."""
    wide = Counter(c.variant for c, row in cells.items() if row.get("mergekit", {}).get("widened"))
    return [
        "",
        "Why:",
        "",
        *(f"- {number} cells apart: {reason}." for reason, number in reasons(cells).most_common()),
        *(
            f"- {number} cells, mergekit fails on {where}: {what}"
            for (where, what), number in messages(cells, "theirs").most_common()
        ),
        *(
            f"- {number} cells, evomerge refuses {where}: {what}"
            for (where, what), number in messages(cells, "mergekit").most_common()
        ),
        *(
            f"- {number} cells of {variant}, which mergekit writes in float32 where the recipe says "
            "bfloat16; "
            "compared after rounding."
            for variant, number in wide.items()
        ),
        "- Not compared: GPT-2's causal masks `h.N.attn.bias` of the hub's files, which mergekit drops, "
        "evomerge",
        "  merges and transformers ignores.",
        *(f"- **Unexplained:** {cell}: {cells[cell]['mergekit']}" for cell in _unexplained(cells)),
    ]


def _float32_table(cells: dict[Cell, dict[str, Any]], variants: Sequence[str]) -> list[str]:
    """The same methods by the policy 'float32'."""
    lines = [
        "",
        "## The policy `float32`, the default",
        "",
        "Arithmetic in float32 whatever the types, one rounding at the end; against mergekit with `dtype: "
        "float32`,",
        "cells in which both merge the same tensors. relative: the largest difference, in units of the "
        "largest entry",
        "of its tensor; median over cells and worst. Most differ by rounding, which is many units in the "
        "last place",
        "of entries whose terms cancel. Beyond rounding, as the methods' docstrings say: TIES and "
        "breadcrumbs among",
        "entries of one size, which bfloat16 has many of; SCE of one model, of which mergekit selects "
        "nothing;",
        "model_stock beyond a right angle, where mergekit steps away from the models (half the tensors of "
        "these",
        "random models); arcee_fusion's divergence, which in mergekit is rounding in part (under 1% of "
        "entries).",
        "",
        "| method | to float32: cells | bitwise | within 1 ulp | relative, median | worst "
        "| to bfloat16: cells | bitwise | within 1 ulp | worst |",
        "| --- " * 10 + "|",
    ]
    for variant in variants:
        single = _float32_columns(cells, variant, "float32", median=True)
        half = _float32_columns(cells, variant, "float32 to bfloat16", median=False)
        lines.append("| " + " | ".join([variant, *single, *half]) + " |")
    return lines


def _float32_columns(
    cells: dict[Cell, dict[str, Any]], variant: str, types: str, *, median: bool
) -> list[str]:
    """Cells, bitwise, within one unit, the median difference where asked, and the worst."""
    results = [
        row["float32"]
        for cell, row in cells.items()
        if (cell.variant, cell.types) == (variant, types)
        and not (cell.other_unit or cell.other_names)
        and "worst" in row.get("float32", {})
    ]
    columns = [
        str(len(results)),
        str(sum(result["worst"] == 0 for result in results)),
        str(sum(result["worst"] <= 1 for result in results)),
    ]
    relative = sorted(result["relative"] for result in results)
    if median:
        columns.append(f"{relative[len(relative) // 2]:.1g}" if relative else "")
    columns.append(f"{relative[-1]:.1g}" if relative else "")
    return columns


def _sampled_table(cells: dict[Cell, dict[str, Any]], variants: Sequence[str]) -> list[str]:
    """Methods that draw masks: statistics of mergekit's draw among ours."""
    lines = [
        "",
        "## Methods that sample",
        "",
        "mergekit draws from one global generator, evomerge hashes keys: the masks differ, their statistics "
        "may not.",
        "In each cell mergekit's one draw is set against eight of evomerge's under the policy `mergekit`: "
        "share of",
        "entries that change, L1 norm of the change in matrices, share of changed entries with the sign "
        "they have at",
        "density 1, product with the change at density 1. A deviation is in standard deviations of a draw, "
        "with",
        "1/10,000 of the measure added for rounding; if the two are alike it has Student's t distribution "
        "with 7",
        "degrees of freedom or a narrower one: mean 0, root mean square 1.18, beyond 5.4 once in 1,000.",
        "",
        "| method | cells | compared | kept: mean, rms, largest | L1 | signs | along the whole | mergekit "
        "fails |",
        "| --- " * 8 + "|",
    ]
    for variant in variants:
        rows = {cell: row for cell, row in cells.items() if cell.variant == variant}
        deviations = [row["z"] for cell, row in rows.items() if "z" in row and not cell.other_names]
        columns = [variant, str(len(rows)), str(len(deviations))]
        for measure in ("kept", "L1", "signs", "along the whole"):
            z = torch.tensor([deviation[measure] for deviation in deviations])
            summary = (
                f"{z.mean():+.2f}, {z.square().mean().sqrt():.2f}, {z.abs().max():.1f}" if deviations else ""
            )
            columns.append(summary)
        columns.append(str(sum("theirs" in row for row in rows.values())))
        lines.append("| " + " | ".join(columns) + " |")
    return [
        *lines,
        "",
        "The cells not compared are those of mixtral with filters, as above. That evomerge's own masks are "
        "the same",
        "on a rerun, in any chunks and on any number of threads, in C and in torch, is in",
        "tests/integration/test_parity_methods.py.",
    ]


def reasons(cells: dict[Cell, dict[str, Any]]) -> Counter[str]:
    """Why cells are apart -> cells."""
    counts: Counter[str] = Counter()
    for cell, row in cells.items():
        if row.get("mergekit", {}).get("worst", 0) > 1 and (cell.other_unit or cell.other_names):
            both = [EXPERTS] * cell.other_unit + [NAMES] * cell.other_names
            counts[f"mixtral as on the hub; {' and '.join(both)}"] += 1
    return counts


def messages(cells: dict[Cell, dict[str, Any]], key: str) -> Counter[tuple[str, str]]:
    """(method and architecture, message without its details) -> cells."""
    counts: Counter[tuple[str, str]] = Counter()
    for cell, row in cells.items():
        text = row.get(key, "") if key == "theirs" else row.get(key, {}).get("refused", "")
        if text:
            counts[f"{cell.variant} on {cell.architecture}", re.sub(r"'[^']*'", "...", text)[:200]] += 1
    return counts


def main() -> None:
    """Merges the cells that are not among the rows, then writes the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--every", type=int, default=1, help="only every so many cells, for a trial")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "results" / "parity.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cells = [cell for cell in parity_cases.matrix() if cell.exists][:: args.every]
    done = row_file.read(args.rows)
    merged = {Cell(*row["cell"]) for row in done}
    left = [cell for cell in cells if cell not in merged]
    with tempfile.TemporaryDirectory() as scratch:
        for first in range(0, len(left), BATCH):
            folder = Path(scratch, "batch")
            folder.mkdir()
            new = list(batch(left[first : first + BATCH], folder, Path(scratch, "models")))
            shutil.rmtree(folder)
            row_file.append(args.rows, new)
            done += new
            print(f"{len(done)} of {len(cells)} cells", flush=True)
    wanted = set(cells)
    lines = report([row for row in done if Cell(*row["cell"]) in wanted])
    args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
