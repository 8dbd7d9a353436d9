"""A route as mergekit's passthrough (version 0.1.5): the YAML, and the shell folder that it names as its
base.

The shell holds the route's config and tokenizer, since mergekit takes both from the base. Slices without
layers, first and last, pin embeddings and head to their models. A gain is a `scale` filter of its hop on the
names of transformers 5, which mergekit 0.1.5 sees. Where a gain is no product, (1 + w) g - 1 of norms such as
Gemma's, the hop's layer lies in the shell.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from evomerge.checkpoints import Checkpoint, Parent, stored_dtype
from evomerge.errors import RecipeError
from evomerge.export import route_checkpoint
from evomerge.merging import companion_files, mergekit_check, model_loading
from evomerge.merging.mergekit_check import Comparison
from evomerge.merging.routing import scale_folding
from evomerge.merging.routing.decoder_layers import stack
from evomerge.merging.routing.routed_model import Hop, RoutedModel
from evomerge.recipes import Mix, Recipe, Source, mergekit_yaml

VERIFIED = ("gemma2", "llama", "mixtral", "olmo2", "phi3", "qwen3")
"""Model types of which tests show that mergekit makes of the YAML what is scored.

Of some others it drops tensors without a message.
"""
SHELL = "shell"
"""Name of the shell folder beside the YAML."""
NO_MERGEKIT_FILE = "No mergekit file"
"""How a sentence begins that says why a route has no YAML."""


def refusal(recipe: Recipe, model_type: str) -> str | None:
    """Why no YAML is written for a route.

    Args:
        recipe: Of the route.
        model_type: Of the route's config.

    Returns:
        A sentence; None where a YAML is written.
    """
    if model_type not in VERIFIED:
        return (
            f"{NO_MERGEKIT_FILE}: what mergekit 0.1.5 makes of a route was verified for "
            f"{', '.join(VERIFIED)} and not for {model_type}; "
            "it drops tensors of some architectures without a word. The checkpoint is whole."
        )
    mixed = [place for place, mix in _places(recipe) if mix.passed is None]
    if mixed:
        return (
            f"{NO_MERGEKIT_FILE}: one file has one method, and {mixed[0]} is mixed while others pass "
            "through; merge in a stage of its own."
        )
    if recipe.tokenizer is not None:
        return (
            f"{NO_MERGEKIT_FILE}: a tokenizer that is put together was not verified for routes. "
            "The checkpoint is whole."
        )
    return None


def yaml_document(
    recipe: Recipe,
    hops: Sequence[Hop],
    parents: Mapping[str, Parent],
    references: Mapping[str, str],
    shell: str = f"./{SHELL}",
    header: Sequence[str] = (),
) -> str:
    """mergekit's YAML that rebuilds a route; with intermediate merges, a document for each, for
    mergekit-multi.

    Args:
        recipe: Of the route.
        hops: The route as `RoutedModel.install` takes it, gains included.
        parents: Its models, for the names of tensors outside the stack.
        references: Model name -> what to write for it.
        shell: The folder of `write_shell`, as seen from where mergekit is run.
        header: Comment lines.

    Returns:
        The text of the file.

    Raises:
        RecipeError: For a recipe that mergekit cannot express.
        FoldError: For a gain that a layer cannot take up.
    """
    data: dict[str, Any] = {
        "merge_method": "passthrough",
        "base_model": shell,
        "dtype": "float32",
        "out_dtype": recipe.out_dtype,
    }
    if recipe.chat_template is not None:
        data["chat_template"] = recipe.chat_template
    data["slices"] = _slices(recipe, hops, references, shell)
    documents = [_intermediate(name, merge, parents, references) for name, merge in recipe.stages]
    documents.append(
        yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=150, allow_unicode=True)
    )
    comments = [f"# {line}\n" for lines in header for line in lines.splitlines() or [""]]
    return "".join(comments) + "---\n".join(documents)


def _slices(
    recipe: Recipe, hops: Sequence[Hop], references: Mapping[str, str], shell: str
) -> list[dict[str, Any]]:
    """The slices of the document: runs of layers that follow one another in one model without a gain are one
    slice.
    """
    named = {**references, **{name: name for name, _ in recipe.stages}}
    sources = [_source(mix, place) for place, mix in _places(recipe)]
    inside = set(shell_positions(hops))
    slices = [_slice(named[sources[0][0]], 0, 0)]
    for position, ((model, layer), hop) in enumerate(zip(sources[1:-1], hops, strict=True)):
        if position in inside:
            reference, start, filters = shell, position, []
        else:
            reference, start, filters = named[model], layer or 0, _filters(hop)
        before = slices[-1]["sources"][0]
        follows = before["model"] == reference and before["layer_range"][1] == start
        if follows and len(slices) > 1 and not filters and "parameters" not in before:
            before["layer_range"][1] += 1
        else:
            slices.append(_slice(reference, start, start + 1, filters))
    slices.append(_slice(named[sources[-1][0]], 0, 0))
    return slices


def shell_positions(hops: Sequence[Hop]) -> tuple[int, ...]:
    """Positions of the hops whose layer, with its gain, lies in the shell.

    Args:
        hops: The route.

    Returns:
        Ascending positions; those whose norms do not take a gain as a product.
    """
    return tuple(
        i
        for i, hop in enumerate(hops)
        if hop.gain != 1 and any(form != "w" for _, form in scale_folding.fold_of(hop.model, hop.layer).norms)
    )


def write_shell(routed: RoutedModel, hops: Sequence[Hop], directory: Path, donor: Path) -> None:
    """Writes the shell: the route's config, the donor's tokenizer, the layers of `shell_positions`.

    Their tensors are the bits that the live model computes with. mergekit opens no model without tensors:
    there is one more, of a single element, that it never reads.

    Args:
        routed: The live model.
        hops: The route.
        directory: Folder to make.
        donor: Folder that tokenizer, generation config, chat template and processor files are copied from.
    """
    routed.install(hops)
    model: Any = routed.model
    directory.mkdir(parents=True)
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], str(model.dtype).removeprefix("torch.")
    config.save_pretrained(directory)
    companion_files.copy_companion_files(donor, directory)
    path, layers = stack(model)
    tensors: dict[str, Tensor] = {"shell": torch.zeros(1)}
    for i in shell_positions(hops):
        for name in stack(hops[i].model)[1][hops[i].layer].state_dict():
            tensors[f"{path}.{i}.{name}"] = route_checkpoint.effective_tensor(layers[i], name).clone().cpu()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def check_with_mergekit(environment: Path, recipe: Path, expected: Path) -> Comparison:
    """Runs mergekit on a written YAML and compares what comes out with the checkpoint of the route.

    What mergekit writes is read by transformers and written again, for it names some tensors otherwise; names
    that it left out are in `Comparison.only`.

    Args:
        environment: Virtual environment with mergekit.
        recipe: The YAML, its shell beside it.
        expected: Folder of the checkpoint.

    Returns:
        The comparison, tensor by tensor.

    Raises:
        SetupError: If there is no mergekit, or it fails.
    """
    with tempfile.TemporaryDirectory(dir=expected.parent, prefix=".mergekit-") as scratch:
        out = Path(scratch) / "out"
        program = mergekit_check.find_program(recipe, environment)
        mergekit_check.run_mergekit(program, recipe, out, in_own_folder=True)
        return compare_checkpoints(expected, out)


def compare_checkpoints(expected: Path, merged: Path) -> Comparison:
    """Compares the checkpoint of a route with what mergekit made of its YAML.

    Args:
        expected: Folder of the checkpoint.
        merged: mergekit's folder.

    Returns:
        The comparison, tensor by tensor under the names of the first.
    """
    ours = Checkpoint(expected)
    loaded = model_loading.load_model(merged, stored_dtype(ours))
    if loaded.faults:
        return Comparison(0, 0, 0, 0, 0.0, loaded.faults)
    with tempfile.TemporaryDirectory(dir=merged.parent) as scratch:
        model: Any = route_checkpoint.model_of_tensors(
            type(loaded.model), loaded.model.config, loaded.model.state_dict()
        )
        model.save_pretrained(scratch)  # under the names that any checkpoint of this kind gets
        return mergekit_check.compare(ours, Checkpoint(Path(scratch)))


def _intermediate(
    name: str, merge: Recipe, parents: Mapping[str, Parent], references: Mapping[str, str]
) -> str:
    """The documents of an intermediate merge, the last of which the others call by its name."""
    layout = parents[merge.base].layout
    named = mergekit_yaml.with_outer_filters(
        merge, layout.outer_names("embeddings"), layout.outer_names("head")
    )
    return mergekit_yaml.dump(named, references, name=name)


def _slice(model: str, start: int, end: int, filters: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    source: dict[str, Any] = {"model": model, "layer_range": [start, end]}
    if filters:
        source["parameters"] = {"scale": list(filters)}
    return {"sources": [source]}


def _filters(hop: Hop) -> list[dict[str, Any]]:
    """The filters of one hop's gain; a filter holds for every tensor whose name it is a part of."""
    if hop.gain == 1:
        return []
    fold = scale_folding.fold_of(hop.model, hop.layer)
    return [
        {"filter": f".{name}", "value": scale_folding.factor(fold, name, hop.gain)[0]} for name in fold.names
    ]


def _places(recipe: Recipe) -> list[tuple[str, Mix]]:
    layers = [(f"layer {i}", mix) for i, mix in enumerate(recipe.layers)]
    return [
        ("what comes before the layers", recipe.embeddings),
        *layers,
        ("what comes after the layers", recipe.head),
    ]


def _source(mix: Mix, place: str) -> Source:
    source = mix.passed
    if source is None:
        raise RecipeError(
            f"one mergekit file has one method, and {place} is mixed while others pass through; "
            "merge in a stage of its own"
        )
    return source
