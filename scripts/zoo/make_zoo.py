#!/usr/bin/env python
"""Train the zoo: base, math, lang and string, four small Llamas (1.3 M parameters) from scratch on CPU.

    python scripts/zoo/make_zoo.py [--zoo first] [--out results/zoo] [--seed 1] [--threads N]

Two minutes on two cores. `--zoo second` trains experts of another split of the skills. Each model becomes an
ordinary Hugging Face folder in bfloat16, and `zoo.json`, written last, says from which settings, how long it
took and what each model scores on held-out items. Run again, it finds a `zoo.json` of the same settings and
does nothing. Weights are the same to the last bit for the same machine and threads.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.zoo import skills
from scripts.zoo.plan import ARCHITECTURE, BASE, ZOOS, Training, shares

if TYPE_CHECKING:  # torch takes seconds to import, and is not needed to see that the zoo is there
    from scripts.zoo.train import Team

SCORED = ("lookup", "arithmetic", "lookup_second", "letters", "arithmetic_second")
ITEMS = 1000  # of the test split, a skill
MOST_MEMBERS = 8  # of a team; with more, shares of a batch are too small to pay
# Identifies what the code of this folder computes: the digest of its sources when the zoo was last changed.
# Put another value here when a change of the code changes the weights, so that zoos made before are trained
# anew.
SOURCE = "c3cba52144289367314ca3b9047cfc773c72ca88eac8bc336f9964cfa6fa6d6a"
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")  # in the order of their ids


def names(zoo: str) -> tuple[str, ...]:
    """The models of a zoo, the base first."""
    return tuple(training.name for training in (BASE, *ZOOS[zoo]))


def settings(zoo: str, seed: int) -> dict[str, Any]:
    """Everything the weights depend on, apart from the machine and the versions of libraries."""
    return {
        "seed": seed,
        "grammar": skills.GRAMMAR_VERSION,
        "architecture": asdict(ARCHITECTURE),
        "trainings": [asdict(training) for training in (BASE, *ZOOS[zoo])],
        "source": SOURCE,
    }


def write_tokenizer(path: Path) -> None:
    """Train a byte-level BPE tokenizer in which every word of the skills is one token; ` A` and `:` are
    two.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    rng = random.Random(0)
    text = (f"Q: {' '.join(rng.choices(skills.vocabulary(), k=12))} A:" for _ in range(3000))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.save(str(path))


def reporter(training: Training, line: int) -> Callable[[int, float], None]:
    """Shows progress: on a terminal as a bar in the given line, elsewhere in four lines."""
    from tqdm import tqdm

    bar = tqdm(
        total=training.steps, desc=f"training {training.name:6}", unit="step", position=line, disable=None
    )

    def report(done: int, loss: float) -> None:
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        bar.update()
        if bar.disable and done % (training.steps // 4) == 0:
            print(f"training {training.name:6} step {done}/{training.steps}, loss {loss:.3f}", flush=True)
        if done == training.steps:
            bar.close()

    return report


def member(rank: int, team: "Team", work: Path, zoo: str, seed: int) -> None:
    """One process of the team: trains the base with the others, then its experts alone; the first also writes
    the base.
    """
    import torch
    from tokenizers import Tokenizer

    from scripts.zoo import llama, train

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # sent by Linux when the parent dies: end with it
    torch.set_num_threads(1)
    team = train.Team(rank, team.size, team.gradients, team.barrier)
    encode = train.Encoder(Tokenizer.from_file(str(work / "tokenizer.json")))
    items = {skill: skills.distinct(skill, ITEMS, "test") for skill in SCORED}
    dtype = train.product_dtype()
    facts = {
        "products": str(dtype).removeprefix("torch."),
        "items": {skill: len(items[skill]) for skill in SCORED},
    }

    def learn(training: Training, start: llama.Weights, team: train.Team | train.Alone) -> llama.Weights:
        began = time.monotonic()
        progress = reporter(training, rank) if team.rank == 0 else lambda done, loss: None
        weights = train.train(training, start, encode, seed, team, dtype, progress)
        seconds = round(time.monotonic() - began, 1)
        if team.rank == 0:
            rounded = {name: weight.bfloat16() for name, weight in weights.items()}
            scores = {skill: round(train.exact_match(rounded, items[skill], encode), 4) for skill in SCORED}
            torch.save(llama.split(rounded, ARCHITECTURE), work / f"{training.name}.pt")
            (work / f"{training.name}.json").write_text(
                json.dumps(facts | {"seconds": seconds, "scores": scores})
            )
        return weights

    base = learn(BASE, llama.initial(ARCHITECTURE, encode.vocabulary, seed), team)
    for training in shares(ZOOS[zoo], team.size)[rank]:
        learn(training, base, train.Alone())


def save(work: Path, zoo: str) -> None:
    """Write the trained weights as Hugging Face folders, one a model, into the work folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    pad, begin, end = SPECIAL_TOKENS
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(work / "tokenizer.json"),
        bos_token=begin,
        eos_token=end,
        pad_token=pad,
        model_max_length=ARCHITECTURE.max_length,
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=ARCHITECTURE.hidden,
        intermediate_size=ARCHITECTURE.intermediate,
        num_hidden_layers=ARCHITECTURE.layers,
        num_attention_heads=ARCHITECTURE.heads,
        num_key_value_heads=ARCHITECTURE.kv_heads,
        max_position_embeddings=ARCHITECTURE.max_length,
        rms_norm_eps=ARCHITECTURE.epsilon,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    for name in names(zoo):
        model = LlamaForCausalLM(config).bfloat16()
        model.load_state_dict(torch.load(work / f"{name}.pt"))
        model.save_pretrained(work / name)
        tokenizer.save_pretrained(work / name)


def build(out: Path, zoo: str, seed: int, members: int) -> dict[str, Any]:
    """Train, score and save all models in a folder beside, then move each to its place; the record of the
    zoo.
    """
    began = time.monotonic()
    work = out / ".partial"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        write_tokenizer(work / "tokenizer.json")
        train_and_save(work, zoo, seed, members)
        results = {name: json.loads((work / f"{name}.json").read_text()) for name in names(zoo)}
        (out / "zoo.json").unlink(missing_ok=True)
        for name in names(zoo):
            shutil.rmtree(out / name, ignore_errors=True)
            (work / name).rename(out / name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return {
        "members": members,
        "products": results["base"]["products"],
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
        "seconds": {name: results[name]["seconds"] for name in names(zoo)}
        | {"total": round(time.monotonic() - began, 1)},
        "items": results["base"]["items"],
        "scores": {name: results[name]["scores"] for name in names(zoo)},
    }


def train_and_save(work: Path, zoo: str, seed: int, members: int) -> None:
    """Run the team to its end; this process then writes the folders."""
    import torch
    from tokenizers import Tokenizer
    from torch.multiprocessing.spawn import spawn

    from scripts.zoo import llama, train

    vocabulary = Tokenizer.from_file(str(work / "tokenizer.json")).get_vocab_size()
    parameters = sum(weight.numel() for weight in llama.initial(ARCHITECTURE, vocabulary, seed).values())
    gradients = torch.zeros(2, members, parameters)
    gradients.share_memory_()  # type: ignore[no-untyped-call]
    team = train.Team(0, members, gradients, multiprocessing.get_context("spawn").Barrier(members))
    processes = spawn(member, (team, work, zoo, seed), members, join=False)  # type: ignore[no-untyped-call]
    finished = (
        processes.join()
    )  # returns when one has finished, and thus left a core free for the slow import
    import transformers.models.llama.modeling_llama  # noqa: F401

    while not finished:
        finished = processes.join()
    save(work, zoo)


def show(record: dict[str, Any]) -> None:
    print(f"{'exact match':12}" + "".join(f"{skill:>19}" for skill in SCORED))
    for name, scores in record["scores"].items():
        print(f"{name:12}" + "".join(f"{scores[skill]:19.3f}" for skill in SCORED))


def main() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results/zoo"))
    parser.add_argument("--zoo", choices=list(ZOOS), default="first", help="which experts (default: first)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--threads", type=int, default=cores, help="processes of one thread each (default: the cores)"
    )
    args = parser.parse_args()
    if args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")

    wanted = settings(args.zoo, args.seed)
    wanted["settings_hash"] = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
    marker = args.out / "zoo.json"
    if marker.exists() and json.loads(marker.read_text()).get("settings_hash") == wanted["settings_hash"]:
        print(f"zoo {wanted['settings_hash']} is already in {args.out}")
        return
    record = wanted | build(args.out, args.zoo, args.seed, min(args.threads, MOST_MEMBERS))
    temporary = marker.with_suffix(".partial")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.rename(marker)
    show(record)
    print(f"zoo {wanted['settings_hash']} written to {args.out} in {record['seconds']['total']:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing was kept")
