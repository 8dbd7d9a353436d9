"""A stand-in for torch.cuda's graphs on a CPU: a capture runs once and records its operations.

A replay runs the recorded operations again on the same tensors, and no Python of the captured code. What
waits for the device during a capture is refused, as a card refuses it. Streams and pools do nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WAITS = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::masked_select",
}


class FakeGraphs:
    """What was captured and replayed.

    Attributes:
        graphs: Every graph that was made.
        capturing: The one that captures now.
        drift: Added to what each replay changes in place last, for a replay with other bits.
    """

    def __init__(self) -> None:
        self.graphs: list[FakeGraph] = []
        self.capturing: FakeGraph | None = None
        self.drift = 0.0

    @property
    def replays(self) -> int:
        return sum(graph.replays for graph in self.graphs)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Puts the stand-ins into torch.cuda."""
        graph = type("CUDAGraph", (FakeGraph,), {"owner": self})  # a class, as annotations name it
        monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
        monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing is not None)


class FakeStream:
    def __init__(self, device: object = None) -> None:
        pass

    def wait_stream(self, other: object) -> None:
        pass


class FakeGraph:
    owner: FakeGraphs

    def __init__(self) -> None:
        self.replays = 0
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self._mode: _Recorder | None = None
        self.owner.graphs.append(self)

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
        assert self.owner.capturing is None
        self.owner.capturing = self
        self._mode = _Recorder(self)
        self._mode.__enter__()

    def capture_end(self) -> None:
        assert self._mode is not None
        self._mode.__exit__(None, None, None)
        self.owner.capturing = None

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, fresh in self.calls:
            results = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
            given = {leaf.untyped_storage().data_ptr() for leaf in tensors(args, kwargs)}
            made = [result for result in results if result.untyped_storage().data_ptr() not in given]
            for target, result in zip(fresh, made, strict=True):
                target.copy_(result)
        changed = [args[0] for func, args, _, _ in self.calls if func._schema.is_mutable]
        floats = [tensor for tensor in changed if tensor.is_floating_point()]
        if self.owner.drift and floats:
            floats[-1].add_(self.owner.drift)


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: FakeGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in _WAITS:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **kwargs)
        if name == "aten::lift_fresh" and result.numel():
            raise RuntimeError("a tensor was made from host memory while the stream is capturing")
        given = {leaf.untyped_storage().data_ptr() for leaf in tensors(args, kwargs)}
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        fresh = [out for out in outputs if out.untyped_storage().data_ptr() not in given]
        self.graph.calls.append((func, args, kwargs, fresh))
        return result


def tensors(args: Any, kwargs: Any) -> Iterator[Tensor]:
    yield from (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
