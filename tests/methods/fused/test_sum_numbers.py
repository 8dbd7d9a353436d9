"""A launch's numbers from arrays are those of one tensor after the other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from evomerge.methods import METHODS, Values
from evomerge.methods.fused import magnitude_tables
from evomerge.methods.fused.difference_rows import DifferenceRows
from evomerge.methods.fused.launch_numbers import DIVISOR, SCALE, LaunchNumbers
from evomerge.methods.fused.magnitude_tables import MagnitudeTables
from evomerge.methods.fused.merge_tensor import MergeInputs, merge_tensor, weighted_sum_of
from evomerge.methods.fused.sum_numbers import MaskKeys, split_words, sum_numbers
from evomerge.methods.fused.table_sums import write_sums
from evomerge.methods.fused.tensor_table import TensorTable

SUMS = [name for name, rule in METHODS.items() if rule.task_vector_sum is not None]
SHAPES = ((40, 50), (7,), (1,), (3, 1), (0, 4), (900,), (33, 31))
SOURCES = 3
DENSITIES = (0.0, 0.001, 0.25, 0.5, 0.777, 0.123456, 0.999, 1.0)


def inputs_of(rule, seed: int) -> list[MergeInputs]:
    """A row for each shape; many values are equal, and one source is the base itself."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number, shape in enumerate(SHAPES):
        base = (torch.randn(shape, generator=generator) * 8).round() / 8
        sources = [
            base + (torch.randn(shape, generator=generator) * 4).round() / 16 for _ in range(SOURCES - 1)
        ]
        sources = [x.bfloat16() for x in (*sources, base)]
        keys = torch.randint(-(1 << 62), 1 << 62, (SOURCES,), generator=generator).tolist()
        ids = [(number, i) for i in range(SOURCES)]
        based = not rule.task_vector_sum.without_base
        rows.append(MergeInputs(sources, base.bfloat16() if based else None, keys, ids, ("base", number)))
    return rows


def values_of(rule, rows: int, generator: np.random.Generator, **given: float) -> dict[str, np.ndarray]:
    """Random values within the bounds of a search, on the grid and off it."""
    values = {}
    for param in rule.params:
        shape = (rows, SOURCES) if param.per == "model" else (rows,)
        if param.name in given or param.flag:
            values[param.name] = np.full(shape, given.get(param.name, param.default))
        elif param.name == "density":
            values[param.name] = generator.choice(DENSITIES, shape)
        else:
            values[param.name] = np.round(generator.uniform(param.low, param.high, shape), param.digits)
    return values


def row_values(values: dict[str, np.ndarray], row: int) -> Values:
    return {
        name: tuple(array[row].tolist()) if array.ndim == 2 else float(array[row])
        for name, array in values.items()
    }


@pytest.mark.parametrize("build", [False, True], ids=["asked one by one", "tables"])
@pytest.mark.parametrize("normalize", [0.0, 1.0], ids=["sum", "normalized"])
@pytest.mark.parametrize("method", SUMS)
def test_numbers_from_arrays_are_those_of_each_tensor(method, normalize, build, monkeypatch) -> None:
    monkeypatch.setattr(magnitude_tables, "_SMALL", 100)
    rule = METHODS[method]
    inputs = inputs_of(rule, len(method))
    tables = MagnitudeTables(build=build, ranks_bytes=1 << 20)
    rows = None if inputs[0].base is None else DifferenceRows([x.pairs() for x in inputs], tables)
    keys = MaskKeys(0, split_words([x.mask_keys for x in inputs])) if rule.randomized else None
    generator = np.random.default_rng(1)
    for rescale in (0.0, 1.0) if rule.param("rescale") else (0.0,):
        values = values_of(rule, len(inputs), generator, normalize=normalize, rescale=rescale)
        found = sum_numbers(rule.task_vector_sum, values, rows, keys)
        assert found is not None
        numbers, units = found
        sums = [
            weighted_sum_of(rule.task_vector_sum, x, row_values(values, i), tables)
            for i, x in enumerate(inputs)
        ]
        expected = LaunchNumbers.of(sums, numbers.form)
        np.testing.assert_array_equal(numbers.integers, expected.integers)
        np.testing.assert_array_equal(numbers.totals, expected.totals)
        known = np.ones(numbers.floats.shape[-1], bool)
        if units is not None:
            known[SCALE] = False
            np.testing.assert_array_equal(units, [[tables.unit(pair) for pair in x.pairs()] for x in inputs])
        np.testing.assert_array_equal(numbers.floats[..., known], expected.floats[..., known])
        asked, units = sum_numbers(rule.task_vector_sum, values, rows, keys, finds_scales=False)
        assert units is None
        np.testing.assert_array_equal(asked.floats, expected.floats)


@pytest.mark.parametrize("method", ["dare_ties", "ties"])
def test_scales_of_densities_on_the_grid_are_looked_up(method, monkeypatch) -> None:
    monkeypatch.setattr(magnitude_tables, "_SMALL", 0)
    rule = METHODS[method]
    inputs = [x for x in inputs_of(rule, 3) if x.sources[0].numel()]
    rows = DifferenceRows([x.pairs() for x in inputs], MagnitudeTables(build=True))
    keys = MaskKeys(0, split_words([x.mask_keys for x in inputs]))
    values = values_of(rule, len(inputs), np.random.default_rng(2), rescale=1.0)
    values["density"] = np.random.default_rng(3).choice([0.2, 0.5, 1.0], values["density"].shape)
    numbers, units = sum_numbers(rule.task_vector_sum, values, rows, keys)
    assert units is None
    assert (numbers.floats[..., SCALE] != 1).any()


@pytest.mark.parametrize("method", SUMS)
def test_a_table_written_from_arrays_has_the_bits_of_each_tensor(method) -> None:
    rule = METHODS[method]
    inputs = [x for x in inputs_of(rule, 5) if x.sources[0].numel()]
    tables = MagnitudeTables()
    rows = None if inputs[0].base is None else DifferenceRows([x.pairs() for x in inputs], tables)
    keys = MaskKeys(0, split_words([x.mask_keys for x in inputs]))
    values = values_of(rule, len(inputs), np.random.default_rng(4))
    numbers, units = sum_numbers(rule.task_vector_sum, values, rows, keys)
    outs = [torch.empty_like(x.sources[0]) for x in inputs]
    ranks = None
    if rows is not None and method.startswith("della"):
        ranks = [[tables.ranks(pair) for pair in x.pairs()] for x in inputs]
    bases = None if rows is None else [x.base for x in inputs]
    table = TensorTable(outs, bases, [x.sources for x in inputs], ranks=ranks)
    flags = write_sums(table, numbers, None if units is None else torch.from_numpy(units).float())
    assert not flags.any()
    for row, (x, out) in enumerate(zip(inputs, outs, strict=True)):
        expected = torch.empty_like(out)
        assert merge_tensor(rule.task_vector_sum, x, row_values(values, row), expected, tables)
        assert torch.equal(out.view(torch.int16), expected.view(torch.int16))


def test_divisors_are_exact_sums_and_cancelling_weights_divide_nothing() -> None:
    values = {"weight": np.array([[1e17, 1.5, -1e17], [0.1, 0.2, -0.3]]), "normalize": np.ones(2)}
    linear, arithmetic = (METHODS[name].task_vector_sum for name in ("linear", "task_arithmetic"))
    inputs = inputs_of(METHODS["task_arithmetic"], 1)[:2]
    rows = DifferenceRows([x.pairs() for x in inputs], MagnitudeTables())
    alone, based = (
        sum_numbers(*given, None) for given in ((linear, values, None), (arithmetic, values, rows))
    )
    assert alone[0].totals[:, DIVISOR].tolist() == [1.5, float(np.float32(math.fsum([0.1, 0.2, -0.3])))]
    assert based[0].totals[:, DIVISOR].tolist() == [1.5, 1.0]


def test_what_cannot_be_one_launch_is_said() -> None:
    ties = METHODS["ties"]
    inputs = inputs_of(ties, 1)
    rows = DifferenceRows([x.pairs() for x in inputs], MagnitudeTables())
    values = values_of(ties, len(inputs), np.random.default_rng(1))
    values["normalize"][0] = 0.0  # the others are divided by the weights that agree
    assert sum_numbers(ties.task_vector_sum, values, rows, None) is None
    values = values_of(ties, len(inputs), np.random.default_rng(1))
    values["rescale"][0] = 1.0
    assert sum_numbers(ties.task_vector_sum, values, rows, None) is None
