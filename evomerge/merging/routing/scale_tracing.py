"""Which parameters of a layer scale what it adds to the residual stream, read off the operations of one forward.

Every tensor is followed by how it scales with the stream (its degree: 1 for the stream, 0 for what comes out of a norm) and
by the last parameters it is linear in. It is abstract interpretation by rough rules: a plan found so has to be checked with
numbers. Knows nothing of models, modules or names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Item = tuple[
    str, str
]  # parameter, form: 'w' for a factor w, '1+w' for a factor 1 + w, '' for what is multiplied or added as it is

_JOINED = frozenset(
    {
        "index_add",
        "index_add_",
        "scatter_add",
        "scatter_add_",
        "index_put",
        "index_put_",
        "_index_put_impl_",
        "copy_",
        "cat",
        "stack",
    }
)
_SUMS = _JOINED | {"add", "add_", "sub", "sub_", "rsub"}
_PRODUCTS = frozenset({"mul", "mul_", "div", "div_"})
_REARRANGED = frozenset(
    {
        "clone",
        "_to_copy",
        "copy",
        "contiguous",
        "to",
        "index",
        "index_select",
        "gather",
        "repeat",
        "repeat_interleave",
        "constant_pad_nd",
        "flip",
        "roll",
        "sort",
        "unsafe_split",
        "split_with_sizes_copy",
        "expand_copy",
        "_unsafe_index",
        "t",
        "view",
        "expand",
        "transpose",
    }
)
"""Operations whose result holds the values they read, and no others but zeros."""
_LINEAR = _REARRANGED | {
    "sum",
    "mean",
    "neg",
    "cumsum",
    "where",
    "masked_fill",
    "masked_fill_",
    "slice_scatter",
    "index_copy",
    "index_copy_",
    "scatter",
    "scatter_",
    "native_dropout",
    "dropout",
    "embedding",
}
"""Operations that are linear in what they read, so that what it is linear in, they are linear in."""
_NORMS = frozenset(
    {"native_layer_norm", "_fused_rms_norm", "native_group_norm", "layer_norm", "rms_norm", "group_norm"}
)
_KEEP = frozenset({"abs", "linalg_vector_norm", "norm", "clamp", "clamp_min", "maximum", "amax", "max"})
_POWERS = {"rsqrt": -0.5, "sqrt": 0.5, "reciprocal": -1.0, "square": 2.0}


@dataclass(frozen=True, slots=True)
class _Value:
    """degree: power of the stream's scale; items: parameters it is linear in; own: the parameter it is, if it is one."""

    degree: float = 0.0
    items: frozenset[Item] = frozenset()
    own: Item | None = None
    matrix: bool = False


_PLAIN = _Value()


class ScaleTracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the operations inside its `with` block.

    inputs: parameters that multiply the stream itself, with no norm before them. used: every parameter that was read.
    """

    def __init__(self, stream: Tensor, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._values: dict[int, _Value] = {_key(stream): _Value(1.0)}
        self._alive: list[Tensor] = [stream]
        for name, parameter in parameters.items():
            self._values[_key(parameter)] = _Value(own=(name, "w"), matrix=parameter.ndim > 1)
        self.inputs: set[str] = set()
        self.used: set[str] = set()

    def items(self, output: Tensor) -> frozenset[Item] | None:
        """The parameters that scale what a tensor holds beside the stream; None if it does not hold the stream itself."""
        value = self._values.get(_key(output), _PLAIN)
        return value.items if value.degree == 1.0 else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and notes what its results are."""
        kwargs = kwargs or {}
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        values = [self._values.get(_key(t), _PLAIN) for t in read]
        result = func(*args, **kwargs)
        self.used |= {value.own[0] for value in values if value.own}
        written = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if func._overloadpacket.__name__.endswith("_") and read:
            written = [read[0]]
        elif written and read and all(_key(t) == _key(read[0]) for t in written):
            return result  # a view
        if values:
            found = self._result(func._overloadpacket.__name__, args, read, values)
            for tensor in written:
                if found != _PLAIN or _key(tensor) in self._values:
                    self._values[_key(tensor)] = found
            self._alive += [*read, *written]
        return result

    def _result(self, name: str, args: Any, read: list[Tensor], values: list[_Value]) -> _Value:
        activations = [v for v in values if v.own is None]
        own = [v for v in values if v.own is not None]
        if not activations:
            return _of_parameters(name, args, own)
        matrices = [v for v in own if v.matrix]
        if values[0].own and name in _REARRANGED:
            return values[0]
        if matrices and name not in _SUMS | _PRODUCTS:
            return self._projection(activations, own, matrices)
        if name in _NORMS:
            return _Value(items=_factors(own[:1]) | _terms(own[1:]))
        if name.rstrip("_") in ("mul", "div", "bmm", "mm", "matmul"):
            return _product(name.rstrip("_"), activations, own)
        if name in _SUMS:
            degree = max((v.degree for v in activations), key=abs)
            return _Value(degree, frozenset().union(*(v.items for v in activations), _terms(own)))
        first = activations[0]
        if name.startswith("pow") and first.degree:
            return _Value(first.degree * float(args[1]) if isinstance(args[1], (int, float)) else 0.0)
        if name in _POWERS:
            return _Value(first.degree * _POWERS[name])
        if name in _LINEAR:
            degree = max((v.degree for v in activations), key=abs)
            return _Value(degree, frozenset().union(*(v.items for v in activations)))
        return _Value(first.degree if name in _KEEP else 0.0)

    def _projection(self, activations: list[_Value], own: list[_Value], matrices: list[_Value]) -> _Value:
        """A linear map: its result is linear in its matrix, and in its bias."""
        if any(v.degree == 1.0 for v in activations):
            self.inputs |= {v.own[0] for v in matrices if v.own}
        return _Value(items=_terms(own))


def _of_parameters(name: str, args: Any, own: list[_Value]) -> _Value:
    """A rearranged or cast parameter is still that parameter; one to which 1 was added has the form 1 + w."""
    first = own[0]
    if (
        name in ("add", "add_", "rsub")
        and len(own) == 1
        and first.own
        and any(isinstance(a, (int, float)) and a == 1 for a in args)
    ):
        return _Value(own=(first.own[0], "1+w"), matrix=first.matrix)
    return first if name in _REARRANGED else _PLAIN


def _product(name: str, activations: list[_Value], own: list[_Value]) -> _Value:
    if own:  # by a vector of weights, as the last step of a norm is
        degree = activations[0].degree
        return _Value(degree, activations[0].items if degree else _factors(own))
    if len(activations) == 1:
        return activations[0]
    first, second = activations[0], activations[1]
    degree = first.degree - second.degree if name == "div" else first.degree + second.degree
    carried = (
        frozenset[Item]()
        if name in ("bmm", "mm", "matmul")
        else first.items
        if name == "div"
        else second.items or first.items
    )
    if first.degree == 1.0 or second.degree == 1.0:
        carried = first.items if first.degree == 1.0 else second.items
    return _Value(
        degree,
        carried if degree in (0.0, 1.0) and (degree or not (first.degree or second.degree)) else frozenset(),
    )


def _factors(values: list[_Value]) -> frozenset[Item]:
    return frozenset(v.own if not v.matrix else (v.own[0], "") for v in values if v.own)


def _terms(values: list[_Value]) -> frozenset[Item]:
    return frozenset((v.own[0], "") for v in values if v.own)


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def stream_of(shape: torch.Size, like: Tensor, scale: float = 2.0, seed: int = 0) -> Tensor:
    """A random hidden state of a type and device, normal with mean 0 and standard deviation `scale`; the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).to(like.device, like.dtype)
