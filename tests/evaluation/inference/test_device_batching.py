"""Decoding with its state on the device gives the tokens of the other decoders, here on a CPU in float32.

Graphs of its step are tried over a stand-in for torch's.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from evomerge.evaluation.inference import device_batching
from evomerge.evaluation.inference.cuda_graphs import CudaGraphs
from evomerge.evaluation.inference.device_batching import bucket_length, bucket_rows
from evomerge.evaluation.inference.generation import GenerationLimits, Generator, TextRules
from evomerge.evaluation.inference.generation_probe import regrets
from evomerge.evaluation.inference.selected_logits import RowHead
from tests.support.fake_graphs import FakeGraphs
from tests.support.text_architectures import EOS, PAD, VOCABULARY, build, tokenizer

LOG = "evomerge.evaluation.inference.device_batching"
NEW = [1, 19, 7, 30, 8, 9, 16, 2, 25, 17]  # of each prompt: less, more and as much as is read at once


def prompts(seed: int = 3) -> list[list[int]]:
    """Ten prompts; four begin alike with 20 tokens."""
    rnd = random.Random(seed)

    def tokens(n: int) -> list[int]:
        return [rnd.randrange(3, VOCABULARY) for _ in range(n)]

    shared = tokens(20)
    return [*(tokens(n) for n in (1, 4, 30, 9, 2, 12)), *(shared + tokens(n) for n in (1, 6, 3, 9))]


def make(model: Any, head: RowHead, decoder: str, rows: int = 4, **more: Any) -> Generator:
    eos = more.pop("eos", frozenset([EOS]))
    rules = TextRules(tokenizer(), 256, PAD, eos)
    limits = GenerationLimits(rows=rows, forward_cost=4)
    return Generator(model, head, rules, decoder=decoder, shares=True, limits=limits, **more)


def generated(
    model: Any, decoder: str, stops: Sequence[str] = (), new: Sequence[int] = NEW, **more: Any
) -> list[list[int]]:
    with RowHead(model) as head:
        generator = make(model, head, decoder, **more)
        return generator.run(generator.compile(prompts(), stops, new))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeGraphs:
    found = FakeGraphs()
    found.install(monkeypatch)
    return found


@pytest.mark.parametrize("rows", [3, 100])
@pytest.mark.parametrize("name", ["qwen2", "llama", "gpt2", "gemma2", "qwen2_swa"])
def test_tokens_are_those_of_the_decoder_on_the_host(name: str, rows: int) -> None:
    model = build(name, dtype=torch.float32)
    assert generated(model, "device", rows=rows) == generated(model, "slots")


def test_a_text_ends_at_its_stop_string_and_a_row_goes_to_the_next_prompt() -> None:
    model, words = build("qwen2", dtype=torch.float32), tokenizer()
    whole = generated(model, "slots", eos=frozenset())
    assert [len(text) for text in whole] == NEW
    # stop strings that end texts inside a block, at its end, and in the next
    stops = [words.decode(whole[1][3:5]), words.decode(whole[3][6:8]), words.decode(whole[8][12:14])]
    expected = generated(model, "slots", stops, eos=frozenset())
    assert sum(len(text) < new for text, new in zip(expected, NEW, strict=True)) >= 3
    for rows in (2, 4, 16):
        assert generated(model, "device", stops, rows=rows, eos=frozenset()) == expected


def test_a_text_ends_at_a_token_that_ends_texts() -> None:
    model = build("llama", dtype=torch.float32)
    whole = generated(model, "slots", eos=frozenset())
    ends = frozenset([whole[1][4], whole[3][0], whole[8][8]])
    expected = generated(model, "slots", eos=ends)
    assert expected != whole
    with RowHead(model) as head:
        generator = make(model, head, "device", rows=16, eos=ends)
        plan = generator.compile(prompts(), (), NEW)
        assert generator.run(plan) == expected
        batch = generator._batches[(plan.rows, plan.length)]
    # no row went on behind the token that ended it
    ended = sum(len(p) + len(text) - 1 for p, text in zip(prompts(), expected, strict=True) if len(text) > 1)
    assert int(batch.positions.sum()) == ended
    assert not batch.running.any()


def test_what_is_traced_is_the_logits_behind_every_token() -> None:
    model = build("gpt2", dtype=torch.float32)
    with RowHead(model) as head:
        generator = make(model, head, "device")
        plan = generator.compile(prompts(), (), NEW)
        texts = generator.texts(plan, trace=True)
        regret, plain = regrets(head, plan.prompts, texts.tokens)
    assert texts.trace is not None
    assert regret < 1e-4
    for rows, want, text in zip(texts.trace, plain, texts.tokens, strict=True):
        assert len(rows) == len(text)
        torch.testing.assert_close(torch.stack(rows), want, rtol=1e-3, atol=1e-3)


def test_a_candidate_with_nan_leaves_nothing_behind() -> None:
    model = build("qwen2", dtype=torch.float32)
    expected = generated(model, "slots")
    with RowHead(model) as head:
        generator = make(model, head, "device", rows=16)
        plan = generator.compile(prompts(), (), NEW)
        weight = model.model.layers[1].self_attn.v_proj.weight
        kept = weight.detach().clone()
        weight.data.fill_(float("nan"))
        generator.run(plan)
        weight.data.copy_(kept)
        assert generator.run(plan) == expected
        few = generator.compile(prompts()[:3], (), NEW[:3])
        assert generator.run(few) == expected[:3]


def test_logits_processors_decode_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", dtype=torch.float32)
    model.generation_config.repetition_penalty = 1.5
    expected = generated(model, "slots")
    monkeypatch.setattr(device_batching, "decode", None)
    assert generated(model, "device") == expected


def test_a_step_is_captured_once_for_all_plans_of_a_bucket_and_takes_up_new_weights(fake: FakeGraphs) -> None:
    model = build("qwen2", dtype=torch.float32)
    graphs = CudaGraphs(torch.device("cpu"))
    with RowHead(model) as head:
        generator = make(model, head, "device", graphs=graphs)
        plans = [generator.compile(prompts(seed), (), NEW) for seed in (3, 4)]
        found = []
        for candidate in range(2):
            with torch.no_grad():
                model.model.layers[0].mlp.down_proj.weight.mul_(1 + candidate)
            for plan in plans:
                reference = make(model, head, "slots")
                expected = reference.run(reference.compile(prompts(3 + plans.index(plan)), (), NEW))
                found.append(generator.run(plan))
                assert found[-1] == expected
    assert len(fake.graphs) == 1
    assert fake.replays > 20
    assert len({str(texts) for texts in found}) > 2


def test_a_step_that_cannot_be_captured_runs_from_python(
    fake: FakeGraphs, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, LOG)
    model = build("llama", dtype=torch.float32)
    expected = generated(model, "slots")
    hook = model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: output if bool(output.sum() < 1e9) else None
    )
    with RowHead(model) as head:
        generator = make(model, head, "device", graphs=CudaGraphs(torch.device("cpu")))
        for plan in (generator.compile(prompts(), (), NEW), generator.compile(prompts()[:2], (), NEW[:2])):
            assert generator.run(plan) == [expected[place] for place in range(len(plan.places))]
    hook.remove()
    assert [record.message for record in caplog.records] == [
        "decoding without CUDA graphs: RuntimeError: operation not permitted when stream is capturing"
    ]
    assert fake.replays == 0


def test_a_step_whose_replay_has_other_bits_runs_from_python(
    fake: FakeGraphs, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, LOG)
    model = build("qwen2", dtype=torch.float32)
    monkeypatch.setattr("evomerge.evaluation.inference.cuda_graphs.same_bits", lambda one, other: False)
    found = generated(model, "device", graphs=CudaGraphs(torch.device("cpu")))
    assert found == generated(model, "slots")
    assert "decoding without CUDA graphs: a replay gives other bits" in caplog.text
    assert fake.replays == 1


def test_a_moved_weight_has_the_step_captured_again(fake: FakeGraphs) -> None:
    model = build("qwen2", dtype=torch.float32)
    with RowHead(model) as head:
        generator = make(model, head, "device", graphs=CudaGraphs(torch.device("cpu")))
        plan = generator.compile(prompts(), (), NEW)
        generator.run(plan)
        weight = model.model.layers[0].mlp.down_proj.weight
        weight.data = weight.data * 3
        found = generator.run(plan)
    assert found == generated(model, "slots")
    assert len(fake.graphs) == 2


def test_no_head_is_copied_in_a_step(fake: FakeGraphs) -> None:
    model = build("qwen2", dtype=torch.float32)
    generated(model, "device", rows=4, graphs=CudaGraphs(torch.device("cpu")))
    keys = 2 * bucket_length(60) * 8  # of a row: key heads, positions, width of a head
    queries = 2 * keys  # there are twice as many query heads
    made = [fresh for _, _, _, outputs in fake.graphs[0].calls for fresh in outputs]
    assert made
    assert all(tensor.numel() < 4 * queries for tensor in made), "keys or values of a whole batch were copied"


def test_buckets_are_few() -> None:
    assert [bucket_rows(prompts, 1024) for prompts in (1, 8, 9, 200, 512, 4000)] == [8, 8, 16, 256, 512, 512]
    assert [bucket_rows(200, most) for most in (3, 8, 100, 255, 256)] == [3, 8, 64, 128, 256]
    assert [bucket_length(n) for n in (1, 128, 129, 2048, 2049, 3073)] == [128, 128, 256, 2048, 3072, 4096]


def test_buffers_of_earlier_plans_are_dropped_where_memory_does_not_take_all() -> None:
    model = build("llama", dtype=torch.float32)
    with RowHead(model) as head:
        generator = make(model, head, "device", rows=16)
        one = generator.compile(prompts(), (), 4)
        generator.run(one)
        generator.memory = next(iter(generator._batches.values())).nbytes
        generator.run(one)
        assert len(generator._batches) == 1
        other = generator.compile(prompts()[:3], (), 4)
        generator.run(other)
        assert list(generator._batches) == [(other.rows, other.length)]
