"""The machine code of the Triton kernels, compiled for GPUs that need not be there."""

import os
import sys

import pytest

from scripts.validation.machine_code import ARCHITECTURES, cases, code_of, compiled

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]
CASES = {case.name: case for case in cases()}
OF_EVERY_ARCHITECTURE = ("ties, 3 parents", "dare_linear, 3 parents")
OF_ONE = ("linear, 3 parents", "della, 8 parents", "breadcrumbs, 3 parents")


def parameters():
    for name in CASES:
        for sm in ARCHITECTURES:
            chosen = name in OF_EVERY_ARCHITECTURE or (name in OF_ONE and sm == 90)
            yield pytest.param(name, sm, marks=() if chosen else pytest.mark.sweep)


@pytest.mark.parametrize(("name", "sm"), [*parameters()])
def test_operations_are_exact_loads_are_wide_and_nothing_is_spilled(name, sm):
    code = code_of(CASES[name], compiled(CASES[name], sm))
    assert not code.faults


def test_a_fused_multiply_add_is_seen():
    case = CASES["task_arithmetic, 3 parents"]
    assert (
        "a fused multiply-add in the PTX" in code_of(case, compiled(case, 90, enable_fp_fusion=True)).faults
    )


def test_narrow_loads_are_seen():
    case = CASES["task_arithmetic, 3 parents"]
    narrow = type(case)(**(vars(case) | {"constants": {**case.constants, "ALIGNED": False}}))
    assert any("loads of 16 bytes" in fault for fault in code_of(narrow, compiled(narrow, 90)).faults)
