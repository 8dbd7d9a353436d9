"""A recipe file, mergekit's or ours, merged to disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from evomerge import documents, merge, mergekit_yaml
from evomerge.checkpoint import Checkpoint, locate
from evomerge.errors import RecipeError
from evomerge.recipe import Recipe


def merge_file(file: Path, directory: Path, progress: Callable[[int], None] | None = None) -> None:
    """Merges by a mergekit YAML or an exported recipe.json into a new folder. Raises RecipeError for a bad recipe."""
    parents: dict[str, Checkpoint] = {}

    def parent(reference: str) -> Checkpoint:
        if reference not in parents:
            parents[reference] = Checkpoint(_locate(reference))
        return parents[reference]

    if file.suffix == ".json":
        recipe, names = _exported(file)
        parents |= {name: Checkpoint(locate(path, revision)) for name, (path, revision) in names.items()}
    else:
        recipe = mergekit_yaml.load(documents.read(file), lambda reference: parent(reference).num_layers, lambda reference: parent(reference).dtype)
        parents |= {name: parent(name) for name in recipe.models}
    for mix in recipe.mixes:
        for model, layer in (*mix.sources, *([mix.base] if mix.base else [])):
            if layer is not None and layer >= parents[model].num_layers:
                raise RecipeError(f"the recipe reads layer {layer} of '{model}', which has {parents[model].num_layers}")
    merge.write(recipe, parents, directory, progress)


def _locate(reference: str) -> Path:
    """Folder of a mergekit model reference: a path, or repository[@revision]."""
    name, at, revision = reference.rpartition("@")
    if at and not (reference.startswith(("/", ".", "~")) or Path(reference).is_dir()):
        return locate(name, revision)
    return locate(reference)


def _exported(file: Path) -> tuple[Recipe, dict[str, tuple[str, str | None]]]:
    """(recipe, model name -> (path, revision)) of an exported recipe.json and the lineage.json beside it."""
    beside = file.with_name("lineage.json")
    try:
        recipe = Recipe.from_json(file.read_text(encoding="utf-8"))
        facts = json.loads(beside.read_text(encoding="utf-8"))["facts"]["parents"]
        names = {name: (str(facts[name]["path"]), facts[name]["revision"]) for name in recipe.models}
        if not all(revision is None or isinstance(revision, str) for _, revision in names.values()):
            raise ValueError("a revision is a text or null")
        return recipe, names
    except FileNotFoundError as error:
        raise RecipeError(f"{error.filename} is missing; recipe.json is read with the lineage.json it was exported with") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RecipeError(f"{file} or {beside.name} cannot be used: {type(error).__name__}: {error}") from None
