"""Faults in the Triton kernels: each has its place in the sources and its test; one is run."""

import ast

import pytest

from scripts.validation.kernel_mutations import KERNELS, MUTATIONS, copied, is_caught, mutated
from tests.support.toy import REPO


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_fault_has_its_place_and_its_test(mutation):
    broken = mutated((REPO / KERNELS / mutation.file).read_text(), mutation)
    ast.parse(broken)
    file, _, name = mutation.test.partition("::")
    functions = {node.name for node in ast.walk(ast.parse((REPO / file).read_text()))
                 if isinstance(node, ast.FunctionDef)}  # fmt: skip
    assert name.partition("[")[0] in functions


@pytest.mark.parametrize(
    "mutation",
    [
        pytest.param(m, marks=() if m.name.startswith("NaN") else pytest.mark.sweep, id=m.name)
        for m in MUTATIONS
    ],
)
def test_a_fault_is_caught(mutation, tmp_path):
    assert is_caught(copied(tmp_path), mutation) == ("passed", "failed")
