"""The registry finds the methods by itself: a new method is one new file."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import evomerge
from evomerge.errors import RecipeError
from evomerge.methods import METHODS, declaration, method

MEDIAN = '''"""Median of the models."""

import torch

from evomerge.methods.declaration import Method


def median(tensors, base, values, keys, *, mergekit_compatible=False):
    """See `Kernel.__call__`: the median of each entry."""
    return torch.stack(list(tensors)).median(dim=0).values


MEDIAN = Method(name="%s", kernel=median, params=(), needs_base=False, paper="", summary="median")
'''
PROGRAM = "from evomerge.methods import METHODS; print(*METHODS)"


def in_a_copy(folder: Path, name: str) -> subprocess.CompletedProcess[str]:
    """What a copy of the package with a file more has for methods."""
    package = Path(evomerge.__file__).parent
    shutil.copytree(package, folder / "evomerge", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "evomerge" / "methods" / "median.py").write_text(MEDIAN % name)
    environment = os.environ | {"PYTHONPATH": str(folder)}
    command = [sys.executable, "-P", "-c", PROGRAM]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_file_more_is_a_method_more(tmp_path):
    done = in_a_copy(tmp_path, "median")
    assert done.stdout.split() == sorted([*METHODS, "median"]), done.stderr


def test_two_methods_of_one_name_are_refused(tmp_path):
    done = in_a_copy(tmp_path, "ties")
    assert "two merge methods have the name 'ties'" in done.stderr


def test_an_unknown_method_is_refused_with_the_nearest_name():
    with pytest.raises(RecipeError, match=r"unknown merge method 'tise'\. Did you mean 'ties'?"):
        method("tise")


def test_what_is_searched_by_default_starts_where_it_did():
    """Weights, densities and t are searched: from 1 / number of parents, 0.5 and, for slerp, 0.5."""
    unnamed = {"density": 0.5, "select_topk": 0.5, "r": 0.1, "alpha": 0.2}
    for rule in METHODS.values():
        for param in rule.params:
            assert param.searched == (param.name in ("weight", "t", *unnamed)), rule.name
            if param.name in unnamed:
                assert param.start_for(3) == unnamed[param.name]
            if param.name == "weight":
                assert param.start == declaration.EQUAL_SHARE
                assert [param.start_for(n) for n in (1, 2, 3)] == [1.0, 1 / 2, 1 / 3]
            if param.searched and param.per == "merge":
                assert param.low < param.start_for(3) < param.high
    assert method("slerp").param("t").start_for(2) == 0.5
    assert method("linear").param("normalize").start_for(2) == 1.0
