"""On a GPU: merges of every weighted sum are the CPU's bits, replays are their runs', decoding needs no host.

Skipped where there is none. scripts/benchmarks/gpu.py runs them in their order of importance.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evomerge.evaluation.budgets import budgets_of, of_card
from evomerge.evaluation.inference.generation import GenerationLimits, Generator, TextRules
from evomerge.evaluation.inference.generation_probe import choose_decoder, probe_decoders
from evomerge.evaluation.inference.loglikelihood import Engine
from evomerge.evaluation.inference.loglikelihood_plan import OPTIMIZATIONS
from evomerge.evaluation.inference.requests import Request
from evomerge.evaluation.inference.selected_logits import RowHead
from evomerge.methods.fused.magnitude_tables import MagnitudeTables
from evomerge.methods.fused.weighted_sum import TensorPair
from evomerge.workers.nan_watch import NanWatch
from scripts.benchmarks import gpu_models
from tests.support.text_architectures import EOS, PAD, VOCABULARY, build, tokenizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = "cuda"
TYPES = [torch.float32, torch.bfloat16]


def words(rnd: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rnd.randrange(3, VOCABULARY) for _ in range(count))


def requests(seed: int = 1) -> list[Request]:
    rnd = random.Random(seed)
    prefix = words(rnd, 30)
    contexts = [prefix + words(rnd, rnd.randrange(9, 20)) for _ in range(8)]
    return [Request(context, words(rnd, rnd.randrange(1, 5))) for context in contexts for _ in range(3)]


def disturb(model: Any, seed: int) -> None:
    """Other weights at the same addresses."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.rand(parameter.shape, generator=generator).to(parameter)
            parameter.mul_(1 + 0.1 * noise)


@pytest.mark.parametrize("method", list(gpu_models.METHODS))
def test_a_merge_has_the_bits_of_the_cpu(method: str, tmp_path: Path) -> None:
    here, there = (gpu_models.make("odd", tmp_path / name, name) for name in ("cpu", DEVICE))
    builders = [models.builder(ranks_bytes=1 << 28) for models in (here, there)]
    for seed in (1, 2):
        for builder, models in zip(builders, (here, there), strict=True):
            builder.build(gpu_models.recipe(method, models, seed)).install()
        found = there.live.state_dict()
        for name, expected in here.live.state_dict().items():
            assert torch.equal(found[name].cpu(), expected), name


def test_tables_are_those_of_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(701, 131, generator=generator) * 0.02).bfloat16()
    source = base + (torch.randn(base.shape, generator=generator) * 2e-3).bfloat16()
    source[:40] = base[:40]
    found = []
    for device in ("cpu", DEVICE):
        tables, pair = MagnitudeTables(build=True), TensorPair(base.to(device), source.to(device), "pair")
        top = tables.top_table(pair)
        assert top is not None
        found.append([*top, tables.hash_table(pair, (5, 7)), np.array([tables.whole_norm(pair)])])
    for here, there in zip(*found, strict=True):
        np.testing.assert_array_equal(here, there)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", ["qwen2", "llama", "gpt2", "gemma2"])
def test_a_replayed_plan_has_the_bits_of_its_run(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype=dtype).to(DEVICE)
    watch = NanWatch()
    watch.add(model)
    with Engine(model) as engine:
        assert engine.replay is not None
        replay = engine.replay
        for optimization in OPTIMIZATIONS:
            plan = engine.compile(requests(), optimization)
            for candidate in range(4):
                disturb(model, candidate)
                watch.reset()
                engine.replay = replay
                scores = engine.run(plan)
                assert not watch.has_seen()
                engine.replay = None
                expected = engine.run(plan)
                assert torch.equal(scores.sums, expected.sums), (optimization, candidate)
                assert torch.equal(scores.greedy, expected.greedy)
        # transformers' windowed caches copy a number from the host, which no graph can hold
        assert replay.refusal is None or name == "gemma2"


def test_a_replay_sees_nan() -> None:
    model = build("qwen2", dtype=torch.bfloat16).to(DEVICE)
    watch = NanWatch()
    watch.add(model)
    with Engine(model) as engine:
        plan = engine.compile(requests(), "plain")
        for _ in range(3):
            engine.run(plan)
        with torch.no_grad():
            next(iter(model.parameters())).fill_(float("nan"))
        watch.reset()
        engine.run(plan)
        assert watch.has_seen()


def test_experts_are_scored_with_or_without_graphs() -> None:
    model = build("mixtral", dtype=torch.float32).to(DEVICE)
    with Engine(model) as engine:
        replay = engine.replay
        plan = engine.compile(requests(), "plain")
        for candidate in range(3):
            disturb(model, candidate)
            engine.replay = replay
            scores = engine.run(plan)
            engine.replay = None
            assert torch.equal(scores.sums, engine.run(plan).sums)


def test_replays_take_no_more_memory() -> None:
    model = build("qwen2", dtype=torch.bfloat16).to(DEVICE)
    with Engine(model) as engine:
        plan = engine.compile(requests(), "fork")
        for _ in range(3):
            engine.run(plan)
        before = torch.cuda.memory_allocated()
        for _ in range(20):
            engine.run(plan)
        assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_merges_in_place_keep_graphs_valid(method: str, tmp_path: Path) -> None:
    models = gpu_models.make("tiny", tmp_path, DEVICE)
    builder = models.builder()
    asked = [Request(r.context, r.continuation) for r in requests()]
    with Engine(models.live) as engine:
        assert engine.replay is not None
        replay, found = engine.replay, []
        plan = engine.compile(asked, "plain")
        for seed in range(4):
            builder.build(gpu_models.recipe(method, models, seed)).install()
            engine.replay = replay
            found.append(engine.run(plan).sums)
            engine.replay = None
            assert torch.equal(found[-1], engine.run(plan).sums)
        assert replay.refusal is None
        assert not torch.equal(found[-1], found[-2])


def prompts(seed: int = 3) -> list[tuple[int, ...]]:
    rnd = random.Random(seed)
    shared = words(rnd, 20)
    alone = [words(rnd, count) for count in (1, 4, 30, 9, 2, 12)]
    return [*alone, *(shared + words(rnd, count) for count in (1, 6, 3, 9))]


NEW = [1, 19, 7, 30, 8, 9, 16, 2, 25, 17]


@pytest.mark.parametrize("name", ["qwen2", "llama", "gpt2", "gemma2"])
def test_decoding_on_the_device_gives_the_tokens_of_the_host(name: str) -> None:
    model = build(name, dtype=torch.float32).to(DEVICE)
    rules = TextRules(tokenizer(), 256, PAD, frozenset([EOS]))
    with Engine(model) as engine:
        found = {}
        for what, decoder, graphs in (
            ("host", "slots", None),
            ("device", "device", None),
            ("graph", "device", engine.graphs),
        ):
            generator = Generator(
                model, engine.head, rules, decoder=decoder, limits=GenerationLimits(rows=8), graphs=graphs
            )
            plan = generator.compile(prompts(), (), NEW)
            found[what] = [generator.run(plan), generator.run(plan)]
            assert not any(batch.refusal for batch in generator._batches.values())
        assert found["graph"] == found["device"] == found["host"]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_probe_chooses_decoding_on_the_device(dtype: torch.dtype) -> None:
    model = build("qwen2", dtype=dtype).to(DEVICE)
    with RowHead(model) as head:
        assert choose_decoder(probe_decoders(model, head, span=48)) == "device"


def test_budgets_are_of_the_whole_card_whatever_is_free() -> None:
    device = torch.device(DEVICE)
    before = budgets_of(device)
    held = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    assert budgets_of(device) == before == of_card(torch.cuda.get_device_properties(0).total_memory)
    del held
