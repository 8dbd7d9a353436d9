"""Which parameters of a layer scale what it adds to the residual stream, observed in one forward.

Every tensor is followed by how it scales with the stream (its degree: 1 for the stream, 0 for what comes out
of a norm) and by the last parameters it is linear in. It is abstract interpretation by rough rules: a fold
that it finds has to be checked with numbers. Knows nothing of models, modules or names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Factor = tuple[str, str]
"""(parameter, form): 'w' for a factor w, '1+w' for a factor 1 + w, '' for what is multiplied or added as it
is.
"""

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
"""Operations whose result holds values of several tensors."""
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
_LINEAR = _REARRANGED | frozenset(
    {
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
)
"""Operations that are linear in what they read: their result is linear in whatever that is linear in."""
_NORMS = frozenset(
    {"native_layer_norm", "_fused_rms_norm", "native_group_norm", "layer_norm", "rms_norm", "group_norm"}
)
_DEGREE_KEPT = frozenset(
    {"abs", "linalg_vector_norm", "norm", "clamp", "clamp_min", "maximum", "amax", "max"}
)
"""Operations that are not linear and scale as what they read."""
_POWERS = {"rsqrt": -0.5, "sqrt": 0.5, "reciprocal": -1.0, "square": 2.0}


@dataclass(frozen=True, slots=True)
class _Value:
    """What is known of a tensor.

    degree: power of the stream's scale; factors: parameters it is linear in; parameter: the parameter it is,
    if it is one; is_matrix: whether that has more than one axis.
    """

    degree: float = 0.0
    factors: frozenset[Factor] = frozenset()
    parameter: Factor | None = None
    is_matrix: bool = False


_PLAIN = _Value()


class ScaleTracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the operations inside its `with` block.

        with torch.no_grad(), ScaleTracer(hidden, dict(layer.named_parameters())) as tracer:
            output = layer(hidden)
        print(tracer.factors(output))

    Attributes:
        inputs: Parameters that multiply the stream itself, with no norm before them.
        used: Every parameter that was read.
    """

    def __init__(self, stream: Tensor, parameters: Mapping[str, Tensor]) -> None:
        """Prepares to follow a forward.

        Args:
            stream: The hidden state that enters the layer.
            parameters: The layer's parameters by name.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._values: dict[int, _Value] = {_key(stream): _Value(1.0)}
        self._alive: list[Tensor] = [stream]
        for name, parameter in parameters.items():
            self._values[_key(parameter)] = _Value(parameter=(name, "w"), is_matrix=parameter.ndim > 1)
        self.inputs: set[str] = set()
        self.used: set[str] = set()

    def factors(self, output: Tensor) -> frozenset[Factor] | None:
        """The parameters that scale what a tensor holds beside the stream.

        Args:
            output: A tensor made inside the `with` block.

        Returns:
            The parameters with their forms; None if the tensor does not hold the stream itself.
        """
        value = self._values.get(_key(output), _PLAIN)
        return value.factors if value.degree == 1.0 else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and notes what its results are."""
        kwargs = kwargs or {}
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        values = [self._values.get(_key(tensor), _PLAIN) for tensor in read]
        result = func(*args, **kwargs)
        self.used |= {value.parameter[0] for value in values if value.parameter}
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        name = func._overloadpacket.__name__
        if name.endswith("_") and read:
            written = [read[0]]
        elif written and read and all(_key(tensor) == _key(read[0]) for tensor in written):
            return result  # a view
        if values:
            value = self._result(name, args, values)
            for tensor in written:
                if value != _PLAIN or _key(tensor) in self._values:
                    self._values[_key(tensor)] = value
            self._alive += [*read, *written]
        return result

    def _result(self, name: str, args: Any, values: list[_Value]) -> _Value:
        """What an operation makes of the values that it reads."""
        activations = [value for value in values if value.parameter is None]
        parameters = [value for value in values if value.parameter is not None]
        if not activations:
            return _of_parameters(name, args, parameters)
        matrices = [value for value in parameters if value.is_matrix]
        if values[0].parameter and name in _REARRANGED:
            return values[0]
        if matrices and name not in _SUMS | _PRODUCTS:
            return self._projection(activations, parameters, matrices)
        if name in _NORMS:
            return _Value(factors=_vector_factors(parameters[:1]) | _terms(parameters[1:]))
        if name.rstrip("_") in ("mul", "div", "bmm", "mm", "matmul"):
            return _product(name.rstrip("_"), activations, parameters)
        if name in _SUMS:
            return _joined(activations, _terms(parameters))
        first = activations[0]
        if name.startswith("pow") and first.degree:
            return _Value(first.degree * float(args[1]) if isinstance(args[1], (int, float)) else 0.0)
        if name in _POWERS:
            return _Value(first.degree * _POWERS[name])
        if name in _LINEAR:
            return _joined(activations, frozenset())
        return _Value(first.degree if name in _DEGREE_KEPT else 0.0)

    def _projection(
        self, activations: list[_Value], parameters: list[_Value], matrices: list[_Value]
    ) -> _Value:
        """A linear map: its result is linear in its matrix, and in its bias."""
        if any(value.degree == 1.0 for value in activations):
            self.inputs |= {value.parameter[0] for value in matrices if value.parameter}
        return _Value(factors=_terms(parameters))


def random_hidden_state(shape: torch.Size, like: Tensor, scale: float = 2.0, seed: int = 0) -> Tensor:
    """A random hidden state, the same on every device.

    Args:
        shape: Its shape.
        like: A tensor of the type and on the device that it gets.
        scale: Standard deviation of its normal values, whose mean is 0.
        seed: Seed of the values.

    Returns:
        The hidden state.
    """
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).to(like.device, like.dtype)


def _of_parameters(name: str, args: Any, parameters: list[_Value]) -> _Value:
    """A rearranged or cast parameter is still that parameter; one to which 1 was added has the form 1 + w."""
    first = parameters[0]
    is_one_added = name in ("add", "add_", "rsub") and any(
        isinstance(argument, (int, float)) and argument == 1 for argument in args
    )
    if is_one_added and len(parameters) == 1 and first.parameter:
        return _Value(parameter=(first.parameter[0], "1+w"), is_matrix=first.is_matrix)
    return first if name in _REARRANGED else _PLAIN


def _joined(activations: list[_Value], terms: frozenset[Factor]) -> _Value:
    """A sum, or another operation that is linear in all it reads. terms: parameters that are added."""
    degree = max((value.degree for value in activations), key=abs)
    return _Value(degree, frozenset().union(*(value.factors for value in activations), terms))


def _product(name: str, activations: list[_Value], parameters: list[_Value]) -> _Value:
    """name: 'mul', 'div', 'bmm', 'mm' or 'matmul'."""
    if parameters:  # by a vector of weights, as the last step of a norm is
        degree = activations[0].degree
        return _Value(degree, activations[0].factors if degree else _vector_factors(parameters))
    if len(activations) == 1:
        return activations[0]
    first, second = activations[0], activations[1]
    degree = first.degree - second.degree if name == "div" else first.degree + second.degree
    is_normed = degree == 0.0 and (first.degree or second.degree)
    if is_normed or degree not in (0.0, 1.0):
        return _Value(degree)
    return _Value(degree, _carried(name, first, second))


def _carried(name: str, first: _Value, second: _Value) -> frozenset[Factor]:
    """The parameters that a product of two activations is linear in."""
    if first.degree == 1.0:
        return first.factors
    if second.degree == 1.0:
        return second.factors
    if name in ("bmm", "mm", "matmul"):
        return frozenset()
    if name == "div":
        return first.factors
    return second.factors or first.factors


def _vector_factors(values: list[_Value]) -> frozenset[Factor]:
    """Parameters as factors: vectors with their form, matrices as they are."""
    return frozenset(
        (value.parameter[0], "") if value.is_matrix else value.parameter
        for value in values
        if value.parameter
    )


def _terms(values: list[_Value]) -> frozenset[Factor]:
    """Parameters that are multiplied or added as they are."""
    return frozenset((value.parameter[0], "") for value in values if value.parameter)


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
