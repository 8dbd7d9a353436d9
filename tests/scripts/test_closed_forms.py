"""RegMean and Fisher-weighted averages against least squares and a loop over elements."""

from __future__ import annotations

import torch
from torch import nn

from scripts.validation.closed_forms import Expert, fisher, regmean


def expert(seed: int) -> Expert:
    """Two tensors, of which the first is a linear layer's weight."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        "layer.weight": torch.randn(3, 4, generator=generator),
        "norm.weight": torch.randn(4, generator=generator),
    }
    return Expert(nn.Identity(), weights, [], [])


EXPERTS = {"a": expert(1), "b": expert(2)}


def test_regmean_minimizes_the_squared_difference_of_outputs() -> None:
    """The oracle is a least-squares fit of the stacked inputs to the experts' own outputs."""
    generator = torch.Generator().manual_seed(5)
    inputs = {name: torch.randn(30, 4, generator=generator, dtype=torch.float64) for name in EXPERTS}
    grams = {name: {"layer.weight": x.T @ x} for name, x in inputs.items()}
    found = regmean(EXPERTS, grams, 1.0)
    outputs = [inputs[name] @ e.weights["layer.weight"].double().T for name, e in EXPERTS.items()]
    wanted = torch.linalg.lstsq(torch.cat(list(inputs.values())), torch.cat(outputs)).solution.T
    torch.testing.assert_close(found["layer.weight"], wanted.float(), rtol=1e-4, atol=1e-5)
    mean = (EXPERTS["a"].weights["norm.weight"] + EXPERTS["b"].weights["norm.weight"]) / 2
    torch.testing.assert_close(found["norm.weight"], mean)


def test_regmean_without_off_diagonals_weighs_each_column_by_its_own_inputs() -> None:
    grams = {
        name: {"layer.weight": torch.diag(torch.tensor(d, dtype=torch.float64)) + 0.3}
        for name, d in (("a", [1.0, 2.0, 3.0, 4.0]), ("b", [4.0, 1.0, 1.0, 2.0]))
    }
    found = regmean(EXPERTS, grams, 0.0)["layer.weight"]
    for column in range(4):
        a, b = (float(grams[name]["layer.weight"][column, column]) for name in ("a", "b"))
        own = [EXPERTS[name].weights["layer.weight"][:, column] for name in ("a", "b")]
        torch.testing.assert_close(found[:, column], (a * own[0] + b * own[1]) / (a + b))


def test_fisher_weighs_each_element_and_averages_where_there_is_no_information() -> None:
    squares = {
        "a": {"layer.weight": torch.rand(3, 4), "norm.weight": torch.tensor([0.0, 1.0, 2.0, 0.0])},
        "b": {"layer.weight": torch.rand(3, 4), "norm.weight": torch.tensor([0.0, 3.0, 0.0, 1.0])},
    }
    found = fisher(EXPERTS, squares, normalized=False)
    for key in ("layer.weight", "norm.weight"):
        x, y = (EXPERTS[name].weights[key].flatten().tolist() for name in ("a", "b"))
        f, g = (squares[name][key].flatten().tolist() for name in ("a", "b"))
        wanted = [
            (f[i] * x[i] + g[i] * y[i]) / (f[i] + g[i]) if f[i] + g[i] else (x[i] + y[i]) / 2
            for i in range(len(x))
        ]
        torch.testing.assert_close(found[key].flatten(), torch.tensor(wanted))


def test_a_normalized_fisher_does_not_depend_on_the_size_of_a_models_gradients() -> None:
    squares = {name: {"layer.weight": torch.rand(3, 4)} for name in EXPERTS}
    scaled = {"a": squares["a"], "b": {"layer.weight": 100 * squares["b"]["layer.weight"]}}
    one, other = (fisher(EXPERTS, s, normalized=True)["layer.weight"] for s in (squares, scaled))
    torch.testing.assert_close(one, other)
