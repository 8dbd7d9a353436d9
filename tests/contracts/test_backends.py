"""The promises of every evaluation backend, swept over the registry: above all lm-eval's own answers."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.checkpoints import Checkpoint
from evomerge.errors import CandidateError, ConfigError
from evomerge.evaluation.engines import live_engine
from evomerge.evaluation.engines.engine import EngineSettings
from evomerge.evaluation.inference.requests import Verification
from evomerge.evaluation.lm_harness.backends import BACKENDS, DEFAULT_BACKEND, find_backend, vllm
from evomerge.evaluation.lm_harness.backends.base import Backend, EngineBackend
from evomerge.evaluation.lm_harness.harness import LmHarness
from evomerge.evaluation.lm_harness.task_loading import TaskSpec
from evomerge.merging import model_loading
from tests.support import toy_engine
from tests.support.lm_eval_tasks import CHOOSE, GENERATE, LIKELIHOOD, ROLLING, sums, write_task
from tests.support.toy import environment, zoo_folder

KINDS = {
    "trial_generate": GENERATE,
    "trial_choose": CHOOSE,
    "trial_likelihood": LIKELIHOOD,
    "trial_rolling": ROLLING,
}
FEW = {"search": sums(6), "validation": sums(3, 10), "test": sums(6, 20)}
BATCH = 1

VLLM = os.environ.get(
    "EVOMERGE_VLLM_PYTHON"
)  # set by scripts/test_vllm; a toy engine stands for it elsewhere

pytestmark = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.vllm] if entry.has_engine else []) for n, entry in BACKENDS.items()],
)


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no vLLM, a toy engine in this process."""
    if VLLM is None:
        monkeypatch.setattr(live_engine, "VLLM", toy_engine.PATH)
        monkeypatch.setattr(vllm, "vllm_version", lambda python: "of a toy")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return model_loading.load_tokenizer(Checkpoint(zoo_folder() / "base"))


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> list[Any]:
    """lm-eval's requests of every kind, with a repeated one."""
    folder = tmp_path_factory.mktemp("tasks")
    for task, settings in KINDS.items():
        write_task(folder, task, settings, FEW)
    specs = [TaskSpec(task, splits="declared") for task in KINDS]
    harness = LmHarness(specs, tokenizer, include=[folder])
    rows = [r for loaded in harness.tasks.values() for i in loaded.items["test"] for r in loaded.requests[i]]
    return [*rows, rows[0], rows[-1]]


def make_model(folder: str = "math") -> Any:
    """In float32: in bfloat16 some CPUs give a row another value in another batch."""
    return model_loading.load_base(Checkpoint(zoo_folder() / folder), "float32")


@pytest.fixture
def model() -> Any:
    return make_model()


def make_backend(name: str, model: Any, tokenizer: Any) -> Backend:
    factory: Any = BACKENDS[name].load()
    if not BACKENDS[name].has_engine:
        return factory(model, tokenizer, BATCH)
    process: Any = "child" if VLLM else "worker"
    settings = EngineSettings(python=VLLM, process=process, rows=8, cache=1 << 28)
    return factory(model, tokenizer, BATCH, engine=settings)


def lm_eval_itself(model: Any, tokenizer: Any, requests: list[Any]) -> list[Any]:
    """One response of each request, by lm-eval's own HFLM, one kind at a time."""
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
    responses: dict[int, Any] = {}
    for kind in dict.fromkeys(request.request_type for request in requests):
        numbers = [i for i, request in enumerate(requests) if request.request_type == kind]
        rows = getattr(lm, kind)([requests[i] for i in numbers], disable_tqdm=True)
        responses |= dict(zip(numbers, rows, strict=True))
    return [responses[i] for i in range(len(requests))]


def assert_same(answers: list[list[Any]], expected: list[Any]) -> None:
    assert [len(responses) for responses in answers] == [1] * len(expected), "a response for each repeat"
    for (response,), wanted in zip(answers, expected, strict=True):
        if isinstance(wanted, str):
            assert response == wanted
        elif isinstance(wanted, tuple):
            assert response[0] == pytest.approx(wanted[0], rel=1e-5, abs=5e-6)
            assert bool(response[1]) == bool(wanted[1])
        else:
            assert response == pytest.approx(wanted, rel=1e-5)


def test_answers_are_lm_evals_own(name: str, model: Any, tokenizer: Any, requests: list[Any]) -> None:
    backend = make_backend(name, model, tokenizer)
    prepared = backend.prepare(requests)
    wanted = lm_eval_itself(model, tokenizer, requests)
    assert_same(backend.answer(prepared, "model"), wanted)
    assert_same(backend.answer(prepared, "float32"), wanted)
    backend.close()


def test_what_is_prepared_once_is_answered_for_every_weights(
    name: str, model: Any, tokenizer: Any, requests: list[Any]
) -> None:
    backend = make_backend(name, model, tokenizer)
    prepared = backend.prepare(requests)
    first = backend.answer(prepared, "model")
    assert backend.answer(prepared, "model") == first, "the same weights give the same answers"
    other = make_model("lang")
    model.load_state_dict(other.state_dict())
    assert_same(backend.answer(prepared, "model"), lm_eval_itself(other, tokenizer, requests))
    backend.close()


def test_a_broken_model_is_told_apart_and_the_next_one_is_answered(
    name: str, model: Any, tokenizer: Any, requests: list[Any]
) -> None:
    """NaN weights raise, or give log-likelihoods that are NaN; the backend goes on with the next weights."""
    scored = [request for request in requests if request.request_type == "loglikelihood"]
    backend = make_backend(name, model, tokenizer)
    prepared = backend.prepare(scored)
    before = backend.answer(prepared, "model")
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    answers = backend.answer(prepared, "model")
    assert all(math.isnan(response[0]) for responses in answers for response in responses)
    model.load_state_dict(kept)
    assert backend.answer(prepared, "model") == before
    backend.close()


def test_a_request_that_no_such_model_can_take_is_refused(
    name: str, model: Any, tokenizer: Any, requests: list[Any]
) -> None:
    from lm_eval.api.instance import Instance

    empty = Instance(
        request_type="loglikelihood", doc={}, arguments=("one", ""), idx=0, metadata=("trial", 0, 1)
    )
    backend = make_backend(name, model, tokenizer)
    with pytest.raises(CandidateError, match="trial"):
        backend.tokens(empty)
    backend.close()


def test_tokens_are_those_of_the_continuation(
    name: str, model: Any, tokenizer: Any, requests: list[Any]
) -> None:
    backend = make_backend(name, model, tokenizer)
    for request in requests:
        if request.request_type == "loglikelihood":
            context, text = request.args
            expected = len(tokenizer.encode(context + text)) - len(tokenizer.encode(context))
            assert backend.tokens(request) == expected
    backend.close()


def test_optimizations_and_fallbacks_are_explained(
    name: str, model: Any, tokenizer: Any, requests: list[Any]
) -> None:
    backend = make_backend(name, model, tokenizer)
    backend.prepare(requests)
    for optimization, verification in backend.optimizations().items():
        assert isinstance(optimization, str)
        assert isinstance(verification, Verification)
        assert verification.reason
    for task in KINDS:
        reason = backend.fallback_reason(task)
        assert reason is None or reason
    backend.close()


def test_an_engine_says_which_tasks_it_answers_and_that_it_was_checked(
    name: str, model: Any, tokenizer: Any, requests: list[Any]
) -> None:
    backend = make_backend(name, model, tokenizer)
    prepared = backend.prepare(requests)
    if isinstance(backend, EngineBackend):
        backend.ready(prepared)
        answered = {task: backend.answered_by(task) for task in KINDS}
        texts = answered.pop("trial_generate")
        assert not any(answered.values()), "log-likelihoods are not an engine's work"
        if name == "vllm":
            assert texts is not None
            assert texts.startswith("vllm ")
            assert "restored bit for bit" in backend.optimizations()["engine"].reason
        else:
            assert texts is None, "a small model on a CPU is not worth an engine"
    backend.close()


def test_closing_leaves_no_hook_on_the_model(
    name: str, model: Any, tokenizer: Any, requests: list[Any]
) -> None:
    backend = make_backend(name, model, tokenizer)
    backend.answer(backend.prepare(requests), "model")
    backend.close()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_the_registry_describes_it_and_loads_it_only_when_it_is_used(name: str) -> None:
    entry = find_backend(name)
    assert entry.takes
    assert entry.summary.endswith(".")
    assert DEFAULT_BACKEND in BACKENDS
    with pytest.raises(ConfigError, match=name):
        find_backend(name + "x")
    program = (
        "import sys, evomerge.evaluation.lm_harness.backends;"
        "print([m for m in ('torch', 'lm_eval', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
        cwd=Path.cwd(),
    )
    assert done.stdout.strip() == "[]"
