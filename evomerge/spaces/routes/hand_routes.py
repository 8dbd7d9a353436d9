"""The stacks of layers that people write by hand: what a search of routes has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

from evomerge.recipes import Recipe
from evomerge.spaces.routes.layer_pool import Hop, LayerPool


def hand_routes(
    models: Sequence[tuple[str, int]], *, stage: tuple[str, Recipe] | None = None, out_dtype: str = "bfloat16"
) -> list[tuple[str, Recipe]]:
    """(label, recipe) of hand-written stacks of models, (name, depth) each.

    Depth up-scaling of each model: its first three quarters, then its last three quarters (SOLAR, arXiv 2312.15166, section 2:
    layers 0-23 then 8-31 of 32). Two frankenmerges of each pair: the first half of one, then the second half of the other; the
    rest is the first one's. stage: see `LayerPool`.
    """
    found: list[tuple[str, Sequence[Hop]]] = []
    for name, depth in models:
        most = (3 * depth + 2) // 4
        found.append((f"{name} up-scaled", [(name, i) for i in (*range(most), *range(depth - most, depth))]))
    for (a, deep), (b, other) in permutations(models, 2):
        lower = [(a, i) for i in range(-(-deep // 2))]
        found.append((f"half {a}, half {b}", [*lower, *((b, i) for i in range(other // 2, other))]))
    return [
        (
            label,
            LayerPool(tuple(models), hops[0][0], stage, out_dtype=out_dtype).recipe(hops, [1.0] * len(hops)),
        )
        for label, hops in found
    ]
