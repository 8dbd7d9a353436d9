"""Plans replayed as graphs, over a stand-in for torch.cuda's graphs on a CPU."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from evomerge.evaluation.inference import cuda_graphs, plan_replay
from evomerge.evaluation.inference.cuda_graphs import CudaGraphs
from evomerge.evaluation.inference.loglikelihood import Engine
from evomerge.evaluation.inference.loglikelihood_plan import OPTIMIZATIONS, Optimization
from evomerge.evaluation.inference.plan_replay import PlanReplay
from evomerge.evaluation.inference.requests import Request
from tests.support.fake_graphs import FakeGraphs
from tests.support.text_architectures import VOCABULARY, build

LOG = "evomerge.evaluation.inference.plan_replay"


def requests(seed: int = 1) -> list[Request]:
    rnd = random.Random(seed)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(rnd.randrange(3, VOCABULARY) for _ in range(n))

    prefix = tokens(30)
    contexts = [prefix + tokens(rnd.randrange(9, 20)) for _ in range(4)]
    return [Request(context, tokens(rnd.randrange(1, 5))) for context in contexts for _ in range(3)]


def disturb(model: nn.Module, seed: int) -> None:
    """Other weights at the same addresses."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.1 * torch.rand(parameter.shape, generator=generator))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeGraphs:
    found = FakeGraphs()
    found.install(monkeypatch)
    return found


@pytest.fixture
def engine(fake: FakeGraphs) -> Iterator[Engine]:
    with replaying(build("qwen2", dtype=torch.float32)) as engine:
        yield engine


def replaying(model: Any) -> Engine:
    engine = Engine(model, forward_cost=4)
    engine.replay = PlanReplay(model, CudaGraphs(torch.device("cpu")))
    return engine


def plain(model: Any, optimization: Optimization, rounding: Any = "float32") -> Any:
    with Engine(model, forward_cost=4) as engine:
        return engine.score(requests(), optimization, rounding)


@pytest.mark.parametrize("optimization", OPTIMIZATIONS)
def test_a_plan_is_captured_once_and_replayed_for_every_later_candidate(
    optimization: Optimization, engine: Engine, fake: FakeGraphs
) -> None:
    plan = engine.compile(requests(), optimization)
    steps = len(engine._program(plan, "float32").steps)
    assert steps > len(plan.steps)
    for candidate in range(4):
        disturb(engine.model, candidate)
        scores = engine.run(plan)
        expected = plain(engine.model, optimization)
        assert torch.equal(scores.sums, expected.sums)
        assert torch.equal(scores.greedy, expected.greedy)
        assert len(fake.graphs) == (0 if candidate == 0 else len(plan.steps) + 2)
    # once to compare, then for two candidates
    assert [graph.replays for graph in fake.graphs] == [3] * (len(plan.steps) + 2)
    assert engine.replay is not None
    assert engine.replay.refusal is None


def test_sums_rounded_as_the_model_rounds_have_graphs_of_their_own(fake: FakeGraphs) -> None:
    model = build("llama", dtype=torch.bfloat16)
    with replaying(model) as engine:
        plan = engine.compile(requests(), "plain")
        for candidate in range(3):
            disturb(model, candidate)
            for rounding in ("float32", "model"):
                expected = plain(model, "plain", rounding)
                assert torch.equal(engine.run(plan, rounding).sums, expected.sums)
    assert len(fake.graphs) == 2 * (len(plan.steps) + 2) + 1


def test_results_of_a_replay_are_not_overwritten_by_the_next(engine: Engine) -> None:
    plan = engine.compile(requests(), "plain")
    found = []
    for candidate in range(4):
        disturb(engine.model, candidate)
        found.append((engine.sums(plan), engine.sums(plan).clone()))
    assert all(torch.equal(sums, copied) for sums, copied in found)


def test_a_replay_with_other_bits_leaves_the_run_as_it_was(
    engine: Engine, fake: FakeGraphs, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, LOG)
    fake.drift = 1e-12
    plan, other = engine.compile(requests(), "fork"), engine.compile(requests(2), "plain")
    for candidate in range(3):
        disturb(engine.model, candidate)
        assert torch.equal(engine.run(plan).sums, plain(engine.model, "fork").sums)
        engine.run(other)
    assert [record.message for record in caplog.records] == [
        "scoring without CUDA graphs: a replay gives other bits than the run that was captured"
    ]
    assert len(fake.graphs) == len(plan.steps) + 2


def test_a_model_that_waits_in_its_forward_is_run_eagerly(
    engine: Engine, fake: FakeGraphs, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, LOG)

    def wait(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        assert bool(output.sum() < 1e9)

    handle = engine.model.get_output_embeddings().register_forward_hook(wait)
    plan = engine.compile(requests(), "prefix")
    for candidate in range(3):
        disturb(engine.model, candidate)
        assert torch.equal(engine.run(plan).sums, plain(engine.model, "prefix").sums)
    handle.remove()
    assert [record.message for record in caplog.records] == [
        "scoring without CUDA graphs: RuntimeError: operation not permitted when stream is capturing"
    ]
    assert fake.replays == 0
    assert fake.capturing is None


def test_moved_weights_are_captured_again_and_at_last_run_eagerly(
    engine: Engine, fake: FakeGraphs, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, LOG)
    plan = engine.compile(requests(), "plain")
    kept = []
    for candidate in range(7):
        parameter = next(iter(engine.model.parameters()))
        kept.append(parameter.data)  # an address is not used again while its tensor lives
        parameter.data = parameter.data * 1.1
        assert torch.equal(engine.run(plan).sums, plain(engine.model, "plain").sums), candidate
    assert len(caplog.records) == 1
    assert "exchanged between candidates" in caplog.text


def test_a_model_that_computes_its_weights_is_not_captured(fake: FakeGraphs) -> None:
    model = build("llama", dtype=torch.float32)
    with replaying(model) as engine:
        nn.utils.parametrize.register_parametrization(
            model.get_output_embeddings(), "weight", nn.Identity(), unsafe=True
        )
        plan = engine.compile(requests(), "plain")
        for _ in range(3):
            engine.run(plan)
        assert engine.replay is not None
        assert "computed in its forward" in (engine.replay.refusal or "")
    assert fake.graphs == []


def test_plans_whose_forwards_are_long_are_not_captured(engine: Engine, fake: FakeGraphs) -> None:
    engine._weights = 10**13
    plan = engine.compile(requests(), "plain")
    for _ in range(3):
        engine.run(plan)
    assert fake.graphs == []


def test_graphs_of_old_plans_are_dropped(
    engine: Engine, fake: FakeGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_replay, "_PLANS", 2)
    plans = [engine.compile(requests(seed)[:1], "plain") for seed in range(3)]
    for plan in plans:
        engine.run(plan)
        engine.run(plan)
    made = len(fake.graphs)
    engine.run(plans[-1])
    assert len(fake.graphs) == made
    engine.run(plans[0])
    engine.run(plans[0])
    assert len(fake.graphs) > made


def test_a_cpu_has_no_graphs() -> None:
    model = build("llama", dtype=torch.float32)
    assert cuda_graphs.graphs_for(model) is None
    with Engine(model) as engine:
        assert engine.replay is None


def test_bits_are_compared_not_values() -> None:
    nan, zero = torch.tensor([float("nan"), 1.0]), torch.tensor([0.0])
    assert cuda_graphs.same_bits(nan, nan.clone())
    assert not cuda_graphs.same_bits(zero, -zero)


def test_a_captured_forward_has_the_attention_of_one_that_is_not(engine: Engine, fake: FakeGraphs) -> None:
    plan = engine.compile(requests(), "plain")
    engine.run(plan)
    engine.run(plan)
    calls = [call for graph in fake.graphs for call in graph.calls]
    attention = [args for func, args, _, _ in calls if "scaled_dot_product" in func._schema.name]
    assert len(attention) == len(plan.steps) * engine.model.config.num_hidden_layers
    assert all(len(args) < 4 or args[3] is None for args in attention), "a mask keeps flash kernels out"


def test_graphs_are_dropped_when_memory_runs_out(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, other = engine.compile(requests(), "plain"), engine.compile(requests(2), "plain")
    for _ in range(2):
        engine.run(plan)
    assert engine.replay is not None
    assert len(engine.replay._plans) == 1

    def fail(*args: object, **inputs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Engine, "forward_step", fail)
    with pytest.raises(torch.OutOfMemoryError):
        engine.run(other)
    assert not engine.replay._plans
