"""A route as a plain Hugging Face folder, with the proof that a fresh process computes the same.

The config has the layers gathered, the weights the gains folded in. Knows nothing of studies. The second form
of a route, mergekit's, is in `evomerge.export.route_mergekit`.
"""

from __future__ import annotations

import copy
import math
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
"""Largest difference of logits that equal weights may make, in standard deviations.

Kernels round by where in memory a tensor lies.
"""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How near a reloaded checkpoint comes to the live model; its weights are the same to the last bit.

    Attributes:
        logits: Largest difference of the logits of whole rows, in standard deviations of the live ones; 0 for
            equal bits.
        steps: The same of single steps over a cache, compared as far as the tokens before them agree.
        tokens: Whether a greedy generation is the same.
    """

    logits: float
    steps: float
    tokens: bool

    def __str__(self) -> str:
        if not self.logits and not self.steps and self.tokens:
            return "logits, step logits and a greedy generation are the same to the last bit"
        logits = f"logits differ by up to {self.logits:.1e}"
        steps = f"step logits by up to {self.steps:.1e} of their deviation"
        return f"{logits} and {steps}, a greedy generation {'is the same' if self.tokens else 'differs'}"


def write_checkpoint(
    routed: RoutedModel, hops: Sequence[Hop], directory: Path, donor: Path, tolerance: float | None = None
) -> Agreement:
    """Writes a route as a folder that transformers loads without code of ours, and verifies it.

    Its tensors are the very bits that the live model computes with.

    Args:
        routed: The live model.
        hops: The route, as `RoutedModel.install` takes it.
        directory: Folder to make; it appears whole and verified, or not at all.
        donor: Folder that tokenizer, generation config, chat template and processor files are copied from.
        tolerance: See `verify_checkpoint`.

    Returns:
        How near the reloaded folder comes to the live model.

    Raises:
        NothingToExport: If the route is no plain checkpoint, with every reason, or the folder computes
            something else.
        SetupError: If the folder exists.
    """
    with atomic_folder.new_folder(directory) as staging:
        write_checkpoint_files(routed, hops, staging, donor)
        return verify_checkpoint(staging, routed, tolerance)


def write_checkpoint_files(routed: RoutedModel, hops: Sequence[Hop], directory: Path, donor: Path) -> None:
    """Like `write_checkpoint`, without the proof and into a folder that exists; the caller makes it whole.

    Args:
        routed: The live model.
        hops: The route.
        directory: The folder.
        donor: Folder that tokenizer, generation config, chat template and processor files are copied from.

    Raises:
        NothingToExport: If the route is no plain checkpoint, with every reason.
    """
    routed.install(hops)
    if reasons := plain_checkpoint.reasons(routed):
        raise NothingToExport(
            f"the route is no plain checkpoint: {'; '.join(reasons)}; choose another candidate"
        )
    model: Any = plain_model(routed)
    model.save_pretrained(directory)
    # transformers guesses a generation config; the donor's is copied if it has one
    (directory / "generation_config.json").unlink(missing_ok=True)
    companion_files.copy_companion_files(donor, directory)


def plain_model(routed: RoutedModel) -> nn.Module:
    """An ordinary model that holds what the installed route computes with.

    Only layers that the route takes twice and tensors with a gain are copies.

    Args:
        routed: The live model, its route installed.

    Returns:
        A model of the same class, its config with the layers gathered.
    """
    model: Any = routed.model
    path, layers = stack(model)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(f"{path}.")}
    used: set[int] = set()
    for position, (layer, hop) in enumerate(zip(layers, routed.hops, strict=True)):
        for name in stack(hop.model)[1][hop.layer].state_dict():
            tensor = effective_tensor(layer, name)
            tensors[f"{path}.{position}.{name}"] = tensor.clone() if tensor.data_ptr() in used else tensor
            used.add(tensor.data_ptr())
    config = copy.deepcopy(model.config)
    if config.tie_word_embeddings and not _is_tied(model):
        config.tie_word_embeddings = config.get_text_config(decoder=True).tie_word_embeddings = False
    return model_of_tensors(type(model), config, tensors)


def model_of_tensors(model_class: Any, config: Any, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A model of transformers that holds given tensors, none copied.

    Args:
        model_class: Class of transformers.
        config: Its config.
        tensors: Name in the model -> tensor, all that it has.

    Returns:
        The model in evaluation mode.
    """
    computed_lists.restore_class(config.get_text_config(decoder=True))
    with torch.device("meta"):
        model: Any = model_class(config)
    model.load_state_dict(tensors, strict=True, assign=True)
    model.tie_weights()
    module: nn.Module = model.eval()
    return module


def verify_checkpoint(directory: Path, routed: RoutedModel, tolerance: float | None = None) -> Agreement:
    """Loads a folder in a fresh process, on the live model's device, and compares it with the installed
    route.

    Args:
        directory: The folder.
        routed: The live model, its route installed.
        tolerance: Largest difference of logits, of random tokens and of steps over a cache, in standard
            deviations of the
            live ones; None for what rounding may make of equal weights, by their type. Every tensor must have
            the same bits.

    Returns:
        How near they are.

    Raises:
        NothingToExport: If they are further apart, or the folder cannot be loaded.
    """
    model: Any = routed.model
    limit = _ROUNDING[model.dtype] if tolerance is None else tolerance
    inputs = reload_check.check_inputs(model)
    outputs, digests = _run_elsewhere(directory, model, inputs)
    expected = reload_check.tensor_digests(plain_model(routed))
    differing = sorted(
        name for name in expected.keys() | digests.keys() if expected.get(name) != digests.get(name)
    )
    if differing:
        raise NothingToExport(
            f"{len(differing)} tensors of {directory.name} are not those that were scored, "
            f"such as {differing[0]}; {_REPORT}"
        )
    agreement = compare_outputs(reload_check.check_outputs(model, inputs), outputs)
    if not (agreement.logits <= limit and agreement.steps <= limit):
        raise NothingToExport(
            f"{directory.name} has the weights that were scored and computes something else: {agreement}; "
            f"at most {limit:g} is rounding; {_REPORT}"
        )
    return agreement


def compare_outputs(live: Mapping[str, Tensor], reloaded: Mapping[str, Tensor]) -> Agreement:
    """The agreement of what two models compute on the same tokens.

    Args:
        live: As `evomerge.export.reload_check.check_outputs` gives it.
        reloaded: The same of the other model.

    Returns:
        Their agreement; steps count as far as the tokens before them are the same.
    """
    same = live["tokens"] == reloaded["tokens"]  # [rows, steps]
    comparable = torch.cat([torch.ones_like(same[:, :1]), same[:, :-1]], 1).cumprod(1).bool()
    steps = _largest_difference(live["steps"][comparable], reloaded["steps"][comparable])
    return Agreement(_largest_difference(live["logits"], reloaded["logits"]), steps, bool(same.all()))


def effective_tensor(layer: nn.Module, name: str) -> Tensor:
    """A tensor of a layer as it is computed with, its gain applied.

    Args:
        layer: The layer.
        name: Of the tensor in the layer.

    Returns:
        The tensor, detached.
    """
    owner, _, attribute = name.rpartition(".")
    tensor: Tensor = getattr(layer.get_submodule(owner), attribute)
    return tensor.detach()


def _largest_difference(live: Tensor, reloaded: Tensor) -> float:
    """In standard deviations of the first; infinite where a number is NaN."""
    if torch.equal(live, reloaded):
        return 0.0
    worst = float((live.double() - reloaded.double()).abs().max() / live.double().std())
    return float("inf") if math.isnan(worst) else worst


def _run_elsewhere(
    directory: Path, model: Any, inputs: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(outputs, digests of the tensors) of a folder in a fresh process."""
    settings = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(next(model.parameters()).device),
        "attention": model.config.get_text_config(decoder=True)._attn_implementation or "",
        "threads": str(torch.get_num_threads()),
    }
    with tempfile.TemporaryDirectory() as scratch:
        input_file, output_file = Path(scratch) / "inputs.safetensors", Path(scratch) / "outputs.safetensors"
        save_file(inputs, input_file, metadata=settings)
        program = [sys.executable, "-P", "-m", "evomerge.export.reload_check"]
        done = subprocess.run(
            [*program, str(directory), str(input_file), str(output_file)],
            env=os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise NothingToExport(f"{directory.name} cannot be used in a process of its own: {last[:500]}")
        with safe_open(output_file, framework="pt") as file:
            return load_file(output_file), file.metadata()


def _is_tied(model: Any) -> bool:
    """Whether embeddings and head hold the same numbers."""
    inner, head = model.get_input_embeddings(), model.get_output_embeddings()
    return head is None or torch.equal(inner.weight, head.weight)
