"""Greedy generation: token by token what transformers' `generate` gives one prompt at a time, and text by
text what HFLM gives.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from evomerge.evaluation.inference.generation import GenerationLimits, Generator, TextRules
from evomerge.evaluation.inference.generation_probe import choose_decoder, probe_decoders, regrets
from evomerge.evaluation.inference.logits_processors import unsupported_reason
from evomerge.evaluation.inference.requests import Verification
from evomerge.evaluation.inference.selected_logits import RowHead
from evomerge.evaluation.inference.shared_prefill import cut_depths, levels
from evomerge.evaluation.inference.stop_strings import Stops
from tests.support.sweeps import sweep
from tests.support.text_architectures import EOS, PAD, VOCABULARY, build, tokenizer
from tests.support.toy import REPO, zoo_folder

NEW = 6
SPAN = 48  # windows are 6 and chunks 16 tokens long
DECODERS = ("slots", "padded", "equal", "single", "whole")
ALLOWED = {  # of decoders and of shared prefixes, in float32
    "llama": {"slots", "padded", "equal", "single", "whole", "prefix"},
    "gemma2": {"slots", "padded", "equal", "single", "whole", "prefix"},
    "gpt2": {"slots", "padded", "equal", "single", "whole", "prefix"},
    "bloom": {"slots", "padded", "equal", "single", "whole", "prefix"},
    "mamba2": {"padded", "equal", "single", "whole", "prefix"},
    "qwen3_next": {"padded", "equal", "single", "whole", "prefix"},
    "mamba": {"padded", "equal", "single", "whole"},  # several tokens on top of a state are wrong
    "gpt_neo": {
        "padded",
        "equal",
        "single",
        "whole",
        "prefix",
    },  # its local layers do not take the slots' mask
    "recurrent_gemma": {"single", "whole"},  # its state lies in its modules, not in the cache
    "minimax": {"whole"},  # it takes a cache of its own alone
    "rwkv": {"equal", "single", "whole"},  # no cache that can be forked
}


def prompts(seed: int = 5) -> list[list[int]]:
    """Ten prompts of 1 to 44 tokens; four begin alike with 24 tokens, two are equal."""
    rnd = random.Random(seed)
    tokens = [rnd.randrange(3, VOCABULARY) for _ in range(24)]
    alone = [[rnd.randrange(3, VOCABULARY) for _ in range(n)] for n in (1, 3, 22, 8, 8)]
    alike = [tokens + [rnd.randrange(3, VOCABULARY) for _ in range(n)] for n in (1, 20, 5, 9)]
    return [*alone[:3], *alike, *alone[3:], list(alike[1])]


def generated(model: Any, prompt: Sequence[int], new: int = NEW, **settings: Any) -> list[int]:
    """New tokens of transformers' own `generate` at batch size 1."""
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=PAD,
        **settings,
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def make(model: Any, head: RowHead, decoder: str, **more: Any) -> Generator:
    shares = more.pop("shares", False)
    rules = TextRules(tokenizer(), more.pop("max_length", 256), PAD, frozenset([EOS]))
    limits = GenerationLimits(**{"rows": 4, "forward_cost": 4, **more})
    return Generator(model, head, rules, decoder=decoder, shares=shares, limits=limits)


def hflm(model: Any, words: Any, batch: int = 1) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=words, batch_size=batch)


def texts_of_hflm(lm: Any, contexts: Sequence[str], until: Sequence[str], new: int) -> list[str]:
    from lm_eval.api.instance import Instance

    asked = {"until": list(until), "max_gen_toks": new, "do_sample": False}
    rows = [
        Instance(request_type="generate_until", doc={}, arguments=(c, dict(asked)), idx=0) for c in contexts
    ]
    found: list[str] = lm.generate_until(rows, disable_tqdm=True)
    return found


def our_texts(
    lm: Any, generator: Generator, contexts: Sequence[str], until: Sequence[str], new: int
) -> list[str]:
    from lm_eval.models.utils import handle_stop_sequences, postprocess_generated_text

    stops = handle_stop_sequences(list(until), eos=lm.tok_decode(lm.eot_token_id, skip_special_tokens=False))
    ids = [lm.tok_batch_encode([c], left_truncate_len=lm.max_length - new)[0][0].tolist() for c in contexts]
    return [
        postprocess_generated_text(lm.tok_decode(t), stops, None)
        for t in generator.run(generator.compile(ids, stops, new))
    ]


@pytest.mark.parametrize("name", ALLOWED)
def test_the_probe_allows_what_is_right_and_what_it_allows_gives_the_tokens_of_generate(name: str) -> None:
    model = build(name)
    with RowHead(model) as head:
        verdicts = probe_decoders(model, head, span=SPAN, pad_id=PAD, every=True)
        assert {key for key, verdict in verdicts.items() if verdict.allowed} == ALLOWED[name], verdicts
        asked = (
            prompts()[1:] if name == "recurrent_gemma" else prompts()
        )  # a prompt of one token goes on from its last text
        wanted = [generated(model, p) for p in asked]
        for decoder in DECODERS:
            if verdicts[decoder].allowed:
                generator = make(model, head, decoder, shares=verdicts["prefix"].allowed)
                plan = generator.compile(asked, (), NEW)
                assert (
                    sum(len(c.levels) for c in plan.chunks) + len(plan.prefixes) > 0 or not generator.shares
                )
                assert generator.run(plan) == wanted, decoder
        apart = make(model, head, choose_decoder(verdicts))
        assert apart.run(apart.compile(asked, (), NEW)) == wanted


def test_what_the_probe_refuses_gives_other_tokens() -> None:
    model = build("gpt_neo")
    with RowHead(model) as head:
        generator = make(model, head, "slots")
        plan = generator.compile(prompts(), (), NEW)
        assert generator.run(plan) != [generated(model, p) for p in prompts()]
        worst, _ = regrets(head, plan.prompts, generator.texts(plan).tokens)
        assert worst > 0.06


def test_a_window_shows_only_to_prompts_that_exceed_it() -> None:
    """gpt_neo's local layers: the slots' mask is wrong from the window on, so a probe of short prompts lets
    it pass.
    """
    from transformers import AutoModelForCausalLM, GPTNeoConfig

    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=64,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        window_size=64,
        attention_types=[[["global", "local"], 1]],
        initializer_range=0.3,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with RowHead(model) as head:
        assert probe_decoders(model, head, span=16)["slots"].allowed
        assert not probe_decoders(model, head, span=120)["slots"].allowed


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3_next"])
def test_in_half_precision_every_token_is_the_likeliest_but_for_rounding(name: str) -> None:
    model = build(name, torch.bfloat16)
    with RowHead(model) as head:
        decoder = choose_decoder(probe_decoders(model, head, span=SPAN, pad_id=PAD))
        assert decoder == ("padded" if name == "qwen3_next" else "slots")
        generator = make(model, head, decoder, shares=True)
        plan = generator.compile(prompts(), (), NEW)
        assert regrets(head, plan.prompts, generator.texts(plan).tokens)[0] < 0.3


@pytest.mark.parametrize("decoder", DECODERS)
def test_limits_of_each_prompt_and_memory_for_one_row_alone(decoder: str) -> None:
    model = build("llama")
    asked, limits = prompts(), [1 + k % 9 for k in range(len(prompts()))]
    wanted = [generated(model, p, new) for p, new in zip(asked, limits, strict=True)]
    with RowHead(model) as head:
        assert any(len(tokens) < new for tokens, new in zip(wanted, limits, strict=True)), "one ends with EOS"
        generator = make(model, head, decoder, memory=1, shares=True)
        plan = generator.compile(asked, (), limits)
        assert plan.rows == 1
        assert generator.run(plan) == wanted
        assert make(model, head, decoder).run(make(model, head, decoder).compile(asked, (), limits)) == wanted
        assert generator.run(generator.compile([], (), 4)) == []


def test_weights_may_change_between_two_runs_of_a_plan() -> None:
    model, other = build("llama"), build("llama", seed=1)
    with RowHead(model) as head:
        generator = make(model, head, "slots", shares=True)
        plan = generator.compile(prompts(), (), NEW)
        before = generator.run(plan)
        model.load_state_dict(other.state_dict())
        assert generator.run(plan) == [generated(other, p) for p in prompts()] != before


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"suppress_tokens": list(range(60, 90)), "begin_suppress_tokens": [EOS, 101]},
        {"min_length": 7, "forced_eos_token_id": EOS},
        {"min_new_tokens": 4, "bad_words_ids": [[70], [71, 72]]},
    ],
    ids=lambda s: next(iter(s)),
)
def test_the_models_own_generation_config_is_honoured(settings: dict[str, Any]) -> None:
    model = build("llama")
    bare = [generated(model, p) for p in prompts()]
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    wanted = [generated(model, p) for p in prompts()]
    assert wanted != bare, "it changes the texts"
    assert unsupported_reason({"do_sample": False, "temperature": 0.0}, model) is None
    with RowHead(model) as head:
        for decoder in ("slots", "padded", "equal"):
            generator = make(model, head, decoder, shares=True)
            assert generator.run(generator.compile(prompts(), (), NEW)) == wanted, decoder


def test_a_requests_own_penalty_is_honoured_over_the_models() -> None:
    model = build("llama")
    bare = [generated(model, p) for p in prompts()]
    model.generation_config.repetition_penalty = 1.7
    wanted = [generated(model, p) for p in prompts()]
    assert wanted != bare
    model.generation_config.repetition_penalty = 1.1
    with RowHead(model) as head:
        generator = make(model, head, "slots", shares=True)
        assert (
            generator.run(
                generator.compile(prompts(), (), NEW, {"repetition_penalty": 1.7, "do_sample": False})
            )
            == wanted
        )


@pytest.mark.parametrize(
    ("asked", "config", "said"),
    [
        ({"do_sample": True}, {}, "sampling"),
        ({"temperature": 0.7}, {}, "sampling"),
        ({"num_beams": 4}, {}, "num_beams"),
        ({"repetition_penalty": 1.2, "do_sample": False}, {}, None),
        (
            {"guidance_scale": 1.5},
            {},
            "guidance_scale in the generation settings asks for UnbatchedClassifierFreeGuidance",
        ),
        ({"no_such_setting": 1}, {}, "no_such_setting"),
        ({"penalty_alpha": 0.6, "top_k": 4}, {}, "contrastive"),
        ({}, {"guidance_scale": 1.5}, "UnbatchedClassifierFreeGuidance"),
        ({}, {"num_beams": 3}, "beam_search"),
        ({}, {"max_time": 5.0}, "MaxTimeCriteria"),
        ({}, {"max_new_tokens": 3}, "max_new_tokens"),
        ({}, {"prompt_lookup_num_tokens": 3}, "assisted"),
        ({}, {"repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8}, None),
        ({"do_sample": False, "top_p": 0.9, "temperature": 0.0}, {}, None),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_its_name(
    asked: dict[str, Any], config: dict[str, Any], said: str | None
) -> None:
    model = build("llama")
    for name, value in config.items():
        setattr(model.generation_config, name, value)
    reason = unsupported_reason(asked, model)
    assert (reason is None) if said is None else (reason is not None and said in reason), reason


@pytest.mark.parametrize(
    "name",
    sweep(["llama", "gemma2", "bloom", "qwen3_next", "recurrent_gemma"], ("gemma2", "recurrent_gemma")),
)
def test_texts_are_those_of_hflm_at_batch_size_1(name: str) -> None:
    model, words = build(name), tokenizer()
    model.generation_config.eos_token_id = None
    rnd = random.Random(3)
    contexts = [
        words.decode([rnd.randrange(3, VOCABULARY) for _ in range(rnd.randrange(1, 40))]) for _ in range(12)
    ]
    lm = hflm(model, words)
    free = texts_of_hflm(lm, contexts, ["never in it"], 12)
    letters = sorted({c for text in free for c in text[1:] if c.isalpha()})
    until = [letters[0], free[0][2:4] or letters[-1], free[1][3:6] or letters[-1], "\n\n"]
    with RowHead(model) as head:
        verdicts = probe_decoders(model, head, span=SPAN, pad_id=PAD)
        generator = make(model, head, choose_decoder(verdicts), shares=verdicts["prefix"].allowed)
        wanted = texts_of_hflm(lm, contexts, until, 12)
        assert wanted != free, "some stop"
        assert our_texts(lm, generator, contexts, until, 12) == wanted
        assert our_texts(lm, generator, contexts, ["never in it"], 12) == free


def test_texts_of_the_zoo_are_those_of_hflm() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = zoo_folder() / "math"
    words = AutoTokenizer.from_pretrained(folder)
    lines = (REPO / "evaluators" / "zoo" / "zoo_arithmetic.test.jsonl").read_text().splitlines()[:96]
    contexts = [json.loads(line)["prompt"] for line in lines]
    # in float32: on CPUs without bfloat16 arithmetic a row's rounding depends on its batch, and near ties
    # fall either way
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    lm = hflm(model, words, 32)
    with RowHead(model) as head:
        rules = TextRules(words, max_length=128, pad_id=0, eos_ids=frozenset([2]))
        generator = Generator(model, head, rules, decoder="slots", shares=True)
        assert our_texts(lm, generator, contexts, ["\n"], 4) == texts_of_hflm(lm, contexts, ["\n"], 4)


@pytest.mark.parametrize(
    "stops",
    [
        ["b"],
        ["abX", "b"],
        ["b", "abX"],
        ["A:", "\n\n"],
        ["é"],
        ["€", " the"],
        ["</s>"],
        ["", "q"],
        ["The answer"],
        [],
    ],
)
def test_stops_fire_at_the_token_at_which_hflms_criteria_do(stops: list[str]) -> None:
    """Random texts rich in what the strings are made of, letters cut in the middle included."""
    from lm_eval.models.utils_hf import stop_sequences_criteria

    words, rnd = tokenizer(), random.Random(1)
    rich = [
        t
        for s in [*stops, "abX", "The answer", "é€\n\n", " A:"]
        for t in words.encode(s, add_special_tokens=False)
    ]
    found = Stops(words, stops)
    fired = 0
    for _ in range(150):
        text = [rnd.choice(rich) if rnd.random() < 0.8 else rnd.randrange(VOCABULARY) for _ in range(14)]
        if rnd.random() < 0.5:
            text[3:3] = words.encode(rnd.choice([*stops, "b"]), add_special_tokens=False)
        criteria = stop_sequences_criteria(words, list(stops), 2, 1)
        wanted = next(
            (
                n
                for n in range(1, len(text) + 1)
                if stops and bool(criteria(torch.tensor([[0, 0, *text[:n]]]), None))
            ),
            None,
        )
        ours = next((n for n in range(1, len(text) + 1) if found.hit(text[:n])), None)
        assert ours == wanted, (text, words.decode(text))
        fired += wanted is not None
    assert fired >= 10 or not stops


def test_tokens_and_prompts_that_do_not_fit_are_refused_or_cut_as_in_hflm() -> None:
    model = build("llama")
    with RowHead(model) as head:
        generator = make(model, head, "slots", max_length=20)
        long = prompts()[4]
        assert generator.run(generator.compile([long], (), 6)) == [generated(model, long[-14:], 6)]
        for prompt, new in (([], 4), ([5], 20), ([5], 0)):
            with pytest.raises(ValueError, match="new tokens"):
                generator.compile([prompt], (), new)
        with pytest.raises(ValueError, match="decoder must be one of device, slots"):
            make(model, head, "beam")


@pytest.mark.parametrize("forward_cost", [0, 3, 50, 10**6])
def test_levels_spell_every_prompt_and_cost_no_more_than_one_forward_over_all(forward_cost: int) -> None:
    rnd = random.Random(2)
    for _ in range(30):
        asked = sorted(
            {tuple(rnd.randrange(3) for _ in range(rnd.randrange(4, 9))) for _ in range(rnd.randrange(1, 20))}
        )
        width = max(map(len, asked))
        depths = cut_depths(asked, width, forward_cost)
        assert all(0 < d < min(map(len, asked)) for d in depths)
        rows: list[tuple[int, ...]] = []
        cost = 0
        for tokens, index in levels(asked, depths):
            rows = [before + more for before, more in zip(rows or [()] * len(tokens), tokens, strict=True)]
            cost += len(tokens) * len(tokens[0]) + forward_cost
            rows = [rows[i] for i in index]
        depth = depths[-1] if depths else 0
        assert [r + p[depth:] for r, p in zip(rows or [()] * len(asked), asked, strict=True)] == asked
        assert cost + len(asked) * (width - depth) <= len(asked) * width


def test_the_decoder_is_the_first_that_is_allowed() -> None:
    yes, no = Verification(True, ""), Verification(False, "")
    assert choose_decoder({"equal": yes, "padded": yes, "slots": yes}) == "slots"
    assert choose_decoder({"slots": no, "padded": yes, "equal": yes}) == "padded"
    assert choose_decoder({"slots": no, "padded": no, "equal": no, "single": no}) == "whole"
