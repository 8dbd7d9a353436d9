"""(mu + lambda) evolution: survivors are asked again, and linked choices are found."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from evomerge.optimizers import Array, Optimizer
from evomerge.optimizers.elitist import Elitist
from evomerge.optimizers.random_search import RandomSearch

COUNTS = (3, 4, 4, 4, 4)
START = (0.0,) * 7


def make(seed: int = 0, population: int = 18) -> Elitist:
    return Elitist(START, 1.0, categories=COUNTS, keep_probability=0.7, population=population, seed=seed)


def linked(genome: Array) -> float:
    """The start is a peak; a higher one needs three choices at once, and each of them alone is worse."""
    choices = genome[:5]
    wrong = float((choices != 0).sum())
    other = 2.0 - 0.4 * float((choices != (1, 2, 2, 0, 0)).sum())
    return max(1.0 - 0.2 * wrong, other) - 0.01 * float(np.abs(genome[5:]).sum())


def search(optimizer: Optimizer, score: Callable[[Array], float], generations: int) -> float:
    best = -np.inf
    for _ in range(generations):
        genomes = optimizer.ask()
        scores = [score(g) for g in genomes]
        best = max(best, *scores)
        optimizer.tell(genomes, list(scores))
    return best


def test_survivors_are_asked_again_first_and_children_are_new() -> None:
    optimizer = make()
    genomes = optimizer.ask()
    assert tuple(genomes[0]) == START
    kept = optimizer.tell(genomes, [float(i % 5) for i in range(18)])
    assert kept == [4, 9, 14]
    again = optimizer.ask()
    assert [tuple(g) for g in again[:3]] == [tuple(genomes[i]) for i in kept]
    assert len({tuple(g) for g in again}) == 18
    assert optimizer.mean.tolist() == genomes[4].tolist()


def test_every_choice_is_reached() -> None:
    optimizer, seen = make(1), [set() for _ in COUNTS]
    for _ in range(40):
        genomes = optimizer.ask()
        for genome in genomes:
            for place, own in enumerate(seen):
                own.add(int(genome[place]))
        optimizer.tell(genomes, [0.0] * 18)
    assert [len(own) for own in seen] == list(COUNTS)


def test_a_child_changes_about_as_many_choices_as_asked() -> None:
    """Two of five: the one that every child changes, and each of the other four with 1/4.

    The mean of 400 lies within 4 standard errors.
    """
    optimizer = Elitist(START, 1.0, categories=COUNTS, keep_probability=0.6, seed=2)
    changed = (np.array([optimizer._child() for _ in range(400)])[:, :5] != 0).sum(1)
    assert abs(changed.mean() - 2) < 4 * np.sqrt(4 * 0.25 * 0.75 / 400)
    assert changed.min() >= 1


def test_injected_genomes_are_asked_as_they_are_before_the_start() -> None:
    optimizer = make()
    given = [(1.0, 2.0, 0.0, 0.0, 0.0, 0.5, 0.0), (2.0, 0.0, 0.0, 1.0, 0.0, 0.0, -0.5)]
    optimizer.inject(given)
    assert [tuple(g) for g in optimizer.ask()[:3]] == [*given, START]


def test_failures_never_survive_and_a_lost_generation_changes_nothing() -> None:
    optimizer = make()
    genomes = optimizer.ask()
    scores: list[float | None] = [None] * 18
    scores[7] = -3.0
    assert optimizer.tell(genomes, scores) == [7]
    genomes = optimizer.ask()
    assert optimizer.tell(genomes, [None] * 18) == []
    assert np.array_equal(optimizer.ask()[0], genomes[0])


def test_linked_choices_are_found_more_often_than_at_random() -> None:
    """Over 20 seeds with 300 evaluations each."""
    won = [search(make(seed), linked, 17) > 1.7 for seed in range(20)]
    lucky = [
        search(
            RandomSearch(START, 1.0, categories=COUNTS, keep_probability=0.7, population=18, seed=seed),
            linked,
            17,
        )
        > 1.7
        for seed in range(20)
    ]
    assert sum(won) >= 14
    assert sum(lucky) <= 8


def test_some_children_have_one_new_choice_over_a_run_of_genes() -> None:
    """As blocks of layers are taken by hand: of 12 genes, a run of 4 or longer with .3 x .625.

    Single changes make none.
    """
    runs = 0
    for seed in range(40):
        optimizer = Elitist(
            [0.0] * 12, 0.1, categories=[5] * 12, keep_probability=0.9, population=20, seed=seed
        )
        runs += sum(
            any(len(set(child[i : i + 4])) == 1 and child[i] for i in range(9))
            for child in optimizer.ask()[1:]
        )
    assert 105 <= runs <= 200  # 143 expected of 760, a few more for equal children are drawn again


def test_new_choices_are_as_likely_as_asked() -> None:
    likely = [(1.0, 1.0, 6.0, 2.0)] * 6
    counts = np.zeros(4)
    for seed in range(200):
        optimizer = Elitist(
            [0.0] * 6,
            0.1,
            categories=[4] * 6,
            keep_probability=0.9,
            category_weights=likely,
            population=4,
            seed=seed,
        )
        for child in optimizer.ask()[1:]:
            changed = child[child != 0]
            counts[int(changed[0])] += 1
    assert counts[0] == 0
    share = counts[1:] / counts.sum()
    assert np.abs(share - np.array([1, 6, 2]) / 9).max() < 4 * (0.25 / counts.sum()) ** 0.5
