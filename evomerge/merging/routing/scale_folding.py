"""Scale folding: a gain of a layer put into its weights, exactly.

A stack whose hidden state is multiplied by s_t as it enters hop t computes x_t = s_t x_{t-1} + F_t(s_t
x_{t-1}). With S_t = s_1 ... s_t and y_t = x_t / S_t it computes y_t = y_{t-1} + F_t(S_t y_{t-1}) / S_t:
nothing scales a hidden state, each layer adds g = 1 / S_t times as much, and the final norm absorbs the rest.
The layer reads S_t y through a norm, which does not see the factor but in its epsilon; so it is enough to
multiply by g what writes: output projections, or the post-norm that a branch ends in. Where a branch reads
the residual stream with no norm before it, what reads is multiplied by 1 / g.

What writes and what reads is observed in one forward of the layer, and the fold is refused unless numbers
confirm it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from evomerge.errors import FoldError, RouteError
from evomerge.merging.routing.decoder_layers import Call, calls, sample, stack
from evomerge.merging.routing.scale_tracing import ScaleTracer, random_hidden_state

TOLERANCE = 2e-4
"""Largest accepted error of a fold, relative to what the layer adds to the stream; a wrong fold errs by 0.1
or more.
"""
_GAINS = (0.6, 1.7)
_SHAPES = ((2, 12), (8, 64), (16, 256))  # (rows, length) of tokens: more where the first left an expert out


@dataclass(frozen=True, slots=True)
class Fold:
    """What of a layer is multiplied so that it adds g times as much while it reads y = g x instead of x.

    Names are those inside the layer, sorted.

    Attributes:
        outputs: Parameters that are multiplied by g.
        norms: (parameter, form) of norms after which a branch ends: w g for the form 'w', (1 + w) g - 1 for
            '1+w'.
        inputs: Parameters that read the stream with no norm before them; they are multiplied by 1 / g.
    """

    outputs: tuple[str, ...]
    norms: tuple[tuple[str, str], ...] = ()
    inputs: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Every parameter that a gain changes."""
        return (*self.outputs, *(name for name, _ in self.norms), *self.inputs)


_proven: WeakKeyDictionary[nn.Module, dict[int, Fold]] = WeakKeyDictionary()
"""Folds that numbers have confirmed, for models that live on."""


def observe(model: nn.Module, layer: int) -> Fold:
    """Finds the fold of one layer in one forward of the model up to it. It is not yet proven: see `probe`.

    Args:
        model: A live transformers model.
        layer: Index of the layer.

    Returns:
        The fold.

    Raises:
        FoldError: The layer adds nothing that a parameter scales, adds it to something else than the stream,
            or does not use a parameter.
    """
    name = f"layer {layer} of {type(model).__name__}"
    unused: set[str] = set()
    for rows, length in _SHAPES:
        call = _calls(model, rows, length, layer)[layer]
        fold, unused = _observed(_layers(model)[layer], call, name)
        if not unused:
            return fold
    some = ", ".join(sorted(unused)[:3])
    tokens = _SHAPES[-1][0] * _SHAPES[-1][1]
    raise FoldError(
        f"{name} does not use {some} in a forward of {tokens} tokens; what a gain multiplies cannot be told"
    )


def probe(model: nn.Module, layer: int, fold: Fold, tolerance: float = TOLERANCE) -> float:
    """Measures the largest error of a fold at two gains, in float32.

    Args:
        model: A live transformers model.
        layer: Index of the layer.
        fold: The fold.
        tolerance: Largest accepted error.

    Returns:
        The error, relative to the largest value that the layer adds to the stream.

    Raises:
        FoldError: It is above the tolerance.
    """
    call = _calls(model, *_SHAPES[0], layer)[layer]
    name = f"layer {layer} of {type(model).__name__}"
    return _probed(_layers(model)[layer], call, fold, tolerance, name)


def fold_of(model: nn.Module, layer: int) -> Fold:
    """The proven fold of one layer; observed once for a model that lives on.

    Args:
        model: A live transformers model.
        layer: Index of the layer.

    Returns:
        The fold.

    Raises:
        FoldError: The layer cannot take up a gain.
    """
    proven = _proven.setdefault(model, {})
    if layer not in proven:
        fold = observe(model, layer)
        probe(model, layer, fold)
        proven[layer] = fold
    return proven[layer]


def check_scalable(model: nn.Module) -> None:
    """Proves the folds of all layers of a model, so that `fold_of` has them ready.

    Args:
        model: A live transformers model.

    Raises:
        FoldError: A layer cannot take up a gain; for the first that fails.
    """
    layer_calls = _calls(model, *_SHAPES[0])
    proven = _proven.setdefault(model, {})
    for i, (layer, call) in enumerate(zip(_layers(model), layer_calls, strict=True)):
        if i not in proven:
            name = f"layer {i} of {type(model).__name__}"
            fold, unused = _observed(layer, call, name)
            fold = observe(model, i) if unused else fold
            _probed(layer, call, fold, TOLERANCE, name)
            proven[i] = fold


def folded(layer: nn.Module, fold: Fold, gain: float) -> dict[str, Tensor]:
    """The tensors of a layer that a gain changes.

    A product is rounded once, in float32 or wider; 1 + w is taken in float64.

    Args:
        layer: The layer.
        fold: Its fold.
        gain: The gain, in (0, inf).

    Returns:
        Name inside the layer -> new tensor, in the parameter's type.

    Raises:
        FoldError: The gain is out of range.
    """
    if not 0 < gain < math.inf:
        raise FoldError(f"gain is {gain}, must be in (0, inf)")
    tensors = dict(layer.named_parameters(remove_duplicate=False))
    return {name: scaled(tensors[name].detach(), *factor(fold, name, gain)) for name in fold.names}


def factor(fold: Fold, name: str, gain: float) -> tuple[float, str]:
    """How a parameter takes up a gain.

    Args:
        fold: The fold of its layer.
        name: The parameter's name inside the layer, one of `Fold.names`.
        gain: The gain.

    Returns:
        (factor, form), forms as in `Fold.norms`.
    """
    if name in fold.inputs:
        return 1 / gain, "w"
    return gain, dict(fold.norms).get(name, "w")


def scaled(tensor: Tensor, by: float, form: str = "w") -> Tensor:
    """A tensor with a factor in it.

    Args:
        tensor: The tensor.
        by: The factor.
        form: 'w' for tensor * by, '1+w' for (1 + tensor) * by - 1.

    Returns:
        A new tensor of the same type.
    """
    if form == "w":
        return tensor * by
    return ((1 + tensor.double()) * by - 1).to(tensor.dtype)


def _layers(model: nn.Module) -> nn.ModuleList:
    return stack(model)[1]


def _calls(model: nn.Module, rows: int, length: int, last: int | None = None) -> Sequence[Call]:
    try:
        return calls(model, sample(model, rows, length), last)
    except RouteError as error:
        raise FoldError(str(error)) from error


def _observed(layer: nn.Module, call: Call, name: str) -> tuple[Fold, set[str]]:
    """(fold, parameters that were not used)."""
    parameters = dict(layer.named_parameters())
    hidden = random_hidden_state(call.hidden.shape, call.hidden)
    with torch.no_grad(), ScaleTracer(hidden, parameters) as tracer:
        output = call.run(layer, hidden)
    factors = tracer.factors(output)
    if output.shape != hidden.shape or factors is None:
        raise FoldError(
            f"{name} does not return its input plus what it adds; scales are not possible, set `scales: none`"
        )
    if not factors:
        raise FoldError(
            f"{name} adds nothing that a parameter of it scales; scales are not possible, set `scales: none`"
        )
    outputs = {parameter for parameter, form in factors if not form}
    norms = {(parameter, form) for parameter, form in factors if form and parameter not in outputs}
    fold = Fold(
        tuple(sorted(outputs - tracer.inputs)), tuple(sorted(norms)), tuple(sorted(tracer.inputs - outputs))
    )
    return fold, set(parameters) - tracer.used


def _probed(layer: nn.Module, call: Call, fold: Fold, tolerance: float, name: str) -> float:
    # float32 whatever the model's type, since a fold's error is to be told from rounding
    exact = copy.deepcopy(layer).float()
    call = call.cast(torch.float32)
    hidden = random_hidden_state(call.hidden.shape, call.hidden, seed=1)
    worst = 0.0
    with torch.no_grad():
        added = call.run(exact, hidden) - hidden
        for gain in _GAINS:
            new = folded(exact, fold, gain)
            output = call.run(lambda *a, **k: functional_call(exact, new, a, k), hidden * gain)  # noqa: B023
            added_with_gain = output - hidden * gain
            error = float((added_with_gain / gain - added).abs().max() / added.abs().max())
            worst = max(worst, math.inf if math.isnan(error) else error)
    if not worst <= tolerance:
        raise FoldError(
            f"{name}: with a gain in its weights it errs by {worst:.1e} of what it adds, at most "
            f"{tolerance:.0e} is exact; scales are not possible, set `scales: none`"
        )
    return worst
