"""CUDA graphs: what a callable launches is captured once and launched again without its Python.

A replay reads and writes the addresses that were captured. So it takes up weights that were changed in place,
and nothing else that changed since. Run on no card so far: tests use a stand-in for torch's graphs.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Step = Callable[[], object]
"""Launches work on static tensors; what it returns is not used."""
Graph = torch.cuda.CUDAGraph
OTHER_BITS = "a replay gives other bits than the run that was captured"


class CudaGraphs:
    """Captures on one card. All graphs share a memory pool, so they are replayed in the order of capture.

    Attributes:
        device: The card.
    """

    def __init__(self, device: torch.device) -> None:
        """Makes a stream and a pool.

        Args:
            device: The card.
        """
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """Runs what is inside on the stream of captures, after all before it and before all after it."""
        outside = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(outside)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            outside.wait_stream(self._stream)

    def capture(self, step: Step) -> Graph:
        """Captures a step without running it. To be called inside `stream`.

        Args:
            step: What to capture. It ran before on this stream, so that libraries have their workspaces.

        Returns:
            The graph.

        Raises:
            RuntimeError: The step waits for the card, or something else that no graph can hold.
        """
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            step()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # that the capture is invalid is known
                graph.capture_end()
            raise
        graph.capture_end()
        return graph


def graphs_for(model: nn.Module) -> CudaGraphs | None:
    """Opens graphs for a model.

    Args:
        model: The live model.

    Returns:
        The graphs; None unless all of the model is on one card.
    """
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) != 1 or not torch.cuda.is_available():
        return None
    device = devices.pop()
    return CudaGraphs(device) if device.type == "cuda" else None


@dataclass(frozen=True, slots=True)
class Addresses:
    """What a graph of a model has taken for constant.

    Attributes:
        modules: The model's modules, in order.
        pointers: Addresses of their parameters and buffers.
    """

    modules: tuple[nn.Module, ...]
    pointers: tuple[int, ...]

    def hold(self, model: nn.Module) -> bool:
        """Returns whether a graph captured at these addresses still computes a model.

        Args:
            model: The model.

        Returns:
            False if a module was exchanged, or a parameter moved.
        """
        now = addresses(model)
        same = len(now.modules) == len(self.modules) and all(map(_is, now.modules, self.modules))
        return same and now.pointers == self.pointers


def addresses(model: nn.Module) -> Addresses:
    """Collects the addresses of a model.

    Args:
        model: The model.

    Returns:
        Its modules and the addresses of their tensors.
    """
    tensors = (*model.parameters(), *model.buffers())
    return Addresses(tuple(model.modules()), tuple(tensor.data_ptr() for tensor in tensors))


def is_static(model: nn.Module) -> bool:
    """Returns whether a model computes with its tensors alone, so that a graph of it can stay right.

    Args:
        model: The model.

    Returns:
        False if a parameter is computed from numbers that Python holds, as gains of a route are.
    """
    return not any(parametrize.is_parametrized(module) for module in model.modules())


def captured(
    graphs: CudaGraphs,
    state: Sequence[Tensor],
    steps: Sequence[Step],
    result: Callable[[], Tensor | None] = lambda: None,
) -> list[Graph] | str:
    """Runs steps, captures them, and compares a replay with the run bit for bit.

    Afterwards the state is what the steps make of it, whatever came of the capture.

    Args:
        graphs: Where to capture.
        state: Every tensor that outlives the steps and that they change.
        steps: In the order in which they run.
        result: Gives a tensor that the last step made, to be compared too; None for none.

    Returns:
        A graph of each step, to be replayed in this order; or why there is none.
    """
    before = [tensor.clone() for tensor in state]
    with graphs.stream():
        for step in steps:
            step()
        expected = [tensor.clone() for tensor in state]
        made = result()
        made = None if made is None else made.clone()
        gc.collect()  # nothing on the card is to be freed by chance during a capture
        try:
            found = [graphs.capture(step) for step in steps]
            _restore(state, before)
            for graph in found:
                graph.replay()
            equal = all(map(same_bits, state, expected))
            again = result()
            equal = equal and (made is None or (again is not None and same_bits(again, made)))
        except Exception as error:  # a model may do anything in its forward
            _restore(state, expected)
            return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        if not equal:
            _restore(state, expected)
            return OTHER_BITS
    return found


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Compares two tensors of one shape and type bit for bit.

    Args:
        one: A tensor.
        other: Another.

    Returns:
        Whether all bits are equal; NaN equals the same NaN.
    """
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _restore(state: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(state, values, strict=True):
        tensor.copy_(value)


def _is(one: object, other: object) -> bool:
    return one is other
