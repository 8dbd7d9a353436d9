"""Losses of lm-eval items through a model, against central differences of a naive loss in float64."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from evomerge.checkpoints import Checkpoint
from evomerge.evaluation import GradientRequest, Labels
from evomerge.evaluation.lm_harness.harness import LmHarness
from evomerge.evaluation.lm_harness.task_loading import TaskSpec
from evomerge.evaluation.surrogates import SURROGATES, Surrogate
from evomerge.merging import model_loading
from tests.support.lm_eval_tasks import BATCH, ROLLING, write_task
from tests.support.toy import zoo_folder

ITEMS = 2
SPECS = [
    TaskSpec(task, splits="declared") for task in ("zoo_arithmetic", "zoo_lookup", "zoo_string", "texts")
]
WEIGHTS = {"zoo_arithmetic": 0.3, "zoo_lookup": 0.2, "zoo_string": 0.4, "texts": 0.1}
STEP = 1e-5


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> LmHarness:
    """The zoo's tasks of three kinds, and texts without a prompt."""
    folder = write_task(tmp_path_factory.mktemp("tasks"), "texts", ROLLING)
    tokenizer = model_loading.load_tokenizer(Checkpoint(zoo_folder() / "base"))
    return LmHarness(SPECS, tokenizer, batch_size=BATCH, include=[folder])


@pytest.fixture(scope="module")
def model() -> Any:
    return model_loading.load_base(Checkpoint(zoo_folder() / "lang"), "float32")


def in_float64(model: Any) -> Any:
    """A copy in float64, its norms too, which transformers computes in float32."""
    exact = copy.deepcopy(model).double()
    for module in exact.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = functools.partial(exact_norm, module)
    return exact


def exact_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    scale = (x.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()
    return torch.as_tensor(module.weight * x * scale)


def naive_sum(model: Any, tokenizer: Any, context: str, text: str) -> torch.Tensor:
    """Log-likelihood of a text after a context, all tokens in one forward without a cache."""
    whole = tokenizer.encode(context + text, add_special_tokens=False)
    first = len(tokenizer.encode(context, add_special_tokens=False)) if context else 0
    if not context:
        whole, first = [tokenizer.bos_token_id, *whole], 1
    logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return torch.stack([logprobs[i - 1, whole[i]] for i in range(first, len(whole))]).sum()


def naive_item(
    model: Any, harness: LmHarness, task: str, item: str, surrogate: Surrogate, labels: Sequence[Any]
) -> torch.Tensor:
    """The loss of an item, said a second time."""
    requests, tokenizer = harness.tasks[task].requests[item], harness.tokenizer
    doc, prompt = requests[0].doc, str(requests[0].args[0])
    if task == "texts":
        tokens = len(tokenizer.encode(prompt, add_special_tokens=False))
        return -naive_sum(model, tokenizer, "", prompt) / tokens
    if task == "zoo_lookup":
        sums = torch.stack([naive_sum(model, tokenizer, *request.args) for request in requests])
        right = labels or [harness.tasks[task].task.doc_to_target(doc)]
        if surrogate == "margin":
            wrong = max(float(s) for i, s in enumerate(sums) if i not in right)
            best = max(float(sums[i]) for i in right)
            return 1 - torch.sigmoid(torch.tensor(best - wrong, dtype=torch.float64))
        probability = sums.softmax(-1)[list(right)].sum()
        return -probability.log() if surrogate == "logprob" else 1 - probability
    texts = [str(requests[0].args[1])] if task == "zoo_string" else [f" {doc['answer']}"]
    ends = [""] if task == "zoo_string" else ["\n", "</s>"]
    texts = [str(label) for label in labels] or texts
    sums = torch.stack([naive_sum(model, tokenizer, prompt, text + end) for text in texts for end in ends])
    probability = sums.exp().sum()
    return -probability.log() if surrogate == "logprob" else 1 - probability


def naive_loss(model: Any, harness: LmHarness, items: Any, surrogate: Surrogate, labels: Labels) -> float:
    with torch.no_grad():
        losses = [
            WEIGHTS[task]
            * naive_item(model, harness, task, item, surrogate, labels.get(task, {}).get(item, ()))
            for task, ids in items.items()
            for item in ids
        ]
        return float(torch.stack(losses).sum())


def check_derivatives(harness: LmHarness, model: Any, surrogate: Surrogate, labels: Labels) -> None:
    """Along the gradient of some tensors, and along random directions."""
    items = {task: ids[:ITEMS] for task, ids in harness.items("search").items()}
    for parameter in model.parameters():
        parameter.grad = None
        parameter.requires_grad_(True)
    _, loss = harness.backward(model, items, GradientRequest(WEIGHTS, surrogate, labels))
    gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    exact = in_float64(model)
    assert loss == pytest.approx(naive_loss(exact, harness, items, surrogate, labels), rel=1e-5)
    parameters = dict(exact.named_parameters())
    generator = torch.Generator().manual_seed(1)
    for name in list(gradients)[:: max(1, len(gradients) // 3)]:
        gradient, start = gradients[name], parameters[name].detach().clone()
        norm = float(gradient.norm())
        random = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        for direction in (gradient / norm, random / random.norm()):
            ends = []
            for step in (STEP, -STEP):
                with torch.no_grad():
                    parameters[name].copy_(start + step * direction)
                ends.append(naive_loss(exact, harness, items, surrogate, labels))
            with torch.no_grad():
                parameters[name].copy_(start)
            wanted = (ends[0] - ends[1]) / (2 * STEP)
            assert float((gradient * direction).sum()) == pytest.approx(wanted, rel=1e-4, abs=1e-5 * norm), (
                name
            )


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_the_derivatives_of_every_surrogate_are_central_differences(
    surrogate: Surrogate, harness: LmHarness, model: Any
) -> None:
    check_derivatives(harness, model, surrogate, {})


def test_labels_are_what_is_climbed(harness: LmHarness, model: Any) -> None:
    items = harness.items("search")
    labels: Labels = {
        "zoo_arithmetic": dict.fromkeys(items["zoo_arithmetic"][:ITEMS], (" 7", " 11")),
        "zoo_lookup": dict.fromkeys(items["zoo_lookup"][:ITEMS], (3,)),
        "zoo_string": {items["zoo_string"][0]: (" a b c</s>",)},
    }
    check_derivatives(harness, model, "logprob", labels)


def test_without_derivatives_the_loss_is_the_same_and_no_gradient_is_made(
    harness: LmHarness, model: Any
) -> None:
    items = {task: ids[:ITEMS] for task, ids in harness.items("search").items()}
    wanted = harness.backward(model, items, GradientRequest(WEIGHTS))
    for parameter in model.parameters():
        parameter.grad = None
    assert harness.backward(model, items, GradientRequest(WEIGHTS, derivatives=False)) == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
