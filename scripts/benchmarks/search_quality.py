"""The quality of searches at equal cost: test scores against item forwards, on two zoos and five seeds.

    python scripts/zoo/make_zoo.py
    python scripts/zoo/make_zoo.py --zoo second --seed 2 --out results/zoo_second
    python scripts/benchmarks/search_quality.py [--zoos first second] [--arms ...] [--seeds 5] [--out FILE]

Each row is a whole study of one arm, seed and budget, appended to FILE.jsonl as it is measured: a run that
was cut goes on from there, and `--report` only writes the table. Cost is what the candidates cost in item
forwards, a scored item with its gradient counted as three; parents, hand recipes and the choice on validation
items are the same for all arms and not counted. Test items are used once a study, for its winner. Optuna's
optimizers run in the engine's own search, on the same genome and items, where `optuna` is installed. A zoo
trained on another kind of processor has other weights: its rows are told apart by a digest of the zoo.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import evomerge as em
from evomerge.evaluation import FORWARDS_OF_A_SLOPE
from evomerge.launch.opening import open_search
from evomerge.optimizers import OPTIMIZERS, OptimizerEntry, OptimizerSettings
from evomerge.optimizers.base import Array
from evomerge.optimizers.cma_es import CmaEs
from evomerge.reports.stages import stage_rows
from evomerge.spaces import WeightSpace
from evomerge.store import Store
from scripts.benchmarks import machine

REPO = Path(__file__).resolve().parents[2]
TASKS = ("zoo_arithmetic", "zoo_lookup", "zoo_string", "zoo_cross")
ITEMS, STEP_ITEMS, POPULATION = 60, 30, 24  # items of a task for a candidate and for a step
NO_DIGEST = "another machine's"  # stands in for the digest that the oldest rows lack
FEW_ITEMS, TRAINING_ITEMS = 16, 200  # labelled items of a task, and how many they are drawn from
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # two-sided quantiles of Student's t, by number of seeds
ZOOS = {
    "first": ("results/zoo", ("math", "lang", "string")),
    "second": ("results/zoo_second", ("symbols", "second", "copies")),
}
Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Arm:
    """A way to search.

    Attributes:
        title: What the table calls it.
        budgets: Item forwards that it is given.
        change: Turns the demo's search file into the arm's, for a budget.
        needs: A package that it cannot do without.
        before: Runs a search that the arm's own begins at, in the same folder of studies, and gives what it
            cost; None for an arm of one search.
    """

    title: str
    budgets: tuple[int, ...]
    change: Callable[[Document, int], None]
    needs: str = ""
    before: Callable[[Document, int, Path], int] | None = None


# ---- Optuna's samplers as optimizers of the engine ---------------------------------------------------------


class OptunaOptimizer:
    """A sampler of Optuna, asked for a generation at a time in the unit cube of the values' ranges."""

    def __init__(self, sampler: str, start: Sequence[float], settings: OptimizerSettings) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._size, self._population = len(start), settings.population or POPULATION
        names = [f"g{i}" for i in range(self._size)]
        self._ranges = {name: optuna.distributions.FloatDistribution(0.001, 0.999) for name in names}
        made = (
            optuna.samplers.TPESampler(seed=settings.seed, constant_liar=True, multivariate=True)
            if sampler == "tpe"
            else optuna.samplers.CmaEsSampler(
                seed=settings.seed, popsize=self._population, x0=dict.fromkeys(names, 0.5)
            )
        )
        self._study = optuna.create_study(direction="maximize", sampler=made)
        self._asked: list[list[Any]] = []
        self._best: tuple[float, Array] = (-math.inf, np.zeros(self._size))

    def ask(self) -> Array:
        trials = [self._study.ask(self._ranges) for _ in range(self._population)]
        self._asked.append(trials)
        units = np.array([[trial.params[name] for name in self._ranges] for trial in trials])
        return np.asarray(np.round(np.log(units / (1 - units)) / 4 * 2**14) / 2**14)

    def inject(self, genomes: Sequence[Sequence[float]]) -> None:
        """Optuna has no injection of samples."""

    def tell(self, genomes: Array, scores: list[float | None]) -> list[int]:
        for trial, genome, score in zip(self._asked.pop(0), genomes, scores, strict=True):
            self._study.tell(trial, -1.0 if score is None else score)
            if score is not None and score > self._best[0]:
                self._best = (score, genome)
        return []

    @property
    def mu(self) -> int:
        return 0

    @property
    def mean(self) -> Array:
        """The best so far, which Optuna would call its result."""
        return np.asarray(self._best[1])


def _register(name: str, title: str, make: Callable[[Sequence[float], OptimizerSettings], Any]) -> None:
    OPTIMIZERS[name] = OptimizerEntry(name, title, title, make, takes_categories=False, takes_numbers=True)


_register("optuna_cma", "Optuna's CMA-ES", lambda start, s: OptunaOptimizer("cma", start, s))
_register("optuna_tpe", "Optuna's TPE", lambda start, s: OptunaOptimizer("tpe", start, s))


# ---- the arms ----------------------------------------------------------------------------------------------


def evaluations(budget: int) -> int:
    return budget // (ITEMS * len(TASKS))


def demo(document: Document, budget: int) -> None:
    document["search"]["evaluations"] = evaluations(budget)


def optimizer(name: str) -> Callable[[Document, int], None]:
    def change(document: Document, budget: int) -> None:
        demo(document, budget)
        document["search"]["optimizer"] = name

    return change


def published(document: Document, budget: int) -> None:
    """arXiv:2403.13187: DARE-TIES, weight and density by layer and model, Optuna's CMA-ES at its defaults."""
    optimizer("optuna_cma")(document, budget)
    document["method"] = "dare_ties"
    weight = {"low": 0.0, "high": 1.0, "start": 0.5}
    density = {"low": 0.001, "high": 1.0, "start": 0.5}
    document["space"] = {
        "groups": 6,
        "components": ["mlp"],
        "parameters": {"weight": weight, "density": density},
    }
    document["search"]["population"] = 4 + int(3 * math.log(48))


def race(document: Document, budget: int) -> None:
    demo(document, 2 * budget)  # a race spends about half of it; the cost that is shown is what it spent
    document["search"]["race"] = {}


def fine_after_coarse(document: Document, budget: int) -> None:
    """The second half of a coarse-to-fine search, which begins where `coarse_first` ended."""
    optimizer("coarse_to_fine")(document, budget // 2)


def coarse_first(document: Document, budget: int, root: Path) -> int:
    """Searches one weight a model and component, and has the fine search begin at its winner; its cost."""
    coarse = json.loads(json.dumps(document))
    demo(coarse, budget // 2)
    coarse["study"] += "-coarse"
    coarse["space"]["groups"] = 1
    coarse["search"]["population"] = 12
    view = run(coarse, root)
    with Store.open(root / coarse["study"] / "study.db") as store:
        winner = store.recipe(store.trial(view["id"]).recipe_id)
    fine: WeightSpace = open_search(em.load(document).effective_settings).space
    start = fine.encode(winner)
    assert start is not None

    def make(_: Sequence[float], settings: OptimizerSettings) -> CmaEs:
        return CmaEs.from_settings(start, settings)

    _register("coarse_to_fine", "coarse-to-fine CMA-ES", make)
    return int(view["cost"])


def learned(genome: str, rate: float = 0.05, items: int = STEP_ITEMS) -> Callable[[Document, int], None]:
    def change(document: Document, budget: int) -> None:
        steps = budget // (FORWARDS_OF_A_SLOPE * items * len(TASKS))
        stage = {"stage": "learned", "genome": genome, "steps": steps, "items": items, "rate": rate}
        document["stages"] = [stage]
        for key in ("evaluations", "population", "sigma"):
            del document["search"][key]

    return change


def learned_then_evolved(document: Document, budget: int) -> None:
    learned("tensor")(document, LEARNED_FIRST)
    rest = evaluations(budget - LEARNED_FIRST)
    weights = {"stage": "weights", "evaluations": rest, "population": POPULATION, "sigma": 0.03}
    document["stages"].append(weights)


def few_labels(genome: str) -> Callable[[Document, int], None]:
    """16 labelled items of each task to learn from, drawn by the seed."""

    def change(document: Document, budget: int) -> None:
        steps = budget // (FORWARDS_OF_A_SLOPE * FEW_ITEMS * len(TASKS))
        learned(genome)(document, budget)
        document["stages"][0] |= {"items": FEW_ITEMS, "steps": steps}
        document["evaluation"]["search"] = FEW_ITEMS
        document["evaluation"]["items"] = FEW_ITEMS
        draw = np.random.default_rng(document["search"]["seed"])
        for task in document["tasks"]:
            numbers = draw.choice(TRAINING_ITEMS, FEW_ITEMS, replace=False)
            task["items"] = {"search": sorted(map(int, numbers))}

    return change


def experts(genome: str) -> Callable[[Document, int], None]:
    """No right answers: each task's own expert is its teacher, and the cross task is left out of the loss."""

    def change(document: Document, budget: int) -> None:
        steps = budget // (FORWARDS_OF_A_SLOPE * STEP_ITEMS * 3)  # three tasks have an expert
        learned(genome)(document, budget)
        teachers = EXPERTS[tuple(document["models"])[1:]]
        labels = dict(zip(TASKS, (*teachers, "none"), strict=True))
        document["stages"][0] |= {"labels": labels, "steps": steps}

    return change


EXPERTS = {
    ("math", "lang", "string"): ("math", "lang", "string"),
    ("symbols", "second", "copies"): ("symbols", "second", "symbols"),
}
"""Models of a zoo -> the experts of arithmetic, look-ups and letters."""
LEARNED_FIRST = 14_400
FEW, EXPERT_LABELS = 11_520, 27_000
SMALL, MIDDLE, HALF, LARGE = 4_680, 39_960, 115_200, 230_400
ARMS: dict[str, Arm] = {
    "demo": Arm("CMA-ES, 20 weights (the demo)", (SMALL, MIDDLE, HALF, LARGE), demo),
    "published": Arm("published: DARE-TIES, Optuna's CMA-ES", (MIDDLE, HALF), published, "optuna"),
    "optuna_cma": Arm("Optuna's CMA-ES, 20 weights", (MIDDLE, HALF), optimizer("optuna_cma"), "optuna"),
    "optuna_tpe": Arm("Optuna's TPE, 20 weights", (MIDDLE, HALF), optimizer("optuna_tpe"), "optuna"),
    "random": Arm("random, 20 weights", (MIDDLE, HALF), optimizer("random")),
    "race": Arm("CMA-ES raced, 20 weights", (MIDDLE, HALF), race),
    "coarse": Arm(
        "CMA-ES, coarse to fine, 8 then 20 weights", (MIDDLE, HALF), fine_after_coarse, "", coarse_first
    ),
    "space": Arm("learned, the space's axes", (SMALL, MIDDLE), learned("space")),
    "layer_component": Arm("learned, layer × component", (SMALL, MIDDLE), learned("layer_component")),
    "tensor": Arm("learned, tensor", (SMALL, LEARNED_FIRST, MIDDLE), learned("tensor")),
    "faster": Arm("learned, tensor, rate .1", (SMALL, LEARNED_FIRST, MIDDLE), learned("tensor", 0.1)),
    "smaller": Arm("learned, tensor, rate .1, 15 items a step", (SMALL,), learned("tensor", 0.1, 15)),
    "then": Arm("learned, tensor, then CMA-ES", (MIDDLE, HALF), learned_then_evolved),
    "few_space": Arm("learned from 16 items a task, the space's axes", (FEW,), few_labels("space")),
    "few_tensor": Arm("learned from 16 items a task, tensor", (FEW,), few_labels("tensor")),
    "experts_space": Arm(
        "learned, experts' answers as labels, the space's axes", (EXPERT_LABELS,), experts("space")
    ),
    "experts_tensor": Arm("learned, experts' answers as labels, tensor", (EXPERT_LABELS,), experts("tensor")),
}


# ---- running -----------------------------------------------------------------------------------------------


def document_of(zoo: str, name: str, seed: int) -> Document:
    """The demo's search file for a zoo."""
    document: Document = yaml.safe_load((REPO / "search_spaces" / "demo-evolution.yaml").read_text())
    folder, experts = ZOOS[zoo]
    document["models"] = {model: str(REPO / folder / model) for model in ("base", *experts)}
    document["study"] = name
    document["search"]["seed"] = seed
    return document


def run(document: Document, root: Path) -> dict[str, Any]:
    """Runs a study, or goes on with it; its best candidate, with the cost of the search."""
    em.run(document, root=root, resume=True)
    with Store.open(root / document["study"] / "study.db") as store:
        study = store.study()
        assert study is not None
        assert study.outcome is not None
        rows = stage_rows(store)
        searched = [t for t in store.trials() if t.generation > 0 and t.origin != "mean"]
        found = {
            "genes": rows[-1]["genes"],
            "cost": sum(row["item_forwards"] for row in rows),
            "seconds": round(sum(sum(t.seconds.values()) for t in searched), 1),
        }
        return found | study.outcome.best


def references(zoo: str, root: Path) -> str:
    """A study whose parents and hand recipes are scored; its name, for others to reuse."""
    name = f"references-{zoo}"
    file = root / name / "study.db"
    if file.is_file():
        with Store.open(file) as store:
            study = store.study()
            if study is not None and study.state == "done":
                return name
    document = document_of(zoo, name, 0)
    document["search"] |= {"evaluations": 4, "population": 4}
    run(document, root)
    return name


def measure(zoo: str, arm: str, budget: int, seed: int, root: Path) -> dict[str, Any]:
    """Runs the study of one row."""
    document = document_of(zoo, f"{zoo}-{arm}-{budget}-{seed}", seed)
    document["reuse"] = [references(zoo, root)]
    before = ARMS[arm].before
    cost = 0 if before is None else before(document, budget, root)
    ARMS[arm].change(document, budget)
    row = run(document, root)
    return row | {"cost": cost + row["cost"]}


def digest(zoo: str) -> str:
    """Identifies the weights of a zoo; '' where it was not made."""
    folder, experts = ZOOS[zoo]
    files = [REPO / folder / model / "model.safetensors" for model in ("base", *experts)]
    if not all(file.is_file() for file in files):
        return ""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def rows_of(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text().splitlines() if file.is_file() else []
    return [{"digest": NO_DIGEST} | json.loads(line) for line in lines]


def wanted(args: argparse.Namespace) -> list[tuple[str, str, int, int]]:
    """(zoo, arm, budget, seed) of the rows that are asked for, seeds in the outer loop."""
    return [
        (zoo, arm, budget, seed)
        for seed in range(args.seeds)
        for zoo in args.zoos
        for arm in args.arms
        for budget in ARMS[arm].budgets
        if args.least <= budget <= args.most
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zoos", nargs="+", choices=list(ZOOS), default=list(ZOOS))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--least", type=int, default=0, help="smallest budget that is run")
    parser.add_argument("--most", type=int, default=LARGE, help="largest budget that is run")
    parser.add_argument("--root", type=Path, default=REPO / "results" / "search_quality")
    parser.add_argument("--out", type=Path, default=REPO / "results" / "search_quality.md")
    parser.add_argument("--report", action="store_true", help="write the table of the rows that are there")
    args = parser.parse_args()
    raw = args.out.with_suffix(".jsonl")
    digests = {zoo: digest(zoo) for zoo in args.zoos}
    done = {
        (row["zoo"], row["arm"], row["budget"], row["seed"])
        for row in rows_of(raw)
        if row["digest"] == digests.get(row["zoo"])
    }
    for zoo, arm, budget, seed in [] if args.report else wanted(args):
        if (zoo, arm, budget, seed) in done:
            continue
        if ARMS[arm].needs and importlib.util.find_spec(ARMS[arm].needs) is None:
            print(f"{arm} left out: {ARMS[arm].needs} is not installed", flush=True)
            continue
        row = {"zoo": zoo, "digest": digests[zoo], "arm": arm, "budget": budget, "seed": seed}
        row |= {"commit": machine.commit()}
        row |= measure(zoo, arm, budget, seed, args.root)
        with raw.open("a") as file:
            file.write(json.dumps(row, default=str) + "\n")
        print(zoo, arm, budget, seed, f"test {row['test']:.3f} for {row['cost']:,}", flush=True)
    args.out.write_text(report(rows_of(raw)))


# ---- the report --------------------------------------------------------------------------------------------


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """The text of results/search_quality.md."""
    lines = [
        "# The quality of searches at equal cost",
        "",
        "By `python scripts/benchmarks/search_quality.py`, rows in `search_quality.jsonl`;",
        f"{machine.stamp('torch', 'transformers', 'lm-eval', 'cma')}.",
        "",
        "Test score of the winner (mean of four tasks, items used once a study), mean over seeds with half",
        "of a 95 % interval over them (Student's t); cost in item forwards, a scored item with its gradient",
        "counted as three. Every arm's winner is chosen on the same validation items among its own",
        "finalists, parents and hand recipes: arms that found nothing better have the score of the best hand",
        "recipe. Rates are .05 where not said; .1 is the default, chosen on validation items.",
        "The 16 labelled items of a task are others with each seed. mergekit-evolve was not run: its",
        "environment needs patches to run on a CPU.",
    ]
    trained = dict.fromkeys((row["zoo"], row["digest"]) for row in rows)
    for zoo, weights in sorted(trained, key=lambda pair: (pair[0], pair[1] == NO_DIGEST)):
        own = [row for row in rows if (row["zoo"], row["digest"]) == (zoo, weights)]
        title = f"## The {zoo} zoo, {weights if weights == NO_DIGEST else f'weights {weights}'}"
        lines += ["", title, "", *_table(own), "", *_verdicts(own)]
    return "\n".join(lines) + "\n"


def _mean(rows: Sequence[Mapping[str, Any]], arm: str, budget: int) -> float | None:
    tests = [row["test"] for row in rows if row["arm"] == arm and row["budget"] == budget]
    return statistics.fmean(tests) if tests else None


def _verdicts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the project set out to reach on its first zoo, each line with the figure found."""
    evolution = _mean(rows, "demo", LARGE)
    goals = [
        ("tensor", SMALL, evolution, f"what CMA-ES has after {LARGE:,}"),
        ("faster", SMALL, evolution, f"what CMA-ES has after {LARGE:,}"),
        ("smaller", SMALL, evolution, f"what CMA-ES has after {LARGE:,}"),
        ("tensor", MIDDLE, 0.75, "a weight for each tensor"),
        ("faster", MIDDLE, 0.75, "a weight for each tensor"),
        ("few_space", FEW, 0.67, "16 labelled items a task"),
        ("experts_space", EXPERT_LABELS, 0.66, "experts' answers as labels"),
        ("experts_tensor", EXPERT_LABELS, 0.66, "experts' answers as labels"),
    ]
    lines = []
    for arm, budget, goal, text in goals:
        found = _mean(rows, arm, budget)
        if found is not None and goal is not None:
            verdict = "holds" if found >= goal else "does not hold"
            what = f"{ARMS[arm].title}, {budget:,} item forwards"
            lines.append(f"- {verdict}: {what}: {found:.3f}, goal {goal:.3f} ({text})")
    return lines


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| search | genes | budget | cost | seeds | validation | test | by seed |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for name, arm in ARMS.items():
        for budget in arm.budgets:
            own = [row for row in rows if row["arm"] == name and row["budget"] == budget]
            if own:
                lines.append(_row(arm.title, budget, sorted(own, key=lambda row: row["seed"])))
    return lines


def _row(title: str, budget: int, rows: Sequence[Mapping[str, Any]]) -> str:
    tests = [row["test"] for row in rows]
    spread = ""
    if len(tests) in T_95:
        spread = f" ± {T_95[len(tests)] * statistics.stdev(tests) / math.sqrt(len(tests)):.3f}"
    cells = [
        title,
        f"{rows[0]['genes']}",
        f"{budget:,}",
        f"{statistics.fmean(row['cost'] for row in rows):,.0f}",
        f"{len(rows)}",
        f"{statistics.fmean(row['validation'] for row in rows):.3f}",
        f"{statistics.fmean(tests):.3f}{spread}",
        " ".join(f"{test:.3f}" for test in tests),
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
