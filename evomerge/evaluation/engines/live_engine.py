"""A text engine that follows a live model: it generates with the weights that the model has at the moment."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from evomerge.errors import CandidateError, EngineSetupError
from evomerge.evaluation.engines import engine_check
from evomerge.evaluation.engines.child_engine import ChildEngine
from evomerge.evaluation.engines.engine import (
    EngineError,
    EngineFactory,
    EngineModel,
    EngineSettings,
    Pushed,
    TextEngine,
    find_factory,
)
from evomerge.evaluation.engines.texts import Text, generate
from evomerge.evaluation.inference.requests import Verification
from evomerge.evaluation.inference.selected_logits import RowHead, device_of, dtype_of

log = logging.getLogger(__name__)
VLLM = "evomerge.evaluation.engines.vllm_engine:VllmEngine"


class LiveEngine:
    """Opens an engine when it is first needed, gives it what changed, and replaces it where it died.

    Attributes:
        settings: How the engine is opened.
        max_length: Most tokens of a prompt and its answer.
        pushed: What the last push did; None before any.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: EngineSettings,
        max_length: int,
        factory: str | None = None,
        import_path: Sequence[str] = (),
    ) -> None:
        """Opens nothing.

        Args:
            model: The live model.
            settings: How the engine is opened.
            max_length: Most tokens of a prompt and its answer.
            factory: 'module:name' of an `EngineFactory`; None for vLLM.
            import_path: Folders that a child imports from beside its environment.
        """
        self.settings = settings
        self.pushed: Pushed | None = None
        self.max_length = max_length
        self._model, self._factory, self._import_path = model, factory or VLLM, import_path
        self._engine: TextEngine | None = None
        self._verification: Verification | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._has_opened = False

    @property
    def verification(self) -> Verification | None:
        """Whether the engine computes what the model does; None before it was checked."""
        return self._verification

    def facts(self) -> Mapping[str, str]:
        """See `TextEngine.facts`. Opens the engine."""
        return self._opened().facts()

    def verify(self, head: RowHead, prompts: Sequence[Sequence[int]], new: int) -> Verification:
        """Compares the engine with the live model, once for each that is opened.

        Args:
            head: The live model's.
            prompts: Token ids of a few prompts.
            new: Tokens to generate after each.

        Returns:
            What was found.

        Raises:
            EngineSetupError: It computes something else, so that no score of it can be trusted.
        """
        self._opened()
        if self._verification is None:
            limits = [new] * len(prompts)
            found = engine_check.check(
                self._model, head, prompts, lambda: self.texts(prompts, limits, (), lambda tokens: False)
            )
            if not found.allowed:
                self.close()
                raise EngineSetupError(
                    f"the engine cannot be trusted with this model: {found.reason}; "
                    "use evaluation.backend: compiled"
                )
            log.info("engine: %s", found.reason)
            self._verification = found
        return self._verification

    def texts(
        self,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        end_ids: Collection[int],
        hits: Callable[[Sequence[int]], bool],
    ) -> list[Text]:
        """Generates texts with the live model's present weights; see `texts.generate`.

        Args:
            prompts: Token ids.
            limits: Most new tokens of each.
            end_ids: Token ids that end a text.
            hits: Whether a stop string ends a text.

        Returns:
            The texts.

        Raises:
            CandidateError: Logits are NaN.
            OSError: The engine died or hung, which is the machine's fault; the next call opens another one.
            EngineError: It failed at what it was asked.
        """
        engine = self._opened()
        try:
            self.pushed = engine.push(tensors_on_disk(self._model))
            return generate(engine, prompts, limits, end_ids, hits)
        except CandidateError:
            raise
        except Exception:
            self.close()
            raise

    def close(self) -> None:
        """Closes the engine; it is opened again where it is needed."""
        engine, self._engine = self._engine, None
        self._verification = None
        if engine is not None:
            with contextlib.suppress(Exception):  # it may be dead
                engine.close()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _opened(self) -> TextEngine:
        if self._engine is None:
            try:
                self._engine = self._open()
            except (EngineError, OSError) as error:
                self.close()
                if self._has_opened:  # it could be opened before: the machine's fault, not the settings'
                    raise
                raise EngineSetupError(f"the engine cannot be opened: {error}") from error
            self._has_opened = True
            log.info("engine: %s", ", ".join(self._engine.facts().values()))
        return self._engine

    def _open(self) -> TextEngine:
        described = self._described()
        if self.settings.process == "child":
            return ChildEngine(self._factory, described, self.settings, import_path=self._import_path)
        factory: EngineFactory = find_factory(self._factory)
        return factory(described, self.settings)

    def _described(self) -> EngineModel:
        """What the engine opens: a folder with the model's config alone."""
        self._folder = tempfile.TemporaryDirectory(prefix="evomerge-engine-model-")
        config: Any = self._model.config
        config.save_pretrained(self._folder.name)
        dtype = str(dtype_of(self._model)).removeprefix("torch.")
        device = str(device_of(self._model))
        return EngineModel(str(Path(self._folder.name)), dtype, device, self.max_length)


def tensors_on_disk(model: nn.Module) -> dict[str, Tensor]:
    """A model's tensors as a checkpoint has them: tied ones once, those that are fused in memory apart.

    Args:
        model: A model of transformers.

    Returns:
        Name on disk -> tensor, which shares memory with the model where it is a part of it.
    """
    from transformers.core_model_loading import revert_weight_conversion

    tied: Any = getattr(model, "all_tied_weights_keys", None) or {}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    converted: dict[str, Tensor] = revert_weight_conversion(model, state)
    return converted
