"""A recipe file, mergekit's or ours, merged to disk."""

from __future__ import annotations

import json
from pathlib import Path

from evomerge import _yaml
from evomerge.checkpoints import Parent, open_parent, stored_dtype
from evomerge.errors import CheckpointError, RecipeError
from evomerge.export import open_route
from evomerge.merging import checkpoint_writer
from evomerge.merging.checkpoint_writer import Progress
from evomerge.merging.vocabulary.alignment import check_rows
from evomerge.recipes import Recipe, mergekit_yaml
from evomerge.store import StudyFacts


def merge_file(
    file: Path,
    directory: Path,
    progress: Progress | None = None,
    *,
    policy: str = "float32",
    memory: int | None = None,
) -> tuple[str, ...]:
    """Merges by a mergekit YAML or an exported recipe.json into a new folder; returns warnings, each a sentence.

    policy: of the arithmetic, for a YAML; memory: bytes that merging may hold besides the parents' mapped files.
    Raises RecipeError for a bad recipe, CheckpointError for parents that do not fit.
    """
    parents: dict[str, Parent] = {}

    def parent(reference: str) -> Parent:
        if reference not in parents:
            parents[reference] = open_parent(reference)
        return parents[reference]

    if file.suffix == ".json":
        if policy != "float32":
            raise RecipeError(
                f"{file} says its own arithmetic policy; '{policy}' can be asked of a YAML, such as the recipe.yaml beside it"
            )
        recipe, names = _exported(file)
        opened = {name: parent(reference) for name, reference in names.items()}
    else:
        recipe = mergekit_yaml.load(
            _yaml.read_all(file),
            lambda name: parent(name).layout.num_layers,
            lambda name: stored_dtype(parent(name)),
            policy,
        )
        opened = {name: parent(name) for name in recipe.models}
    for read in (*(stage for _, stage in recipe.stages), recipe):
        _check_layers(read, opened)
    warnings = _warnings(recipe, opened)
    if recipe.scales:
        agreement = open_route.write(recipe, opened, directory)
        return (
            *warnings,
            f"the route was loaded in a process of its own and compared with what it should be: {agreement}",
        )
    checkpoint_writer.write(recipe, opened, directory, progress, memory)
    return warnings


def _check_layers(recipe: Recipe, parents: dict[str, Parent]) -> None:
    for mix in recipe.mixes:
        for model, layer in (*mix.sources, *([mix.base] if mix.base else [])):
            if layer is not None and model in parents and layer >= parents[model].layout.num_layers:
                raise RecipeError(
                    f"the recipe reads layer {layer} of '{model}', which has {parents[model].layout.num_layers}"
                )


def _warnings(recipe: Recipe, parents: dict[str, Parent]) -> tuple[str, ...]:
    found = []
    if recipe.tokenizer is None and recipe.base in parents:
        try:
            differs = check_rows(parents, recipe.base)
        except (
            CheckpointError
        ) as error:  # rows that differ are refused by the plan; a broken tokenizer only cannot be compared
            differs = str(error)
        found += [differs] if differs else []
    towers = parents[recipe.base].layout.outer_names("tower") if recipe.base in parents else ()
    if towers and len(recipe.models) > 1:
        found.append(
            f"{len(towers)} tensors outside the language model, such as '{towers[0]}', come from '{recipe.base}' unmerged"
        )
    return tuple(found)


def _exported(file: Path) -> tuple[Recipe, dict[str, str]]:
    """(recipe, model name -> reference) of an exported recipe.json and the lineage.json beside it."""
    beside = file.with_name("lineage.json")
    try:
        recipe = Recipe.from_json(file.read_text(encoding="utf-8"))
        facts = StudyFacts.from_json(json.loads(beside.read_text(encoding="utf-8"))["facts"])
        names = {}
        for name in recipe.models:
            path, revision = str(facts.parents[name].path), facts.parents[name].revision
            if not isinstance(revision, str | None):
                raise ValueError("a revision is a text or null")
            names[name] = f"{path}@{revision}" if revision else path
        return recipe, names
    except FileNotFoundError as error:
        raise RecipeError(
            f"{error.filename} is missing; recipe.json is read with the lineage.json it was exported with"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RecipeError(
            f"{file} or {beside.name} cannot be used: {type(error).__name__}: {error}"
        ) from None
