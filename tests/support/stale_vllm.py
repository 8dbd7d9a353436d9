"""vLLM with a fault: it keeps what earlier weights computed."""

from __future__ import annotations

from evomerge.evaluation.engines.vllm_engine import VllmEngine

PATH = "tests.support.stale_vllm:StaleVllm"


class StaleVllm(VllmEngine):
    """Does not reset the prefix cache at a push."""

    def forget_keys_and_values(self) -> None:
        pass
