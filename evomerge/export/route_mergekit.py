"""A route as mergekit's passthrough (version 0.1.5): the YAML, and the shell folder that it names as its
base.

The shell holds the route's config and tokenizer, since mergekit takes both from the base. Slices without
layers, first
and last, pin embeddings and head to their models. A gain is a `scale` filter of its hop on the names of
transformers 5,
which mergekit 0.1.5 sees. Where a gain is no product, (1 + w) g - 1 of norms such as Gemma's, the hop's layer
lies in the shell.
"""

from __future__ import annotations

import copy
import json
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
"""Model types of which tests show that mergekit makes of the YAML what is scored. Of some others it drops
tensors and says nothing."""
SHELL = "shell"


def why_not(recipe: Recipe, model_type: str) -> str | None:
    """A sentence that says why no YAML is written for a route, None if one is. model_type: of the route's
    config."""
    if model_type not in VERIFIED:
        return (
            "No mergekit file: what mergekit 0.1.5 makes of a route was verified for "
            f"{', '.join(VERIFIED)} and not for {model_type}; "
            "it drops tensors of some architectures without a word. The checkpoint is whole."
        )
    mixed = [place for place, mix in _places(recipe) if mix.passed is None]
    if mixed:
        return (
            f"No mergekit file: one file has one method, and {mixed[0]} is mixed while others pass "
            "through; merge in a stage of its own."
        )
    if recipe.tokenizer is not None:
        return (
            "No mergekit file: a tokenizer that is put together was not verified for routes. The "
            "checkpoint is whole."
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
    """mergekit YAML that rebuilds a route; with stages, a document for each, for mergekit-multi.

    hops: the route as `RoutedModel.install` takes it, gains included. parents: for the names of tensors
    outside the stack.
    references: model name -> what to write for it. shell: the folder of `write_shell`, as seen from where
    mergekit is run.
    Raises RecipeError for a recipe that mergekit cannot express, FoldError for a gain that a layer cannot
    take up.
    """
    named = {**references, **{name: name for name, _ in recipe.stages}}
    sources = [_source(mix, place) for place, mix in _places(recipe)]
    inside = set(in_shell(hops))
    slices: list[dict[str, Any]] = [_slice(named[sources[0][0]], 0, 0)]
    for position, ((model, layer), hop) in enumerate(zip(sources[1:-1], hops, strict=True)):
        where, start = (shell, position) if position in inside else (named[model], layer or 0)
        filters = [] if position in inside else _filters(hop)
        before = slices[-1]["sources"][0]
        if (
            not filters
            and len(slices) > 1
            and before["model"] == where
            and before["layer_range"][1] == start
            and "parameters" not in before
        ):
            before["layer_range"][1] += 1
        else:
            slices.append(_slice(where, start, start + 1, filters))
    slices.append(_slice(named[sources[-1][0]], 0, 0))
    data: dict[str, Any] = {
        "merge_method": "passthrough",
        "base_model": shell,
        "dtype": "float32",
        "out_dtype": recipe.out_dtype,
    }
    if recipe.chat_template is not None:
        data["chat_template"] = recipe.chat_template
    text = [_stage(name, stage, parents, references) for name, stage in recipe.stages]
    text.append(
        yaml.safe_dump(
            data | {"slices": slices}, sort_keys=False, default_flow_style=None, width=150, allow_unicode=True
        )
    )
    return "".join(f"# {line}\n" for lines in header for line in lines.splitlines() or [""]) + "---\n".join(
        text
    )


def in_shell(hops: Sequence[Hop]) -> tuple[int, ...]:
    """Positions of hops whose layer, with its gain, lies in the shell."""
    return tuple(
        i
        for i, hop in enumerate(hops)
        if hop.gain != 1 and any(form != "w" for _, form in scale_folding.fold_of(hop.model, hop.layer).norms)
    )


def write_shell(routed: RoutedModel, hops: Sequence[Hop], directory: Path, donor: Path) -> None:
    """Writes the shell into a new folder: the route's config, the donor's tokenizer, the layers of
    `in_shell`.

    Their tensors are the bits that the live model computes with. mergekit opens no model without tensors:
    there is one more,
    of a single element, that it never reads.
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
    for i in in_shell(hops):
        for name in stack(hops[i].model)[1][hops[i].layer].state_dict():
            tensors[f"{path}.{i}.{name}"] = route_checkpoint.tensor_of(layers[i], name).clone().cpu()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def check_with_mergekit(environment: Path, recipe: Path, expected: Path) -> Comparison:
    """Runs the mergekit of a virtual environment on a written YAML and compares what comes out with the
    checkpoint of the route.

    What mergekit writes is read by transformers and written again, for it names some tensors otherwise; names
    that it left
    out are in `only`. Raises SetupError if there is no mergekit, or if it fails.
    """
    with tempfile.TemporaryDirectory(dir=expected.parent, prefix=".mergekit-") as scratch:
        out = Path(scratch) / "out"
        program = mergekit_check.find_program(recipe, environment)
        mergekit_check.run_mergekit(program, recipe, out, in_own_folder=True)
        return compare(expected, out)


def compare(expected: Path, found: Path) -> Comparison:
    """The checkpoint of a route and what mergekit made of its YAML, tensor by tensor under the names of the
    first."""
    ours = Checkpoint(expected)
    loaded = model_loading.load_model(found, stored_dtype(ours))
    if loaded.faults:
        return Comparison(0, 0, 0, 0, 0.0, loaded.faults)
    with tempfile.TemporaryDirectory(dir=found.parent) as scratch:
        model: Any = route_checkpoint.fresh(
            type(loaded.model), loaded.model.config, loaded.model.state_dict()
        )
        model.save_pretrained(scratch)  # under the names that any checkpoint of this kind gets
        return mergekit_check.compare(ours, Checkpoint(Path(scratch)))


def _stage(name: str, stage: Recipe, parents: Mapping[str, Parent], references: Mapping[str, str]) -> str:
    shell = parents[stage.base]
    keyed = mergekit_yaml.with_outer_filters(
        stage, shell.layout.outer_names("embeddings"), shell.layout.outer_names("head")
    )
    return f"name: {json.dumps(name)}\n" + mergekit_yaml.dump(keyed, references)


def _slice(model: str, start: int, end: int, filters: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    source: dict[str, Any] = {"model": model, "layer_range": [start, end]}
    return {"sources": [source | ({"parameters": {"scale": list(filters)}} if filters else {})]}


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
            f"one mergekit file has one method, and {place} is mixed while others pass through; merge "
            "in a "
            "stage of its own"
        )
    return source
