"""A route as a plain Hugging Face folder: gathered config, gains in the weights, and the proof that a fresh
process computes the same.

Knows nothing of studies. The second form of a route, mergekit's, is in `evomerge.export.route_mergekit`.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from evomerge.errors import NothingToExport
from evomerge.export import reload_check
from evomerge.merging import atomic_folder, companion_files
from evomerge.merging.routing import computed_lists, plain_checkpoint
from evomerge.merging.routing.decoder_layers import stack
from evomerge.merging.routing.routed_model import Hop, RoutedModel

_REPORT = "tell the authors of evomerge which models these are"
_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest difference of logits that equal weights may make, in standard deviations: kernels round by where in
memory a tensor lies."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How near a reloaded checkpoint comes to the live model; its weights are the same to the last bit.

    logits, steps: largest differences of the logits of whole rows and of single steps over a cache, in
    standard deviations
    of the live ones, 0 for equal bits; steps are compared as far as the tokens before them agree. tokens:
    whether a greedy
    generation is the same.
    """

    logits: float
    steps: float
    tokens: bool

    def __str__(self) -> str:
        if not self.logits and not self.steps and self.tokens:
            return "logits, step logits and a greedy generation are the same to the last bit"
        said = (
            f"logits differ by up to {self.logits:.1e} and step logits by up to {self.steps:.1e} of "
            "their deviation"
        )
        return f"{said}, a greedy generation {'is the same' if self.tokens else 'differs'}"


def checkpoint(
    routed: RoutedModel, hops: Sequence[Hop], directory: Path, donor: Path, tolerance: float | None = None
) -> Agreement:
    """Writes a route as a folder that transformers loads without code of ours, and verifies it.

    donor: folder that tokenizer, generation config, chat template and processor files are copied from.
    tolerance: see
    `verify`. Tensors are the very bits that the live model computes with. The folder appears whole and
    verified or not at
    all. Raises NothingToExport with every reason why the route is no plain checkpoint, or if the folder
    computes something
    else; SetupError if the directory exists.
    """
    with atomic_folder.new_folder(directory) as staging:
        write_into(routed, hops, staging, donor)
        return verify(staging, routed, tolerance)


def write_into(routed: RoutedModel, hops: Sequence[Hop], directory: Path, donor: Path) -> None:
    """Like `checkpoint`, without the proof and into a directory that exists; the caller makes it whole."""
    routed.install(hops)
    if reasons := plain_checkpoint.reasons(routed):
        raise NothingToExport(
            f"the route is no plain checkpoint: {'; '.join(reasons)}; choose another candidate"
        )
    model: Any = plain(routed)
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink(
        missing_ok=True
    )  # transformers' guess; the donor's is copied if it has one
    companion_files.copy_companion_files(donor, directory)


def plain(routed: RoutedModel) -> nn.Module:
    """An ordinary model of the gathered config that holds what the installed route computes with; only layers
    that the
    route takes twice and tensors with a gain are copies."""
    model: Any = routed.model
    path, layers = stack(model)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(f"{path}.")}
    seen: set[int] = set()
    for position, (layer, hop) in enumerate(zip(layers, routed.hops, strict=True)):
        for name in stack(hop.model)[1][hop.layer].state_dict():
            tensor = tensor_of(layer, name)
            tensors[f"{path}.{position}.{name}"] = tensor.clone() if tensor.data_ptr() in seen else tensor
            seen.add(tensor.data_ptr())
    config = copy.deepcopy(model.config)
    if config.tie_word_embeddings and not _tied(model):
        config.tie_word_embeddings = config.get_text_config(decoder=True).tie_word_embeddings = False
    return fresh(type(model), config, tensors)


def fresh(kind: Any, config: Any, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A model of a transformers class that holds these tensors, by their names in it, none copied."""
    computed_lists.restore_class(config.get_text_config(decoder=True))
    with torch.device("meta"):
        found: Any = kind(config)
    found.load_state_dict(tensors, strict=True, assign=True)
    found.tie_weights()
    model: nn.Module = found.eval()
    return model


def verify(directory: Path, routed: RoutedModel, tolerance: float | None = None) -> Agreement:
    """Loads a folder in a fresh process, on the live model's device, and compares it with the installed
    route.

    Every tensor must have the same bits. Logits of random tokens and of steps over a cache may differ by the
    tolerance, in
    standard deviations of the live ones; None: what rounding may make of equal weights, by their type. Raises
    NothingToExport if they are further apart, or if the folder cannot be loaded.
    """
    model: Any = routed.model
    limit = _ROUNDING[model.dtype] if tolerance is None else tolerance
    asked = reload_check.questions(model)
    read, digests = _elsewhere(directory, model, asked)
    own = reload_check.digests(plain(routed))
    other = sorted(name for name in own.keys() | digests.keys() if own.get(name) != digests.get(name))
    if other:
        raise NothingToExport(
            f"{len(other)} tensors of {directory.name} are not those that were scored, such as "
            f"{other[0]}; "
            f"{_REPORT}"
        )
    found = compare(reload_check.answers(model, asked), read)
    if not (found.logits <= limit and found.steps <= limit):
        raise NothingToExport(
            f"{directory.name} has the weights that were scored and computes something else: {found}; at "
            f"most {limit:g} is rounding; {_REPORT}"
        )
    return found


def compare(live: Mapping[str, Tensor], read: Mapping[str, Tensor]) -> Agreement:
    """The agreement of two answers to the same questions."""
    same = live["tokens"] == read["tokens"]  # [rows, steps]
    comparable = torch.cat([torch.ones_like(same[:, :1]), same[:, :-1]], 1).cumprod(1).bool()
    steps = _apart(live["steps"][comparable], read["steps"][comparable])
    return Agreement(_apart(live["logits"], read["logits"]), steps, bool(same.all()))


def _apart(live: Tensor, read: Tensor) -> float:
    if torch.equal(live, read):
        return 0.0
    worst = float((live.double() - read.double()).abs().max() / live.double().std())
    return worst if worst == worst else float("inf")


def _elsewhere(
    directory: Path, model: Any, asked: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(answers, digests of the tensors) of a folder in a fresh process."""
    settings = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(next(model.parameters()).device),
        "attention": model.config.get_text_config(decoder=True)._attn_implementation or "",
        "threads": str(torch.get_num_threads()),
    }
    with tempfile.TemporaryDirectory() as scratch:
        question, answer = Path(scratch) / "questions.safetensors", Path(scratch) / "answers.safetensors"
        save_file(asked, question, metadata=settings)
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "evomerge.export.reload_check",
                str(directory),
                str(question),
                str(answer),
            ],
            env=os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise NothingToExport(f"{directory.name} cannot be used in a process of its own: {last[:500]}")
        with safe_open(answer, framework="pt") as file:
            return load_file(answer), file.metadata()


def tensor_of(layer: nn.Module, name: str) -> Tensor:
    """A tensor of a layer as it is computed with, its gain applied."""
    owner, _, leaf = name.rpartition(".")
    found: Tensor = getattr(layer.get_submodule(owner), leaf)
    return found.detach()


def _tied(model: Any) -> bool:
    """Whether embeddings and head hold the same numbers."""
    inner, head = model.get_input_embeddings(), model.get_output_embeddings()
    return head is None or torch.equal(inner.weight, head.weight)
