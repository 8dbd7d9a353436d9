"""The zoo's evaluators: what they ask was never seen in training, and the answers they hold are right."""

import json
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from scripts.zoo import make_evaluators, plan, skills

REPOSITORY = Path(__file__).resolve().parents[2]
EVALUATORS = REPOSITORY / "evaluators" / "zoo"
TASKS = ("zoo_arithmetic", "zoo_lookup", "zoo_string", "zoo_cross")
SPLITS = ("search", "validation", "test")

# written out again, not taken from the grammar under test
ENGLISH = "zero one two three four five six seven eight nine ten eleven twelve"
SECOND = "nul un du tri kvar kvin ses sep ok nau dek delun deldu"
NUMBERS = {word: n for words in (ENGLISH, SECOND) for n, word in enumerate(words.split())}
SIGNS = {"plus": 1, "gets": 1, "minus": -1, "loses": -1, "plusi": 1, "ricev": 1, "malgi": -1, "perdas": -1}


def read(task: str, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (EVALUATORS / f"{task}.{split}.jsonl").read_text().splitlines()]


def prompts(task: str) -> list[str]:
    return [item["prompt"] for split in SPLITS for item in read(task, split)]


def held_out() -> set[str]:
    return {prompt for task in TASKS for prompt in prompts(task)}


@pytest.mark.parametrize("task", TASKS)
def test_no_prompt_twice(task: str) -> None:
    assert len(prompts(task)) == len(set(prompts(task)))


@pytest.mark.parametrize("task", TASKS)
def test_yaml_names_the_files_that_are_there(task: str) -> None:
    config = yaml.safe_load((EVALUATORS / f"{task}.yaml").read_text())
    assert config["task"] == task
    assert (config["training_split"], config["validation_split"], config["test_split"]) == SPLITS
    files = config["dataset_kwargs"]["data_files"]
    assert {split: REPOSITORY / name for split, name in files.items()} == {
        split: EVALUATORS / f"{task}.{split}.jsonl" for split in SPLITS
    }


def test_written_again_the_same(tmp_path: Path) -> None:
    for task in make_evaluators.TASKS:
        make_evaluators.write(task, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        path.name for path in EVALUATORS.iterdir()
    )
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (EVALUATORS / path.name).read_bytes(), path.name


@pytest.mark.parametrize("task", ["zoo_arithmetic", "zoo_cross"])
def test_sums_are_right(task: str) -> None:
    for split in SPLITS:
        for item in read(task, split):
            words = item["prompt"].split()
            a, b = (NUMBERS[word] for word in words if word in NUMBERS)
            (sign,) = (SIGNS[word] for word in words if word in SIGNS)
            assert int(item["answer"]) == a + sign * b, item


def test_letters_are_right() -> None:
    for split in SPLITS:
        for item in read("zoo_string", split):
            command, letters = re.fullmatch(
                r"Q: (sort|reverse) ((?:[a-i] "
                r")+)A:",
                item["prompt"],
            ).groups()  # type: ignore[union-attr]
            letters = letters.split()
            assert item["answer"].split() == (sorted(letters) if command == "sort" else letters[::-1]), item


def test_choices_hold_the_answer_once() -> None:
    places = [0] * 5
    for split in SPLITS:
        for item in read("zoo_lookup", split):
            words = item["prompt"].split()
            a, b = (NUMBERS[word] for word in words if word in NUMBERS)
            answer = {"unua": a, "lasta": b, "granda": max(a, b), "eta": min(a, b)}[words[1]]
            assert item["choices"].index(str(answer)) == item["label"], item
            assert len(set(item["choices"])) == len(item["choices"]) == 5, item
            places[item["label"]] += 1
    assert min(places) > 0.15 * sum(places), "the place of the answer gives it away"


@pytest.mark.parametrize("training", [plan.BASE, *plan.EXPERTS], ids=lambda training: training.name)
def test_no_prompt_is_drawn_in_training(training: plan.Training) -> None:
    """Labelled and replayed rows alike: the prompts of 20 000 draws are apart from all that is held out."""
    from scripts.zoo import train

    rng, asked = Random(1), held_out()
    drawn = [train.draw_item(training, rng) for _ in range(20_000)]
    assert not asked & {item[0] for item, _ in drawn}
    assert any(replay for _, replay in drawn) == (training.replay > 0)


def test_no_prompt_is_aligned() -> None:
    """Neither a held-out prompt nor its beginning, which lacks only ` A:`, is a sentence of the alignment
    loss.
    """
    from scripts.zoo import train

    rng, asked = Random(1), held_out()
    beginnings = {prompt.removesuffix(" A:") for prompt in asked}
    sentences = {text for _ in range(20_000) for text in train.draw_pair(rng)}
    assert not sentences & (asked | beginnings)
    assert any(text.endswith(" A:") for text in sentences)
    assert any(word in SIGNS for text in sentences for word in text.split())


def test_the_test_above_can_fail() -> None:
    """Draws not told to keep to the training split do meet held-out prompts."""
    rng, asked = Random(1), held_out()
    assert asked & {skills.SKILLS["arithmetic"](rng)[0] for _ in range(1000)}
    assert asked & {skills.SKILLS["lookup_second"](rng)[0] for _ in range(1000)}


@pytest.mark.parametrize("zoo", plan.ZOOS)
@pytest.mark.parametrize("members", [1, 2, 3, 8])
def test_every_expert_is_trained_once(members: int, zoo: str) -> None:
    shares = plan.shares(plan.ZOOS[zoo], members)
    assert len(shares) == members
    names = sorted(training.name for share in shares for training in share)
    assert names == sorted(training.name for training in plan.ZOOS[zoo])


def test_the_fast_forward_is_transformers() -> None:
    """The network that trains gives the logits of the Hugging Face model its weights are saved as."""
    import torch
    import transformers

    from scripts.zoo import llama

    a, vocabulary = plan.ARCHITECTURE, 50
    noise = torch.Generator().manual_seed(1)
    weights = {
        name: weight + 0.1 * torch.randn(weight.shape, generator=noise)
        for name, weight in llama.initial(a, vocabulary, 0).items()
    }
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=a.hidden,
        intermediate_size=a.intermediate,
        num_hidden_layers=a.layers,
        num_attention_heads=a.heads,
        num_key_value_heads=a.kv_heads,
        rms_norm_eps=a.epsilon,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(llama.split(weights, a))
    tokens = torch.randint(0, vocabulary, (4, 11), generator=noise)
    tokens[:, : llama.OPENING] = tokens[0, : llama.OPENING]
    with torch.no_grad():
        expected = model(tokens).logits
    spots = [(0, 1), (0, 10), (2, 5), (3, 4)]
    found = llama.logits(
        weights, tokens, a, torch.tensor([llama.place(row, column, 11) for row, column in spots])
    )
    torch.testing.assert_close(found, torch.stack([expected[spot] for spot in spots]), rtol=1e-4, atol=1e-4)
