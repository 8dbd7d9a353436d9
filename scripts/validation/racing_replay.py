"""Races against full evaluation: in a simulation, and replayed on the item scores of recorded studies.

Writes results/racing.md.

The simulation: candidates with normal skills answer items of normal difficulty by a logistic model, with a
part of their own in common that other candidates lack. Recorded are two searches over the zoo
(search_spaces/demo-evolution.yaml, 20 generations of 24, 200 items a task), one ranked by the tasks' metrics,
one by the probability of the right answer, both without a race, so that all scores are known. A replay deals
a generation's items in another order and runs the same code as a search.

usage: python scripts/validation/racing_replay.py [--studies results] [--samples 75] [--orders 4] [--out
    results/racing.md]
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from evomerge import config
from evomerge.config import loading
from evomerge.evaluation import Evaluation, Items, ItemScore, Objective, Term
from evomerge.launch.prepare import prepare_study
from evomerge.launch.search_request import SearchRequest
from evomerge.recipes import Mix, Recipe
from evomerge.search.racing import Race, RaceResult, run
from evomerge.store import Store
from evomerge.store.paths import store_path
from scripts.benchmarks import machine

REPOSITORY = Path(__file__).resolve().parents[2]
MU, EVALUATIONS = 12, 480  # what CMA-ES recombines of 24, and 20 generations of them
SEEDS = (("metric", 11), ("probability", 12))  # not those on which the rungs were chosen, 1 and 2
SCHEMES = {
    "three": (0.25, 0.5, 1.0),
    "five": (0.15, 0.3, 0.5, 0.7, 1.0),
    "eight": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 1.0),
    "ten": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
}
PASS = Mix("passthrough", (("base", None),))
RECIPE = Recipe("base", (PASS,), PASS, PASS)
Table = Mapping[int, Sequence[ItemScore]]
"""Slot -> a candidate's scores on all items of its generation."""


@dataclass(frozen=True, slots=True)
class Result:
    """A race against full evaluation.

    same: the same best mu; level: the same but for candidates of equal scores; dropped: one of the best was
    dropped, but for equal scores; cost: item evaluations over those of full evaluation; overlap: of the
    weights that CMA-ES gives to candidates by rank, the share that went to the same ones.
    """

    same: bool
    level: bool
    dropped: bool
    cost: float
    overlap: float


def race(scores: Table, items: Items, objective: Objective, rules: Race, mu: int = MU) -> Result:
    """Runs a race on known scores and compares it with what they say in full."""
    known = {slot: {(s.task, s.item): s for s in own} for slot, own in scores.items()}
    recipes = {slot: replace(RECIPE, seed=slot) for slot in scores}
    slots, used = {r.id: slot for slot, r in recipes.items()}, 0

    def score(raced: Sequence[Recipe], part: Items) -> dict[str, Evaluation]:
        nonlocal used
        keys = [(task, item) for task, ids in part.items() for item in ids]
        used += len(raced) * len(keys)
        return {r.id: Evaluation(r.id, tuple(known[slots[r.id]][k] for k in keys), {}, {}) for r in raced}

    fates = run(recipes, items, rules, objective, mu, score)
    full = {slot: seen(own, objective) for slot, own in scores.items()}
    ideal = sorted(full, key=lambda slot: (-full[slot], slot))
    found = sorted(fates, key=lambda slot: standing(fates[slot], objective, slot))
    last = full[ideal[mu - 1]]
    gained = sorted(full[slot] for slot in found[:mu]), sorted(full[slot] for slot in ideal[:mu])
    weights = [max(0.0, math.log((len(full) + 1) / 2) - math.log(i + 1)) for i in range(len(full))]
    own, other = dict(zip(ideal, weights, strict=True)), dict(zip(found, weights, strict=True))
    return Result(
        set(found[:mu]) == set(ideal[:mu]),
        bool(np.allclose(*gained, rtol=0, atol=1e-12)),
        any(f.dropped is not None and full[slot] > last + 1e-12 for slot, f in fates.items())
        or len([f for f in fates.values() if f.dropped is None]) < mu,
        used / (len(scores) * sum(map(len, items.values()))),
        sum(min(own[slot], other[slot]) for slot in full) / sum(weights),
    )


def seen(items: Iterable[ItemScore], objective: Objective) -> float:
    """The objective as the search sees it."""
    by_task: dict[str, list[float]] = {}
    for s in objective.search_items(tuple(items)):
        by_task.setdefault(s.task, []).append(s.value)
    return math.fsum(
        share * math.fsum(by_task[task]) / len(by_task[task])
        for task, share in objective.search_shares.items()
    )


def standing(fate: RaceResult, objective: Objective, slot: int) -> tuple[float, float, int]:
    """What a search ranks by, the best first."""
    score = seen(fate.evaluation.items, objective) if fate.predicted is None else fate.predicted
    return (-math.inf if fate.dropped is None else -fate.dropped, -score, slot)


# ---- simulation --------------------------------------------------------------------------------------------


def sample(
    generator: np.random.Generator,
    spread: float,
    soft: bool,
    items: int,
    candidates: int = 24,
    tasks: int = 4,
) -> tuple[Table, Items]:
    """Candidates whose skills have a standard deviation of `spread` in logits; items: of all tasks
    together.
    """
    skill, ease = generator.normal(0.0, spread, (candidates, 1)), generator.normal(0.0, 1.5, items)
    apart = generator.standard_normal((candidates, 6)) @ generator.standard_normal((6, items)) / math.sqrt(6)
    p = 1.0 / (1.0 + np.exp(-(skill + ease + apart)))
    values = p if soft else (generator.random(p.shape) < p).astype(float)
    names = [(f"t{i % tasks}", str(i)) for i in range(items)]
    table = {
        c: [ItemScore(task, item, float(v)) for (task, item), v in zip(names, row, strict=True)]
        for c, row in enumerate(values)
    }
    return table, {f"t{t}": tuple(item for task, item in names if task == f"t{t}") for t in range(tasks)}


def simulate(samples: int, rungs: Sequence[float], seed: int = 0) -> list[str]:
    """A table of stated against found error rates, `samples` generations of each kind."""
    objective = Objective(tuple(Term(f"t{t}") for t in range(4)))
    rows = [
        "| scores | spread of skills | stated error | other best 12 | one of the best dropped | item "
        "evaluations |",
        "| --- " * 6 + "|",
    ]
    totals: dict[float, list[Result]] = {}
    for soft in (False, True):
        for spread in (0.0, 0.1, 0.3, 1.0):
            for error in (0.01, 0.05, 0.1, 0.2):
                generator = np.random.default_rng(
                    [seed, int(soft), int(100 * spread)]
                )  # the same generations for each error
                found = []
                for i in range(samples):
                    table, items = sample(generator, spread, soft, (60, 120, 240, 400)[i % 4])
                    found.append(race(table, items, objective, Race(tuple(rungs), error)))
                totals.setdefault(error, []).extend(found)
                rows.append(
                    f"| {'soft' if soft else 'binary'} | {spread:g} | {error:g} | {_figures(found)} |"
                )
    rows += [f"| **all** | | **{error:g}** | {_figures(found)} |" for error, found in totals.items()]
    return rows


def _figures(found: Sequence[Result]) -> str:
    return (
        f"{_rate([not r.level for r in found])} | {_rate([r.dropped for r in found])} | "
        f"{np.mean([r.cost for r in found]):.2f}"
    )


def _rate(flags: Sequence[bool]) -> str:
    return f"{np.mean(flags):.3f} ({sum(flags)} of {len(flags)})"


# ---- recorded studies --------------------------------------------------------------------------------------


def record(measure: str, seed: int, studies: Path) -> Path:
    """Runs the search, unless it is there; returns its file."""
    document = _document(measure, seed)
    path = store_path(document["study"], studies, new=True)
    if not _done(path):
        settings, text = _load(document, studies)
        study = prepare_study(SearchRequest(settings, text, resume=path.is_file()), studies)
        try:
            study.run()
        finally:
            study.store.close()
    return path


def _document(measure: str, seed: int) -> dict[str, Any]:
    file = REPOSITORY / "search_spaces" / "demo-evolution.yaml"
    document: dict[str, Any] = yaml.safe_load(file.read_text())
    document["study"] = f"racing-{measure}"
    document["tasks"] = [task | {"search": measure} for task in document["tasks"]]
    document["evaluation"] |= {"items": 200, "validation": 20, "test": 20}
    document["search"] |= {"evaluations": EVALUATIONS, "finalists": 2, "seed": seed}
    return document


def _load(document: dict[str, Any], studies: Path) -> tuple[config.Config, str]:
    file = studies / f"{document['study']}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(document))
    try:
        return loading.load(str(file))
    finally:
        file.unlink()


def _done(path: Path) -> bool:
    """Whether all generations are there."""
    if not path.is_file():
        return False
    with Store.open(path, write=True) as store:  # for writing: one of an older version is brought up to date
        return sum(t.generation > 0 and t.origin != "mean" for t in store.trials()) >= EVALUATIONS


def generations(path: Path) -> list[Table]:
    """The scores of every generation's candidates, but for those that failed."""
    found: dict[int, dict[int, Sequence[ItemScore]]] = {}
    with Store.open(path) as store:
        for trial in store.trials():
            if trial.generation > 0 and trial.origin != "mean" and trial.score is not None:
                found.setdefault(trial.generation, {})[trial.slot] = store.scored(trial).evaluation.items
    return [found[g] for g in sorted(found) if len(found[g]) > MU]


def replay(tables: Sequence[Table], measure: str, rules: Race, orders: int) -> list[list[Result]]:
    """[generations][orders] races over every generation, its items dealt in each of `orders` orders."""
    tasks = dict.fromkeys(s.task for s in tables[0][min(tables[0])])
    objective = Objective(tuple(Term(task, search=((measure, 1.0),)) for task in tasks))  # type: ignore[arg-type]
    out = []
    for number, table in enumerate(tables):
        ids = {task: [s.item for s in table[min(table)] if s.task == task] for task in tasks}
        shuffled = [np.random.default_rng([number, order]) for order in range(orders)]
        out.append(
            [
                race(
                    table,
                    {t: tuple(map(str, g.permutation(own))) for t, own in ids.items()},
                    objective,
                    rules,
                )
                for g in shuffled
            ]
        )
    return out


def replays(studies: Mapping[str, Sequence[Table]], orders: int, show: Callable[[str], None]) -> list[str]:
    rows = [
        "| ranked by | items' scores | rungs | stated error | same best 12 | same but for equal scores | "
        "item evaluations | overlap of weights |"
    ]
    rows.append("| --- " * 8 + "|")
    schemes = (("three", 0.05), ("five", 0.05), ("eight", 0.05), ("eight", 0.1), ("ten", 0.05))
    together: dict[tuple[str, float], list[Result]] = {}
    for name, tables in studies.items():
        for measure in ("metric", "probability") if name == "probability" else ("metric",):
            for scheme, error in schemes:
                found = [
                    r for own in replay(tables, measure, Race(SCHEMES[scheme], error), orders) for r in own
                ]
                together.setdefault((scheme, error), []).extend(found)
                rows.append(f"| {name} | {measure} | {scheme} | {error:g} | {_shares(found)} |")
                show(rows[-1])
    return rows + [
        f"| **all** | | **{scheme}** | **{error:g}** | {_shares(found)} |"
        for (scheme, error), found in together.items()
    ]


def _shares(found: Sequence[Result]) -> str:
    same, level = (
        f"{np.mean(flags):.3f} ({sum(flags)} of {len(flags)})"
        for flags in ([r.same for r in found], [r.level for r in found])
    )
    return (
        f"{same} | {level} | {np.mean([r.cost for r in found]):.3f} | "
        f"{np.mean([r.overlap for r in found]):.3f}"
    )


# ---- seconds -----------------------------------------------------------------------------------------------


def seconds(rungs: Sequence[float] | None, studies: Path) -> float:
    """CPU seconds of a generation of the recorded search, the median of generations 2 to 5 of one that is run
    anew.
    """
    document = _document("metric", 3) | {"study": f"racing-seconds-{time.time_ns()}"}
    document["search"] |= {"evaluations": 120} | (
        {"race": {"rungs": list(rungs), "error": 0.05}} if rungs else {}
    )
    marks: list[float] = []
    settings, text = _load(document, studies)
    study = prepare_study(
        SearchRequest(settings, text),
        studies,
        show=lambda p: marks.append(time.process_time()) if p.note.startswith("generation") else None,
    )
    try:
        study.run()
    finally:
        study.store.close()
        shutil.rmtree(study.store.path.parent)
    return float(np.median(np.diff(marks)))


def main() -> None:
    """Replays, simulates and times, then writes results/racing.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--studies", type=Path, default=REPOSITORY / "results")
    parser.add_argument("--samples", type=int, default=75)
    parser.add_argument("--orders", type=int, default=4)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "results" / "racing.md")
    args = parser.parse_args()
    studies = {measure: generations(record(measure, seed, args.studies)) for measure, seed in SEEDS}
    replayed = replays(studies, args.orders, print)
    simulated = simulate(args.samples, SCHEMES["eight"])
    schemes = {"no race": None, **{name: rungs for name, rungs in SCHEMES.items() if name != "ten"}}
    timed = {name: seconds(rungs, args.studies) for name, rungs in schemes.items()}
    lines = [
        *_heading(args),
        *_replay_section(studies, replayed, args.orders),
        *_seconds_section(timed),
        *_simulation_section(simulated, args.samples),
    ]
    args.out.write_text("\n".join(lines))
    print(f"wrote {args.out}")


def _heading(args: argparse.Namespace) -> list[str]:
    flags = f"--samples {args.samples} --orders {args.orders}"
    return [
        "# Races against full evaluation",
        "",
        f"Written by `python scripts/validation/racing_replay.py {flags}`. In each generation of 24 the "
        "best 12",
        "are looked for; a race settles candidates early, as chosen or dropped, where",
        "`evomerge.search.racing_statistics` is sure of what all items would say.",
        "",
        f"{machine.stamp('torch', 'numpy', 'scipy', 'cma')}.",
        "",
        "Rungs, as shares of a generation's items:",
        "",
        *(f"- {name}: {', '.join(f'{r:g}' for r in rungs)}" for name, rungs in SCHEMES.items()),
        "",
    ]


def _replay_section(studies: Mapping[str, Sequence[Table]], rows: Sequence[str], orders: int) -> list[str]:
    counts = ", ".join(f"{len(tables)} by {name}" for name, tables in studies.items())
    seeds = " and ".join(str(seed) for _, seed in SEEDS)
    return [
        "## Recorded studies, replayed",
        "",
        f"Searches over the zoo, 4 tasks, 200 items each a generation; generations: {counts}; each with its "
        "items",
        f"in {orders} orders. Seeds {seeds}; the default, eight rungs, was chosen on others.",
        "",
        *rows,
        "",
        "Orders of one generation are not independent. Overlap of weights: of the weights that CMA-ES gives "
        "by",
        "rank, how much went to the same candidates; those chosen early are ordered by fewer items.",
        "",
    ]


def _seconds_section(timed: Mapping[str, float]) -> list[str]:
    return [
        "## Seconds",
        "",
        "CPU seconds of a generation of the same search, run anew, medians of four generations; 1.3 M "
        "parameters.",
        "Every rung merges its candidates again and plans its items anew: with a model this small that "
        "costs as",
        "much as the items that are saved. What is saved on a model whose forward passes take nearly all "
        "the time",
        "is the item evaluations above.",
        "",
        "| " + " | ".join(timed) + " |",
        "| --- " * len(timed) + "|",
        "| " + " | ".join(f"{s:.1f}" for s in timed.values()) + " |",
        "",
    ]


def _simulation_section(rows: Sequence[str], samples: int) -> list[str]:
    return [
        "## Simulation: is the error what is stated?",
        "",
        f"Rungs: eight. {samples} generations a row, of 60, 120, 240 and 400 items; with a spread of 0 all",
        "candidates are alike. Other best 12: not counting candidates of equal scores.",
        "",
        *rows,
        "",
    ]


if __name__ == "__main__":
    main()
