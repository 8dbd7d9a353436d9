"""Scores merges in closed form on the demo's models: RegMean and Fisher-weighted averages.

    python -m scripts.validation.closed_forms [--items 200] [--out results/closed_forms.md]

Each expert's statistics come from the search items of its own task, right answers included: Gram matrices of
the inputs of linear layers (RegMean), or squared gradients of each item's log-probability (Fisher). The
fourth task, which no expert was trained for, gives none. What no statistic covers is averaged. A merge is
scored as it is, and as base + s (merge - base) with the scale s that is best on validation items; test items
are used once for each row. Hand recipes are those of every search, the best one by validation.

References:
    RegMean: Jin et al. 2023, arXiv:2212.09849; alpha scales the off-diagonal part of the Gram matrices.
    Fisher: Matena and Raffel 2022, arXiv:2111.09832.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.config import loading
from evomerge.evaluation import Items
from evomerge.launch.opening import Opened, open_search
from evomerge.launch.stages import reference_recipes
from evomerge.workers.worker import Worker
from scripts.benchmarks import machine

REPOSITORY = Path(__file__).resolve().parents[2]
EXPERTS = {"math": "zoo_arithmetic", "lang": "zoo_lookup", "string": "zoo_string"}
SCALES = (1.0, 1.5, 2.0, 2.5, 3.0)
Weights = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Expert:
    """A model in float32 with the token ids of its own task's items; starts: where their answers begin."""

    model: nn.Module
    weights: Weights
    rows: list[list[int]]
    starts: list[int]


@dataclass(frozen=True, slots=True)
class Row:
    """A merge that was scored."""

    name: str
    scale: float
    validation: float
    test: float
    seconds: float


def load_expert(name: str, count: int) -> Expert:
    """An expert and the first items of its task."""
    folder = REPOSITORY / "results" / "zoo" / name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows, starts = [], []
    file = REPOSITORY / "evaluators" / "zoo" / f"{EXPERTS[name]}.search.jsonl"
    for line in file.read_text().splitlines()[:count]:
        item = json.loads(line)
        answer = item["choices"][item["label"]] if "choices" in item else item["answer"]
        prompt = tokenizer.encode(item["prompt"], add_special_tokens=False)
        right = tokenizer.encode(f" {answer}", add_special_tokens=False)
        rows.append([*prompt, *right, tokenizer.eos_token_id])
        starts.append(len(prompt))
    weights = {key: value.detach().clone() for key, value in model.state_dict().items()}
    return Expert(model, weights, rows, starts)


def gram_matrices(expert: Expert) -> Weights:
    """Name of a linear layer's weight -> sum of x x^T over the tokens of all items."""
    grams: Weights = {}
    handles = []
    for name, module in expert.model.named_modules():
        if isinstance(module, nn.Linear):

            def add(module: nn.Module, inputs: tuple[Tensor], key: str = f"{name}.weight") -> None:
                x = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
                grams[key] = grams.get(key, torch.zeros(())) + x.T @ x

            handles.append(module.register_forward_pre_hook(add))
    with torch.no_grad():
        for row in expert.rows:
            expert.model(input_ids=torch.tensor([row]))
    for handle in handles:
        handle.remove()
    return grams


def squared_gradients(expert: Expert) -> Weights:
    """Mean over items of the squared gradient of the right answer's log-probability."""
    squares = {name: torch.zeros_like(p) for name, p in expert.model.named_parameters()}
    for row, start in zip(expert.rows, expert.starts, strict=True):
        expert.model.zero_grad()
        ids = torch.tensor([row])
        log_p = expert.model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
        log_p.gather(1, ids[0, start:, None]).sum().backward()
        for name, parameter in expert.model.named_parameters():
            assert parameter.grad is not None
            squares[name] += parameter.grad**2 / len(expert.rows)
    return squares


def average(experts: Mapping[str, Expert]) -> Weights:
    """The mean of the experts."""
    first = next(iter(experts.values())).weights
    return {key: torch.stack([e.weights[key] for e in experts.values()]).mean(0) for key in first}


def regmean(experts: Mapping[str, Expert], grams: Mapping[str, Weights], alpha: float) -> Weights:
    """W = (sum G_i)^-1 sum G_i W_i of each linear layer, with off-diagonals of G_i times alpha."""
    merged = average(experts)
    for key in next(iter(grams.values())):
        total, right = torch.zeros(()), torch.zeros(())
        for name, expert in experts.items():
            gram = grams[name][key]
            gram = alpha * gram + (1 - alpha) * torch.diag(gram.diagonal())
            total = total + gram
            right = right + gram @ expert.weights[key].double().T
        ridge = 1e-8 * total.diagonal().mean() * torch.eye(len(total), dtype=total.dtype)
        merged[key] = torch.linalg.solve(total + ridge, right).T.float()
    return merged


def fisher(experts: Mapping[str, Expert], squares: Mapping[str, Weights], *, normalized: bool) -> Weights:
    """W = sum F_i W_i / sum F_i, element by element; normalized: each F_i divided by its mean."""
    merged = average(experts)
    means = {name: statistics.fmean(float(v.mean()) for v in own.values()) for name, own in squares.items()}
    for key in next(iter(squares.values())):
        factors = {
            name: own[key].double() / (means[name] if normalized else 1.0) for name, own in squares.items()
        }
        total = torch.stack(list(factors.values())).sum(0)
        weighted = torch.stack([factors[name] * experts[name].weights[key].double() for name in experts]).sum(
            0
        )
        covered = total > 1e-12 * total.max()
        merged[key] = torch.where(covered, weighted / total.clamp_min(1e-300), merged[key].double()).float()
    return merged


class Scorer:
    """Scores tensors in the live model that the search scores candidates in."""

    def __init__(self, opened: Opened) -> None:
        self.opened = opened
        self.worker: Worker = opened.load()
        base = REPOSITORY / "results" / "zoo" / "base"
        self.base = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()

    def score(self, merged: Weights, scale: float, items: Items) -> float:
        """The mean of the tasks' metrics."""
        own = self.worker.model.state_dict()
        with torch.no_grad():
            for key, value in merged.items():
                own[key].copy_(self.base[key] + scale * (value - self.base[key]))
        _, metrics = self.opened.harness.score(self.worker.model, items)
        return statistics.fmean(metrics[task.task] for task in self.opened.settings.tasks)

    def rows(self, name: str, make: Callable[[], Weights]) -> list[Row]:
        """The merge as it is, and at its best scale."""
        began = time.perf_counter()
        merged = make()
        seconds = time.perf_counter() - began
        validation, test = (self.opened.harness.items(role) for role in ("validation", "test"))
        by_scale = {scale: self.score(merged, scale, validation) for scale in SCALES}
        best = max(by_scale, key=lambda scale: by_scale[scale])
        return [
            Row(name, scale, by_scale[scale], self.score(merged, scale, test), seconds)
            for scale in dict.fromkeys((1.0, best))
        ]

    def best_hand_recipe(self) -> Row:
        """The hand recipe that is best on validation items."""
        opened = self.opened
        validation, test = (opened.harness.items(role) for role in ("validation", "test"))
        references = reference_recipes(opened.settings, opened.space, opened.parents)
        scored = {}
        for baseline in references:
            evaluation = self.worker.evaluate(baseline.recipe, validation)
            scored[baseline.label] = opened.objective.reported_score(evaluation) or 0.0
        best = max(references, key=lambda baseline: scored[baseline.label])
        tested = opened.objective.reported_score(self.worker.evaluate(best.recipe, test))
        return Row(f"hand recipe: {best.label}", 1.0, scored[best.label], tested or 0.0, 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    settings, _ = loading.load(str(REPOSITORY / "search_spaces" / "demo.yaml"))
    scorer = Scorer(open_search(settings))
    experts = {name: load_expert(name, args.items) for name in EXPERTS}
    began = time.perf_counter()
    grams = {name: gram_matrices(expert) for name, expert in experts.items()}
    gram_seconds = time.perf_counter() - began
    began = time.perf_counter()
    squares = {name: squared_gradients(expert) for name, expert in experts.items()}
    fisher_seconds = time.perf_counter() - began
    rows = [scorer.best_hand_recipe(), *scorer.rows("average of the experts", lambda: average(experts))]
    for alpha in (1.0, 0.9, 0.5, 0.1):
        rows += scorer.rows(f"RegMean, alpha {alpha:g}", lambda alpha=alpha: regmean(experts, grams, alpha))
    for normalized in (False, True):
        name = "Fisher" + (", each divided by its mean" if normalized else "")
        rows += scorer.rows(name, lambda n=normalized: fisher(experts, squares, normalized=n))
    text = "\n".join([*_lines(rows, args.items, gram_seconds, fisher_seconds), ""])
    print(text)
    if args.out:
        args.out.write_text(text)


def _lines(rows: list[Row], items: int, gram_seconds: float, fisher_seconds: float) -> list[str]:
    return [
        "# Merges in closed form",
        "",
        f"By `scripts/validation/closed_forms.py`; {machine.stamp('torch', 'transformers', 'lm-eval')}.",
        "",
        f"Statistics of {items} search items of each expert's task: Gram matrices in {gram_seconds:.1f} s, "
        f"squared gradients in {fisher_seconds:.1f} s.",
        "",
        "| merge | scale of the task vector | validation | test |",
        "| --- | ---: | ---: | ---: |",
        *(f"| {row.name} | {row.scale:g} | {row.validation:.4f} | {row.test:.4f} |" for row in rows),
    ]


if __name__ == "__main__":
    main()
