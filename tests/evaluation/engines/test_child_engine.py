"""An engine in a process of its own: what reaches it, and how its death, silence and errors are told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.evaluation.engines.child_engine import ChildEngine
from evomerge.evaluation.engines.engine import EngineError, EngineModel, EngineSettings
from evomerge.evaluation.engines.live_engine import tensors_on_disk
from evomerge.evaluation.engines.shared_weights import SharedWeights
from evomerge.evaluation.engines.texts import Text, generate
from evomerge.workers.machine_errors import is_machine_error, is_only_machines
from evomerge.workers.pool import one_line
from tests.support import toy, toy_engine

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoModelForCausalLM

    folder = toy.llama(tmp_path_factory.mktemp("toy") / "a", 1, layers=3)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def folder(model: Any, tmp_path: Path) -> Path:
    model.config.save_pretrained(tmp_path)
    return tmp_path


def opened(folder: Path, answer_seconds: float = 120.0, **options: Any) -> ChildEngine:
    described = EngineModel(str(folder), "float32", "cpu", 64)
    settings = EngineSettings(options=options)
    return ChildEngine(
        toy_engine.PATH, described, settings, answer_seconds=answer_seconds, import_path=[str(toy.REPO)]
    )


@pytest.fixture(scope="module")
def healthy(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChildEngine]:
    folder = tmp_path_factory.mktemp("config")
    model.config.save_pretrained(folder)
    engine = opened(folder)
    yield engine
    engine.close()


def texts(engine: Any) -> list[Text]:
    return generate(engine, PROMPTS, [4] * len(PROMPTS), [], lambda tokens: False)


@torch.inference_mode()
def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_its_texts_are_the_models_after_every_push(healthy: ChildEngine, model: Any) -> None:
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        for factor in (1.0, -1.0, 1.0):
            with torch.no_grad():
                for name, tensor in model.named_parameters():
                    tensor.copy_(kept[name] * (factor if "norm" not in name else 1.0))
            healthy.push(tensors_on_disk(model))
            assert [t.tokens for t in texts(healthy)] == [greedy(model, p, 4) for p in PROMPTS]
    finally:
        model.load_state_dict(kept)


def test_only_layers_that_changed_are_pushed(healthy: ChildEngine, model: Any) -> None:
    tensors = {name: tensor.clone() for name, tensor in tensors_on_disk(model).items()}
    healthy.push(tensors)
    assert healthy.push(tensors).tensors == 0
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    layer = [name for name in tensors if name.startswith("model.layers.1.")]
    pushed = healthy.push(tensors)
    assert pushed.tensors == len(layer)
    tensors["model.norm.weight"][0] = -tensors["model.norm.weight"][0]
    assert healthy.push(tensors).tensors == 1


def test_bytes_are_compared_and_not_values() -> None:
    """NaN is unequal to itself and -0 equal to 0: neither may hide or feign a change."""
    tensors = {"a": torch.tensor([0.0, float("nan")]), "b": torch.zeros(3, dtype=torch.bfloat16)}
    weights = SharedWeights.for_tensors(tensors)
    assert [place.name for place in weights.write(tensors)] == ["a", "b"]
    assert weights.write(tensors) == []
    tensors["a"][0] = -0.0
    assert [place.name for place in weights.write(tensors)] == ["a"]
    attached = SharedWeights.attached(weights.path, weights.size)
    views = attached.views(weights.places(tensors))
    assert torch.equal(views["a"].view(torch.int32), tensors["a"].view(torch.int32))
    del views
    attached.close()
    weights.close()


@pytest.mark.parametrize(
    ("fault", "kind", "only_machines", "says"),
    [
        ("kill", ConnectionResetError, True, "SIGKILL"),
        ("exit", OSError, False, "exit code 7; it wrote: the toy leaves"),
        ("raise", EngineError, False, "ValueError: the toy raises"),
    ],
)
def test_a_death_is_the_machines_and_says_how_it_ended(
    folder: Path, model: Any, fault: str, kind: type[Exception], only_machines: bool, says: str
) -> None:
    engine = opened(folder, fault=fault, at=2)
    try:
        engine.push(tensors_on_disk(model))
        with pytest.raises(kind, match=says) as raised:
            texts(engine)
    finally:
        engine.close()
    line = one_line(raised.value)
    assert is_machine_error(line)
    assert is_only_machines(line) is only_machines


def test_a_hang_is_a_time_out(folder: Path, model: Any) -> None:
    engine = opened(folder, answer_seconds=1.0, fault="hang")
    try:
        engine._answer_seconds = 120.0
        engine.push(tensors_on_disk(model))
        engine._answer_seconds = 1.0
        with pytest.raises(TimeoutError, match="has not answered for 1 s") as raised:
            texts(engine)
    finally:
        engine.close()
    assert is_machine_error(one_line(raised.value))
    assert not (Path("/proc") / str(engine.pid)).exists(), "a process that hangs is ended"


def test_what_cannot_be_opened_says_why(folder: Path) -> None:
    with pytest.raises(EngineError, match="the toy stays closed"):
        opened(folder, closed=True)


def test_the_process_ends_with_its_worker(folder: Path) -> None:
    program = textwrap.dedent(
        f"""
        import os, sys
        sys.path.insert(0, {str(toy.REPO)!r})
        from tests.evaluation.engines.test_child_engine import opened
        from pathlib import Path
        print(opened(Path({str(folder)!r})).pid, flush=True)
        os.kill(os.getpid(), 9)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=toy.environment(), check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid = int(done.stdout)
    while (Path("/proc") / str(pid)).exists():
        assert os.getpid()  # waits as long as it takes; a child that stays is seen as a test that hangs
        time.sleep(0.05)
