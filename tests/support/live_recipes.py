"""Recipes of routes, merges and mixtures of both over the parents 'base', 'a' and 'b' of five layers."""

from __future__ import annotations

from dataclasses import replace

from evomerge.recipes import Filtered, Mix, Recipe, params


def passed(model: str, layer: int | None) -> Mix:
    return Mix("passthrough", ((model, layer),))


def route(*hops: tuple[str, int], outer: str = "a", scales: tuple[float, ...] = ()) -> Recipe:
    return Recipe(
        outer, tuple(passed(*hop) for hop in hops), passed(outer, None), passed(outer, None), scales=scales
    )


def mixed(
    layer: int | None, weight: float, method: str = "task_arithmetic", more: float | Filtered = 1.0
) -> Mix:
    given = {"weight": (weight, 0.4), "lambda": more, **({"density": (0.5, 0.5)} if "dare" in method else {})}
    return Mix(method, (("a", layer), ("b", layer)), ("base", layer), params(given))


def merged() -> Recipe:
    return Recipe(
        "base", tuple(mixed(i, 0.3 + 0.1 * i) for i in range(5)), mixed(None, 0.5), mixed(None, 0.6)
    )


HYBRID = Recipe(
    "base",
    (passed("a", 0), mixed(3, 0.7), mixed(1, 0.2), passed("b", 4), mixed(3, 0.7)),
    passed("b", None),
    passed("b", None),
)
RECIPES = {
    "one parent's path": route(*(("b", i) for i in range(5)), outer="b"),
    "repeats, skips, two parents": route(("a", 0), ("b", 1), ("b", 1), ("a", 4), ("a", 2), ("b", 1)),
    "shorter": route(("a", 3), ("b", 0)),
    "the base's layers under another's embeddings": route(("base", 0), ("base", 1), ("base", 3), outer="b"),
    "merged layers among parents'": HYBRID,
    "two merges of one layer": replace(
        HYBRID, layers=(mixed(2, 0.9), mixed(2, 0.1), passed("a", 1), mixed(2, 0.9))
    ),
    "random masks at two places": replace(
        HYBRID, layers=(mixed(0, 0.9), mixed(1, 0.5, "dare_linear"), mixed(1, 0.5, "dare_linear")), seed=7
    ),
    "a filter that names a layer": replace(
        HYBRID, layers=(*[mixed(1, 0.5, more=Filtered(((".2.", 3.0), ("*", 1.0))))] * 3, passed("a", 1))
    ),
    "embeddings and head of two models": replace(HYBRID, head=passed("a", None)),
    "merged embeddings": replace(HYBRID, embeddings=mixed(None, 1.1)),
    "a merge as a model": Recipe(
        "base",
        (*(passed("merged", i) for i in (0, 1, 2, 2, 3)), passed("b", 3), passed("merged", 4)),
        passed("merged", None),
        passed("merged", None),
        stages=(("merged", merged()),),
    ),
    "a merge as a model, and a merge beside it": Recipe(
        "a",
        (passed("merged", 1), mixed(1, 0.2), passed("a", 1), mixed(1, 0.6)),
        passed("a", None),
        passed("a", None),
        stages=(("merged", merged()),),
    ),
}
