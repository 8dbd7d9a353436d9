"""A gain of a layer put into its weights, exactly.

A stack whose hidden state is multiplied by s_t as it enters hop t computes x_t = s_t x_{t-1} + F_t(s_t x_{t-1}). With
S_t = s_1 ... s_t and y_t = x_t / S_t it computes y_t = y_{t-1} + F_t(S_t y_{t-1}) / S_t: nothing scales a hidden state, each
layer adds g = 1 / S_t times as much, and the final norm absorbs the rest. The layer reads S_t y through a norm, which does
not see the factor but in its epsilon; so it is enough to multiply by g what writes: output projections, or the post-norm
that a branch ends in. Where a branch reads the stream with no norm before it, what reads is multiplied by 1 / g.

What writes and what reads is observed in one forward of the layer, and the fold is refused unless numbers confirm it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from evomerge.errors import FoldError, RouteError
from evomerge.merging.routing.decoder_layers import Call, calls, sample, stack
from evomerge.merging.routing.scale_tracing import ScaleTracer, stream_of

TOLERANCE = 2e-4
"""Largest error of a fold that is accepted, relative to what the layer adds to the stream; a wrong plan errs by 0.1 or more."""
_GAINS = (0.6, 1.7)
_ROWS = ((2, 12), (8, 64), (16, 256))  # more tokens where the first left an expert out


@dataclass(frozen=True, slots=True)
class Fold:
    """What of a layer is multiplied so that it adds g times as much to the stream while it reads y = g x instead of x.

    outputs: parameters times g; norms: (parameter, form) of norms after which a branch ends, w g for the form 'w',
    (1 + w) g - 1 for '1+w'; inputs: parameters that read the stream with no norm before them, times 1 / g. Sorted names
    inside the layer.
    """

    outputs: tuple[str, ...]
    norms: tuple[tuple[str, str], ...] = ()
    inputs: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Every parameter that a gain changes."""
        return (*self.outputs, *(name for name, _ in self.norms), *self.inputs)


_known: WeakKeyDictionary[nn.Module, dict[int, Fold]] = WeakKeyDictionary()


def observe(model: nn.Module, layer: int) -> Fold:
    """The fold of one layer, from one forward of the model up to it. It is not yet proven: see `probe`.

    Raises FoldError with the reason if the layer adds nothing that a parameter scales, or adds it to something else than
    the stream.
    """
    name = f"layer {layer} of {type(model).__name__}"
    unused: set[str] = set()
    for rows, length in _ROWS:
        call = _calls(model, rows, length, layer)[layer]
        fold, unused = _observed(_layers(model)[layer], call, name)
        if not unused:
            return fold
    some = ", ".join(sorted(unused)[:3])
    raise FoldError(
        f"{name} does not use {some} in a forward of {_ROWS[-1][0] * _ROWS[-1][1]} tokens; what a gain multiplies cannot be told"
    )


def probe(model: nn.Module, layer: int, fold: Fold, tolerance: float = TOLERANCE) -> float:
    """Largest error of a fold at two gains, relative to the largest value that the layer adds to the stream; in float32.

    Raises FoldError if it is above the tolerance.
    """
    return _probed(
        _layers(model)[layer],
        _calls(model, *_ROWS[0], layer)[layer],
        fold,
        tolerance,
        f"layer {layer} of {type(model).__name__}",
    )


def fold_of(model: nn.Module, layer: int) -> Fold:
    """The proven fold of one layer; observed once for a model that lives on. Raises FoldError."""
    known = _known.setdefault(model, {})
    if layer not in known:
        fold = observe(model, layer)
        probe(model, layer, fold)
        known[layer] = fold
    return known[layer]


def check_scalable(model: nn.Module) -> None:
    """Proves the folds of all layers of a model, so that `fold_of` has them ready. Raises FoldError for the first that fails."""
    found = _calls(model, *_ROWS[0])
    known = _known.setdefault(model, {})
    for i, (layer, call) in enumerate(zip(_layers(model), found, strict=True)):
        if i not in known:
            name = f"layer {i} of {type(model).__name__}"
            fold, unused = _observed(layer, call, name)
            fold = observe(model, i) if unused else fold
            _probed(layer, call, fold, TOLERANCE, name)
            known[i] = fold


def folded(layer: nn.Module, fold: Fold, gain: float) -> dict[str, Tensor]:
    """The tensors of a layer that a gain changes: name inside the layer -> new tensor, in the parameter's type.

    A product is rounded once, in float32 or wider; 1 + w is taken in float64. Raises FoldError unless 0 < gain < inf.
    """
    if not 0 < gain < float("inf"):
        raise FoldError(f"gain is {gain}, must be in (0, inf)")
    tensors = dict(layer.named_parameters(remove_duplicate=False))
    return {name: scaled(tensors[name].detach(), *factor(fold, name, gain)) for name in fold.names}


def factor(fold: Fold, name: str, gain: float) -> tuple[float, str]:
    """(factor, form) with which a parameter takes up a gain; forms as in `Fold.norms`."""
    if name in fold.inputs:
        return 1 / gain, "w"
    return gain, dict(fold.norms).get(name, "w")


def scaled(tensor: Tensor, by: float, form: str = "w") -> Tensor:
    """tensor * by, or (1 + tensor) * by - 1 for the form '1+w'; a new tensor of the same type."""
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
    hidden = stream_of(call.hidden.shape, call.hidden)
    with torch.no_grad(), ScaleTracer(hidden, parameters) as trace:
        output = call.run(layer, hidden)
    items = trace.items(output)
    if output.shape != hidden.shape or items is None:
        raise FoldError(
            f"{name} does not return its input plus what it adds; scales are not possible, set `scales: none`"
        )
    if not items:
        raise FoldError(
            f"{name} adds nothing that a parameter of it scales; scales are not possible, set `scales: none`"
        )
    outputs = {item for item, form in items if not form}
    norms = {item for item in items if item[1] and item[0] not in outputs}
    fold = Fold(
        tuple(sorted(outputs - trace.inputs)), tuple(sorted(norms)), tuple(sorted(trace.inputs - outputs))
    )
    return fold, set(parameters) - trace.used


def _probed(layer: nn.Module, call: Call, fold: Fold, tolerance: float, name: str) -> float:
    # float32 whatever the model's type, since a fold's error is to be told from rounding
    exact = copy.deepcopy(layer).float()
    call = call.cast(torch.float32)
    hidden = stream_of(call.hidden.shape, call.hidden, seed=1)
    worst = 0.0
    with torch.no_grad():
        added = call.run(exact, hidden) - hidden
        for gain in _GAINS:
            new = folded(exact, fold, gain)
            found = call.run(lambda *a, **k: functional_call(exact, new, a, k), hidden * gain) - hidden * gain  # noqa: B023
            error = float((found / gain - added).abs().max() / added.abs().max())
            worst = max(worst, error if error == error else float("inf"))
    if not worst <= tolerance:
        raise FoldError(
            f"{name}: with a gain in its weights it errs by {worst:.1e} of what it adds, at most {tolerance:.0e} is exact; "
            "scales are not possible, set `scales: none`"
        )
    return worst
