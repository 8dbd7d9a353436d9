"""What runs where vLLM keeps its model: in its own worker processes, or in this one where it has none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from evomerge.evaluation.engines.shared_weights import SharedTensor, SharedWeights


class PushExtension:
    """Methods that vLLM adds to its workers (`worker_extension_cls`), called by `collective_rpc`."""

    model_runner: Any

    def evomerge_reload(self, path: str, size: int, tensors: Sequence[SharedTensor]) -> int:
        """Loads tensors through vLLM's own loader, which takes its shard of each.

        Args:
            path: Of the shared memory.
            size: Its bytes.
            tensors: Where each tensor lies in it.

        Returns:
            How many were given.
        """
        weights = SharedWeights.attached(path, size)
        self.evomerge_reload_from(weights.views(tensors).items())
        return len(tensors)

    def evomerge_reload_from(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """The same, with the tensors at hand.

        Args:
            tensors: (name on disk, tensor).
        """
        self.model_runner.reload_weights(weights_iterator=iter(tensors))
        pack_tied_heads(self.model_runner.get_model())


def pack_tied_heads(model: nn.Module) -> None:
    """Packs heads that share the embedding's weights once more.

    vLLM 0.32 packs the weights of a head for a CPU when it is loaded, and leaves a tied one as it was when
    the embedding is loaded again: logits would be those of the first weights.

    Args:
        model: vLLM's own.
    """
    packed = [module for module in model.modules() if hasattr(module, "cpu_linear")]
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.numel():
            owners.setdefault(weight.data_ptr(), []).append(module)
    for module in packed:
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.numel() and len(owners[weight.data_ptr()]) > 1:
            module.quant_method.process_weights_after_loading(module)  # type: ignore[union-attr, operator]
