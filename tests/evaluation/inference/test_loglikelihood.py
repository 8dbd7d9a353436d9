"""The engine's pieces against loops: prefix groups, token trees, plans, rounding, row head, cache forks."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.errors import CandidateError
from evomerge.evaluation.inference import kv_cache
from evomerge.evaluation.inference.attention_masks import Windows, attention_mask, windows
from evomerge.evaluation.inference.gradient_memory import Way
from evomerge.evaluation.inference.loglikelihood import Engine
from evomerge.evaluation.inference.loglikelihood_plan import OPTIMIZATIONS, LoglikelihoodPlan
from evomerge.evaluation.inference.loglikelihood_probe import probe
from evomerge.evaluation.inference.prefix_tree import (
    FORWARD_COST,
    common_prefix_length,
    shared_prefixes,
    token_tree,
    visibility,
)
from evomerge.evaluation.inference.requests import Request, Verification, distinct
from evomerge.evaluation.inference.selected_logits import RowHead
from tests.support.text_architectures import VOCABULARY, build, tokenizer

Tokens = tuple[int, ...]
SHORT = st.lists(st.integers(0, 3), min_size=0, max_size=7).map(tuple)


def requests(
    seed: int, *, shared: int = 40, items: int = 8, choices: int = 4, size: int = 4
) -> list[Request]:
    """Items with a common prefix and several continuations each, some alike at the start, one twice."""
    rnd = random.Random(seed)

    def tokens(n: int) -> Tokens:
        return tuple(rnd.randrange(3, VOCABULARY) for _ in range(n))

    prefix, found = tokens(shared), []
    for _ in range(items):
        context = prefix + tokens(rnd.randrange(2, 24))
        own = [tokens(rnd.randrange(1, size + 1)) for _ in range(choices)]
        own[1] = own[0] + tokens(1)  # a choice that begins another
        found += [Request(context, c) for c in own]
    return [*found, found[0]]


def looped(model: Any, asked: Sequence[Request]) -> tuple[torch.Tensor, list[bool]]:
    """(sums in float64, greedy flags): one request a forward, every logit made."""
    sums, greedy = [], []
    for request in asked:
        with torch.no_grad():
            logits = (
                model(input_ids=torch.tensor([request.context + request.continuation]), use_cache=False)
                .logits[0]
                .double()
            )
        rows = logits[len(request.context) - 1 : -1]
        target = torch.tensor(request.continuation)
        sums.append(rows.log_softmax(-1)[torch.arange(len(target)), target].sum())
        greedy.append(bool((rows.argmax(-1) == target).all()))
    return torch.stack(sums), greedy


# ---- requests and trees ------------------------------------------------------------------------------------


@given(SHORT, SHORT)
def test_common_is_the_longest_common_prefix(a: Tokens, b: Tokens) -> None:
    assert common_prefix_length(a, b) == max(k for k in range(len(a) + 1) if a[:k] == b[:k])


@given(st.lists(SHORT.filter(len), min_size=1, max_size=12))
def test_a_tree_holds_each_distinct_prefix_once_and_every_path(sequences: list[Tokens]) -> None:
    t = token_tree(sequences)
    prefixes = {s[: k + 1] for s in sequences for k in range(len(s))}
    assert len(t.tokens) == len(prefixes)
    for sequence, path in zip(sequences, t.paths, strict=True):
        assert tuple(t.tokens[node] for node in path) == sequence
        assert [t.depths[node] for node in path] == list(range(len(sequence)))
    above = {node: set(path[: at + 1]) for path in t.paths for at, node in enumerate(path)}
    for query, ancestors in above.items():  # the interval test is the ancestor test
        assert {k for k in range(len(t.tokens)) if k <= query < t.ends[k]} == ancestors


def test_a_node_sees_the_prefix_and_its_ancestors_and_padding_sees_itself() -> None:
    mask, queries, keys = visibility([token_tree([(5, 6), (5, 7, 8)]), token_tree([(9,)])], past=2, width=4)
    assert mask.shape == (2, 4, 6)
    seen = [[set(torch.nonzero(mask[b, q]).flatten().tolist()) for q in range(4)] for b in range(2)]
    assert seen[0] == [{0, 1, 2}, {0, 1, 2, 3}, {0, 1, 2, 4}, {0, 1, 2, 4, 5}]
    assert seen[1] == [{0, 1, 2}, {0, 1, 3}, {0, 1, 4}, {0, 1, 5}]
    assert queries[0].tolist() == [2, 3, 3, 4]
    assert keys[0].tolist() == [0, 1, 2, 3, 3, 4]


def saved(contexts: Sequence[Tokens], groups: Sequence[tuple[int, list[int]]], forward_cost: int) -> int:
    return sum((len(members) - 1) * length - forward_cost for length, members in groups)


@given(
    st.lists(
        st.lists(st.integers(0, 1), min_size=0, max_size=4).map(tuple), min_size=1, max_size=7, unique=True
    ),
    st.integers(0, 40),
)
@settings(max_examples=60)
def test_the_groups_save_as_many_tokens_as_any_choice_of_prefixes_can(
    heads: list[Tokens], forward_cost: int
) -> None:
    contexts = [
        (*tuple(t for h in head for t in [h] * 8), 9 + i) for i, head in enumerate(heads)
    ]  # prefixes of 8, 16, ... tokens
    groups, left = shared_prefixes(contexts, forward_cost)
    assert sorted([i for _, members in groups for i in members] + left) == list(range(len(contexts)))
    for length, members in groups:
        assert len({contexts[i][:length] for i in members}) == 1
        assert length >= 16

    def best(own: list[int], depth: int) -> int:  # over the radix tree, by trying every cut
        found = 0
        if len(own) > 1:
            shared = min(common_prefix_length(contexts[own[0]], contexts[i]) for i in own)
            if shared >= 16:
                found = max(0, (len(own) - 1) * shared - forward_cost)
            by: dict[Any, list[int]] = {}
            for i in own:
                by.setdefault(contexts[i][shared] if len(contexts[i]) > shared else ("end", i), []).append(i)
            if len(by) > 1:
                found = max(found, sum(best(part, shared) for part in by.values()))
        return found

    assert saved(contexts, groups, forward_cost) == best(list(range(len(contexts))), 0)


def test_a_few_shot_block_is_found_when_several_tasks_are_in_one_call() -> None:
    rnd = random.Random(0)
    blocks = [tuple(rnd.randrange(100) for _ in range(300)) for _ in range(3)]
    contexts = [(*b, 100 + k, rnd.randrange(100)) for b in blocks for k in range(20)]
    groups, left = shared_prefixes(contexts, FORWARD_COST)
    assert [length for length, _ in sorted(groups, key=lambda g: g[1][0])] == [300, 300, 300]
    assert not left


def test_a_request_is_cut_from_the_left_as_lm_eval_cuts_it() -> None:
    whole = Request(tuple(range(10)), (20, 21, 22))
    assert whole.fitted(12) == whole
    cut = whole.fitted(6)
    assert (cut.context + cut.continuation) == (*range(10), 20, 21, 22)[-7:]
    assert len(cut.inputs) == 6
    assert cut.inputs[cut.first] == 9, "the row that predicts the first token"
    with pytest.raises(ValueError, match="longer than the model's 2"):
        whole.fitted(2)


def test_equal_requests_are_one() -> None:
    a, b = Request((1, 2), (3,)), Request((1,), (2, 3))
    assert distinct([a, b, a, a]) == ([a, b], [0, 1, 0, 0])


# ---- plans and engine --------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimization", OPTIMIZATIONS)
@pytest.mark.parametrize("kind", ["llama", "mistral", "llama4_text", "gemma3_text"])
def test_every_technique_gives_the_sums_of_a_loop(kind: str, optimization: Any) -> None:
    model = build(kind)
    asked = requests(1)
    sums, greedy = looped(model, asked)
    with Engine(model, tokens=300) as engine:
        plan = engine.compile(asked, optimization)
        found = engine.run(plan)
        again = engine.run(plan)
    assert torch.allclose(found.sums, sums, atol=2e-5)
    assert found.greedy.tolist() == greedy
    assert torch.equal(found.sums, again.sums), "a replay gives the same bits"


def test_a_plan_is_replayed_on_other_weights() -> None:
    model, other, asked = build("llama"), build("llama", seed=5), requests(2)
    with Engine(model) as engine:
        plan = engine.compile(asked, "tree")
        engine.run(plan)
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            ours.data.copy_(theirs)
        assert torch.allclose(engine.run(plan).sums, looped(other, asked)[0], atol=2e-5)


def shape(plan: LoglikelihoodPlan) -> tuple[int, int]:
    return plan.tokens, max(step.ids.numel() for step in plan.steps)


def test_sharing_saves_tokens_and_batches_keep_their_bounds() -> None:
    model, asked = build("llama"), requests(3, shared=60, items=12)
    with Engine(model, tokens=256) as engine:
        tokens = {t: engine.compile(asked, t).tokens for t in OPTIMIZATIONS}
        assert tokens["tree"] < tokens["fork"] < tokens["prefix"] < tokens["plain"]
        assert tokens["plain"] <= sum(len(r.inputs) for r in asked) * 2, "padding included"
        for optimization in OPTIMIZATIONS:
            assert shape(engine.compile(asked, optimization))[1] <= 256
    distinct_tokens = {(r.inputs[: k + 1]) for r in asked for k in range(len(r.inputs))}
    assert tokens["tree"] >= len(distinct_tokens)


def test_caches_are_dropped_after_their_last_use() -> None:
    with Engine(build("llama"), tokens=128) as engine:
        plan = engine.compile(requests(4, shared=50), "fork")
        kept = [step.keep for step in plan.steps if step.keep is not None]
        assert sorted(n for step in plan.steps for n in step.drop) == sorted(kept)
        assert kept, "there was something to keep"


def test_without_verdicts_only_plain_rows_are_used() -> None:
    model = build("llama")
    with Engine(model) as engine:
        assert engine.best == "plain"
        engine.verifications = {
            "tree": Verification(False, "no"),
            "fork": Verification(True, "yes"),
            "prefix": Verification(True, "yes"),
        }
        assert engine.best == "fork"
        engine.verifications = probe(model, span=60)
        assert engine.best == "tree"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_model_rounding_is_hflms(dtype: torch.dtype) -> None:
    from lm_eval.models.huggingface import HFLM

    model = build("llama", dtype)
    asked = requests(5, shared=0, items=6)
    with Engine(model, tokens=1) as engine:  # one row a forward, as HFLM at batch size 1: the same bits
        found = engine.run(engine.compile(asked, "plain"), "model")
    lm = HFLM(pretrained=model, tokenizer=tokenizer(), batch_size=1)
    theirs = lm._loglikelihood_tokens(
        [(None, list(r.context), list(r.continuation)) for r in asked], disable_tqdm=True
    )
    assert found.sums.tolist() == pytest.approx(
        [s for s, _ in theirs], rel=1e-6 if dtype == torch.float32 else 0.0
    )
    assert found.greedy.tolist() == [g for _, g in theirs]


def test_greedy_in_bfloat16_is_the_first_of_the_tokens_that_rounding_makes_equal() -> None:
    from evomerge.evaluation.inference.loglikelihood_plan import Reads
    from evomerge.evaluation.inference.target_logprobs import target_logprobs

    logits = torch.randn(4000, 400, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    every = torch.arange(len(logits))
    _, likeliest = target_logprobs(logits, Reads(every, every, every % 400, every), "model")
    assert torch.equal(likeliest, torch.log_softmax(logits, -1).argmax(-1))
    assert not torch.equal(likeliest, logits.argmax(-1)), "some rows tie"


def test_float32_sums_keep_apart_what_the_models_type_makes_equal() -> None:
    model, asked = build("llama", torch.bfloat16), requests(6, items=30)
    with Engine(model) as engine:
        plan = engine.compile(asked, "plain")
        fine, rough = engine.run(plan, "float32").sums, engine.run(plan, "model").sums
    assert len(set(fine.tolist())) > len(set(rough.tolist()))
    assert torch.allclose(fine, rough, rtol=2e-2)


# ---- row head, caches, masks -------------------------------------------------------------------------------


def test_the_row_head_makes_only_the_rows_asked_for_and_leaves_the_model_as_it_was() -> None:
    model = build("llama")
    ids = torch.randint(3, VOCABULARY, (2, 5))
    whole = model(input_ids=ids, use_cache=False).logits
    seen: list[tuple[int, ...]] = []
    watch = model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, out: seen.append(tuple(out.shape))
    )
    with RowHead(model) as head, torch.no_grad():
        rows = head(torch.tensor([7, 0]), ids, use_cache=False)
        assert head.works
    assert torch.allclose(rows, torch.stack([whole[1, 2], whole[0, 0]]), atol=1e-6)
    assert seen == [(1, 2, VOCABULARY)]
    watch.remove()
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, whole)
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_a_model_that_does_not_call_its_head_is_noticed() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(11, 4), torch.nn.Linear(4, 11)

        def get_output_embeddings(self) -> torch.nn.Module:
            return self.head

        def forward(self, input_ids: torch.Tensor) -> Any:
            logits = self.embed(input_ids) @ self.head.weight.T
            return type("Output", (), {"logits": logits})

    model = Odd()
    ids = torch.tensor([[1, 2, 3]])
    with RowHead(model) as head:
        assert torch.equal(head(torch.tensor([2]), ids), model(ids).logits[0, 2:])
        assert head.works is False


@pytest.mark.parametrize("kind", ["llama", "mistral", "mamba2", "qwen3_next"])
def test_forks_do_not_touch_the_original_or_each_other(kind: str) -> None:
    model = build(kind)
    name = kv_cache.cache_argument(model)
    assert name is not None
    rnd = torch.Generator().manual_seed(0)
    prefix, a, b = (torch.randint(3, VOCABULARY, (1, n), generator=rnd) for n in (20, 6, 6))

    def on(past: Any, ids: torch.Tensor) -> torch.Tensor:
        positions = (
            {"position_ids": torch.arange(20, 26)[None].expand(ids.shape[0], -1)}
            if kv_cache.takes_positions(model)
            else {}
        )
        return model(input_ids=ids, use_cache=True, **{name: past}, **positions).logits

    with torch.no_grad():
        past = kv_cache.new_cache(model)
        model(input_ids=prefix, use_cache=True, **{name: past})
        both = on(kv_cache.fork(past, rows=2), torch.cat([a, b]))
        alone = [on(kv_cache.fork(past), ids) for ids in (a, b)]
        swapped = on(
            kv_cache.fork(kv_cache.fork(past, rows=2), index=torch.tensor([1, 0])), torch.cat([b, a])
        )
        whole = [
            model(input_ids=torch.cat([prefix, ids], 1), use_cache=False).logits[:, 20:] for ids in (a, b)
        ]
    for found in (both, torch.cat(alone), swapped.flip(0)):
        assert torch.allclose(found, torch.cat(whole), atol=1e-4)


def test_masks_say_what_windows_and_chunks_say() -> None:
    seen = torch.ones(1, 6, 6, dtype=torch.bool).tril()
    at = torch.arange(6)[None]
    found = attention_mask(
        Windows(3, 2, ("chunked_attention", "full_attention", "sliding_attention")),
        seen,
        at,
        at,
        torch.float32,
    )
    assert isinstance(found, dict)
    for kind, rule in (
        ("full_attention", lambda q, k: k <= q),
        ("sliding_attention", lambda q, k: k <= q and q - k < 3),
        ("chunked_attention", lambda q, k: k <= q and q // 2 == k // 2),
    ):
        wanted = torch.tensor([[rule(q, k) for k in range(6)] for q in range(6)])
        assert torch.equal(found[kind][0, 0] == 0, wanted)
        assert found[kind].min() == torch.finfo(torch.float32).min
    assert windows(build("mistral")) == Windows(6, None, None)
    assert windows(build("llama")).span == 0


# ---- gradients ---------------------------------------------------------------------------------------------

WAYS = [Way(passes, recomputes) for passes in (1, 2) for recomputes in (False, True)]


def gradients(
    model: Any, engine: Engine, plan: LoglikelihoodPlan, weights: torch.Tensor, way: Way | None = None
) -> dict[str, torch.Tensor]:
    """Name -> gradient of the weighted sum of the requests' log-likelihoods."""
    slopes = torch.zeros(plan.size, dtype=torch.float64).index_add(0, plan.places, weights)
    model.zero_grad(set_to_none=True)
    engine.differentiate(plan, lambda sums: slopes, way)
    return {name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "mixtral", "gpt2"])
def test_plans_that_share_give_the_gradient_of_one_request_at_a_time(architecture: str) -> None:
    model = build(architecture).float().requires_grad_(True)
    asked = requests(5, shared=12, items=3, choices=3)
    weights = torch.tensor([0.1 * (i % 7) - 0.3 for i in range(len(asked))], dtype=torch.float64)
    loss = torch.zeros((), dtype=torch.float64)
    for request, weight in zip(asked, weights, strict=True):
        ids = torch.tensor([request.context + request.continuation])
        logprobs = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
        rows = torch.arange(request.first, request.first + len(request.continuation))
        loss = loss + weight * logprobs[rows, torch.tensor(request.continuation)].sum()
    model.zero_grad(set_to_none=True)
    loss.backward()
    wanted = {name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None}
    size = max(float(g.norm()) for g in wanted.values())
    with Engine(model) as engine:
        for optimization, way in itertools.product(OPTIMIZATIONS, WAYS):
            found = gradients(model, engine, engine.compile(asked, optimization), weights, way)
            assert found.keys() == wanted.keys()
            for name, gradient in wanted.items():
                assert float((found[name] - gradient).norm()) <= 3e-6 * size, (optimization, way, name)


@pytest.mark.parametrize("optimization", ["plain", "tree"])
def test_every_way_gives_the_same_gradient_in_bfloat16(optimization: Any) -> None:
    """Within what rounding moves; attention has a backward pass of its own there."""
    model = build("llama").bfloat16().requires_grad_(True)
    asked = requests(5, shared=12, items=3, choices=3)
    weights = torch.linspace(-0.3, 0.3, len(asked), dtype=torch.float64)
    with Engine(model) as engine:
        plan = engine.compile(asked, optimization)
        first, *others = (gradients(model, engine, plan, weights, way) for way in WAYS)
    size = max(float(g.norm()) for g in first.values())
    for found in others:
        for name, gradient in first.items():
            assert float((found[name] - gradient).norm()) <= 1e-2 * size, name


def test_each_step_of_a_plan_runs_its_backward_pass_before_the_next_is_computed() -> None:
    """A parameter's hook sees the gradient of one step at a time, so that it can free it."""
    model = build("llama").float().requires_grad_(True)
    taken: list[float] = []

    def take(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        taken.append(float(parameter.grad.norm()))
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(take)
    asked = requests(3, shared=12, items=3, choices=3)
    with Engine(model) as engine:
        plan = engine.compile(asked, "tree")
        assert len(plan.steps) > 1
        engine.differentiate(plan, torch.ones_like, Way(passes=2))
    count = sum(1 for _ in model.parameters())
    assert len(taken) > count
    assert all(parameter.grad is None for parameter in model.parameters())


def test_recurrent_states_carry_no_gradient_and_say_so() -> None:
    model = build("mamba").float().requires_grad_(True)
    with Engine(model) as engine:
        plan = engine.compile(requests(3), "prefix")
        assert any(step.keep is not None for step in plan.steps)
        with pytest.raises(CandidateError, match="recurrent states"):
            engine.differentiate(plan, torch.ones_like, Way())
