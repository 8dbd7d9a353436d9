"""Relaxed routes over the zoo: derivatives are the loss's own, rows are those of one worker, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from evomerge.checkpoints import Checkpoint, Parent
from evomerge.config import loading
from evomerge.errors import ConfigError
from evomerge.evaluation import GradientRequest
from evomerge.launch.opening import open_search
from evomerge.launch.relaxed_routes import check_relaxable, make_relaxation
from evomerge.spaces.routes import LayerPool
from evomerge.store import Store
from evomerge.workers.worker import Worker
from tests.support.toy import in_process, llama, search_file

STEPS, ITEMS = 4, 4


def relaxed_file(folder: Path, study: str, stage: dict[str, Any] | None = None, **more: Any) -> Path:
    """A search file of one stage of relaxed routes in float32."""
    file = search_file(folder, study)
    document = json.loads(file.read_text())
    del document["search"]["evaluations"]
    stages = [{"stage": "routes", "method": "relaxed", "steps": STEPS, "items": ITEMS, "evaluations": 4}]
    stages[0] |= stage or {}
    document |= {"stages": stages, "out_dtype": "float32", "routes": {"models": ["math", "lang"]}} | more
    document["search"]["population"] = 4
    file.write_text(json.dumps(document, indent=1))
    return file


@pytest.fixture(scope="module")
def relaxed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a finished study 'relaxed'."""
    root = tmp_path_factory.mktemp("relaxed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVOMERGE_THREADS", "1")
        code, _, err = in_process("run", relaxed_file(root, "relaxed"), "--root", root)
    assert code == 0, err
    return root


def test_pulled_slopes_are_central_differences_of_the_loss(tmp_path: Path) -> None:
    """Through lm-eval's tasks, the averages of whole layers and the softmax."""
    settings, _ = loading.load(str(relaxed_file(tmp_path, "slopes")))
    opened = open_search(settings)
    worker = Worker(opened.parents, settings.base, opened.harness, dtype="float32")
    pool = LayerPool(tuple((name, 6) for name in settings.models), "base", out_dtype="float32")
    relaxation = make_relaxation(settings.stages[0], settings.base, opened.parents, pool, any_outer=True)
    opening = relaxation.opening
    items = {task: ids[:4] for task, ids in opened.harness.items("search").items()}
    request = GradientRequest(dict.fromkeys(items, 0.0625))

    def loss(genome: list[float], step: int) -> tuple[float, list[float]]:
        space = opening.space_at(step, genome)
        found = worker.slopes(space.decode(genome), items, request)
        assert found.error is None
        assert found.slopes is not None
        return found.slopes.loss, list(space.pull(found.slopes.partials))

    point = [0.3 * (-1) ** i * (i % 3) for i in range(len(opening.space.axes))]
    for step, places in ((0, (1, 2)), (STEPS - 2, (4, 9, 22))):
        _, gradient = loss(point, step)
        for place in places:
            ends = []
            for move in (0.02, -0.02):
                moved = list(point)
                moved[place] += move
                ends.append(loss(moved, step)[0])
            assert gradient[place] == pytest.approx((ends[0] - ends[1]) / 0.04, rel=0.03, abs=1e-3)
        assert any(gradient[:4]) == (step == 0)


def test_the_route_is_a_plain_stack_that_is_scored_validated_and_exported(
    relaxed: Path, tmp_path: Path
) -> None:
    with Store.open(relaxed / "relaxed" / "study.db") as store:
        trials = store.trials()
        steps = [trial for trial in trials if trial.origin == "learned"]
        assert [trial.label for trial in steps] == [f"relaxed, step {n + 1}" for n in range(STEPS)]
        slopes = [store.scored(trial).evaluation.slopes for trial in steps]
        assert all(found is not None and found.loss > 0 for found in slopes)
        route = next(trial for trial in trials if trial.label == "relaxed route")
        recipe = store.recipe(route.recipe_id)
        study = store.study()
        assert study is not None
        assert study.outcome is not None
        assert route.recipe_id in {row["recipe"] for row in study.outcome.finalists}
        assert study.outcome.stages[0].first == 1
    assert route.score is not None
    assert all(mix.method == "passthrough" for mix in recipe.mixes)
    assert [mix.sources[0][1] for mix in recipe.layers] == list(range(6))
    code, _, err = in_process(
        "export", f"relaxed/{route.id}", tmp_path / "out", "--weights", "--root", relaxed
    )
    assert code == 0, err
    code, _, err = in_process("status", "relaxed", "--root", relaxed)
    assert code == 0, err


def test_a_plan_shows_the_descent_and_what_it_costs(tmp_path: Path) -> None:
    code, out, err = in_process("plan", relaxed_file(tmp_path, "planned"))
    assert code == 0, err
    assert f"routes, relaxed: 21 genes, {STEPS} steps of {ITEMS} items of each task" in out
    assert f"search: routes, relaxed: {STEPS} candidates x {3 * 4 * ITEMS} items" in out


def test_after_a_stage_of_weights_the_merge_is_one_of_the_models(tmp_path: Path) -> None:
    file = relaxed_file(tmp_path, "after", {"steps": 2, "rate": 0.2, "surrogate": "probability"})
    document = json.loads(file.read_text())
    document["stages"].insert(0, {"stage": "weights", "evaluations": 4})
    document["routes"] = {"embeddings": "start", "layers": [4, 8]}
    file.write_text(json.dumps(document))
    code, _, err = in_process("run", file, "--root", tmp_path)
    assert code == 0, err
    with Store.open(tmp_path / "after" / "study.db") as store:
        steps = [trial for trial in store.trials() if trial.origin == "learned"]
        first = store.recipe(steps[0].recipe_id)
        assert any(trial.label == "relaxed route" for trial in store.trials())
    assert len(steps) == 2
    assert len(first.layers[0].sources) in (4, 5), "the merge too, where it is no parent"


@pytest.mark.parametrize(
    ("stage", "more", "words"),
    [
        ({}, {"routes": {"genome": "indicator"}}, "take genome: categorical or conditional"),
        ({}, {"routes": {"layers": [8, 10]}}, "routes.layers are [8, 10]; let them hold 6"),
        ({"method": "relaxd"}, {}, "method"),
        ({"stage": "weights"}, {}, "a stage of weights has evaluations, population and sigma, and no method"),
        ({"stage": "learned", "evaluations": None}, {}, "and no method"),
        ({"method": None}, {}, "a stage of routes has method, evaluations, population and sigma, and no"),
    ],
)
def test_what_cannot_be_relaxed_is_refused_in_a_line(
    stage: dict[str, Any], more: dict[str, Any], words: str, tmp_path: Path
) -> None:
    file = relaxed_file(tmp_path, "refused", stage, **more)
    code, out, err = in_process("run", file, "--root", tmp_path)
    assert (code, out) == (3, "") or code == 2, err
    assert words in err
    assert not (tmp_path / "refused" / "study.db").exists()


def narrower(folder: Path) -> Path:
    """Halves the MLP of a model."""
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    half = config["intermediate_size"] = config["intermediate_size"] // 2
    for name, tensor in tensors.items():
        if ".mlp." in name:
            cut = tensor[:, :half] if "down" in name else tensor[:half]
            tensors[name] = cut.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_layers_of_another_number_or_shape_are_refused_with_the_remedy(tmp_path: Path) -> None:
    parents: dict[str, Parent] = {
        "base": Checkpoint(llama(tmp_path / "base", 0)),
        "deep": Checkpoint(llama(tmp_path / "deep", 1, layers=7)),
        "narrow": Checkpoint(narrower(llama(tmp_path / "narrow", 2))),
        "same": Checkpoint(llama(tmp_path / "same", 3)),
    }
    check_relaxable("base", ["base", "same"], parents, None)
    for name, words in (("deep", "has 7 layers where the base 'base' has"), ("narrow", "does not fit")):
        with pytest.raises(ConfigError, match=rf"'{name}' {words}.*leave it out of routes.models"):
            check_relaxable("base", ["base", "same", name], parents, None)


def test_a_task_without_a_loss_is_named_before_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "length_of.py").write_text(
        "def length(model, tokenizer):\n    return {f'item {i}': float(i) for i in range(50)}\n"
    )
    monkeypatch.chdir(tmp_path)
    python = [{"name": "length", "python": "length_of:length", "higher_is_better": True}]
    file = relaxed_file(tmp_path, "python", tasks=python, evaluation={"items": 8})
    code, out, err = in_process("run", file, "--root", tmp_path, "--allow-python", "--accept-floor")
    assert (code, out) != (0, ""), err
    assert "task 'length' has no text with a right answer" in err
    assert not (tmp_path / "python" / "study.db").exists()
