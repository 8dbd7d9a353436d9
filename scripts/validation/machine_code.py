"""Compiles the Triton kernels for GPUs that need not be there, and checks the machine code.

    python -m scripts.validation.machine_code [--sm 80 90 100] [--out results/machine_code.md]

For the bits of a CPU: no fused multiply-add, nothing flushed to zero, exact divisions, rounding to nearest.
For speed: models are read 16 bytes at a time, and nothing is spilled from registers. Triton's interpreter
shows none of this. The table has instructions of the machine per element (both branches of a threshold's
kernel) and registers.
"""

from __future__ import annotations

import argparse
import collections
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from evomerge.methods.fused import device_tables, triton_kernels
from scripts.benchmarks import machine

ARCHITECTURES = (80, 90, 100)
WARPS = triton_kernels.COMPILATION["num_warps"]
FORBIDDEN = {
    r"\bfma\.": "a fused multiply-add",
    r"\bmad\.\w*\.?f(32|64)": "a fused multiply-add",
    r"\.ftz": "a flush to zero",
    r"div\.(full|approx)": "an approximate division",
    r"rcp\.": "a reciprocal",
    r"cvt\.rz?[mpz]?i?\.?(ftz\.)?bf16": "a conversion to bfloat16 that is not to nearest",
}
ADDRESSES = {
    "addresses": "*i64",
    "sizes": "*i32",
    "first_blocks": "*i32",
    "block_rows": "*i32",
}
NUMBERS = {"ranks": "*i64", "floats": "*fp32", "integers": "*i32"}
SUM = {"KIND": 0, "ELECT": False, "DIVISION": 0, "SCALED": False, "BOUNDED": False, "BASED": True}
SUMS = {
    "linear": SUM | {"BASED": False, "DIVISION": 1},
    "task_arithmetic": SUM,
    "ties": SUM | {"KIND": 1, "ELECT": True, "DIVISION": 2},
    "dare_linear": SUM | {"KIND": 2, "SCALED": True},
    "dare_ties": SUM | {"KIND": 2, "SCALED": True, "ELECT": True, "DIVISION": 2},
    "breadcrumbs": SUM | {"KIND": 1, "BOUNDED": True},
    "della": SUM | {"KIND": 3, "SCALED": True, "ELECT": True, "DIVISION": 2},
}


@dataclass(frozen=True)
class Case:
    """A kernel with the constants of one compilation.

    Attributes:
        name: What it is called in the table.
        kernel: Module and function, below `evomerge.methods.fused`.
        arguments: Name -> type of arguments that are not compiled in.
        constants: Name -> value of those that are.
        elements: Elements that a thread handles.
        wide_loads: How many 16-byte loads there must be at least.
    """

    name: str
    kernel: tuple[str, str]
    arguments: Mapping[str, str]
    constants: Mapping[str, object]
    elements: float
    wide_loads: int


@dataclass(frozen=True)
class Code:
    """What a compiled kernel is like; faults: what must not be."""

    faults: tuple[str, ...]
    instructions: float
    registers: int
    wide_loads: int


def cases() -> Iterator[Case]:
    """Every kernel, for bfloat16 models."""
    yield from sum_cases()
    yield from table_cases()


def sum_cases() -> Iterator[Case]:
    """The kernels of sums."""
    for sources, block in ((3, 2048), (8, 1024)):
        types = {"N": sources, "BASE": 1, "SOURCES": sum(1 << 2 * i for i in range(sources)), "ALIGNED": True}
        for name, form in SUMS.items():
            constants = form | types | {"OUT": 1, "NATIVE": True, "BLOCK": block}
            arguments = ADDRESSES | NUMBERS | {"totals": "*fp32", "flags": "*i32"}
            loads = (sources + form["BASED"]) * block // WARPS // 32 // 8
            kernel = ("triton_sums", "merge")
            yield Case(f"{name}, {sources} parents", kernel, arguments, constants, block / WARPS / 32, loads)
        masks = {"KIND": 2, "BOUNDED": False, "STEPS": 8, "BLOCK": block}
        arguments = ADDRESSES | NUMBERS | {"units": "*fp32", "sums": "*i64"}
        yield Case(
            f"norms, {sources} parents", ("triton_sums", "norms"), arguments, types | masks, block / 128, 2
        )


def table_cases() -> Iterator[Case]:
    """The kernels of tables."""
    tables = {"BASE": 1, "SOURCES": 1, "ALIGNED": True, "STEPS": 16, "BLOCK": 2048}

    def case(name: str, arguments: Mapping[str, str], **constants: object) -> Case:
        given = ADDRESSES | arguments
        function = name.partition(",")[0]
        return Case(name, ("triton_tables", function), given, tables | constants, 8, 2)

    yield case("largest", {"tops": "*i32"}, N=1, BASED=True)
    sums = {"units": "*fp32", "sums": "*i64"}
    yield case("hash_sums", sums | {"keys": "*i32"}, GRID=1000, REPLICAS=8)
    yield case("sums_between", sums | {"keys": "*i64", "wanted": "i32"}, DEPTH=10, REPLICAS=8)
    counts = {"counts": "*i32", **{f"child_{i}": "*i32" for i in range(5)}}
    counts |= {"node_counts": "*i32", "widths": "*i32"}
    for level in range(6):
        yield case(f"count_digits, level {level}", counts, LEVEL=level, REPLICAS=8)
    numbers = dict.fromkeys(("width", "a", "b", "product", "products"), "i32")
    own = {"TYPE_A": 1, "TYPE_B": 1, "BASED": True}
    constants = own | {name: value for name, value in tables.items() if name != "SOURCES"}
    arguments = ADDRESSES | numbers | {"units": "*fp64", "sums": "*i64"}
    kernel = ("triton_tables", "product_sums")
    yield Case("product_sums", kernel, arguments, constants, 8, 2)


def compiled(case: Case, sm: int, **options: object) -> Any:
    """The kernel, compiled for a compute capability such as 90; options: instead of those of launches."""
    from importlib import import_module

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, function = case.kernel
    kernel = getattr(import_module(f"evomerge.methods.fused.{module}"), function)
    names = kernel.arg_names
    missing = set(names) ^ {*case.arguments, *case.constants}
    assert not missing, f"{case.name}: {sorted(missing)}"
    pointers = [i for i, name in enumerate(names) if case.arguments.get(name, "").startswith("*")]
    source = ASTSource(
        fn=kernel,
        signature={name: case.arguments.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    own = device_tables.COMPILATION if module == "triton_tables" else triton_kernels.COMPILATION
    chosen = own | options
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=chosen)


def code_of(case: Case, built: Any) -> Code:
    """Reads a compiled kernel's PTX and machine code."""
    ptx = re.sub(r"//.*", "", built.asm["ptx"])
    faults = [f"{what} in the PTX" for pattern, what in FORBIDDEN.items() if re.search(pattern, ptx)]
    sass, usage = _disassembled(built.asm["cubin"])
    operations = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)", sass)
    count = collections.Counter(operation.split(".")[0] for operation in operations)
    if "div.rn" not in ptx and count["FFMA"]:  # an exact division is made of them
        faults.append(f"{count['FFMA']} fused multiply-adds in the machine code")
    wide = sum(operation.startswith("LDG") and ".128" in operation for operation in operations)
    if wide < case.wide_loads:
        faults.append(f"{wide} loads of 16 bytes, expected {case.wide_loads}")
    registers, stack = (int(_found(rf"{word}:(\d+)", usage)) for word in ("REG", "STACK"))
    spills = count["STL"] + count["LDL"]
    if spills:
        faults.append(f"{spills} spills, {stack} bytes of stack")
    return Code(tuple(faults), len(operations) / case.elements, registers, wide)


def _disassembled(cubin: bytes) -> tuple[str, str]:
    """(machine code, use of resources) by NVIDIA's tool that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        texts = [
            subprocess.run(
                [str(tool), option, file.name], capture_output=True, text=True, check=True, timeout=120
            ).stdout
            for option in ("-sass", "-res-usage")
        ]
    return texts[0], texts[1]


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match, f"no {pattern} in {text[:500]!r}"
    return match[1]


def report(architectures: Sequence[int]) -> tuple[str, bool]:
    """(Markdown, whether every kernel is as it must be)."""
    lines = ["| kernel | GPU | instructions an element | registers | loads of 16 bytes | |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    is_right = True
    for sm in architectures:
        for case in cases():
            code = code_of(case, compiled(case, sm))
            is_right &= not code.faults
            verdict = "; ".join(code.faults) or "right"
            lines.append(
                f"| {case.name} | sm_{sm} | {code.instructions:.0f} | {code.registers} | "
                f"{code.wide_loads} | {verdict} |"
            )
            print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines), is_right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sm", type=int, nargs="+", default=ARCHITECTURES, help="compute capabilities")
    parser.add_argument("--out", type=Path, help="write the table there")
    given = parser.parse_args()
    table, is_right = report(given.sm)
    head = (
        "# Machine code of the Triton kernels\n\n"
        f"`python -m scripts.validation.machine_code`; {machine.stamp('torch', 'triton')}.\nNo GPU: the code "
        "is compiled and read, nothing ran. Right: no fused multiply-add, nothing flushed to zero, exact "
        "divisions, 16-byte loads of models, no spills. Models in bfloat16.\n\n"
    )
    if given.out:
        given.out.write_text(f"{head}{table}\n", encoding="utf-8")
    else:
        print(f"triton {version('triton')}\n{table}")
    sys.exit(not is_right)


if __name__ == "__main__":
    main()
