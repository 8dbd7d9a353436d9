"""A merge by several methods as merges by one method each and a passthrough of their layers.

One mergekit document has one method. mergekit-multi runs several documents, of which later ones read the
results of earlier ones; a recipe says the same with stages.
"""

from __future__ import annotations

from dataclasses import replace

from evomerge.errors import RecipeError
from evomerge.recipes.recipe import Mix, Recipe, Source


def by_method(recipe: Recipe, name: str = "merge") -> Recipe:
    """The same merge with one method in each stage.

    A stage merges the whole model by its method. Layers, embeddings and head that are another method's take
    the numbers of a layer beside them: nothing reads what becomes of them.

    Args:
        recipe: Any recipe; its own stages are divided, too.
        name: What the names of new stages begin with.

    Returns:
        A recipe that merges to the same tensors; an equal one where no merge has several methods.

    Raises:
        RecipeError: A merge by several methods has a tokenizer of its own, or passes layers through out of
            their places.
    """
    divided = _divided(recipe, name)
    stages: list[tuple[str, Recipe]] = []
    for stage_name, stage in divided.stages:
        inner = _divided(stage, stage_name)
        stages += [*inner.stages, (stage_name, replace(inner, stages=()))]
    return replace(divided, stages=tuple(stages))


def _divided(recipe: Recipe, name: str) -> Recipe:
    """A recipe with a stage for each of its methods, where it has several."""
    methods = list(dict.fromkeys(mix.method for mix in recipe.mixes if mix.passed is None))
    if len({mix.method for mix in recipe.mixes}) < 2:
        return recipe
    listed = ", ".join(sorted({mix.method for mix in recipe.mixes}))
    if recipe.tokenizer is not None:
        raise RecipeError(
            f"one mergekit file has one method, this recipe has {listed}, and a tokenizer that is put "
            "together; merge in a stage of its own"
        )
    if any(mix.passed is not None and mix.passed[1] != layer for layer, mix in enumerate(recipe.layers)):
        raise RecipeError(
            f"one mergekit file has one method, this recipe has {listed}, and passes layers through in "
            "another order; merge in a stage of its own"
        )
    taken = {*recipe.models, *(stage for stage, _ in recipe.stages)}
    names = {method: _free(f"{name}-{method}", taken) for method in methods}

    def passed(mix: Mix, layer: int | None) -> Mix:
        return mix if mix.passed is not None else Mix("passthrough", ((names[mix.method], layer),))

    return replace(
        recipe,
        layers=tuple(passed(mix, layer) for layer, mix in enumerate(recipe.layers)),
        embeddings=passed(recipe.embeddings, None),
        head=passed(recipe.head, None),
        stages=(*recipe.stages, *((names[method], _whole(recipe, method)) for method in methods)),
    )


def _whole(recipe: Recipe, method: str) -> Recipe:
    """A whole model merged by one of a recipe's methods, with the recipe's own mixes where they are of it."""
    nearest = next(mix for mix in (*recipe.layers, *recipe.mixes) if mix.method == method)
    layers: list[Mix] = []
    for mix in recipe.layers:
        if mix.method == method:
            nearest = mix
        layers.append(_moved(nearest, mix.sources[0][1]))
    embeddings, head = recipe.embeddings, recipe.head
    return replace(
        recipe,
        layers=tuple(layers),
        embeddings=embeddings if embeddings.method == method else _moved(layers[0], None),
        head=head if head.method == method else _moved(layers[-1], None),
        stages=(),
        chat_template=None,
    )


def _moved(mix: Mix, layer: int | None) -> Mix:
    """A mix of another layer of its models, or of their embeddings or heads."""

    def move(source: Source) -> Source:
        return (source[0], layer)

    if mix.sources[0][1] == layer:
        return mix
    return replace(mix, sources=tuple(map(move, mix.sources)), base=move(mix.base) if mix.base else None)


def _free(name: str, taken: set[str]) -> str:
    """A name that no model and no other stage has."""
    while name in taken:
        name += "-"
    taken.add(name)
    return name
