"""The stacks of layers that people write by hand: what a search of routes has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

from evomerge.recipes import Recipe
from evomerge.spaces.routes.layer_pool import LayerPool, LayerRef


def hand_routes(
    models: Sequence[tuple[str, int]], *, stage: tuple[str, Recipe] | None = None, out_dtype: str = "bfloat16"
) -> list[tuple[str, Recipe]]:
    """Depth up-scaling of each model, and two frankenmerges of each pair.

    An up-scaled model is its first three quarters, then its last three quarters. A frankenmerge is the first
    half of one model, then the second half of the other; the rest is the first one's.

    Args:
        models: (name, depth) pairs.
        stage: See `LayerPool`.
        out_dtype: Type of the merged model's tensors.

    Returns:
        (label, recipe) pairs.

    References:
        SOLAR, arXiv:2312.15166, section 2: layers 0-23 then 8-31 of 32.
    """
    stacks: list[tuple[str, Sequence[LayerRef]]] = []
    for name, depth in models:
        kept = (3 * depth + 2) // 4
        layers = [*range(kept), *range(depth - kept, depth)]
        stacks.append((f"{name} up-scaled", [(name, layer) for layer in layers]))
    for (first, first_depth), (second, second_depth) in permutations(models, 2):
        lower = [(first, layer) for layer in range(-(-first_depth // 2))]
        upper = [(second, layer) for layer in range(second_depth // 2, second_depth)]
        stacks.append((f"half {first}, half {second}", [*lower, *upper]))
    routes: list[tuple[str, Recipe]] = []
    for label, stack in stacks:
        pool = LayerPool(tuple(models), stack[0][0], stage, out_dtype=out_dtype)
        routes.append((label, pool.recipe(stack, [1.0] * len(stack))))
    return routes
