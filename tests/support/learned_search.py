"""Learned stages over the toy pool: a quadratic loss of each coefficient, and runs that are broken off."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from evomerge.errors import Paused
from evomerge.evaluation import Evaluation, GradientRequest, Items, ItemScore, Slopes
from evomerge.methods import method
from evomerge.recipes import Filtered, Recipe
from evomerge.search import LearnedOpening, Plan, Stage, Start, Study
from evomerge.spaces.tensor_weights import WEIGHT, TensorWeight, TensorWeightSpace
from evomerge.store import Store, StudyFacts
from tests.support.landscape import uniform
from tests.support.toy import ToyPool, search_file
from tests.support.toy_search import Killed, plan

NAMES = ("self_attn.q_proj.weight", "mlp.up_proj.weight")
STEPS, ITEMS, SHARD = 8, 5, 4


def tensor_space(depth: int = 3, models: tuple[str, str] = ("a", "b")) -> TensorWeightSpace:
    """Two tensors a layer, the embeddings and the final norm, two models."""
    axes = [
        TensorWeight(f"model.layers.{layer}.{text}", text, layer, False, model)
        for layer in range(depth)
        for text in NAMES
        for model in models
    ]
    axes += [TensorWeight("model.embed_tokens.weight", "model.embed_tokens.weight", None, False, models[0])]
    axes += [TensorWeight("model.norm.weight", "model.norm.weight", None, True, models[1])]
    return TensorWeightSpace(method("task_arithmetic"), "base", models, depth, tuple(axes), start_weight=0.5)


def target(tensor: str, source: str) -> float:
    """Where the loss of a coefficient is least."""
    return int(hashlib.sha256(f"{tensor}/{source}".encode()).hexdigest()[:4], 16) / 65536


def weight_of(recipe: Recipe, tensor: str, source: str) -> float:
    """A coefficient read from a recipe by the tensor's full name."""
    mix = recipe.embeddings if "embed" in tensor else recipe.head
    if ".layers." in tensor:
        mix = recipe.layers[int(tensor.split(".")[2])]
    setting = dict(mix.params)[WEIGHT][mix.models.index(source)]  # type: ignore[index]
    number = setting.at(tensor) if isinstance(setting, Filtered) else setting
    assert number is not None
    return number


class Learner(ToyPool):
    """The toy pool, with a quadratic loss of each coefficient that items weigh differently."""

    def __init__(self, fails_at: Sequence[int] = (), **hooks: Callable[[int], None]) -> None:
        super().__init__(**hooks)  # type: ignore[arg-type]
        self.fails_at = fails_at
        self.learned = 0
        self.requests: list[GradientRequest] = []

    def slopes(self, recipe: Recipe, items: Items, request: GradientRequest) -> Evaluation:
        self.requests.append(request)
        self.learned += request.derivatives
        if self.learned in self.fails_at:
            return Evaluation(recipe.id, (), {}, {}, error="the gradient of the loss is not finite")
        partials: dict[tuple[str, str, str], float] = {}
        scores, loss = [], 0.0
        for task, ids in items.items():
            for item in ids:
                scores.append(ItemScore(task, item, 0.5, 0.5, -0.7))
                for axis in tensor_space().axes:
                    off = weight_of(recipe, axis.tensor, axis.source) - target(axis.tensor, axis.source)
                    weight = request.weights[task] * (1 + len(item) % 3)
                    loss += weight * off**2
                    key = (axis.tensor, WEIGHT, axis.source)
                    partials[key] = partials.get(key, 0.0) + 2 * weight * off
        return Evaluation(recipe.id, tuple(scores), {}, {}, slopes=Slopes(loss, partials))

    def answers(self, recipe: Recipe, items: Items) -> Evaluation:
        """The recipe's own scores, and an answer to each item that names both; to one item in six none."""
        scored = self.evaluate(recipe, items)
        answers = tuple(
            None if uniform("none", s.item) < 1 / 6 else f"{recipe.id} of {s.item}" for s in scored.items
        )
        return replace(scored, answers=answers)


def learned_plan(**changes: Any) -> Plan:
    """A search of one learned stage."""
    given = {"steps": STEPS, "rate": 0.2, "items": ITEMS, "shard": SHARD} | changes
    opening = LearnedOpening(tensor_space(), **given)

    def open_stage(start: Start) -> LearnedOpening:
        return opening

    return Plan(
        **{
            **{name: getattr(plan(), name) for name in Plan.__dataclass_fields__},
            "stages": (Stage("learned", given["steps"], open_stage),),
        }
    )


def run(file: Path, pool: Any, of: Plan | None = None, budget: int | None = None) -> str:
    """One process' life; how it ended.

    pool: a toy pool that counts its slopes in `learned`. of: the search; one learned stage unless given.
    budget: slopes after which there is nothing left of it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with Store.open(file, write=True) as store:
        if store.study() is None:
            store.begin("trial", 5, "study: trial\n", {}, StudyFacts())
        study = Study(of or learned_plan(), store, pool)
        if budget is not None:

            def exhausted() -> str | None:
                return "the budget of 1 h is used up" if pool.learned >= budget else None

            study.dispatch.exhausted_budget = exhausted  # type: ignore[method-assign]
        pool.study = study
        try:
            study.run()
        except Killed:
            return "killed"
        except Paused:
            return "paused"
    return "done"


def learned_file(folder: Path, study: str, stage: dict[str, Any] | None = None, **more: Any) -> Path:
    """A search file of one learned stage of the zoo in float32: 3 steps of 6 items of each task."""
    file = search_file(folder, study)
    document = json.loads(file.read_text())
    del document["search"]["evaluations"], document["search"]["population"], document["search"]["sigma"]
    stages = [{"stage": "learned", "steps": 3, "items": 6} | (stage or {})]
    file.write_text(json.dumps(document | {"stages": stages, "out_dtype": "float32"} | more, indent=1))
    return file
