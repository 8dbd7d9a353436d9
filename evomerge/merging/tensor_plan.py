"""What every output tensor of a recipe is made of, checked before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from evomerge.checkpoints.safetensors_headers import TensorInfo
from evomerge.errors import RecipeError, suggest
from evomerge.methods import Method, method
from evomerge.recipes import STORED, Filtered, Mix, ParamValue, Recipe

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
DTYPE_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}


@dataclass(frozen=True, slots=True)
class Step:
    """One output tensor. info: its header facts; inputs: its name in each source; base: in the base; mix: None for a tensor taken over."""

    name: str
    info: TensorInfo
    mix: Mix | None = None
    inputs: tuple[str, ...] = ()
    base: str | None = None


def check(recipe: Recipe) -> None:
    """Raises RecipeError, naming layer and model, unless every mix is one that its method accepts."""
    for name in (recipe.dtype, recipe.out_dtype):
        if name not in DTYPES and not (
            name == STORED and recipe.policy == "mergekit" and recipe.out_dtype != STORED
        ):
            raise RecipeError(f"unknown dtype '{name}'. Known: {', '.join(DTYPES)}")
    for where, mix in zip(output_places(recipe), recipe.mixes, strict=True):
        rule = method(mix.method)
        least, most = rule.models
        if not least <= len(mix.sources) <= most:
            wanted = str(least) if least == most else f"{least} to {most}"
            raise RecipeError(
                f"{mix.method} takes {wanted} source models besides the base, got {len(mix.sources)} ({where})"
            )
        if rule.needs_base and mix.base is None:
            raise RecipeError(f"{mix.method} needs a base model ({where})")
        if mix.base is not None and not (rule.needs_base or rule.takes_base):
            raise RecipeError(
                f"{mix.method} has no base model; list '{mix.base[0]}' among its sources ({where})"
            )
        for name, value in mix.params:
            _check_param(rule, name, value, mix, where)


def _check_param(rule: Method, name: str, value: ParamValue, mix: Mix, where: str) -> None:
    param = rule.param(name)
    if param is None:
        raise RecipeError(
            f"{rule.name} has no parameter '{name}' ({where}). {suggest(name, [p.name for p in rule.params])}"
        )
    if isinstance(value, tuple) and param.per == "merge":
        raise RecipeError(
            f"{name} of {rule.name} is one value for the merge, not one for each model ({where})"
        )
    settings = value if isinstance(value, tuple) else (value,)
    for i, s in enumerate(settings):
        place = f"{where}, model {mix.sources[i][0]}" if isinstance(value, tuple) else where
        for number in [v for _, v in s.cases] if isinstance(s, Filtered) else [s]:
            param.check(number, place)


def output_places(recipe: Recipe) -> list[str]:
    return ["embeddings", *(f"layer {i}" for i in range(len(recipe.layers))), "head"]
