"""Losses of Python tasks: a scalar for each item or for all, their gradient, and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from evomerge.errors import CandidateError, TaskError
from evomerge.evaluation import GradientRequest
from evomerge.evaluation.python_tasks import PythonSpec, PythonTasks
from evomerge.store import Store
from tests.support.learned_search import learned_file
from tests.support.toy import in_process

SOURCE = """
import torch

ITEMS = [f"item {i}" for i in range(40)]

def score(model, tokenizer):
    return {item: float(len(item)) for item in ITEMS}

def each(model, items):
    return {item: model.weight.square().sum() * (1 + int(item[5:])) for item in items}

def of_all(model, tokenizer, items):
    assert tokenizer == "words"
    return model.weight.square().mean()

def detached(model, items):
    return {item: model.weight.detach().sum() for item in items}

def no_tensor(model, items):
    return {item: 1.0 for item in items}

def one_less(model, items):
    return {item: model.weight.sum() for item in items[1:]}

def infinite(model, items):
    return model.weight.sum() / 0

def alone(model):
    return model.weight.sum()
"""
ZOO_SOURCE = """
TEXTS = {f"text {i}": f"Q: {a} plus one A: {i + 1}" for i, a in enumerate(
    ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"] * 4)}
TEXTS = {f"text {i}": text for i, text in enumerate(TEXTS.values())}

def nats(model, tokenizer, items):
    import torch
    found = {}
    for item in items:
        ids = torch.tensor([tokenizer.encode(TEXTS[item])])
        found[item] = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1].float(), ids[0, 1:])
    return found

def score(model, tokenizer, items):
    return {item: -float(value) for item, value in nats(model, tokenizer, items or list(TEXTS)).items()}
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Name of a module in the working directory that no other test uses."""
    name = "loss_" + hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return name


def model() -> nn.Linear:
    own = nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        own.weight.copy_(torch.arange(6.0).reshape(3, 2) / 5)
    return own


def load(module: str, loss: str | None) -> PythonTasks:
    named = None if loss is None else f"{module}:{loss}"
    return PythonTasks([PythonSpec("mine", f"{module}:score", loss=named)], "words", model())


@pytest.mark.parametrize("loss", ["each", "of_all"])
def test_the_gradient_is_that_of_the_weighted_sum_of_the_items_losses(loss: str, module: str) -> None:
    tasks, own = load(module, loss), model()
    items = tasks.items("search")["mine"][:5]
    scores, whole = tasks.backward(own, {"mine": items}, GradientRequest({"mine": 0.3}))
    weight = own.weight.detach()
    if loss == "each":
        wanted = [float(weight.square().sum()) * (1 + int(item[5:])) for item in items]
        gradient = 2 * weight * sum(0.3 * (1 + int(item[5:])) for item in items)
    else:
        wanted = [float(weight.square().mean())] * 5
        gradient = 5 * 0.3 * 2 * weight / weight.numel()
    assert [score.value for score in scores] == pytest.approx([-value for value in wanted])
    assert whole == pytest.approx(0.3 * sum(wanted))
    assert own.weight.grad is not None
    assert torch.allclose(own.weight.grad, gradient, rtol=1e-6)


def test_without_derivatives_there_is_the_same_loss_and_no_gradient(module: str) -> None:
    tasks, own = load(module, "each"), model()
    items = {"mine": tasks.items("search")["mine"][:5]}
    wanted = tasks.backward(model(), items, GradientRequest({"mine": 1.0}))
    assert tasks.backward(own, items, GradientRequest({"mine": 1.0}, derivatives=False)) == wanted
    assert own.weight.grad is None


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ("detached", "has no gradient by the model's weights; compute it in torch"),
        ("no_tensor", "gave float; it must give a torch scalar for each item, or one for all"),
        ("one_less", "gave 4 losses for 5 items; it must give one for each, and none for"),
        ("infinite", "is not finite"),
    ],
)
def test_a_loss_that_gives_something_else_fails_the_candidate(loss: str, words: str, module: str) -> None:
    tasks = load(module, loss)
    items = {"mine": tasks.items("search")["mine"][:5]}
    with pytest.raises(CandidateError, match=words):
        tasks.backward(model(), items, GradientRequest({"mine": 1.0}))


def test_what_cannot_be_a_loss_is_refused_at_the_start(module: str) -> None:
    with pytest.raises(TaskError, match=r"takes 1 arguments; it is called as loss\(model, items\)"):
        load(module, "alone")
    with pytest.raises(TaskError, match="holds no function 'absent'"):
        load(module, "absent")
    with pytest.raises(TaskError, match="give it a loss: module:function"):
        load(module, None).check_losses({})
    with pytest.raises(TaskError, match="is a Python function, whose answers are not known"):
        load(module, "each").check_losses({"mine": "math"})
    assert load(module, None).check_losses({"mine": "none"}) == ()
    assert load(module, "each").check_losses({}) == ()


def test_a_loss_belongs_to_the_fingerprint_and_its_absence_does_not(module: str) -> None:
    """A study of before goes on."""
    prints = {loss: load(module, loss).fingerprint()["mine"] for loss in (None, "each", "of_all")}
    assert len(set(prints.values())) == 3
    tasks = load(module, None)
    source = hashlib.sha256(Path(f"{module}.py").read_bytes()).hexdigest()
    spec = f"PythonSpec(name='mine', function='{module}:score', higher_is_better=True)"
    items = [tasks.items(role)["mine"] for role in ("search", "validation", "test")]
    assert prints[None] == hashlib.sha256(f"({spec}, {source!r}, {items!r})".encode()).hexdigest()


def test_a_learned_stage_goes_down_a_python_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_nats.py").write_text(ZOO_SOURCE)
    monkeypatch.chdir(tmp_path)
    file = learned_file(tmp_path, "nats", {"steps": 4, "items": 40, "rate": 0.1})
    document: dict[str, Any] = json.loads(file.read_text())
    document["tasks"] = [{"name": "nats", "python": "own_nats:score", "loss": "own_nats:nats"}]
    document["evaluation"] = {}
    file.write_text(json.dumps(document))
    code, _, err = in_process("run", file, "--root", tmp_path, "--allow-python")
    assert code == 0, err
    with Store.open(tmp_path / "nats" / "study.db") as store:
        steps = [trial for trial in store.trials() if trial.origin == "learned"]
        slopes = [store.scored(trial).evaluation.slopes for trial in steps]
        study = store.study()
    losses = [of.loss for of in slopes if of is not None]
    assert losses[-1] < losses[0] - 0.01
    assert study is not None
    assert study.outcome is not None
    agreement = study.outcome.stages[0].agreement
    assert agreement is not None
    assert agreement.correlation == pytest.approx(1.0), "the score is minus the loss"
