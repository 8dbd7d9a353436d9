"""The greedy soup among the hand recipes, against the rule it is named after, in plain words."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import pytest

from evomerge.evaluation import Evaluation, Items, ItemScore
from evomerge.recipes import Recipe
from evomerge.search import Study
from evomerge.spaces import baselines, soup
from evomerge.store import Store, StudyFacts
from tests.support.landscape import uniform
from tests.support.toy import ToyPool, stored_rows, weight_space
from tests.support.toy_search import plan

SPACE = weight_space(models=("a", "b", "c"))
PARENTS = ("base", "a", "b", "c")


class SoupPool(ToyPool):
    """Every set of models has a score of its own; other recipes score 0."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def value(self, names: frozenset[str]) -> float:
        return round(uniform(self.seed, *sorted(names)), 3)

    def evaluate(self, recipe: Recipe, items: Items) -> Evaluation:
        mix = recipe.layers[0]
        plain = mix.method in ("linear", "passthrough")
        value = self.value(frozenset(name for name, _ in mix.sources)) if plain else 0.0
        scores = tuple(ItemScore(task, item, value) for task, ids in items.items() for item in ids)
        return Evaluation(recipe.id, scores, dict.fromkeys(items, value), {})


def recipe_one(score: dict[frozenset[str], float]) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """(averages tried, soup) of recipe 1 of Model Soups, without ties."""
    order = sorted(PARENTS, key=lambda name: -score[frozenset([name])])
    held, tried = order[:1], []
    for name in order[1:]:
        tried.append((*held, name))
        if score[frozenset([*held, name])] >= score[frozenset(held)]:
            held.append(name)
    return tried, tuple(held)


@pytest.mark.parametrize("seed", range(8))
def test_parents_are_averaged_in_from_the_best_down_while_it_does_not_get_worse(
    seed: int, tmp_path: Path
) -> None:
    pool = SoupPool(seed)
    score = {
        frozenset(c): pool.value(frozenset(c))
        for n in range(1, 5)
        for c in itertools.combinations(PARENTS, n)
    }
    tried, held = recipe_one(score)
    wish = plan(space=SPACE, baselines=baselines(SPACE), soup=functools.partial(soup, SPACE), evaluations=6)
    file = tmp_path / "trial" / "study.db"
    file.parent.mkdir()
    for _ in range(2):  # the second time everything is known
        with Store.open(file, write=True) as store:
            if store.study() is None:
                store.begin("trial", 5, "study: trial\n", {}, StudyFacts())
            outcome = Study(wish, store, pool).run()
    labels = [
        row["label"] for row in stored_rows(file)["trials"] if (row["label"] or "").startswith("soup of")
    ]
    assert labels == [f"soup of {' + '.join(names)}" for names in tried]
    assert (
        max(t["search"] for t in outcome.references if t["label"] in {*labels, *PARENTS})
        >= score[frozenset(held)] - 1e-9
    )
