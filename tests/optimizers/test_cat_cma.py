"""CatCMA and random search: honest about what they sample, and one of them learns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from scipy import stats

from evomerge.optimizers import Optimizer
from evomerge.optimizers.cat_cma import CatCma
from evomerge.optimizers.cma_es import CmaEs
from evomerge.optimizers.pending import GRID
from evomerge.optimizers.random_search import RandomSearch

Score = Callable[[np.ndarray], "float | None"]
COUNTS = (4, 2, 3, 5, 4, 4, 3, 2)
LEAD = len(COUNTS)


def hidden(x: np.ndarray) -> float:
    """Right categories, less the distance of the other genes from .5."""
    wanted = [(3 * i + 1) % k for i, k in enumerate(COUNTS)]
    return float(np.sum(x[:LEAD] == wanted) - np.sum((x[LEAD:] - 0.5) ** 2))


def coarse(x: np.ndarray) -> float:
    """Accuracy on few items: many ties."""
    return round(hidden(x) / 2) / 4


def run(
    optimizer: Optimizer,
    generations: int,
    score: Score = hidden,
    between: Callable[[], object] = lambda: None,
) -> list[np.ndarray]:
    asked = []
    for _ in range(generations):
        between()
        genomes = optimizer.ask()
        asked.append(genomes.copy())
        between()
        optimizer.tell(genomes, [score(g) for g in genomes])
    return asked


def same(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


CATEGORICAL = {
    "mixed": lambda seed=3, **more: CatCma(
        [0.0] * 14, 1.0, categories=COUNTS, keep_probability=0.75, **{"population": 10, **more}, seed=seed
    ),
    "one number": lambda seed=3, **more: CatCma(
        [0.0] * 9, 1.0, categories=COUNTS, keep_probability=0.75, **{"population": 10, **more}, seed=seed
    ),
    "categories alone": lambda seed=3, **more: CatCma(
        [1.0] * 8, 1.0, categories=COUNTS, keep_probability=0.75, **{"population": 10, **more}, seed=seed
    ),
}
RANDOM = {
    "random, mixed": lambda seed=3, **more: RandomSearch(
        [0.0] * 14, 1.0, categories=COUNTS, keep_probability=0.75, **{"population": 10, **more}, seed=seed
    ),
    "random, numbers": lambda seed=3, **more: RandomSearch(
        [0.0] * 14, 1.0, **{"population": 10, **more}, seed=seed
    ),
}
every = pytest.mark.parametrize(
    "make", [*CATEGORICAL.values(), *RANDOM.values()], ids=[*CATEGORICAL, *RANDOM]
)
categorical = pytest.mark.parametrize("make", CATEGORICAL.values(), ids=CATEGORICAL)
with_categories = pytest.mark.parametrize(
    "make", [*CATEGORICAL.values(), RANDOM["random, mixed"]], ids=[*CATEGORICAL, "random, mixed"]
)


# ---- reproducible ------------------------------------------------------------------------------------------


# ---- what is asked -----------------------------------------------------------------------------------------


@with_categories
def test_the_first_sample_keeps_each_category_as_often_as_asked(make: Callable[..., Optimizer]) -> None:
    """Each gene is binomial with the probability `stay`, exactly; the others share the rest alike."""
    size = 4000
    optimizer = make(population=size)
    start = optimizer.mean[:LEAD]
    sample = optimizer.ask()[:, :LEAD]
    for i, count in enumerate(COUNTS):
        for category in range(count):
            share = 0.75 if category == start[i] else 0.25 / (count - 1)
            low, high = stats.binom.ppf([1e-7, 1 - 1e-7], size, share)
            assert low <= (sample[:, i] == category).sum() <= high
    together = np.corrcoef((sample != start).T) - np.eye(LEAD)
    assert np.abs(together).max() < 5 / math.sqrt(size), "genes change on their own"


@pytest.mark.parametrize("kind", ["mixed", "random, mixed", "random, numbers"])
def test_the_first_numbers_are_those_of_cma_es(kind: str) -> None:
    """Normal around the start with the deviation given, each on its own: by moments, and against a sample of
    CmaEs.
    """
    start, lead, size = np.linspace(-1, 1, 6), [0.0] * (0 if kind == "random, numbers" else LEAD), 4000
    more = {"categories": COUNTS, "keep_probability": 0.75} if lead else {}
    maker = CatCma if kind == "mixed" else RandomSearch
    optimizer = maker([*lead, *start], 0.25, population=size, seed=1, **more)  # type: ignore[arg-type]
    assert np.allclose(optimizer.mean[len(lead) :], start, atol=GRID)
    numbers = optimizer.ask()[:, len(lead) :]
    z = (numbers - start) / 0.25
    assert np.abs(z.mean(axis=0)).max() < 5 / math.sqrt(size)
    assert np.abs(z.std(axis=0) - 1).max() < 5 / math.sqrt(2 * size)
    assert np.abs(np.corrcoef(z.T) - np.eye(6)).max() < 5 / math.sqrt(size)
    other = CmaEs(start, 0.25, population=size, seed=2).ask()
    assert min(stats.ks_2samp(a, b).pvalue for a, b in zip(numbers.T, other.T, strict=True)) > 1e-6


def test_no_category_starts_below_the_margin() -> None:
    """A category that is never sampled could never be learnt."""
    sure = CatCma([0.0] * LEAD, 1.0, categories=COUNTS, keep_probability=1 - 1e-9)
    lowest = (1 - 0.73 ** (1 / LEAD)) / (np.array(COUNTS) - 1)
    for q, count, least in zip(sure.probabilities, COUNTS, lowest, strict=True):
        assert np.allclose(q[1:count], least)
        assert q.sum() == pytest.approx(1)
        assert (q[count:] == 0).all()


# ---- what is told ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@categorical
def test_a_hidden_pattern_is_found_and_random_search_does_not_find_it(
    make: Callable[..., CatCma], seed: int
) -> None:
    learnt = make(seed)
    best = max(hidden(g) for genomes in run(learnt, 60) for g in genomes)
    n = len(learnt.mean)
    blind = RandomSearch(
        [0.0] * n if n > LEAD else [1.0] * n,
        1.0,
        population=10,
        seed=seed,
        categories=COUNTS,
        keep_probability=0.75,
    )
    other = max(hidden(g) for genomes in run(blind, 60) for g in genomes)
    assert hidden(learnt.mean) > other, "what is returned, the mean, beats the best of as many random samples"
    assert best > other
    assert np.sum(learnt.probabilities.max(axis=1) > 0.8) >= LEAD - 1
    assert hidden(learnt.mean) > LEAD - 1.5


@categorical
def test_only_the_order_of_scores_counts(make: Callable[..., CatCma]) -> None:
    assert same(run(make(), 15), run(make(), 15, lambda x: 1e-6 * hidden(x) - 5))
    assert same(run(make(), 15), run(make(), 15, lambda x: math.exp(hidden(x) / 10)))
    assert not same(run(make(), 15), run(make(), 15, lambda x: -hidden(x)))


@categorical
def test_failed_candidates_rank_last(make: Callable[..., CatCma]) -> None:
    def failing(x: np.ndarray) -> float | None:
        return None if x[0] == 1 else hidden(x)

    assert same(run(make(), 15, failing), run(make(), 15, lambda x: -1e9 if x[0] == 1 else hidden(x)))
    es = make()
    genomes = es.ask()
    scores = [None if i % 3 == 0 else hidden(g) for i, g in enumerate(genomes)]
    order = es.tell(genomes, scores)
    wanted = sorted((i for i in range(10) if scores[i] is not None), key=lambda i: (-(scores[i] or 0.0), i))
    assert order == wanted[: es.mu]
    assert es.mu == 5
    run(es, 3, lambda x: None)
    assert all(np.isfinite(g).all() for g in run(es, 3))


@categorical
def test_the_probabilities_move_towards_the_best_by_the_natural_gradient(make: Callable[..., CatCma]) -> None:
    """arXiv 2405.09962, section 3: q moves along sum_i w_i (c_i - q), weights falling with rank and zero for
    the lower half.
    """
    for seed in range(10):
        es = make(seed, population=12)
        before = es.probabilities
        genomes = es.ask()
        scores = [hidden(g) for g in genomes]
        order = es.tell(genomes, list(scores))
        weights = np.array([math.log(6.5) - math.log(i + 1) for i in range(6)])
        chosen = genomes[order][:, :LEAD, None] == np.arange(5)  # [mu, genes, categories]
        gradient = np.tensordot(weights / weights.sum(), chosen - before, axes=1)
        moved = es.probabilities - before
        margin = ((1 - 0.73 ** (1 / LEAD)) / (np.array(COUNTS) - 1))[:, None]
        free = (es.probabilities > margin * 1.001).sum(axis=1) == np.array(
            COUNTS
        )  # genes without a category held at the margin
        ratios = moved[free][np.abs(gradient[free]) > 1e-9] / gradient[free][np.abs(gradient[free]) > 1e-9]
        assert np.allclose(ratios, ratios[:1], rtol=1e-6)
        assert (ratios > 0).all()
        assert np.allclose(es.probabilities.sum(axis=1), 1)


@categorical
def test_flat_scores_and_long_searches_stay_sound(make: Callable[..., CatCma]) -> None:
    """A flat landscape, and one long converged: numbers stay finite and no category is lost for good."""
    es = make()
    for genomes in run(es, 300, lambda x: 0.25):
        assert np.isfinite(genomes).all()
    assert len(np.unique(genomes, axis=0)) > 1
    es = make()
    for generation, genomes in enumerate(run(es, 400)):
        assert np.isfinite(genomes).all()
        assert generation < 250 or genomes.shape[1] == LEAD or np.abs(genomes[:, LEAD:] - 0.5).max() < 0.1
    least = ((1 - 0.73 ** (1 / LEAD)) / (np.array(COUNTS) - 1))[:, None]
    real = np.arange(5) < np.array(COUNTS)[:, None]
    assert (es.probabilities >= np.where(real, least * (1 - 1e-9), 0)).all()
    assert np.allclose(es.probabilities.sum(axis=1), 1)


@pytest.mark.parametrize("numbers", [0, 1, 2, 6])
def test_a_search_that_has_converged_stays_where_it_is(numbers: int) -> None:
    """Steps shorter than the grid must not make the distribution explode."""
    es = CatCma([0.0] * (LEAD + numbers), 0.05, categories=COUNTS, keep_probability=0.75, population=12)
    for generation, genomes in enumerate(run(es, 1000)):
        assert np.isfinite(genomes).all()
        assert generation < 500 or np.abs(genomes[:, LEAD:] - 0.5).max(initial=0) < 0.01


@pytest.mark.parametrize("make", RANDOM.values(), ids=RANDOM)
def test_random_search_learns_nothing(make: Callable[..., RandomSearch]) -> None:
    one, two = make(), make()
    start = one.mean
    assert same(run(one, 10), run(two, 10, lambda x: -hidden(x)))
    assert np.array_equal(one.mean, start)
    assert one.tell(one.ask(), [float(i) for i in range(10)]) == []
    assert one.mu == 0


# ---- what is injected --------------------------------------------------------------------------------------


@with_categories
def test_injected_genomes_come_first(make: Callable[..., Optimizer]) -> None:
    es, plain = make(), make()
    n = len(es.mean)
    given = [[float(k - 1) for k in COUNTS] + [0.25] * (n - LEAD), [0.0] * LEAD + [-0.5] * (n - LEAD)]
    es.inject(given[:1])
    es.inject(given[1:])
    genomes, others = es.ask(), plain.ask()
    assert np.array_equal(genomes[:2], given)
    assert np.array_equal(genomes[2:], others[2:]), "the rest of the generation is as it would have been"
    es.tell(genomes, [hidden(g) for g in genomes])
    assert not np.array_equal(es.ask()[0], given[0]), "once"


@categorical
def test_long_steps_of_numbers_are_shortened_and_categories_are_not(make: Callable[..., CatCma]) -> None:
    es = make()
    n = len(es.mean)
    free = max(2, n - LEAD)
    es.inject([[1.0] * LEAD + [100.0] * (n - LEAD)])
    first = es.ask()[0]
    assert (first[:LEAD] == 1).all()
    length = float(np.linalg.norm(first[LEAD:]))  # in standard deviations of the first sample
    assert n == LEAD or (math.sqrt(free) + 2 - free * GRID) <= length <= math.sqrt(free) + 2 + free * GRID
    assert n == LEAD or np.ptp(first[LEAD:]) == 0, "along the way to what was injected"
    assert all(np.isfinite(g).all() for g in run(make(), 5))


@categorical
def test_a_good_injected_genome_is_learnt_from(make: Callable[..., CatCma]) -> None:
    plain, helped = make(), make()
    right = [float((3 * i + 1) % k) for i, k in enumerate(COUNTS)]
    helped.inject([[*right, *[0.5] * (len(plain.mean) - LEAD)]])
    for es in (plain, helped):
        run(es, 1)
    rows = np.arange(LEAD)
    chosen = np.array(right, dtype=int)
    assert helped.probabilities[rows, chosen].sum() > plain.probabilities[rows, chosen].sum()


@pytest.mark.parametrize("genome", [[9.0] * 14, [0.5] * 14, [0.0] * 13, [-1.0] * 14])
def test_a_category_that_there_is_not_is_refused(genome: list[float]) -> None:
    with pytest.raises(ValueError, match="whole numbers"):
        CATEGORICAL["mixed"]().inject([genome])
    if len(genome) == 14:
        with pytest.raises(ValueError, match="whole numbers"):
            CatCma(genome, 1.0, categories=COUNTS, keep_probability=0.75)
