"""Budgets by the kind of device."""

from __future__ import annotations

import pytest
import torch

from evomerge.evaluation import budgets
from evomerge.evaluation.inference.generation import Generator, TextRules
from evomerge.evaluation.inference.loglikelihood import Engine
from evomerge.evaluation.inference.selected_logits import RowHead
from tests.support.text_architectures import PAD, VOCABULARY, build

GIB = 1 << 30


def test_a_cpu_has_the_limits_that_it_always_had() -> None:
    model = build("llama")
    assert budgets.budgets_of(torch.device("cpu")) == budgets.Budgets(1024, 4096, 1 << 26, 1024, GIB)
    with Engine(model) as engine:
        assert (engine.facts.tokens, engine.facts.rows) == (1024, (1 << 26) // VOCABULARY)
    with RowHead(model) as head:
        generator = Generator(model, head, TextRules(None, 256, PAD), decoder="slots")
        rules = generator._batching_rules(7)
        assert (rules.tokens, generator.memory, generator._max_rows) == (4096, GIB, (1 << 26) // VOCABULARY)
        assert generator._rows_at_once(5000, 8) == 1024


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (150_000_000_000, budgets.Budgets(16_384, 16_384, 1 << 30, 1024, 8 * GIB)),  # 141 GB
        (85_000_000_000, budgets.Budgets(16_384, 16_384, 1 << 29, 1024, 4 * GIB)),  # 80 GB
        (25_300_000_000, budgets.Budgets(8_192, 8_192, 1 << 27, 1024, GIB)),  # 24 GB
        (8 * GIB, budgets.Budgets(8_192, 8_192, 1 << 26, 1024, GIB)),
    ],
)
def test_budgets_of_cards(memory: int, expected: budgets.Budgets) -> None:
    assert budgets.of_card(memory) == expected


@pytest.mark.parametrize("memory", [24 * GIB, 80 * GIB, 141 * GIB])
def test_logits_and_caches_take_a_small_part_of_a_card_however_much_of_it_is_free(memory: int) -> None:
    found = budgets.of_card(memory)
    assert 2 * found.logits + found.cache <= memory // 12
    # a card of the same kind that reports some megabytes less has the same plans
    assert budgets.of_card(memory - (memory >> 8)) == found or memory & (memory - 1) == 0
