"""An engine that follows a live model: checked when it is opened, replaced where it died."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.errors import CandidateError, EngineSetupError
from evomerge.evaluation.engines.engine import EngineError, EngineSettings
from evomerge.evaluation.engines.live_engine import LiveEngine
from evomerge.evaluation.inference.selected_logits import RowHead
from tests.support import toy, toy_engine

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6]]
MLP = "model.layers.2.mlp.down_proj.weight"
LAST = "model.layers.2.self_attn.q_proj.weight"


@pytest.fixture
def model(tmp_path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    folder = toy.llama(tmp_path / "a", 1, layers=3)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def live(model: Any, process: Any = "worker", **options: Any) -> LiveEngine:
    settings = EngineSettings(process=process, options=options)
    return LiveEngine(model, settings, 64, toy_engine.PATH, [str(toy.REPO)])


def tokens(engine: LiveEngine, count: int = 6) -> list[list[int]]:
    made = engine.texts(PROMPTS, [count] * len(PROMPTS), (), lambda tokens: False)
    return [text.tokens for text in made]


@torch.inference_mode()
def greedy(model: Any, count: int = 6) -> list[list[int]]:
    made = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        made.append(ids[len(prompt) :])
    return made


def verify(engine: LiveEngine, model: Any) -> Any:
    with RowHead(model) as head:
        return engine.verify(head, PROMPTS, 4)


def test_a_right_engine_is_trusted_and_the_model_left_as_it_was(model: Any) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine = live(model)
    found = verify(engine, model)
    assert found.allowed
    assert "restored bit for bit" in found.reason
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert tokens(engine) == greedy(model)


def test_texts_of_earlier_weights_are_noticed_without_a_cache_reset(model: Any) -> None:
    """Keys and values of the candidate before would be served in silence."""
    with pytest.raises(EngineSetupError, match="after a push of other weights"):
        verify(live(model, stale=True), model)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", LAST, "model.norm.weight", "lm_head.weight"])
def test_a_tensor_that_does_not_reach_the_engine_is_noticed(model: Any, name: str) -> None:
    with pytest.raises(EngineSetupError, match=r"cannot be trusted.*use evaluation.backend: compiled"):
        verify(live(model, skips=name), model)


def test_nan_weights_are_the_candidates_fault_and_the_next_one_is_answered(model: Any) -> None:
    engine = live(model)
    kept = model.get_parameter(MLP).detach().clone()
    with torch.no_grad():
        model.get_parameter(MLP).fill_(float("nan"))
    with pytest.raises(CandidateError, match="NaN"):
        tokens(engine)
    with torch.no_grad():
        model.get_parameter(MLP).copy_(kept)
    assert tokens(engine) == greedy(model)


def test_a_killed_engine_is_opened_again_with_the_weights_at_hand(model: Any) -> None:
    engine = live(model, "child")
    try:
        assert tokens(engine) == greedy(model)
        with torch.no_grad():
            model.get_parameter("lm_head.weight").neg_()
        child: Any = engine._engine
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(ConnectionResetError, match="SIGKILL"):
            tokens(engine)
        assert tokens(engine) == greedy(model)
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("has_opened", "error"), [(False, EngineSetupError), (True, EngineError)], ids=["first", "later"]
)
def test_an_engine_that_cannot_be_opened_is_a_fault_of_settings_first_and_of_the_machine_later(
    model: Any, has_opened: bool, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {}
    engine = live(model, **options)
    if has_opened:
        tokens(engine)
        engine.close()
    refuse: Callable[..., Any] = _refuse
    monkeypatch.setattr(toy_engine.ToyEngine, "__init__", refuse)
    with pytest.raises(error, match="stays closed"):
        tokens(engine)


def _refuse(*arguments: Any) -> None:
    raise EngineError("the toy stays closed")
