"""vLLM as a text engine, in the process that calls it.

Weights get into it in two ways. In place: they are copied to where its parameters lie, which kernels and
captured graphs go on reading. By reload: vLLM's own loader takes them, which also packs, pads, transposes and
shards them. After either, keys and values computed with earlier weights are forgotten: vLLM would serve them
to the next candidate, whose texts would then be wrong without a sign.

Checked with vLLM 0.32 on a CPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from evomerge.evaluation.engines.engine import EngineError, EngineModel, EngineSettings, Progress, Pushed
from evomerge.evaluation.engines.shared_weights import SharedWeights
from evomerge.evaluation.engines.weight_positions import Position, find_positions

_EXTENSION = "evomerge.evaluation.engines.vllm_extension.PushExtension"
_CPU_ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine is in this process, where the model can be had
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


class VllmEngine:
    """A running vLLM. Satisfies `engine.TextEngine`."""

    def __init__(self, model: EngineModel, settings: EngineSettings) -> None:
        """See `EngineFactory`."""
        self._settings, self._device = settings, torch.device(model.device)
        self._dtype: torch.dtype = getattr(torch, model.dtype)
        for name, value in {**_ENVIRONMENT, **(_CPU_ENVIRONMENT if self._on_cpu else {})}.items():
            os.environ.setdefault(name, value)
        if self._on_cpu and settings.push == "in-place":
            _keep_linear_layers_plain()
        try:
            self._open(model, settings)
        except Exception as error:
            raise EngineError(f"vLLM does not start: {type(error).__name__}: {error}") from error
        self._positions: dict[str, Position] | None = None
        self._way: tuple[str, str] | None = None
        self._shared: SharedWeights | None = None
        self._running: set[int] = set()
        self._begun = 0

    @property
    def _on_cpu(self) -> bool:
        return self._device.type == "cpu"

    def _open(self, model: EngineModel, settings: EngineSettings) -> None:
        from vllm import LLM

        options: dict[str, Any] = {
            "dtype": model.dtype,
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "max_model_len": model.max_length,
            "max_num_seqs": settings.rows,
            "enable_prefix_caching": True,
            "kv_cache_memory_bytes": settings.cache,
            "tensor_parallel_size": settings.tensor_parallel,
            "worker_extension_cls": _EXTENSION,
            "disable_log_stats": True,
            "seed": 0,
        }
        if self._on_cpu:
            options["enforce_eager"] = True
        self._llm: Any = LLM(model=model.folder, **{**options, **settings.options})
        self._engine = self._llm.llm_engine

    def facts(self) -> Mapping[str, str]:
        """See `TextEngine.facts`."""
        s = self._settings
        shown = {name: value for name, value in s.options.items() if value is not None}
        import vllm

        return {
            "engine": f"vllm {vllm.__version__}",
            "device": self._device.type if self._on_cpu else torch.cuda.get_device_name(self._device),
            "settings": ", ".join(
                [f"rows {s.rows}", f"tensor parallel {s.tensor_parallel}"]
                + [f"{name} {value}" for name, value in sorted(shown.items())]
            ),
        }

    # ---- weights -------------------------------------------------------------------------------------------

    def push(self, tensors: Mapping[str, Tensor]) -> Pushed:
        """See `TextEngine.push`."""
        if self._way is None:
            self._way = self._choose_way(tensors)
        way, reason = self._way
        if way == "in-place":
            self._write(tensors)
        else:
            self._reload(tensors)
        self.forget_keys_and_values()
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        return Pushed(way, reason, len(tensors), size)

    def forget_keys_and_values(self) -> None:
        """Drops the prefix cache: it holds what earlier weights computed."""
        if not self._llm.reset_prefix_cache():
            raise EngineError("vLLM does not reset its prefix cache while requests run")

    def _choose_way(self, tensors: Mapping[str, Tensor]) -> tuple[str, str]:
        wanted = self._settings.push
        if wanted == "reload":
            return "reload", "asked for"
        if self._settings.tensor_parallel > 1:
            found: dict[str, Position] | str = "several devices share the model"
        else:
            found = self._find_positions(tensors)
        if isinstance(found, dict):
            self._positions = found
            return "in-place", "every tensor is one run of a parameter"
        if wanted == "in-place":
            raise EngineError(
                f"weights cannot be written in place: {found}; set evaluation.engine.push: auto"
            )
        return "reload", found

    def _find_positions(self, tensors: Mapping[str, Tensor]) -> dict[str, Position] | str:
        """Where tensors lie, or why they cannot be written there."""
        model = self._model()
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        parameters = {name: own.data for name, own in model.named_parameters()}
        if any(own.dtype != self._dtype for own in parameters.values()):
            return "vLLM keeps parameters of another type"
        try:
            return find_positions(parameters, shapes, model.load_weights, self._dtype)
        except Exception as error:  # a loader may raise anything where parameters are packed
            return f"vLLM has packed its weights ({type(error).__name__})"

    def _write(self, tensors: Mapping[str, Tensor]) -> None:
        assert self._positions is not None
        parameters = dict(self._model().named_parameters())
        for name, tensor in tensors.items():
            at = self._positions[name]
            own = parameters[at.parameter].data.view(-1)[at.start : at.start + at.size]
            own.copy_(tensor.detach().reshape(-1), non_blocking=True)
        if not self._on_cpu:
            torch.cuda.synchronize(self._device)

    def _reload(self, tensors: Mapping[str, Tensor]) -> None:
        if self._settings.tensor_parallel == 1:
            weights = [(name, tensor.detach()) for name, tensor in tensors.items()]
            self._llm.collective_rpc("evomerge_reload_from", args=(weights,))
            return
        if self._shared is None:
            self._shared = SharedWeights.for_tensors(tensors)
        self._shared.write(tensors)
        places = self._shared.places(tensors)
        self._llm.collective_rpc("evomerge_reload", args=(self._shared.path, self._shared.size, places))

    def _model(self) -> Any:
        """vLLM's module: in this process `apply_model` hands over itself."""
        found: list[Any] = []
        self._llm.apply_model(found.append)
        return found[0]

    # ---- texts ---------------------------------------------------------------------------------------------

    def start(self, prompts: Sequence[Sequence[int]], limits: Sequence[int], end_ids: Sequence[int]) -> None:
        """See `TextEngine.start`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.abort(sorted(self._running))
        self._begun += 1
        for row, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            params = SamplingParams(
                temperature=0.0,
                max_tokens=limit,
                logprobs=0,
                detokenize=False,
                ignore_eos=True,
                stop_token_ids=list(end_ids),
                output_kind=RequestOutputKind.DELTA,
            )
            self._engine.add_request(self._name(row), {"prompt_token_ids": list(prompt)}, params)
            self._running.add(row)

    def step(self) -> list[Progress]:
        """See `TextEngine.step`."""
        made = []
        for output in self._engine.step():
            begun, row = map(int, output.request_id.split("."))
            if begun != self._begun or row not in self._running:
                continue
            if output.finished:
                self._running.discard(row)
            made.append(_progress(row, output))
        return made

    def abort(self, rows: Sequence[int]) -> None:
        """See `TextEngine.abort`."""
        running = [row for row in rows if row in self._running]
        if running:
            self._engine.abort_request([self._name(row) for row in running])
            self._running.difference_update(running)

    def _name(self, row: int) -> str:
        return f"{self._begun}.{row}"

    def close(self) -> None:
        """See `TextEngine.close`."""
        self.abort(sorted(self._running))
        self._engine.engine_core.shutdown()
        del self._llm, self._engine


def _progress(row: int, output: Any) -> Progress:
    """What vLLM reports of a row."""
    completion = output.outputs[0]
    tokens = tuple(map(int, completion.token_ids))
    given = completion.logprobs or [{}] * len(tokens)
    logprobs = tuple(
        float(of[token].logprob) if token in of else float("nan")
        for token, of in zip(tokens, given, strict=True)
    )
    return Progress(row, tokens, logprobs, bool(output.finished))


def _keep_linear_layers_plain() -> None:
    """Has vLLM's linear layers on a CPU read their parameters, which it would pack and drop."""
    from vllm.model_executor.layers import linear, utils, vocab_parallel_embedding

    def plain(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    changed: Iterable[Any] = (utils, linear, vocab_parallel_embedding)
    for module in changed:
        if hasattr(module, "dispatch_cpu_unquantized_gemm"):
            module.dispatch_cpu_unquantized_gemm = plain
