"""Cards that are labels: tensors stay on the CPU, and an operation that mixes two devices raises as on cards.

with FakeCards():
    model.to("cuda:1")
    torch.zeros(3, device="cuda:0") + torch.zeros(3, device="cuda:1")  # raises RuntimeError
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

_MOVES = (Tensor.to, Tensor.cuda, Tensor.cpu)
_DEVICE, _IS_CUDA, _DATA = Tensor.device.__get__, Tensor.is_cuda.__get__, Tensor.data.__set__  # type: ignore[attr-defined]
_INDEXING = (Tensor.__getitem__, Tensor.__setitem__)
CPU = torch.device("cpu")


class FakeCards(TorchFunctionMode):
    """A context in which 'cuda:N' can be had."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation on the CPU, with the labels that it would have on cards."""
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        if func == _DEVICE:
            return card(args[0])
        if func == _IS_CUDA:
            return card(args[0]).type == "cuda"
        if func in _MOVES:
            return _moved(func, args, kwargs)
        device = _device(kwargs.get("device"))
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        found = {card(leaf) for leaf in leaves if leaf.dim() or card(leaf) != CPU}
        if func in _INDEXING:
            found.discard(CPU)  # indices may be the host's
        if len(found) > 1 and func not in (Tensor.copy_, _DATA):
            raise RuntimeError(f"tensors on {', '.join(sorted(map(str, found)))} in {func.__name__}")
        result = func(*_on_cpu(args), **_on_cpu(kwargs))
        if func == _DATA:
            args[0]._card = card(args[1])
        elif func is not Tensor.copy_:
            _label(result, device or next(iter(found), CPU))
        return result


def card(tensor: Tensor) -> torch.device:
    """The device that a tensor claims to be on."""
    return getattr(tensor, "_card", CPU)


def _moved(func: Any, args: Any, kwargs: Any) -> Any:
    given = [*args[1:], *kwargs.values()]
    target = torch.device("cpu" if func is Tensor.cpu else "cuda:0") if func is not Tensor.to else None
    for value in given:
        if isinstance(value, Tensor):
            target = card(value)
        elif not isinstance(value, bool) and _device(value) is not None:
            target = _device(value)
    result = func(*_on_cpu(args), **_on_cpu(kwargs)) if func is Tensor.to else args[0]
    target = target or card(args[0])
    if target != card(args[0]) and result is args[0]:
        result = args[0].detach().clone()
    _label(result, target)
    return result


def _device(value: Any) -> torch.device | None:
    """The device that a value names; None for any other value."""
    if isinstance(value, int) and not isinstance(value, bool):
        return torch.device("cuda", value)
    if not isinstance(value, str | torch.device):
        return None
    device = torch.device(value)
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _on_cpu(value: Any) -> Any:
    """Arguments with 'cpu' for each device."""

    def one(leaf: Any) -> Any:
        is_card = isinstance(leaf, torch.device) or (isinstance(leaf, str) and leaf.startswith("cuda"))
        return CPU if is_card else leaf

    return tree_map(one, value)


def _label(result: Any, device: torch.device) -> None:
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor):
            leaf._card = device  # type: ignore[attr-defined]
