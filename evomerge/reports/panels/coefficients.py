"""How much of each model a recipe takes, by place and component: the numbers of the heat map."""

from __future__ import annotations

import math
from collections.abc import Mapping

from evomerge.recipes import Filtered, Mix, PerRow, Recipe, Setting

Cell = tuple[int, str]
"""(place, component): `EMBEDDINGS`, a layer or `HEAD`; the component is '' where all are mixed alike."""
EMBEDDINGS, HEAD = -1, 10**6
_COMPONENTS = (
    ("norm", "other"),
    ("attn", "attention"),
    ("attention", "attention"),
    ("mlp", "mlp"),
    ("feed_forward", "mlp"),
)
_SHOWN_FIRST = ("weight", "t")  # the parameter that says how much of a model a method takes


def coefficients(recipe: Recipe) -> dict[Cell, dict[str, float]]:
    """Reads how much of each model a recipe takes.

    Args:
        recipe: A merge of models, or a route of layers.

    Returns:
        Cell -> model -> the mean of its coefficient there; a layer that is taken over counts 1.
    """
    found: dict[Cell, dict[str, float]] = {}
    places = (EMBEDDINGS, *range(len(recipe.layers)), HEAD)
    for place, mix in zip(places, recipe.mixes, strict=True):
        by_component = _of_mix(mix)
        for component, shares in by_component.items():
            is_outer = place in (EMBEDDINGS, HEAD) and len(by_component) == 1
            found[place, "" if is_outer else component] = shares
    return found


def _of_mix(mix: Mix) -> dict[str, dict[str, float]]:
    """Component -> model -> coefficient."""
    models = [name for name, _ in mix.sources]
    named = dict(mix.params)
    if mix.method == "passthrough":
        return {"": dict.fromkeys(models, 1.0)}
    name = next((n for n in _SHOWN_FIRST if n in named), None)
    if name is None:
        name = next((n for n, value in mix.params if isinstance(value, tuple)), None)
    if name is None:
        return {"": dict.fromkeys(models, 1.0 / len(models))}
    value = named[name]
    by_model = dict(zip(models, value, strict=True)) if isinstance(value, tuple) else {models[-1]: value}
    numbers = {model: _by_component(setting) for model, setting in by_model.items()}
    components = {component for of in numbers.values() for component in of} - {""} or {""}
    return {
        component: {model: of.get(component, of.get("", 0.0)) for model, of in numbers.items()}
        for component in components
    }


def _by_component(setting: Setting) -> dict[str, float]:
    """Component -> mean of a setting's numbers there."""
    if isinstance(setting, Filtered):
        cases: list[tuple[str, tuple[float, ...]]] = [(text, (value,)) for text, value in setting.cases]
    elif isinstance(setting, PerRow):
        cases = list(setting.cases)
    else:
        return {"": setting}
    numbers: dict[str, list[float]] = {}
    for text, values in cases:
        numbers.setdefault(_component(text), []).extend(values)
    if len(numbers) > 1:
        numbers.pop("", None)  # what no other case names: norms and the like
    return {component: math.fsum(values) / len(values) for component, values in numbers.items()}


def _component(text: str) -> str:
    if text == "*":
        return ""
    return next((component for part, component in _COMPONENTS if part in text), "other")


def mean_of_models(cells: Mapping[Cell, Mapping[str, float]], models: tuple[str, ...]) -> list[float]:
    """The mean coefficient of each model over the layers.

    Args:
        cells: As `coefficients` gives them.
        models: Names of the models.

    Returns:
        One number for each model, 0 where it is not taken at all.
    """
    layers = [shares for (place, _), shares in cells.items() if 0 <= place < HEAD] or list(cells.values())
    return [math.fsum(shares.get(model, 0.0) for shares in layers) / len(layers) for model in models]
