"""Scores merges in closed form on the demo's models: RegMean and Fisher-weighted averages.

    python -m scripts.validation.closed_forms [--items 200] [--few 16 50] [--out results/closed_forms.md]
    python -m scripts.validation.closed_forms --write FOLDER  # the Fisher-weighted average as a checkpoint

Each expert's statistics come from the search items of its own task, right answers included: Gram matrices of
the inputs of linear layers (RegMean), or squared gradients of each item's log-probability (Fisher). The
fourth task, which no expert was trained for, gives none. What no statistic covers is averaged. A merge is
scored as it is, and as base + s (merge - base) with the scale s that is best on validation items; test items
are used once for each row. Hand recipes are those of every search, the best one by validation. With fewer
items (`--few`), three draws of them show how far a result depends on which. Copying letters is a skill that
all parents have and no task asks for.

References:
    RegMean: Jin et al. 2023, arXiv:2212.09849; alpha scales the off-diagonal part of the Gram matrices.
    Fisher: Matena and Raffel 2022, arXiv:2111.09832.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import evomerge as em
from evomerge.config import loading
from evomerge.evaluation import Items
from evomerge.launch.opening import Opened, open_search
from evomerge.launch.stages import reference_recipes
from evomerge.store import Store
from evomerge.workers.worker import Worker
from scripts.benchmarks import machine
from scripts.zoo import skills

REPOSITORY = Path(__file__).resolve().parents[2]
EXPERTS = {"math": "zoo_arithmetic", "lang": "zoo_lookup", "string": "zoo_string"}
SCALES = (1.0, 1.5, 2.0, 2.5, 3.0)
COPIES = skills.distinct("copy_letters", 300, "test")
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
    test: Mapping[str, float]
    copying: float


def load_expert(name: str, count: int, seed: int = 0) -> Expert:
    """An expert and some items of its task: the first ones for seed 0, else a draw."""
    folder = REPOSITORY / "results" / "zoo" / name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows, starts = [], []
    file = REPOSITORY / "evaluators" / "zoo" / f"{EXPERTS[name]}.search.jsonl"
    lines = file.read_text().splitlines()
    if seed:
        random.Random(seed).shuffle(lines)
    for line in lines[:count]:
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
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.base = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()

    def score(self, merged: Weights, scale: float, items: Items) -> dict[str, float]:
        """The tasks' metrics."""
        own = self.worker.model.state_dict()
        with torch.no_grad():
            for key, value in merged.items():
                own[key].copy_(self.base[key] + scale * (value - self.base[key]))
        _, metrics = self.opened.harness.score(self.worker.model, items)
        return {task.task: metrics[task.task] for task in self.opened.settings.tasks}

    def rows(self, name: str, merged: Weights, scales: Sequence[float] = SCALES) -> list[Row]:
        """The merge as it is, and at its best scale."""
        validation, test = (self.opened.harness.items(role) for role in ("validation", "test"))
        by_scale = {
            scale: statistics.fmean(self.score(merged, scale, validation).values()) for scale in scales
        }
        best = max(by_scale, key=lambda scale: by_scale[scale])
        rows = [
            Row(name, scale, by_scale[scale], self.score(merged, scale, test), self.copying())
            for scale in dict.fromkeys((1.0, best))
        ]
        print(rows, flush=True)
        return rows

    def copying(self) -> float:
        """How often the model that was scored last copies letters without a fault."""
        right = 0
        for prompt, answer in COPIES:
            ids = self.tokenizer.encode(prompt, add_special_tokens=False)
            wanted = [*self.tokenizer.encode(answer, add_special_tokens=False), self.tokenizer.eos_token_id]
            with torch.no_grad():
                logits = self.worker.model(input_ids=torch.tensor([[*ids, *wanted]])).logits
            right += logits[0, len(ids) - 1 : -1].argmax(-1).tolist() == wanted
        return right / len(COPIES)

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
        metrics = self.worker.evaluate(best.recipe, test).metrics
        tested = {task.task: metrics[task.task] for task in opened.settings.tasks}
        return Row(f"hand recipe: {best.label}", 1.0, scored[best.label], tested, self.copying())


def fisher_of(count: int, seed: int = 0, *, normalized: bool = False) -> Weights:
    """The Fisher-weighted average from some items of each expert's task."""
    experts = {name: load_expert(name, count, seed) for name in EXPERTS}
    squares = {name: squared_gradients(expert) for name, expert in experts.items()}
    return fisher(experts, squares, normalized=normalized)


def learned_with(folder: Path, root: Path, seed: int) -> tuple[float, float]:
    """Validation and test of a learned stage with the Fisher-weighted average among the models."""
    document = yaml.safe_load((REPOSITORY / "search_spaces" / "demo.yaml").read_text())
    models = {name: str(REPOSITORY / path) for name, path in document["models"].items()}
    document |= {"study": f"fisher-{seed}", "search": {"seed": seed}}
    document["models"] = models | {"fisher": str(folder)}
    document["stages"] = [{"stage": "learned", "steps": 40, "items": 30}]
    em.run(document, root=root)
    with Store.open(root / document["study"] / "study.db") as store:
        study = store.study()
        assert study is not None
        assert study.outcome is not None
        return study.outcome.best["validation"], study.outcome.best["test"]


def write(folder: Path, merged: Weights) -> None:
    """Writes a merge as a checkpoint in bfloat16, which a search may have among its models."""
    base = REPOSITORY / "results" / "zoo" / "base"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.load_state_dict(merged)
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


def all_rows(items: int, few: Sequence[int]) -> list[Row]:
    """Every merge, scored."""
    settings, _ = loading.load(str(REPOSITORY / "search_spaces" / "demo.yaml"))
    scorer = Scorer(open_search(settings))
    experts = {name: load_expert(name, items) for name in EXPERTS}
    grams = {name: gram_matrices(expert) for name, expert in experts.items()}
    squares = {name: squared_gradients(expert) for name, expert in experts.items()}
    rows = [scorer.best_hand_recipe(), *scorer.rows("average of the experts", average(experts))]
    for alpha in (1.0, 0.9, 0.5, 0.1):
        rows += scorer.rows(f"RegMean, alpha {alpha:g}", regmean(experts, grams, alpha))
    rows += scorer.rows("Fisher", fisher(experts, squares, normalized=False))
    normalized = fisher(experts, squares, normalized=True)
    rows += scorer.rows("Fisher, each divided by its mean", normalized)
    for count in few:
        for seed in (1, 2, 3):
            name = f"Fisher, {count} items a task, draw {seed}"
            rows += scorer.rows(name, fisher_of(count, seed), (1.0,))
            normalized = fisher_of(count, seed, normalized=True)
            rows += scorer.rows(f"{name}, each divided by its mean", normalized)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--few", type=int, nargs="*", default=[16, 50])
    parser.add_argument("--learned", type=int, default=3, help="seeds of a learned stage with it as a parent")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.write:
        write(args.write, fisher_of(args.items))
        return
    rows = all_rows(args.items, args.few)
    found: list[tuple[float, float]] = []
    _write(args.out, rows, args.items, found)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "fisher", fisher_of(args.items))
        for seed in range(args.learned):
            found.append(learned_with(Path(folder) / "fisher", Path(folder), seed))
            _write(args.out, rows, args.items, found)


def _write(out: Path | None, rows: Sequence[Row], items: int, learned: Sequence[tuple[float, float]]) -> None:
    """Prints the tables, and writes them into a file if there is one."""
    text = "\n".join([*_lines(rows, items), *_learned_lines(learned), ""])
    print(text, flush=True)
    if out:
        out.write_text(text)


def _lines(rows: Sequence[Row], items: int) -> list[str]:
    tasks = list(rows[0].test)
    names = [task.removeprefix("zoo_") for task in tasks]
    lines = [
        "# Merges in closed form",
        "",
        f"By `scripts/validation/closed_forms.py`; {machine.stamp('torch', 'transformers', 'lm-eval')}.",
        "",
        f"Statistics of {items} search items of each expert's task; a Fisher-weighted average costs "
        f"their forward and backward passes, {3 * items * len(EXPERTS):,} item forwards.",
        "",
        f"| merge | scale | validation | test | {' | '.join(names)} | copying letters |",
        "| --- | ---: | ---: | ---: " + "| ---: " * (len(names) + 1) + "|",
    ]
    for row in rows:
        single = " | ".join(f"{row.test[task]:.3f}" for task in tasks)
        mean = statistics.fmean(row.test.values())
        scores = f"{row.validation:.4f} | {mean:.4f} | {single} | {row.copying:.3f}"
        lines.append(f"| {row.name} | {row.scale:g} | {scores} |")
    return lines


def _learned_lines(learned: Sequence[tuple[float, float]]) -> list[str]:
    if not learned:
        return []
    what = "A learned stage, 40 steps (14,400 item forwards), with the first Fisher average as a model:"
    rows = [f"- seed {seed}: validation {v:.4f}, test {t:.4f}" for seed, (v, t) in enumerate(learned)]
    return ["", what, "", *rows]


if __name__ == "__main__":
    main()
