"""Scans of coefficients: points against brute force, slopes against least squares, going on after a stop."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from evomerge.errors import ConfigError, StudyError
from evomerge.evaluation import Evaluation, Items, ItemScore
from evomerge.recipes import Recipe
from evomerge.reports import sensitivity
from evomerge.reports.sensitivity import CENTRE, Point, Scan
from evomerge.search import Study
from evomerge.spaces import Range, baselines
from evomerge.store import Store, StudyFacts
from tests.support.landscape import uniform
from tests.support.toy import REPO, ToyPool, count_rows, in_process, stored_rows, weight_space
from tests.support.toy_search import plan

SPACE = weight_space()
GENOME = tuple(0.3 * math.sin(i) for i in range(len(SPACE.axes)))
ITEMS: Items = {"first": tuple(f"f{i}" for i in range(40)), "second": tuple(f"s{i}" for i in range(60))}
WEIGHTS = {"first": 0.25, "second": 0.75}
EVERY = range(len(SPACE.axes))


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVOMERGE_THREADS", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(REPO)


def values_of(recipe: Recipe) -> list[float]:
    """The coefficients of a recipe of the space, read out of it."""
    genome = SPACE.encode(recipe)
    assert genome is not None
    return [axis.value(g) for axis, g in zip(SPACE.axes, genome, strict=True)]


def landscape(place: int, height: Callable[[float], float]) -> Callable[[Recipe, Items], Evaluation]:
    """An item is right with the probability `height` of one coefficient; the same luck for every recipe."""

    def evaluate(recipe: Recipe, items: Items) -> Evaluation:
        p = height(values_of(recipe)[place])
        scores = tuple(ItemScore(t, i, float(uniform(t, i) < p)) for t, ids in items.items() for i in ids)
        return Evaluation(
            recipe.id,
            scores,
            {t: float(np.mean([s.value for s in scores if s.task == t])) for t in items},
            {"score": 0.0},
        )

    return evaluate


def objective(evaluation: Evaluation) -> float | None:
    return None if evaluation.error else math.fsum(w * evaluation.metrics[t] for t, w in WEIGHTS.items())


def begun(folder: Path) -> Store:
    folder.mkdir(exist_ok=True)
    store = Store.open(folder / "study.db", write=True)
    if store.study() is None:
        store.begin("trial", 5, "study: trial\n", {}, StudyFacts())
    return store


# ---- points ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "span"), [(0.1, 0.3), (0.07, 0.5), (0.5, 3.0), (0.1, 0.1)])
def test_points_are_all_steps_within_bounds_and_nothing_else_moves(step: float, span: float) -> None:
    own = values_of(SPACE.decode(GENOME))
    found = sensitivity.points(SPACE, GENOME, EVERY, step, span)
    expected = []
    for place, axis in enumerate(SPACE.axes):
        k = -int(span / step + 1e-9)
        while k * step <= span + 1e-9:
            if k and axis.low <= own[place] + k * step <= axis.high:
                expected.append((axis.name, own[place] + k * step))
            k += 1
    assert [p.axis for p in found] == [name for name, _ in expected]
    assert [p.value for p in found] == pytest.approx(
        [value for _, value in expected], abs=1e-3
    )  # a bound is approached, not reached
    for p in found:
        place = next(i for i, axis in enumerate(SPACE.axes) if axis.name == p.axis)
        now = values_of(p.recipe)
        assert now[place] == pytest.approx(p.value, abs=1e-4)
        assert [v for i, v in enumerate(now) if i != place] == pytest.approx(
            [v for i, v in enumerate(own) if i != place], abs=1e-4
        )


def test_values_that_the_grid_makes_equal_are_one_point() -> None:
    found = sensitivity.points(SPACE, GENOME, [0], 0.00003, 0.0003)
    assert len({p.recipe.id for p in found}) == len(found) < 20
    assert SPACE.decode(GENOME).id not in {p.recipe.id for p in found}


@pytest.mark.parametrize(
    ("step", "span", "words"),
    [(0.0, 1.0, "0 < step"), (0.2, 0.1, "step 0.2"), (math.nan, 1.0, "nan"), (0.001, 1.0, "larger steps")],
)
def test_steps_that_are_none_are_refused(step: float, span: float, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        sensitivity.points(SPACE, GENOME, EVERY, step, span)


def test_bounds_that_leave_no_step_are_said() -> None:
    narrow = weight_space(ranges={"weight": Range(0.4, 0.6, 0.5)})
    with pytest.raises(ConfigError, match="choose a smaller one"):
        sensitivity.points(narrow, [0.0] * len(narrow.axes), range(len(narrow.axes)), 0.3, 0.3)


def test_axes_are_chosen_by_pattern_or_part() -> None:
    names = [axis.name for axis in SPACE.axes]
    assert [names[i] for i in sensitivity.matching_axes(SPACE.axes, "weight of a in*mlp")] == [
        n for n in names if " a in" in n and n.endswith("mlp")
    ]
    assert [names[i] for i in sensitivity.matching_axes(SPACE.axes, "embeddings")] == [
        n for n in names if "embeddings" in n
    ]
    assert sensitivity.matching_axes(SPACE.axes, None) == list(EVERY)
    with pytest.raises(ConfigError, match="no axis of the space matches 'layer 9'"):
        sensitivity.matching_axes(SPACE.axes, "layer 9")


def test_a_recipe_of_another_space_has_no_coefficients() -> None:
    hand = {b.label: b.recipe for b in baselines(SPACE)}
    for label in ("base", "TIES .5, sum"):
        with pytest.raises(StudyError, match="no point of this space"):
            sensitivity.genome_of(SPACE, hand[label], None)
    known = sensitivity.genome_of(SPACE, hand["task arithmetic 0.5"], None)
    assert SPACE.decode(known).id == hand["task arithmetic 0.5"].id


# ---- curves ----------------------------------------------------------------------------------------------


def test_curves_are_least_squares_and_paired_tests(tmp_path: Path) -> None:
    centre, place = SPACE.decode(GENOME), 2
    neighbours = sensitivity.points(SPACE, GENOME, [place, 5], 0.1, 0.4)
    evaluate = landscape(place, lambda v: 0.5 + 0.8 * (v - values_of(centre)[place]))
    with begun(tmp_path / "s") as store:
        assert (
            sensitivity.scan(store, Scan(centre, "search", ITEMS), neighbours, evaluate, objective)
            == len(neighbours) + 1
        )
        steep, flat = sensitivity.curves(
            SPACE, GENOME, neighbours, store.sensitivity(centre.id, "search", ITEMS), WEIGHTS
        )
    assert (steep.steep, flat.steep) == (True, False)
    assert [d.difference.mean for d in flat.steps if d.difference] == [0.0] * (len(flat.steps) - 1)
    recipes = {p.value: p.recipe for p in neighbours if p.axis == steep.axis} | {steep.value: centre}
    by_value = {v: evaluate(r, ITEMS) for v, r in recipes.items()}
    x = np.array(sorted(by_value))
    assert [s.value for s in steep.steps] == list(x)
    assert [s.score for s in steep.steps] == pytest.approx([objective(by_value[v]) for v in x])
    assert steep.slope is not None
    assert steep.slope.mean == pytest.approx(np.polyfit(x, [objective(by_value[v]) or 0.0 for v in x], 1)[0])
    lines = {
        t: [
            np.polyfit(x, [next(s.value for s in by_value[v].items if s.item == i) for v in x], 1)[0]
            for i in ids
        ]
        for t, ids in ITEMS.items()
    }
    error = math.sqrt(sum(w**2 * np.var(lines[t], ddof=1) / len(lines[t]) for t, w in WEIGHTS.items()))
    assert steep.slope.error == pytest.approx(error)
    assert abs(steep.slope.mean - 0.8) < 4 * steep.slope.error
    assert steep.best == max(x, key=lambda v: objective(by_value[v]) or 0.0)
    own = {(s.task, s.item): s.value for s in by_value[steep.value].items}
    pvalues = []
    for s in steep.steps:
        if s.difference is None:
            assert s.value == steep.value
            continue
        d = {
            t: np.array([i.value - own[t, i.item] for i in by_value[s.value].items if i.task == t])
            for t in ITEMS
        }
        assert s.difference.mean == pytest.approx(sum(w * d[t].mean() for t, w in WEIGHTS.items()))
        assert s.difference.error == pytest.approx(
            math.sqrt(sum(w**2 * d[t].var(ddof=1) / len(d[t]) for t, w in WEIGHTS.items()))
        )
        pvalues.append(s.difference.p_value())
    assert [s.p for s in steep.steps if s.p is not None] == pytest.approx(holm(pvalues))


def holm(pvalues: list[float]) -> list[float]:
    """By the definition: the largest of (n - rank) p over those at or below."""
    ranked = sorted(pvalues)
    return [max(min(1.0, (len(ranked) - i) * q) for i, q in enumerate(ranked) if q <= p) for p in pvalues]


def test_a_peak_is_steep_though_its_slope_is_flat(tmp_path: Path) -> None:
    centre, place = SPACE.decode(GENOME), 1
    top = values_of(centre)[place]
    neighbours = sensitivity.points(SPACE, GENOME, [place], 0.1, 0.3)
    with begun(tmp_path / "s") as store:
        sensitivity.scan(
            store,
            Scan(centre, "search", ITEMS),
            neighbours,
            landscape(place, lambda v: 0.9 - 5 * (v - top) ** 2),
            objective,
        )
        (curve,) = sensitivity.curves(
            SPACE, GENOME, neighbours, store.sensitivity(centre.id, "search", ITEMS), WEIGHTS
        )
    assert curve.slope is not None
    assert curve.slope.mean == pytest.approx(0, abs=0.01)
    assert curve.steep
    assert curve.best == curve.value


def test_a_point_that_fails_is_a_gap_and_a_candidate_that_fails_an_error(tmp_path: Path) -> None:
    centre = SPACE.decode(GENOME)
    neighbours = sensitivity.points(SPACE, GENOME, [0], 0.1, 0.2)
    bad = neighbours[-1].recipe.id
    with begun(tmp_path / "s") as store:
        sensitivity.scan(
            store,
            Scan(centre, "search", ITEMS),
            neighbours,
            ToyPool(lambda r: r.id == bad).evaluate,
            objective,
        )
        (curve,) = sensitivity.curves(
            SPACE, GENOME, neighbours, store.sensitivity(centre.id, "search", ITEMS), WEIGHTS
        )
        assert (curve.steps[-1].score, curve.steps[-1].difference) == (None, None)
        assert "fails on purpose" in (curve.steps[-1].error or "")
        assert all(s.score is not None for s in curve.steps[:-1])
        with pytest.raises(StudyError, match="fails on purpose"):
            sensitivity.scan(
                store,
                Scan(centre, "validation", ITEMS),
                neighbours,
                ToyPool(lambda r: True).evaluate,
                objective,
            )


# ---- stored, and gone on with ----------------------------------------------------------------------------


def test_a_scan_that_was_stopped_goes_on(tmp_path: Path) -> None:
    centre = SPACE.decode(GENOME)
    neighbours = sensitivity.points(SPACE, GENOME, EVERY, 0.1, 0.2)
    made: list[str] = []

    def evaluate(recipe: Recipe, items: Items) -> Evaluation:
        if len(made) == 7:
            made.append("stopped")
            raise KeyboardInterrupt
        made.append(recipe.id)
        return ToyPool().evaluate(recipe, items)

    with begun(tmp_path / "s") as store, pytest.raises(KeyboardInterrupt):
        sensitivity.scan(store, Scan(centre, "search", ITEMS), neighbours, evaluate, objective)
    with begun(tmp_path / "s") as store:
        assert (
            sensitivity.scan(store, Scan(centre, "search", ITEMS), neighbours, evaluate, objective)
            == len(neighbours) + 1 - 7
        )
        assert sensitivity.scan(store, Scan(centre, "search", ITEMS), neighbours, evaluate, objective) == 0
        known = store.sensitivity(centre.id, "search", ITEMS)
        wider = sensitivity.points(SPACE, GENOME, [0], 0.1, 0.4)
        assert (
            sensitivity.scan(store, Scan(centre, "search", ITEMS), wider, evaluate, objective)
            == len(wider) - 4
        )
        fewer = {task: ids[:9] for task, ids in ITEMS.items()}
        assert (
            sensitivity.scan(store, Scan(centre, "search", fewer), wider, evaluate, objective)
            == len(wider) + 1
        ), "other items are another scan"
    made.remove("stopped")
    assert made[: len(neighbours) + 1] == [p.recipe.id for p in (Point(CENTRE, 0.0, centre), *neighbours)]
    for p in neighbours:
        again = ToyPool().evaluate(p.recipe, ITEMS)
        assert known[p.axis, p.value].evaluation == again
        assert known[p.axis, p.value].score == objective(again)


def test_a_scan_leaves_the_search_as_it_was(tmp_path: Path) -> None:
    tables = ("study", "trials", "evaluations", "front")

    def run(folder: Path, evaluations: int) -> None:
        with begun(folder) as store:
            Study(plan(evaluations=evaluations), store, ToyPool()).run()

    for name in ("plain", "scanned"):
        run(tmp_path / name, 12)
    with begun(tmp_path / "scanned") as store:
        trial = next(t for t in store.trials() if t.origin == "sampled")
        genome = sensitivity.genome_of(SPACE, store.recipe(trial.recipe_id), trial.genome)
        items = sensitivity.scan_items(plan().items["search"], {"first": 8, "second": 8})
        neighbours = sensitivity.points(SPACE, genome, EVERY, 0.1, 0.2)
        before = {t: stored_rows(store.path)[t] for t in tables}
        sensitivity.scan(
            store,
            Scan(store.recipe(trial.recipe_id), "search", items),
            neighbours,
            ToyPool().evaluate,
            objective,
        )
        assert {t: stored_rows(store.path)[t] for t in tables} == before
        assert count_rows(store.path, "sensitivity") == len(neighbours) + 1
    for name in ("plain", "scanned"):
        run(tmp_path / name, 30)
    plain, scanned = (stored_rows(tmp_path / name / "study.db") for name in ("plain", "scanned"))
    assert len(plain["trials"]) > 30
    for table in tables:
        assert scanned[table] == plain[table], table


def test_the_items_are_the_same_whenever_asked_and_as_many() -> None:
    found = sensitivity.scan_items(ITEMS, {"first": 10, "second": 1000})
    assert found == sensitivity.scan_items(
        {t: tuple(reversed(ids)) for t, ids in ITEMS.items()}, {"first": 10, "second": 1000}
    )
    assert (len(found["first"]), len(found["second"])) == (10, 60)
    assert set(sensitivity.scan_items(ITEMS, {"first": 5, "second": 5})["first"]) < set(found["first"])
    with pytest.raises(ConfigError, match="at least 2 items"):
        sensitivity.scan_items(ITEMS, {"first": 1, "second": 5})


# ---- the command line ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def copied(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sensitivity")
    shutil.copytree(finished / "small", root / "small")
    return root


def test_the_verb_scans_prints_and_goes_on(copied: Path) -> None:
    words = (
        "sensitivity",
        "small/best",
        "--root",
        copied,
        "--axes",
        "layers 0-2, attention",
        "--step",
        "0.2",
        "--span",
        "0.2",
        "--items",
        6,
    )
    code, out, err = in_process(*words, "--json", "--plot", copied / "curves.png")
    assert code == 0, err
    data = json.loads(out)
    assert (data["items"], data["evaluated"], data["stored"]) == (24, 7, 0)
    assert [c["axis"] for c in data["axes"]] == [
        f"weight of {m} in layers 0-2, attention" for m in ("math", "lang", "string")
    ]
    for curve in data["axes"]:
        assert [round(s["value"] - curve["value"], 3) for s in curve["steps"]] == [-0.2, 0.0, 0.2]
        assert curve["steps"][1]["score"] == data["score"]
    assert (copied / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    code, out, err = in_process(*words, "--plot", copied / "curves.svg")
    assert code == 0, err
    assert "0 points scored now, 7 were stored" in out
    assert "<svg" in (copied / "curves.svg").read_text()
    rows = {line.split("  ")[0]: line for line in out.splitlines() if line.startswith("weight of")}
    assert list(rows) == [c["axis"] for c in data["axes"]]
    for curve in data["axes"]:
        assert rows[curve["axis"]].endswith("steep" if curve["steep"] else "flat")
        assert sum(mark in "▁▂▃▄▅▆▇█×" for mark in rows[curve["axis"]]) == 3


def test_the_study_goes_on_to_where_it_would_have_gone(copied: Path) -> None:
    before = stored_rows(copied / "small" / "study.db")["trials"]
    code, _, err = in_process(
        "sensitivity",
        "small/math + lang at 1",
        "--root",
        copied,
        "--axes",
        "embeddings",
        "--items",
        4,
        "--step",
        "0.3",
    )
    assert code == 0, err
    code, _, err = in_process("resume", "small", "--root", copied)
    assert code == 0, err
    assert stored_rows(copied / "small" / "study.db")["trials"] == before


WRONG: dict[str, tuple[tuple[object, ...], int, str, str]] = {
    "a parent": (("small/base",), 2, "E300", "no point of this space"),
    "no candidate": (("small/9999",), 2, "E300", "no candidate 9999"),
    "no axis": (("small/best", "--axes", "layer 77"), 2, "E100", "no axis of the space matches 'layer 77'"),
    "a step beyond the span": (("small/best", "--step", "0.5"), 2, "E100", "got step 0.5 and span 0.3"),
    "test items": (("small/best", "--role", "test"), 2, "E100", "got 'test'"),
    "one item": (("small/best", "--items", 1), 2, "E100", "at least 2 items"),
    "no picture": (("small/best", "--plot", "curves.txt"), 2, "E100", ".png, .svg, .pdf"),
    "no folder": (("small/best", "--plot", "nowhere/curves.png"), 3, "E200", "there is no folder"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_wish_is_one_line(case: str, copied: Path) -> None:
    words, number, name, sentence = WRONG[case]
    before = count_rows(copied / "small" / "study.db", "sensitivity")
    code, out, err = in_process("sensitivity", *words, "--root", copied)
    assert (code, out) == (number, "")
    assert err.startswith(f"error[{name}] ")
    assert len(err.splitlines()) == 1
    assert sentence in err
    assert count_rows(copied / "small" / "study.db", "sensitivity") == before


def test_without_matplotlib_the_work_is_not_begun(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = in_process("sensitivity", "small/best", "--plot", copied / "a.png", "--root", copied)
    assert (code, out) == (3, "")
    assert err.startswith("error[E200] plots need matplotlib")
    assert "evomerge[plots]" in err


def test_a_study_that_another_process_writes_is_left_alone(copied: Path) -> None:
    with Store.open(copied / "small" / "study.db", write=True):
        code, out, err = in_process("sensitivity", "small/best", "--root", copied)
    assert (code, out) == (2, "")
    assert "another process is writing small" in err
