"""Learned weights beside CMA-ES on a real model at equal cost: SmolLM2-135M-Instruct and two experts of it.

    OMP_NUM_THREADS=1 python scripts/benchmarks/real_learned.py [--arms ...] [--seeds 0 1 2] [--out FILE]

The models are those of `real_parents.py`. Each row is a whole study of one arm and seed, appended to
FILE.jsonl as it is measured: a run that was cut goes on from there, and `--report` only writes the table.
Cost is what the candidates cost in item forwards, a scored item with its gradient counted as three. Parents
and hand recipes are scored once, by a study of their own, and reused by the others. The winner of a study is
chosen on validation items among its own finalists, parents and hand recipes; test items are used once.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import evomerge as em
from evomerge.evaluation import FORWARDS_OF_A_SLOPE, ItemScore
from evomerge.evaluation.intervals import lead_interval, score_interval
from evomerge.reports.stages import stage_rows
from evomerge.store import Store
from scripts.benchmarks import machine

REPO = Path(__file__).resolve().parents[2]
TASKS = (
    "real_bbh_boolean_expressions",
    "real_blimp_anaphor_number_agreement",
    "real_blimp_sentential_negation_npi_scope",
)
SHARES = dict.fromkeys(TASKS, 1 / len(TASKS))
ITEMS, POPULATION, STEPS = 16, 10, 10  # items of a task for a candidate and for a step
SEEDS = 3
BUDGET = FORWARDS_OF_A_SLOPE * ITEMS * len(TASKS) * STEPS
ARMS = {
    "cma": "CMA-ES, the space's axes",
    "tensor": "learned, tensor",
    "space": "learned, the space's axes",
}
REFERENCES = "references"
Document = dict[str, Any]
Row = Mapping[str, Any]


def document_of(arm: str, seed: int, root: Path) -> Document:
    """The search file of an arm."""
    document: Document = {
        "study": f"{arm}-{seed}",
        "models": {name: str(root / name) for name in ("base", "logic", "grammar")},
        "base": "base",
        "method": "task_arithmetic",
        "space": {
            "groups": 3,
            "components": ["attention", "mlp"],
            "embeddings": False,
            "head": False,
            "parameters": {"weight": {"low": -0.5, "high": 2.5, "start": 1.0}},
        },
        "tasks": [{"task": task} for task in TASKS],
        "evaluation": {"splits": "declared", "items": ITEMS, "validation": 30, "test": 80},
        "search": {"seed": seed, "finalists": 3},
    }
    if arm in ("tensor", "space"):
        document["stages"] = [{"stage": "learned", "genome": arm, "steps": STEPS, "items": ITEMS}]
    else:
        candidates = BUDGET // (ITEMS * len(TASKS))
        document["search"] |= {"evaluations": candidates, "population": POPULATION, "sigma": 0.15}
    if arm == REFERENCES:
        document["search"] |= {"evaluations": 4, "population": 4, "finalists": 1}
        document["study"] = REFERENCES
    else:
        document["reuse"] = [REFERENCES]
        if arm != "cma" and (root / f"cma-{seed}" / "study.db").is_file():
            document["reuse"].append(f"cma-{seed}")  # which scores the references on this seed's items
    return document


def tested(store: Store, recipe: str) -> list[list[Any]]:
    """[task, item, value] of a candidate's test."""
    found = [scored for role, scored in store.evaluations(recipe) if role == "test"]
    return [[score.task, score.item, score.value] for score in found[-1].evaluation.items]


def measure(arm: str, seed: int, root: Path, workers: int) -> dict[str, Any]:
    """Runs the study of a row, or goes on with it."""
    document = document_of(arm, seed, root)
    em.run(document, root=root, resume=True, workers=workers, accept_floor=True)
    with Store.open(root / document["study"] / "study.db") as store:
        study = store.study()
        assert study is not None
        assert study.outcome is not None
        stages = stage_rows(store)
        cost = sum(stage["item_forwards"] for stage in stages)
        searched = [t for t in store.trials() if t.generation > 0 and t.origin != "mean"]
        seconds = sum(sum(trial.seconds.values()) for trial in searched)
        row = {
            "arm": arm,
            "seed": seed,
            "genes": stages[-1]["genes"],
            "cost": cost,
            "seconds": round(seconds, 1),
        }
        row |= {"commit": machine.commit(), **line(study.outcome.best, store)}
        if arm == REFERENCES:
            row["references"] = [line(reference, store) for reference in study.outcome.references]
        return row


def line(candidate: Row, store: Store) -> dict[str, Any]:
    """A candidate's scores and its test items."""
    names = ("origin", "label", "validation", "test", "test_metrics")
    return {name: candidate[name] for name in names} | {"items": tested(store, candidate["recipe"])}


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in file.read_text().splitlines()] if file.is_file() else []


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(SEEDS)))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--root", type=Path, default=REPO / "results" / "real_learned")
    parser.add_argument("--out", type=Path, default=REPO / "results" / "real_learned.md")
    parser.add_argument("--report", action="store_true", help="write the table of the rows that are there")
    args = parser.parse_args()
    raw = args.out.with_suffix(".jsonl")
    done = {(row["arm"], row["seed"]) for row in rows_of(raw)}
    wanted = [(REFERENCES, 0), *((arm, seed) for seed in args.seeds for arm in args.arms)]
    for arm, seed in [] if args.report else wanted:
        if (arm, seed) not in done:
            row = measure(arm, seed, args.root, args.workers)
            with raw.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(arm, seed, f"test {row['test']:.3f} for {row['cost']:,}", flush=True)
    args.out.write_text(report(rows_of(raw)))


# ---- the report --------------------------------------------------------------------------------------------


def report(rows: Sequence[Row]) -> str:
    """The text of results/real_learned.md."""
    references = next((row["references"] for row in rows if row["arm"] == REFERENCES), [])
    measured = sorted((row for row in rows if row["arm"] in ARMS), key=lambda row: row["seed"])
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    lines = [
        "# Learned weights on a real model, at equal cost",
        "",
        "By `python scripts/benchmarks/real_learned.py`, rows in `real_learned.jsonl` (measured at commit",
        f"{commits}); {machine.stamp('torch', 'transformers', 'lm-eval', 'cma')}.",
        "",
        *_setting(),
        "",
        f"{len(measured)} of {len(ARMS) * SEEDS} searches are measured; seconds are of the candidates alone,",
        "first compilation included, on a machine that others used.",
        "",
        *_reference_table(references),
        "",
        *_search_table(measured),
        "",
        *_difference_table(measured, references),
    ]
    return "\n".join(lines) + "\n"


def _setting() -> list[str]:
    return [
        "SmolLM2-135M-Instruct and two experts of it, made by `scripts/benchmarks/real_parents.py`, on",
        f"{', '.join(TASKS)} (`evaluators/real`), mean of the tasks. {ITEMS} items a task for a",
        f"candidate and for a step, {BUDGET:,} item forwards a search, a scored item with its gradient",
        "counted as three. The winner is chosen on validation items among the search's finalists, parents",
        "and hand recipes, and tested once. Intervals: 95 %, over items, differences paired by item.",
    ]


def _reference_table(references: Sequence[Row]) -> list[str]:
    lines = [
        "## Parents and hand recipes",
        "",
        f"| recipe | validation | test | {' | '.join(TASKS)} |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for row in references:
        by_task = " | ".join(f"{row['test_metrics'][task]:.2f}" for task in TASKS)
        lines.append(f"| {row['label']} | {row['validation']:.3f} | {_score(row['items'])} | {by_task} |")
    return lines


def _search_table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "## Searches",
        "",
        f"| search | seed | numbers | cost | seconds | winner | validation | test | {' | '.join(TASKS)} |",
        "| --- | ---: | ---: | ---: | ---: | --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for arm, title in ARMS.items():
        for row in rows:
            if row["arm"] == arm:
                winner = row["label"] if row["origin"] in ("hand", "parent", "mean") else "a candidate"
                by_task = " | ".join(f"{row['test_metrics'][task]:.2f}" for task in TASKS)
                lines.append(
                    f"| {title} | {row['seed']} | {row['genes']} | {row['cost']:,} | {row['seconds']:.0f} | "
                    f"{winner} | {row['validation']:.3f} | {_score(row['items'])} | {by_task} |"
                )
    return lines


def _difference_table(rows: Sequence[Row], references: Sequence[Row]) -> list[str]:
    lines = [
        "## Differences of test scores, paired",
        "",
        "| difference | seed | test | 95 % interval |",
        "| --- | --- | ---: | --- |",
    ]
    pairs, apart = 0, {"above": 0, "below": 0}
    for title, seed, one, other in _pairs(rows, references):
        mean, (low, high) = difference(one, other)
        lines.append(f"| {title} | {seed} | {mean:+.3f} | {low:+.3f} to {high:+.3f} |")
        pairs += seed != _ALL
        apart["above"] += seed != _ALL and low > 0
        apart["below"] += seed != _ALL and high < 0
    return [
        *lines,
        "",
        f"Of {pairs} paired intervals {apart['above']} lie above 0, {apart['below']} below, and",
        f"{pairs - sum(apart.values())} hold it: there these items do not tell the two apart.",
    ]


_ALL = "mean"
Items = Sequence[Sequence[Any]]


def _pairs(rows: Sequence[Row], references: Sequence[Row]) -> list[tuple[str, str, Items, Items]]:
    """(difference, seed or the mean of seeds, items of one, items of the other)."""
    by_arm = {arm: {row["seed"]: row["items"] for row in rows if row["arm"] == arm} for arm in ARMS}
    hands = [row for row in references if row["origin"] == "hand"]
    if hands:
        best = max(hands, key=lambda row: row["validation"])
        name = f"best hand recipe ({best['label']}, chosen on validation)"
        others = {name: dict.fromkeys(range(len(rows)), best["items"])}
    else:
        others = {}
    others[ARMS["cma"]] = by_arm["cma"]
    pairs: list[tuple[str, str, Items, Items]] = []
    for arm, title in ARMS.items():
        for other, items in others.items():
            seeds = sorted(by_arm[arm].keys() & items.keys()) if other != title else []
            text = f"{title} − {other}"
            pairs += [(text, str(seed), by_arm[arm][seed], items[seed]) for seed in seeds]
            if len(seeds) > 1:
                one, against = ([values[seed] for seed in seeds] for values in (by_arm[arm], items))
                pairs.append((text, _ALL, mean_items(one), mean_items(against)))
    return pairs


def mean_items(seeds: Sequence[Items]) -> Items:
    """Each item's mean value over seeds."""
    values = [{(task, item): value for task, item, value in items} for items in seeds]
    return [[*key, statistics.fmean(value[key] for value in values)] for key in values[0]]


def difference(one: Items, other: Items) -> tuple[float, tuple[float, float]]:
    """The mean over tasks of one's lead, and its 95 % interval paired by item."""
    if sorted(map(list, one)) == sorted(map(list, other)):
        return 0.0, (0.0, 0.0)
    lead = _mean(one) - _mean(other)
    return lead, lead_interval(_scores(one), _scores(other), SHARES, lead)


def _score(items: Items) -> str:
    low, high = score_interval(_scores(items), SHARES, _mean(items))
    return f"{_mean(items):.3f} ({low:.3f} to {high:.3f})"


def _mean(items: Items) -> float:
    by_task = [[value for task, _, value in items if task == name] for name in TASKS]
    return statistics.fmean(statistics.fmean(values) for values in by_task)


def _scores(items: Items) -> list[ItemScore]:
    return [ItemScore(task, item, value) for task, item, value in items]


if __name__ == "__main__":
    main()
