"""Every method against mergekit 0.1.5, in cells that cover all pairs of method, parents, types, form and
architecture.

The whole matrix is in scripts/validation/mergekit_parity.py. All files go through one mergekit process.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from string import Template

import pytest
import torch

from evomerge.errors import EvomergeError
from evomerge.export.recipe_file import merge_recipe_file
from evomerge.merging import merge
from evomerge.methods import METHODS
from evomerge.methods.fused import c_library, c_rows, one_pass, torch_kernels
from tests.support import parity_cases
from tests.support.parity_cases import (
    Cell,
    Difference,
    covering,
    deviations,
    difference,
    flat,
    read,
    refused_by_both,
)

CELLS = covering()
RANDOM = [cell for cell in CELLS if METHODS[cell.method].randomized and not cell.other_names]
EXACT = [
    cell
    for cell in CELLS
    if not METHODS[cell.method].randomized and not cell.other_names and not cell.other_unit
]
PLAIN = [
    cell
    for cell in EXACT
    if cell.method in ("linear", "task_arithmetic", "passthrough", "slerp") and cell.arithmetic == "float32"
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parity-methods")


@pytest.fixture(scope="module")
def files(work: Path) -> dict[Cell, Path]:
    found = {}
    for number, cell in enumerate(CELLS):
        found[cell] = work / f"{number}.yaml"
        found[cell].write_text(
            Template(parity_cases.text(cell)).substitute(
                parity_cases.models(work / "models", cell.architecture, cell.types)
            )
        )
    return found


@pytest.fixture(scope="module")
def theirs(files: dict[Cell, Path]) -> dict[Cell, Path]:
    """Cell -> mergekit's folder."""
    folders = {cell: file.with_suffix(".theirs") for cell, file in files.items()}
    errors = parity_cases.finish(
        parity_cases.start(
            [(files[cell], folder) for cell, folder in folders.items()], [cell.seed for cell in folders]
        )
    )
    assert not errors
    return folders


def compared(cell: Cell, files: dict[Cell, Path], theirs: dict[Cell, Path], policy: str) -> Difference:
    ours = files[cell].with_suffix(f".{policy}")
    merge_recipe_file(files[cell], ours, policy=policy)
    return difference(ours, theirs[cell])


@pytest.mark.parametrize("cell", EXACT, ids=str)
def test_under_the_policy_mergekit_a_merge_has_mergekits_bits(
    cell: Cell, files: dict[Cell, Path], theirs: dict[Cell, Path]
):
    try:
        found = compared(cell, files, theirs, "mergekit")
    except EvomergeError as error:
        if refused_by_both(cell, str(error)):
            return
        raise
    assert found.worst == 0, found
    if found.widened:
        assert cell.method in ("ramplus_tl", "arcee_fusion")


@pytest.mark.parametrize("cell", PLAIN, ids=str)
def test_under_the_policy_float32_a_plain_merge_differs_by_its_last_place_at_most(
    cell: Cell, files: dict[Cell, Path], theirs: dict[Cell, Path]
):
    found = compared(cell, files, theirs, "float32")
    assert found.relative <= (2**-8 if cell.types.endswith("bfloat16") else 2**-22), found


def test_random_methods_agree_within_sampling_error(files: dict[Cell, Path], theirs: dict[Cell, Path]):
    found = {
        f"{cell}: {name}": z
        for cell in RANDOM
        for name, z in deviations(cell, files[cell], theirs[cell]).items()
    }
    z = torch.tensor(list(found.values()))
    assert z.abs().max() < 12, max(
        found.items(), key=lambda item: abs(item[1])
    )  # one in 100,000 of Student's t with 7 degrees
    assert z.square().mean().sqrt() < 1.8, found  # 1.18 is expected
    assert abs(z.mean()) < 0.6


@pytest.mark.parametrize("policy", ["float32", "mergekit"])
@pytest.mark.parametrize("method", [name for name, rule in METHODS.items() if rule.randomized])
def test_masks_are_the_same_on_rerun_in_any_chunks_and_threads(
    method: str, policy: str, files: dict[Cell, Path], monkeypatch: pytest.MonkeyPatch
):
    cell = next(c for c in RANDOM if c.method == method and c.parents > 1)
    recipe, parents = read(files[cell], policy)
    recipe = replace(recipe, seed=3)

    def again() -> torch.Tensor:
        return flat(dict(merge.merged_tensors(recipe, parents)))

    first = again()
    assert torch.equal(first, again())
    assert not torch.equal(first, flat(dict(merge.merged_tensors(replace(recipe, seed=4), parents))))
    for threads, job, chunk in ((2, 1 << 18, 1 << 16), (1, 333, 100), (3, 1000, 77)):
        torch.set_num_threads(threads)
        monkeypatch.setattr(c_library, "_LEAST_SPAN", job)
        monkeypatch.setattr(c_rows, "_LEAST_SPAN", job)
        monkeypatch.setattr(torch_kernels, "_CHUNK", chunk)
        assert torch.equal(first, again())
        with monkeypatch.context() as only_torch:
            only_torch.setattr(one_pass, "BACKENDS", (torch_kernels,))
            assert torch.equal(first, again())
    torch.set_num_threads(1)
