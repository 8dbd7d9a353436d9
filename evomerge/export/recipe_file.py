"""A recipe file, mergekit's or ours, merged to disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from evomerge import _yaml
from evomerge.checkpoints import Parent, open_parent, stored_dtype
from evomerge.checkpoints.comparison import doubts, meaningless
from evomerge.errors import CheckpointError, RecipeError
from evomerge.export import open_route
from evomerge.export.merge_card import Origin, write_origin
from evomerge.merging import atomic_folder, checkpoint_writer
from evomerge.merging.checkpoint_writer import Progress
from evomerge.merging.merge import Merge
from evomerge.merging.name_versions import with_names_of_base
from evomerge.merging.vocabulary.alignment import check_rows
from evomerge.merging.written_stages import has_own_files, written_stages
from evomerge.merging.written_tokenizer import end_doubts
from evomerge.recipes import Recipe, mergekit_yaml
from evomerge.store import StudyFacts


def merge_recipe_file(
    file: Path,
    directory: Path,
    progress: Progress | None = None,
    *,
    policy: str = "float32",
    memory: int | None = None,
) -> tuple[str, ...]:
    """Merges by a mergekit YAML or an exported recipe.json into a new folder.

    Args:
        file: The YAML, or the JSON with the lineage.json that it was exported with.
        directory: The folder, which appears whole or not at all.
        progress: Called with the numbers of tensors written and to write.
        policy: Arithmetic of a YAML: 'float32' rounds once, 'mergekit' has its types and operations.
        memory: Bytes that merging may hold besides the parents' mapped files; None for no limit.

    Returns:
        Warnings, each a sentence.

    Raises:
        RecipeError: For a bad recipe.
        CheckpointError: For parents that do not fit.
        SetupError: If the folder exists.
    """
    parents: dict[str, Parent] = {}
    ignored: list[str] = []
    text = None

    def parent(reference: str) -> Parent:
        if reference not in parents:
            parents[reference] = open_parent(reference)
        return parents[reference]

    if file.suffix == ".json":
        if policy != "float32":
            raise RecipeError(
                f"{file} says its own arithmetic policy; '{policy}' can be asked of a YAML, "
                "such as the recipe.yaml beside it"
            )
        recipe, names = _exported(file)
    else:
        documents = _yaml.read_all(file)
        text = mergekit_yaml.dump_documents([document.data for document in documents])
        recipe = mergekit_yaml.load(
            documents,
            lambda name: parent(name).layout.num_layers,
            lambda name: stored_dtype(parent(name)),
            policy,
            tensor_names=lambda name: parent(name).tensors.keys(),
            warn=ignored.append,
        )
        names = {name: name for name in recipe.models}
    opened = {name: parent(reference) for name, reference in names.items()}
    return merge_recipe(
        Origin(recipe, names, text, tuple(ignored)), opened, directory, progress, memory=memory
    )


def merge_recipe(
    origin: Origin,
    parents: Mapping[str, Parent],
    directory: Path,
    progress: Progress | None = None,
    *,
    memory: int | None = None,
) -> tuple[str, ...]:
    """Merges by a recipe into a new folder, which says what it is made of.

    Args:
        origin: What to merge, and what its models are called.
        parents: Each of its models, open.
        directory: The folder, which appears whole or not at all.
        progress: Called with the numbers of tensors written and to write.
        memory: Bytes that merging may hold besides the parents' mapped files; None for no limit.

    Returns:
        Warnings, each a sentence.

    Raises:
        RecipeError: For a bad recipe.
        CheckpointError: For parents that do not fit.
        SetupError: If the folder exists.
    """
    recipe = origin.recipe
    given = parents
    if not recipe.scales:  # a route's models are loaded by transformers, which knows their names
        parents = with_names_of_base(recipe, parents)
    for part in (*(stage for _, stage in recipe.stages), recipe):
        _check_layers(part, parents)
    _check_meanings(recipe, parents)
    atomic_folder.check_new(directory)
    if recipe.scales:
        return _merge_route(origin, parents, directory)
    own_files = [stage for _, stage in recipe.stages if has_own_files(stage)]
    with written_stages(recipe, parents, directory, memory) as (last, opened):
        found = [*origin.notes, *(w for part in (*own_files, last) for w in _warnings(part, opened))]
        warnings = tuple(dict.fromkeys(found))
        merge = Merge(last, opened)
        with atomic_folder.new_folder(directory) as staging:
            checkpoint_writer.write_into(merge, staging, progress, memory)
            write_origin(staging, origin, given, warnings)
    return warnings


def _merge_route(origin: Origin, parents: Mapping[str, Parent], directory: Path) -> tuple[str, ...]:
    """Like `merge_recipe`, of a route with scales."""
    recipe = origin.recipe
    warnings = (*origin.notes, *_warnings(recipe, parents))
    with atomic_folder.new_folder(directory) as staging:
        agreement = open_route.load_route(recipe, parents).write_checkpoint_files(staging)
        checked = "the route was loaded in a process of its own and compared with what it should be"
        warnings = (*warnings, f"{checked}: {agreement}")
        write_origin(staging, origin, parents, warnings)
    return warnings


def _check_layers(recipe: Recipe, parents: Mapping[str, Parent]) -> None:
    for mix in recipe.mixes:
        for model, layer in (*mix.sources, *([mix.base] if mix.base else [])):
            if layer is not None and model in parents and layer >= parents[model].layout.num_layers:
                depth = parents[model].layout.num_layers
                raise RecipeError(f"the recipe reads layer {layer} of '{model}', which has {depth}")


def _check_meanings(recipe: Recipe, parents: Mapping[str, Parent]) -> None:
    """Raises CheckpointError for a model of the base's shape whose weights mean nothing to the base's."""
    root = recipe.root_base
    for name in recipe.models if root in parents else ():
        reason = None if name == root else meaningless(name, parents[name], root, parents[root])
        if reason is not None:
            raise CheckpointError(reason)


def _warnings(recipe: Recipe, parents: Mapping[str, Parent]) -> tuple[str, ...]:
    warnings: list[str] = []
    root = recipe.root_base
    for name in recipe.models if root in parents else ():
        if name in parents and name != root:
            warnings += doubts(name, parents[name], root, parents[root])
    if recipe.tokenizer is None and recipe.chat_template is None and root in parents:
        warnings += end_doubts({name: parents[name] for name in recipe.models if name in parents}, root)
    if recipe.tokenizer is None and root in parents:
        try:
            difference = check_rows(parents, root)
        except CheckpointError as error:
            # a broken tokenizer cannot be compared; rows that differ are refused when the merge is planned
            difference = str(error)
        warnings += [difference] if difference else []
    towers = parents[root].layout.outer_names("tower") if root in parents else ()
    if towers and len(recipe.models) > 1:
        outside = f"{len(towers)} tensors outside the language model, such as '{towers[0]}'"
        warnings.append(f"{outside}, come from '{root}' unmerged")
    return tuple(warnings)


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
