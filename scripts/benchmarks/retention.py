"""Measures what a weight for each row learns, and what it forgets, with and without retention.

    python scripts/benchmarks/retention.py [--seeds 3] [--arms NAME ...] [--out results/retention.md]

For each seed a learned stage by tensors gives the coarse merge; from it each arm learns one weight a row.
Asked are the demo's four tasks (test items, once for each arm's winner). Unasked are skills of the base that
no task has: letters to be said again, words to be said again, look-ups in English; of each 300 test items
that no model was trained on and no text retains, right where the whole answer with its end is the likeliest.
Texts to be retained are drawn from the training split of what the base was trained on. Each run is one JSON
line of --log; runs that are there already are not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import machine
import yaml

from evomerge.config import Config, loading
from evomerge.evaluation import FORWARDS_OF_A_SLOPE, ROLES
from evomerge.evaluation.lm_harness.harness import LmHarness
from evomerge.evaluation.lm_harness.task_loading import TaskSpec
from evomerge.launch.objective import per_generation
from evomerge.launch.opening import Opened, open_search
from evomerge.launch.stages import open_stages
from evomerge.recipes import Recipe
from evomerge.search import Plan, Study
from evomerge.spaces import Baseline, baselines
from evomerge.store import Store, StudyFacts
from evomerge.workers import InProcessPool
from evomerge.workers.worker import Worker
from scripts.zoo import skills
from scripts.zoo.make_evaluators import FORCED, YAML, answered
from scripts.zoo.plan import BASE

REPOSITORY = Path(__file__).resolve().parents[2]
UNASKED = ("copy_letters", "copy_words", "lookup")
UNASKED_ITEMS, ITEMS, COARSE_STEPS = 300, 30, 40
REFERENCES = {"base": "the base", "task arithmetic 1": "all task vectors added"}
COARSE = "tensor, 164 weights: the coarse merge"
LETTERS = ("copy_letters", "letters")


@dataclass(frozen=True, slots=True)
class Arm:
    """A learned stage by rows.

    about: in the table; texts: of which kind, '' for none; count: of them; stage: its settings beside genome
    and items.
    """

    about: str
    texts: str = ""
    count: int = 0
    stage: Mapping[str, Any] = field(default_factory=dict)


def _arm(texts: str, weight: float, count: int = 4096, items: int = 128, **stage: Any) -> Arm:
    """An arm that retains texts."""
    about = f"{count:,} {texts}, {items} a step, weight {weight:g}"
    about += "".join(f", {name} {value}" for name, value in stage.items())
    return Arm(about, texts, count, {"retain_weight": weight, "retain_items": items, **stage})


PROMPTS, ANSWERED = "prompts", "prompts with answers"
OTHERS = "prompts with answers, none of letters"
UNASKED_ALONE = "prompts with answers of unasked skills"
EVEN = "prompts with answers of unasked skills in equal numbers"
ARMS: dict[str, Arm] = {
    "free": Arm("nothing retained"),
    "prompts 10": _arm(PROMPTS, 10.0),
    "few 3": _arm(ANSWERED, 3.0, 512, 64),
    "few 10": _arm(ANSWERED, 10.0, 512, 64),
    "few base 3": _arm(ANSWERED, 3.0, 512, 64, teacher="base"),
    "answered 3": _arm(ANSWERED, 3.0),
    "answered 10": _arm(ANSWERED, 10.0),
    "base 3": _arm(ANSWERED, 3.0, teacher="base"),
    "base 10": _arm(ANSWERED, 10.0, teacher="base"),
    "others 10": _arm(OTHERS, 10.0),
    "unasked base 10": _arm(UNASKED_ALONE, 10.0, teacher="base"),
    "even base 3": _arm(EVEN, 3.0, teacher="base"),
    "even 3": _arm(EVEN, 3.0),
    "trust .3": Arm("no text, trust .3", stage={"trust": 0.3}),
    "decay .3": Arm("no text, decay .3", stage={"decay": 0.3}),
}


NOTES = (
    "Asked: mean of the demo's four tasks on 3,903 test items. Unasked: 300 test items each; in brackets the "
    "difference from the coarse merge of the same seed, from which every row begins. Item forwards are "
    "those of the stage alone, a scored item or text with its derivatives counted as three.",
    "Texts are of the training split, so that none is a test item. 'prompts with answers' are the base's own "
    "training mix: 66 % look-ups, 14 % words and 8 % letters to be said again, 10 % letters to be sorted or "
    "reversed, 2 % sums. 'of unasked skills' leaves the last two out, which the four tasks ask for; in equal "
    "numbers they hold 61 % of the prompts of letters to be said again that are in that split. "
    "The teacher is the coarse merge unless named.",
    "Arms with one seed were tried one after the other, later ones once the figures of earlier ones were "
    "known: what they show is what can be had, not what to expect of another zoo.",
)


def write_texts(file: Path, kind: str, count: int, seed: int) -> None:
    """Draws texts of the base's own training mix from the training split, a line each."""
    rng = Random(f"retain/{kind}/{seed}")
    mix = [(name, share) for name, share in BASE.skills if kind != OTHERS or name not in LETTERS]
    if kind in (UNASKED_ALONE, EVEN):
        mix = [(name, 1.0 if kind == EVEN else share) for name, share in BASE.skills if name in UNASKED]
    names, shares = [name for name, _ in mix], [share for _, share in mix]
    lines: dict[str, None] = {}
    for _ in range(100 * count):
        prompt, answer = skills.draw(rng.choices(names, shares)[0], rng, "train")
        lines[prompt if kind == PROMPTS else prompt + answer] = None
        if len(lines) == count:
            break
    file.write_text("\n".join(lines) + "\n")


def unasked_tasks(folder: Path, tokenizer: Any) -> LmHarness:
    """The unasked skills as lm-eval tasks."""
    for name in UNASKED:
        text = YAML.format(about=f"{name}, asked by no task.", task=f"unasked_{name}", scoring=FORCED)
        text = text.replace("evaluators/zoo/", f"{folder}/")
        (folder / f"unasked_{name}.yaml").write_text(text)
        for split, count in (("search", 5), ("validation", 5), ("test", UNASKED_ITEMS)):
            items = skills.distinct(name, count, split)  # type: ignore[arg-type]
            lines = (json.dumps(answered(*item)) + "\n" for item in items)
            (folder / f"unasked_{name}.{split}.jsonl").write_text("".join(lines))
    specs = [TaskSpec(f"unasked_{name}", splits="declared") for name in UNASKED]
    return LmHarness(specs, tokenizer, include=[folder], batch_size=256)


def settings_of(folder: Path, seed: int, stage: Mapping[str, Any], **more: Any) -> Config:
    """A search of the demo's models and tasks with one learned stage."""
    document = yaml.safe_load((REPOSITORY / "search_spaces" / "demo.yaml").read_text())
    document |= {"study": "retention", "search": {"seed": seed}, "stages": [dict(stage)], **more}
    document["models"] = {name: str(REPOSITORY / path) for name, path in document["models"].items()}
    file = folder / "retention.yaml"
    file.write_text(yaml.safe_dump(document))
    settings, _ = loading.load(str(file))
    return settings


def learn(opened: Opened, worker: Worker, references: list[Baseline], folder: Path) -> dict[str, Any]:
    """Runs one study from the best of the references; its winner and what it took."""
    settings = opened.settings
    facts = StudyFacts(diagonal=False, budgets=settings.budgets)
    plan = Plan(
        stages=open_stages(settings, opened.space, opened.parents, facts),
        baselines=references,
        objective=opened.objective,
        items={role: opened.harness.items(role) for role in ROLES},
        per_generation=per_generation(settings, opened.objective),
        finalists=settings.search.finalists,
        seed=settings.search.seed,
    )
    started = time.perf_counter()
    with Store.open(folder / "study.db", write=True) as store:
        store.begin("retention", settings.search.seed, "", {}, facts)
        outcome = Study(plan, store, InProcessPool(worker)).run()
        steps = [trial for trial in store.trials() if trial.origin == "learned"]
        recipe = store.recipe(str(outcome.best["recipe"]))
    return {
        "recipe": recipe.canonical(),
        "genes": len(steps[0].genome or ()),
        "steps": len(steps),
        "test": outcome.best["test"],
        "validation": outcome.best["validation"],
        "label": outcome.best.get("label"),
        "seconds": time.perf_counter() - started,
    }


def unasked(worker: Worker, harness: LmHarness, recipe: Recipe) -> dict[str, float]:
    """Skill -> share of right answers."""
    asked, worker.evaluator = worker.evaluator, harness
    try:
        evaluation = worker.evaluate(recipe, harness.items("test"))
    finally:
        worker.evaluator = asked
    assert evaluation.error is None, evaluation.error
    return {name: evaluation.metrics[f"unasked_{name}"] for name in UNASKED}


def tokenizer_of(opened: Opened) -> Any:
    """The tokenizer of the models."""
    return opened.harness.tokenizer  # type: ignore[attr-defined]


class Runs:
    """Makes runs and keeps a JSON line of each."""

    def __init__(self, log: Path, steps: int) -> None:
        self.log, self.steps = log, steps
        self.rows: list[dict[str, Any]] = []
        if log.is_file():
            self.rows = [json.loads(line) for line in log.read_text().splitlines()]
        self._folder = Path(tempfile.mkdtemp(prefix="retention-"))
        self._harness: LmHarness | None = None

    def find(self, arm: str, seed: int) -> dict[str, Any] | None:
        """A run that is there already."""
        found = (r for r in self.rows if (r["arm"], r["seed"], r["asked_steps"]) == (arm, seed, self.steps))
        return next(found, None)

    def reference(self, label: str) -> None:
        """Scores the base or a hand recipe on all test items."""
        if any(row["arm"] == label for row in self.rows):
            return
        opened = open_search(settings_of(self._folder, 0, {"stage": "learned"}))
        worker = opened.load()
        recipe = next(b.recipe for b in baselines(opened.space) if b.label == label)
        asked = worker.evaluate(recipe, opened.harness.items("test"))
        self._harness = self._harness or unasked_tasks(self._folder, tokenizer_of(opened))
        row = {"arm": label, "seed": 0, "asked_steps": 0, "cost": 0}
        row |= {
            "test": opened.objective.reported_score(asked),
            "unasked": unasked(worker, self._harness, recipe),
        }
        self._add(row)

    def coarse(self, seed: int) -> dict[str, Any]:
        """The merge by tensors, from the best parent or hand recipe."""
        steps, self.steps = self.steps, COARSE_STEPS
        found = self.find("coarse", seed)
        if found is None:
            settings = settings_of(
                self._folder, seed, {"stage": "learned", "steps": COARSE_STEPS, "items": ITEMS}
            )
            found = self._run("coarse", seed, settings, None)
        self.steps = steps
        return found

    def row(self, name: str, seed: int) -> dict[str, Any]:
        """An arm by rows, from the coarse merge."""
        found = self.find(name, seed)
        if found is not None:
            return found
        start = Recipe.from_json(self.coarse(seed)["recipe"])
        arm = ARMS[name]
        stage = {"stage": "learned", "genome": "row", "steps": self.steps, "items": ITEMS, **arm.stage}
        more: dict[str, Any] = {}
        if arm.texts:
            file = self._folder / f"{name.replace(' ', '-')}-{seed}.txt"
            write_texts(file, arm.texts, arm.count, seed)
            stage["retain"] = str(file)
        else:
            more["keep"] = {"zoo_arithmetic": 1.0}
        return self._run(name, seed, settings_of(self._folder, seed, stage, **more), start)

    def _run(self, name: str, seed: int, settings: Config, start: Recipe | None) -> dict[str, Any]:
        opened = open_search(settings)
        worker = opened.load()
        references = baselines(opened.space)
        if start is not None:  # `keep` compares with the parents
            references = [b for b in references if b.origin == "parent" and settings.keep]
            references.append(Baseline("coarse", "hand", start))
        self._harness = self._harness or unasked_tasks(self._folder, tokenizer_of(opened))
        folder = self._folder / f"{name}-{seed}-{self.steps}".replace(" ", "-")
        folder.mkdir()
        row = learn(opened, worker, references, folder)
        row |= {"arm": name, "seed": seed, "asked_steps": self.steps, "cost": _cost(settings, self.steps)}
        row["unasked"] = unasked(worker, self._harness, Recipe.from_json(row["recipe"]))
        if name != "coarse":
            del row["recipe"]
        return self._add(row)

    def _add(self, row: dict[str, Any]) -> dict[str, Any]:
        self.rows.append(row)
        with self.log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps({key: value for key, value in row.items() if key != "recipe"}), flush=True)
        return row


def _cost(settings: Config, steps: int) -> int:
    """Item forwards of a stage, texts among them."""
    stage = settings.stages[0]
    texts = 0 if stage.retain is None else stage.retain_items or 64
    return FORWARDS_OF_A_SLOPE * steps * (ITEMS * len(settings.tasks) + texts)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A row for each arm and number of steps: means over the seeds, in brackets what differs from coarse."""
    coarse = {row["seed"]: row for row in rows if row["arm"] == "coarse"}
    lines = [
        "| genome and retention | steps | seeds | item forwards | asked, test | "
        + " | ".join(UNASKED)
        + " |",
        "| --- | ---: | ---: | ---: | --- |" + " --- |" * len(UNASKED),
    ]
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for name in (*REFERENCES, "coarse", *ARMS):
        for row in rows:
            if row["arm"] == name:
                found.setdefault((name, row["asked_steps"]), []).append(row)
    for (name, steps), own in found.items():
        about = f"row: {ARMS[name].about}" if name in ARMS else REFERENCES.get(name, COARSE)
        cells = [about, str(steps), str(len(own)), f"{own[0]['cost']:,}", _spread([r["test"] for r in own])]
        for skill in UNASKED:
            lost = statistics.fmean(r["unasked"][skill] - coarse[r["seed"]]["unasked"][skill] for r in own)
            difference = f" ({lost:+.3f})" if name in ARMS else ""
            cells.append(_spread([r["unasked"][skill] for r in own]) + difference)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--log", type=Path, default=Path("retention.jsonl"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    runs = Runs(args.log, args.steps)
    for label in REFERENCES:
        runs.reference(label)
    for name in args.arms:
        for seed in range(args.seeds):
            runs.row(name, seed)
    lines = [
        "# What a weight for each row learns and forgets",
        "",
        f"By `scripts/benchmarks/retention.py`; {machine.stamp('torch', 'transformers', 'lm-eval')}.",
        "",
        *table(runs.rows),
        "",
        *(line for note in NOTES for line in (note, "")),
    ]
    text = "\n".join(lines)
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
