"""lm-eval's own command line on the checkpoint of a scaled route gives the scores of the live route."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from evomerge.checkpoints import Checkpoint
from evomerge.evaluation.lm_harness.harness import LmHarness
from evomerge.evaluation.lm_harness.task_loading import TaskSpec
from evomerge.export import route_checkpoint
from evomerge.merging import model_loading
from evomerge.merging.model_loading import load_tokenizer
from evomerge.merging.routing.routed_model import Hop, RoutedModel, gains
from tests.support.equality_oracle import item_id
from tests.support.sweeps import sweep
from tests.support.toy import REPO, environment, zoo_folder

TASKS, LIMIT = {"zoo_lookup": "acc", "zoo_arithmetic": "exact_match"}, 60
SCALES = (1.0, 0.9, 1.1, 1.05, 0.95)


def command_line(
    folder: Path, dtype: str, into: Path
) -> tuple[dict[str, float], dict[tuple[str, str], list[float | str]]]:
    """(task -> metric, (task, item) -> responses) of `lm_eval run`."""
    words = [
        "--model",
        "hf",
        "--model_args",
        f"pretrained={folder},dtype={dtype}",
        "--tasks",
        ",".join(TASKS),
        "--include_path",
        "evaluators/zoo",
    ]
    more = [
        "--limit",
        str(LIMIT),
        "--batch_size",
        "64",
        "--device",
        "cpu",
        "--log_samples",
        "--output_path",
        str(into),
    ]
    program = [str(Path(sys.executable).with_name("lm_eval")), "run", *words, *more]
    done = subprocess.run(program, cwd=REPO, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(next(into.rglob("results*.json")).read_text())["results"]
    responses: dict[tuple[str, str], list[float | str]] = {}
    for task in TASKS:
        for line in next(into.rglob(f"samples_{task}_*.jsonl")).read_text().splitlines():
            row = json.loads(line)
            responses[task, item_id(row["doc"])] = [
                answer(found) for resps in row["resps"] for found in resps
            ]
    return {task: results[task][f"{metric},none"] for task, metric in TASKS.items()}, responses


def answer(found: object) -> float | str:
    """A log-likelihood or a text."""
    return float(found[0]) if isinstance(found, list | tuple) else str(found)


@pytest.mark.parametrize(
    ("dtype", "relative"), sweep([("float32", 1e-5), ("bfloat16", 1e-5)], [("bfloat16", 1e-5)])
)
def test_lm_evals_command_line_scores_the_checkpoint_as_the_live_route_was_scored(
    dtype: str, relative: float, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
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
    metrics, responses = command_line(tmp_path / "out", dtype, tmp_path / "results")

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
