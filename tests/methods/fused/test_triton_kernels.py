"""The Triton backend: its kernels in Triton's interpreter, and where it is used.

Triton decides as it is loaded whether it interprets, and the process of these tests may have loaded it for
other things: a process of its own runs the files that need the interpreter.
"""

import os
import subprocess
import sys

import pytest
import torch

from evomerge.methods.fused import one_pass, triton_kernels
from tests.support.toy import REPO

INTERPRETED = ("test_triton_sums.py", "test_triton_tables.py")
FOLDER = REPO / "tests" / "methods" / "fused"


def interpreted(*arguments):
    """What pytest says of the files that need the interpreter, and whether all passed."""
    files = [str(FOLDER / name) for name in INTERPRETED if (FOLDER / name).is_file()]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments, *files]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    finished = subprocess.run(
        command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    return finished.returncode == 0, finished.stdout[-6000:] + finished.stderr[-2000:]


def test_the_kernels_have_the_c_path_s_bits_in_the_interpreter():
    passed, output = interpreted("-m", "not sweep")
    assert passed, output
    assert "passed" in output


@pytest.mark.sweep
def test_the_kernels_have_the_c_path_s_bits_for_many_more_values_in_the_interpreter():
    passed, output = interpreted("-m", "sweep")
    assert passed, output


def test_tensors_of_a_cpu_are_not_for_triton():
    x = torch.zeros(8)
    assert not triton_kernels.fits([x])
    assert one_pass.BACKENDS.index(triton_kernels) < len(one_pass.BACKENDS) - 1


def test_a_device_on_which_triton_fails_is_left_to_torch(caplog):
    if triton_kernels.is_available():
        assert not triton_kernels.gives_the_reference_s_bits(torch.device("cpu"))  # it has no driver
        assert "merging in torch there" in caplog.text


def test_nothing_loads_triton_before_a_launch():
    program = "import evomerge.merging.merge, sys; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=REPO, check=True, timeout=300)
