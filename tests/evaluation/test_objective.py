"""From metrics to one number and a rank: every kind against numpy, soft scores, floors, ties, and what the
search file says of them.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomerge import _yaml, config
from evomerge.config import loading
from evomerge.errors import ConfigError
from evomerge.evaluation import ItemScore, Objective, Standing, Term, ranks
from evomerge.launch import objective as objective_module
from evomerge.optimizers.cma_es import CmaEs
from evomerge.store.study_facts import TermFacts

METRICS = {"a": 0.4, "b": 0.7, "c": 3.0, "a:probability": 0.3, "a:logprob": -1.5, "b:probability": 0.6}


def drawn(seed: int, kind: Any, signs: bool = True) -> tuple[Objective, dict[str, float]]:
    """A random objective of three tasks, one of them a group of two, and metrics for it."""
    rng = random.Random(seed)
    sign = -1 if signs and rng.random() < 0.5 else 1
    terms = (
        Term("a", rng.uniform(0.1, 3)),
        Term("group", rng.uniform(0.1, 3), subtasks=(("b", 0.25), ("c", 0.75))),
        Term("d", rng.uniform(0.1, 3), sign),
    )
    return Objective(terms, kind), {task: rng.uniform(0.05, 0.95) for task in "abcd"}


# ---- kinds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", ["mean", "geometric", "worst"])
def test_a_kind_is_numpys(kind: Any, seed: int) -> None:
    objective, metrics = drawn(seed, kind, signs=kind != "geometric")
    values = np.array(
        [metrics["a"], 0.25 * metrics["b"] + 0.75 * metrics["c"], objective.terms[2].sign * metrics["d"]]
    )
    weights = np.array([t.weight for t in objective.terms])
    wanted = {
        "mean": lambda: np.average(values, weights=weights),
        "geometric": lambda: np.prod(values ** (weights / weights.sum())),
        "worst": lambda: values.min(),
    }[kind]()
    assert objective(metrics) == pytest.approx(wanted, abs=1e-14)
    assert objective.search_score(metrics) == objective(metrics), (
        "the search sees the metrics unless told otherwise"
    )
    assert objective.task_values(metrics) == pytest.approx(tuple(values), abs=1e-15)
    given = metrics | {"group": 0.123}
    assert objective.task_values(given)[1] == 0.123, "a group's own metric comes before its leaves'"


@pytest.mark.parametrize("value", [0.0, -0.2])
def test_a_geometric_mean_of_nothing_is_nothing(value: float) -> None:
    objective = Objective((Term("a"), Term("b")), "geometric")
    assert objective({"a": value, "b": 0.9}) == 0.0
    assert objective({"a": 1e-9, "b": 1e-9}) > 0.0, "the lowest is never beaten downwards"


@pytest.mark.parametrize("kind", ["mean", "geometric", "worst"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_gives_nan(kind: Any, bad: float) -> None:
    assert math.isnan(Objective((Term("a"), Term("b")), kind)({"a": bad, "b": 0.5}))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", ["mean", "geometric", "worst"])
def test_shares_are_the_derivative(kind: Any, seed: int) -> None:
    objective, metrics = drawn(seed, kind, signs=kind != "geometric")
    step, shares = 1e-6, objective.shares(metrics)
    for task in metrics:
        up, down = (objective(metrics | {task: metrics[task] + d}) for d in (step, -step))
        assert shares[task] == pytest.approx((up - down) / (2 * step), abs=1e-8)
    if kind == "mean":
        assert math.fsum(map(abs, shares.values())) == pytest.approx(1, abs=1e-14)
        assert objective.shares() == shares


def test_what_makes_no_sense_is_refused() -> None:
    for bad, sentence in (
        (lambda: Objective(()), "at least one task"),
        (lambda: Objective((Term("a", 0.0),)), "weight above 0"),
        (lambda: Objective((Term("a", search=(("metric", 0.0),)),)), "shares above 0"),
        (lambda: Objective((Term("a", sign=-1), Term("b")), "geometric"), "lower is better"),
        (lambda: Objective((Term("a", search=(("logprob", 1.0),)),), "geometric"), "log-probability"),
        (lambda: Objective((Term("a"),), keep=(("b", 0.1),)), "not in the objective"),
        (lambda: Objective((Term("a", mean=False),), keep=(("a", 0.1),)), "no mean"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            bad()


# ---- soft scores -------------------------------------------------------------------------------------------


def test_the_search_sees_shares_and_the_report_the_metric() -> None:
    objective = Objective(
        (Term("a", 2.0, search=(("metric", 7.0), ("probability", 3.0))), Term("b"), Term("c", 1.0, -1))
    )
    assert objective(METRICS) == pytest.approx((2 * 0.4 + 0.7 - 3.0) / 4, abs=1e-15)
    assert objective.search_score(METRICS) == pytest.approx(
        (2 * (0.7 * 0.4 + 0.3 * 0.3) + 0.7 - 3.0) / 4, abs=1e-15
    )
    likely = Objective((Term("a", search=(("logprob", 1.0),)),))
    assert (likely(METRICS), likely.search_score(METRICS)) == (0.4, -1.5)
    lower = Objective((Term("a", sign=-1, search=(("probability", 1.0),)),))
    assert lower.search_score(METRICS) == 0.3, "a probability is better higher, whatever the metric is"


@pytest.mark.parametrize("task", ["b", "c"])
def test_a_soft_score_that_is_not_there_is_said(task: str) -> None:
    objective = Objective((Term(task, search=(("logprob", 1.0),)),))
    with pytest.raises(ConfigError, match=f"task '{task}' gives no logprob"):
        objective.search_score(METRICS)


@pytest.mark.parametrize("seed", range(10))
def test_the_items_as_seen_average_to_the_search_score(seed: int) -> None:
    rng = random.Random(seed)
    terms = (
        Term("a", 2.0, search=(("metric", 0.6), ("probability", 0.4))),
        Term("g", 1.5, subtasks=(("b", 0.3), ("c", 0.7)), search=(("probability", 1.0),)),
        Term("d", 1.0, -1),
    )
    items = [
        ItemScore(t, str(i), rng.random(), rng.random(), -rng.random())
        for t, n in (("a", 5), ("b", 3), ("c", 8), ("d", 4))
        for i in range(n)
    ]
    mean = {t: np.mean([s.value for s in items if s.task == t]) for t in "abcd"} | {
        f"{t}:probability": np.mean([s.probability for s in items if s.task == t]) for t in "abcd"
    }
    objective = Objective(terms)
    seen = objective.search_items(items)
    assert [(s.task, s.item) for s in seen] == [(s.task, s.item) for s in items]
    shares = objective.search_shares
    assert math.fsum(shares.values()) == pytest.approx(1, abs=1e-14)
    by_task = {t: np.mean([s.value for s in seen if s.task == t]) for t in "abcd"}
    assert sum(shares[t] * by_task[t] for t in shares) == pytest.approx(
        objective.search_score(mean), abs=1e-13
    )
    bare = [ItemScore(s.task, s.item, s.value) for s in items]
    assert {s.task for s in objective.search_items(bare)} == {"d"}, (
        "an item without the soft score is no item of the search"
    )


# ---- ranks, floors, ties -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_ranks_are_lexicographic(seed: int) -> None:
    rng = random.Random(seed)
    some = [
        None if rng.random() < 0.15 else Standing(*(float(rng.randrange(3)) for _ in range(4)))
        for _ in range(25)
    ]
    found = ranks(some)
    for a, x in zip(some, found, strict=True):
        assert (a is None) == (x is None)
        for b, y in zip(some, found, strict=True):
            if a is not None and b is not None and x is not None and y is not None:
                key_a, key_b = ((s.reached, s.kept, s.score, s.tie) for s in (a, b))
                assert (x > y) == (key_a > key_b)
                assert (x == y) == (key_a == key_b)
    assert max(x for x in found if x is not None) == 0.0


def test_an_optimizer_learns_from_ranks_what_it_learns_from_scores() -> None:
    """CMA-ES uses ranks alone."""
    one, other = (CmaEs([0.0] * 5, 0.3, population=9, seed=3) for _ in range(2))
    for _ in range(6):
        genomes = one.ask()
        scores = [round(float(-np.sum((g - 0.4) ** 2)), 2) for g in genomes]
        assert np.array_equal(other.ask(), genomes)
        given: list[float | None] = [None, *scores[1:]]
        standings = [None, *(Standing(math.inf, 0.0, s, 0.0) for s in scores[1:])]
        order = one.tell(genomes, given)
        assert order == other.tell(genomes, ranks(standings))
        assert len(order) == one.mu
    assert np.array_equal(one.mean, other.mean)


def test_floors_and_violations() -> None:
    objective = Objective((Term("a"), Term("c", 1.0, -1), Term("b")), keep=(("a", 0.05), ("c", 0.5)))
    floors = objective.floors({"a": {"a": 0.5}, "c": {"c": 3.0}})
    assert floors == {"a": pytest.approx(0.45), "c": pytest.approx(-3.5)}
    assert objective.violation({"a": 0.45 + 1e-12, "c": 3.5 - 1e-12, "b": 0.0}, floors) == 0.0
    assert objective.violation({"a": 0.40, "c": 4.0, "b": 1.0}, floors) == pytest.approx(
        0.05 + 0.5, abs=1e-12
    )
    assert objective.violation({"a": 0.1, "c": 9.0, "b": 1.0}, {}) == 0.0


def test_a_tie_is_broken_by_the_soft_scores_that_there_are() -> None:
    terms = (Term("a", 3.0), Term("b", 1.0), Term("c", 5.0, -1))
    assert Objective(terms, tie_break="probability").tie_break_score(METRICS) == pytest.approx(
        (3 * 0.3 + 0.6) / 4, abs=1e-15
    )
    assert Objective(terms, tie_break="logprob").tie_break_score(METRICS) == -1.5
    assert Objective(terms).tie_break_score(METRICS) == 0.0
    assert Objective((Term("c"),), tie_break="probability").tie_break_score(METRICS) == 0.0


# ---- the search file ---------------------------------------------------------------------------------------


def parsed(**changes: Any) -> config.Config:
    document: dict[str, Any] = {
        "study": "x",
        "models": {"base": "m/base", "one": "m/one"},
        "base": "base",
        "method": "task_arithmetic",
    }
    document["tasks"] = [{"task": "a"}, {"task": "b"}]
    return loading.check(_yaml.parse(json.dumps(document | changes, indent=1), "trial.yaml"))


TERM_FACTS = {
    task: TermFacts.from_json(facts)
    for task, facts in {
        "a": {"sign": 1, "mean": True, "measures": ["probability", "logprob"], "leaves": [["a", 1.0]]},
        "b": {"sign": -1, "mean": False, "measures": [], "leaves": [["b1", 0.5], ["b2", 0.5]]},
    }.items()
}


def test_the_search_file_says_the_objective() -> None:
    settings = parsed(
        tasks=[{"task": "a", "weight": 2, "search": {"metric": 0.7, "probability": 0.3}}, {"task": "b"}],
        keep={"a": 0.02},
        search={"tie_break": "none"},
    )
    objective = objective_module.make_objective(settings, TERM_FACTS)
    assert objective == Objective(
        (
            Term("a", 2.0, 1, (("metric", 0.7), ("probability", 0.3)), (("a", 1.0),), True),
            Term("b", 1.0, -1, (("metric", 1.0),), (("b1", 0.5), ("b2", 0.5)), False),
        ),
        "mean", (("a", 0.02),), "none",
    )  # fmt: skip
    assert objective_module.make_objective(parsed(), TERM_FACTS).tie_break == "probability", (
        "where it is there, it is used"
    )
    assert objective_module.per_generation(settings, objective) == {"a": 100, "b1": 100, "b2": 100}
    sized = parsed(evaluation={"items": {"b": 7}})
    assert objective_module.per_generation(sized, objective) == {"a": 100, "b1": 7, "b2": 7}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "keep of no task": (
        {"keep": {"aa": 0.1}},
        r"trial.yaml:\d+:\d+ 'aa' is not among the tasks. Did you mean 'a'",
    ),
    "items of no task": ({"evaluation": {"items": {"c": 5}}}, "'c' is not among the tasks"),
    "items below one": (
        {"evaluation": {"items": {"a": 0}}},
        r"at least 1, or one for each task named, got 0",
    ),
    "negative slack": ({"keep": {"a": -0.1}}, "at least 0, got -0.1"),
    "no such measure": (
        {"tasks": [{"task": "a", "search": "accuracy"}]},
        "'metric', 'probability' or 'logprob'",
    ),
    "no share": ({"tasks": [{"task": "a", "search": {"metric": 0}}]}, "above 0, got 0"),
    "no measure": ({"tasks": [{"task": "a", "search": {}}]}, "at least 1 entry, got 0"),
    "kind": ({"objective": "median"}, "'mean', 'geometric' or 'worst'"),
    "key of a race": ({"search": {"race": {"rung": [1]}}}, "Did you mean 'rungs'"),
    "error of a race": ({"search": {"race": {"error": 1}}}, "below 1, got 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_key_is_named_with_its_place(case: str) -> None:
    changes, sentence = WRONG[case]
    with pytest.raises(ConfigError, match=sentence):
        parsed(**changes)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "soft score of a task without": (
        {"tasks": [{"task": "a"}, {"task": "b", "search": "probability"}]},
        "task 'b' gives no probability",
    ),
    "tie-break of a task without": ({"search": {"tie_break": "logprob"}}, "task 'b' gives no logprob"),
    "race of a metric that is no mean": (
        {"search": {"race": {}}},
        "metric of task 'b' is aggregated otherwise",
    ),
    "race of the worst task": ({"objective": "worst", "search": {"race": {}}}, "'worst' objective"),
    "race beside keep": ({"keep": {"a": 0.1}, "search": {"race": {}}}, "'keep'"),
    "keep of a metric that is no mean": ({"keep": {"b": 0.1}}, "no mean"),
    "geometric mean where lower is better": ({"objective": "geometric"}, "lower is better"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_tasks_cannot_give_is_refused_at_the_start(case: str) -> None:
    changes, sentence = REFUSED[case]
    with pytest.raises(ConfigError, match=sentence):
        objective_module.make_objective(parsed(**changes), TERM_FACTS)


def test_rungs_that_do_not_rise_to_one_are_refused() -> None:
    for rungs in ([0.5, 0.25, 1.0], [0.5], [0.0, 1.0], [0.5, 1.5]):
        with pytest.raises(ConfigError, match="rungs"):
            objective_module.race_settings(parsed(search={"race": {"rungs": rungs}}))
    assert objective_module.race_settings(parsed()) is None


def test_shipped_searches_are_understood() -> None:
    for path in sorted((Path(__file__).resolve().parents[2] / "search_spaces").glob("*.yaml")):
        assert loading.load(str(path))[0].search.race is None
