"""lm-eval itself on the checkpoint of a scaled route gives the scores of the live route."""

from __future__ import annotations

import math
from pathlib import Path

import lm_eval
import pytest
import torch
from lm_eval.tasks import TaskManager

from evomerge.checkpoints import Checkpoint
from evomerge.evaluation.lm_harness.harness import LmHarness
from evomerge.evaluation.lm_harness.task_loading import TaskSpec
from evomerge.export import route_checkpoint
from evomerge.merging import model_loading
from evomerge.merging.model_loading import load_tokenizer
from evomerge.merging.routing.routed_model import Hop, RoutedModel, gains
from tests.support.equality_oracle import item_id
from tests.support.sweeps import sweep
from tests.support.toy import REPO, zoo_folder

TASKS, LIMIT = {"zoo_lookup": "acc", "zoo_arithmetic": "exact_match"}, 24
SCALES = (1.0, 0.9, 1.1, 1.05, 0.95)


def lm_eval_itself(
    folder: Path, dtype: str
) -> tuple[dict[str, float], dict[tuple[str, str], list[float | str]]]:
    """(task -> metric, (task, item) -> responses) of what `lm_eval run` calls."""
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": dtype},
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(REPO / "evaluators" / "zoo"), include_defaults=False),
        device="cpu",
        batch_size=64,
        limit=LIMIT,
        log_samples=True,
        bootstrap_iters=0,
    )
    responses: dict[tuple[str, str], list[float | str]] = {
        (task, item_id(row["doc"])): [answer(found) for resps in row["resps"] for found in resps]
        for task in TASKS
        for row in found["samples"][task]
    }
    return {task: found["results"][task][f"{metric},none"] for task, metric in TASKS.items()}, responses


def answer(found: object) -> float | str:
    """A log-likelihood or a text."""
    return float(found[0]) if isinstance(found, list | tuple) else str(found)


@pytest.mark.parametrize(
    ("dtype", "relative"), sweep([("float32", 1e-5), ("bfloat16", 1e-5)], [("float32", 1e-5)])
)
def test_lm_eval_scores_the_checkpoint_as_the_live_route_was_scored(
    dtype: str, relative: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(REPO)  # the tasks name their data from there
    files = {name: Checkpoint(zoo_folder() / name) for name in ("math", "lang")}
    models = {name: model_loading.load_base(file, dtype) for name, file in files.items()}
    depth = files["math"].layout.num_layers
    route = [("math", i) for i in range(depth)]
    route.insert(depth // 2, ("lang", depth // 2))
    scales = (*SCALES, *[1.0] * len(route))[: len(route)]
    hops = [
        Hop(models[m], layer, gain) for (m, layer), gain in zip(route, gains(scales, len(route)), strict=True)
    ]
    routed = RoutedModel(models["math"])
    route_checkpoint.write_checkpoint(routed, hops, tmp_path / "out", files["math"].path)
    metrics, responses = lm_eval_itself(tmp_path / "out", dtype)

    specs = [TaskSpec(task, metric, splits="declared") for task, metric in TASKS.items()]
    harness = LmHarness(specs, load_tokenizer(files["math"]), include=[REPO / "evaluators" / "zoo"])
    items = {
        task: tuple(i for i in ids if (task, i) in responses) for task, ids in harness.items("test").items()
    }
    assert {task: len(ids) for task, ids in items.items()} == dict.fromkeys(TASKS, LIMIT)
    _, own = harness.score(routed.model, items)
    assert {task: own[task] for task in TASKS} == pytest.approx(metrics, abs=1e-9)
    worst, texts = 0.0, 0
    for task, ids in items.items():
        for item in ids:
            mine = [
                answer(found) for request in harness.tasks[task].requests[item] for found in request.resps
            ]  # they are shown nowhere else
            for a, b in zip(mine, responses[task, item], strict=True):
                if isinstance(a, str) or isinstance(b, str):
                    assert a == b
                    texts += 1
                else:
                    worst = max(worst, abs(a - b) / max(1.0, abs(b)))
    assert texts == LIMIT
    assert len({r for found in responses.values() for r in found if isinstance(r, str)}) > 10
    assert worst <= relative, worst
    assert all(math.isfinite(value) for value in metrics.values())
