"""The probe allows no technique and no decoder that gives other numbers than the model itself.

A dozen architectures, those at which some technique fails without a word among them;
scripts/validation/probe_verdicts.py tries them all.
"""

from __future__ import annotations

import pytest
import torch

from tests.support import probe_truth
from tests.support.probe_truth import DECODERS, OPTIMIZATIONS, Truth, truth
from tests.support.sweeps import sweep
from tests.support.text_architectures import build

NAMES = (
    "llama",
    "mistral",
    "gemma2",
    "llama4_chunk",
    "gpt_neo",
    "bloom",
    "mpt",
    "mamba",
    "jamba",
    "lfm2",
    "minimax",
)
SILENT = {  # techniques that run on an architecture and give other numbers
    "gpt_neo": {"tree"},
    "mpt": {"tree"},
    "mamba": {"prefix", "fork"},
    "jamba": {"prefix", "fork"},
    "recurrent_gemma": {"prefix", "fork", "tree"},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", sweep(NAMES, ("llama", "gemma2", "gpt_neo", "jamba")))
def test_nothing_is_allowed_that_is_wrong_and_little_refused_that_is_right(name: str) -> None:
    found = probe_truth.outcomes(name)
    assert [o for o in found if o.allowed and not o.right] == []
    assert {o.name for o in found if o.allowed} >= {"plain"}
    assert any(o.allowed for o in found if o.name in DECODERS)
    refused = [o for o in found if o.name in OPTIMIZATIONS and o.right and not o.allowed]
    assert refused == [], "sharing that this model could have had"


@pytest.mark.sweep
def test_half_precision_hides_no_wrong_decoder() -> None:
    """Slots are wrong for this model; on few tokens the regret alone looks like rounding."""
    found = probe_truth.outcomes("recurrent_gemma", (torch.float32, torch.bfloat16))
    assert [o for o in found if o.allowed and not o.right] == []
    assert {o.name for o in found if o.dtype == torch.bfloat16 and not o.right} >= {
        "slots",
        "padded",
        "prefix",
        "tree",
    }


@pytest.mark.parametrize("name", SILENT)
def test_the_truth_sees_what_is_silently_wrong(name: str) -> None:
    """Else the test above could not fail."""
    model = build(name)
    asked = probe_truth.likeliest(model, probe_truth.requests(2))
    wanted = probe_truth.reference(model, asked)
    assert bool(wanted.greedy.any())
    assert not bool(wanted.greedy.all())
    wrong: dict[str, Truth] = {t: truth(model, t, asked, wanted) for t in SILENT[name]}
    assert not any(found.right for found in wrong.values())
    assert any(found.error > 0.05 for found in wrong.values()), "wrong by numbers, not by an exception"


def test_the_truth_sees_another_model() -> None:
    model, other = build("llama"), build("llama")
    with torch.no_grad():
        other.get_parameter("model.layers.2.mlp.up_proj.weight").mul_(1.02)
    asked = probe_truth.requests(3)
    assert truth(model, "fork", asked, probe_truth.reference(model, asked)).right
    assert not truth(other, "fork", asked, probe_truth.reference(model, asked)).right
