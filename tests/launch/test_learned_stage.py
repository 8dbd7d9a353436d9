"""A learned stage over the zoo: its derivatives are the score's own, its recipe leaves and comes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from evomerge.checkpoints import Checkpoint
from evomerge.config import loading
from evomerge.evaluation import GradientRequest
from evomerge.launch.learned_spaces import GENOMES
from evomerge.launch.opening import Opened, open_search
from evomerge.recipes import Recipe
from evomerge.store import Store
from evomerge.workers.worker import Worker
from tests.support.learned_search import learned_file
from tests.support.sweeps import sweep
from tests.support.toy import in_process

STEPS, ITEMS = 3, 6


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a finished study 'learned'."""
    root = tmp_path_factory.mktemp("learned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVOMERGE_THREADS", "1")
        code, _, err = in_process("run", learned_file(root, "learned"), "--root", root)
    assert code == 0, err
    return root


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> tuple[Opened, Worker]:
    """(models and tasks, a worker in float32)."""
    settings, _ = loading.load(str(learned_file(tmp_path_factory.mktemp("slopes"), "slopes")))
    opened = open_search(settings)
    return opened, Worker(opened.parents, settings.base, opened.harness, dtype="float32")


@pytest.mark.parametrize("genome", ["tensor", "layer_component", "space"])
@pytest.mark.parametrize("surrogate", sweep(["logprob", "probability", "margin"], ["logprob"]))
def test_slopes_are_central_differences_of_the_loss(
    surrogate: Any, genome: str, search: tuple[Opened, Worker]
) -> None:
    """Through lm-eval's tasks, the scoring plans and the merge, on the zoo in float32."""
    opened, worker = search
    space = GENOMES[genome].make(opened.space, opened.parents)
    items = {task: ids[:3] for task, ids in opened.harness.items("search").items()}
    request = GradientRequest(dict.fromkeys(items, 0.05), surrogate)
    found = worker.slopes(space.decode(space.start), items, request)
    assert found.error is None
    assert found.slopes is not None
    gradient = space.pull(found.slopes.partials)
    assert len(gradient) == len(space.axes)
    largest = sorted(range(len(gradient)), key=lambda i: -abs(gradient[i]))
    for place in (*largest[:2], largest[len(largest) // 2]):
        ends = []
        for step in (0.005, -0.005):
            genome = list(space.start)
            genome[place] += step
            moved = worker.slopes(space.decode(genome), items, request)
            assert moved.slopes is not None
            ends.append(moved.slopes.loss)
        assert gradient[place] == pytest.approx((ends[0] - ends[1]) / 0.01, rel=0.01, abs=2e-5)


def test_a_plan_says_what_is_learned_and_what_it_costs(tmp_path: Path) -> None:
    """It was error[E000]: gradient descent has no sigma."""
    code, out, err = in_process("plan", learned_file(tmp_path, "planned"))
    assert code == 0, err
    assert "164 weights, one for each tensor and model" in out
    assert "gradient descent (Adam): start best, seed 0" in out
    assert f"stage 1, learned: 164 genes, {STEPS} steps of {ITEMS} items of each task" in out
    assert f"search: {STEPS} candidates x {3 * 4 * ITEMS} items" in out
    assert "to 2.5, start" not in out, "the axes are another space's"


def test_the_loss_falls_and_the_recipe_names_tensors(learned: Path) -> None:
    with Store.open(learned / "learned" / "study.db") as store:
        steps = [trial for trial in store.trials() if trial.origin == "learned"]
        losses = [store.scored(trial).evaluation.slopes for trial in steps]
        assert len(steps) == STEPS
        assert all(slopes is not None and slopes.loss > 0 for slopes in losses)
        assert all(trial.score is None and trial.error is None for trial in steps)
        study = store.study()
        assert study is not None
        assert study.state == "done"
        ends = [trial for trial in store.trials() if trial.label == "end of the learned stage"]
        recipe = store.recipe(ends[0].recipe_id)
    assert "self_attn.q_proj.weight" in recipe.canonical()


def test_status_show_and_report_speak_of_a_learned_study(learned: Path) -> None:
    code, out, err = in_process("status", "learned", "--root", learned)
    assert code == 0, err
    assert "0 failed" in out
    code, out, err = in_process("show", "learned/best", "--root", learned)
    assert code == 0, err
    report = (learned / "learned" / "report.md").read_text()
    assert "end of the learned stage" in report or "learned" in report


def test_a_learned_recipe_leaves_as_yaml_and_comes_back_bit_for_bit(learned: Path, tmp_path: Path) -> None:
    """What mergekit makes of such a file: `tensor_space` in integration/test_mergekit_parity.py."""
    with Store.open(learned / "learned" / "study.db") as store:
        end = next(trial for trial in store.trials() if trial.label == "end of the learned stage")
    code, _, err = in_process("export", f"learned/{end.id}", tmp_path / "out", "--weights", "--root", learned)
    assert code == 0, err
    weights = next(folder for folder in (tmp_path / "out").rglob("model*.safetensors")).parent
    document = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert "filter" in json.dumps(document)
    code, _, err = in_process("merge", tmp_path / "out" / "recipe.yaml", tmp_path / "again")
    assert code == 0, err
    own, again = Checkpoint(weights), Checkpoint(tmp_path / "again")
    assert own.tensors.keys() == again.tensors.keys()
    for name in own.tensors:
        assert torch.equal(own.tensor(name), again.tensor(name)), name


@pytest.mark.parametrize(
    ("genome", "items", "genes"),
    [(None, 31, 14), (None, 32, 164), ("layer_component", 31, 56), ("tensor", 31, 164), ("space", 40, 14)],
)
def test_the_genome_is_that_of_the_file_or_what_the_items_allow(
    genome: str | None, items: int, genes: int, tmp_path: Path
) -> None:
    file = learned_file(tmp_path, "sized", {"genome": genome} if genome else {})
    document = json.loads(file.read_text())
    document["evaluation"]["items"] = 8
    document["evaluation"]["search"] = items
    file.write_text(json.dumps(document))
    code, out, err = in_process("plan", file, "--json")
    assert code == 0, err
    assert json.loads(out)["stages"][0]["axes"] == genes


@pytest.mark.parametrize(
    ("stage", "more", "words"),
    [
        ({"population": 8}, {}, "items, rate, surrogate and labels, and no population"),
        ({}, {"method": "multislerp", "space": {"groups": 2}}, "'multislerp' is none"),
        ({"rate": 0}, {}, "rate should be above 0"),
        ({"surrogate": "token"}, {}, "surrogate should be"),
        ({"surrogate": "entropy"}, {}, "entropy is not offered: it falls as a model grows sure of wrong"),
        ({"labels": {"zoo_sums": "math"}}, {}, "'zoo_sums' is not among the tasks"),
        ({"labels": {"zoo_string": "maths"}}, {}, "Did you mean 'math'"),
    ],
)
def test_what_cannot_be_learned_is_refused_in_a_line(
    stage: dict[str, Any], more: dict[str, Any], words: str, tmp_path: Path
) -> None:
    file = learned_file(tmp_path, "refused", stage, **more)
    code, out, err = in_process("run", file, "--root", tmp_path)
    assert (code, out) == (3, "") or code == 2, err
    assert words in err
    assert not (tmp_path / "refused" / "study.db").exists()


def test_a_task_without_a_text_as_its_answer_is_named_before_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "size_of.py").write_text(
        "def size(model, tokenizer):\n    return {f'item {i}': float(i) for i in range(50)}\n"
    )
    monkeypatch.chdir(tmp_path)
    file = learned_file(tmp_path, "python")
    document = json.loads(file.read_text())
    document["tasks"] = [{"name": "size", "python": "size_of:size", "higher_is_better": True}]
    document["evaluation"] = {"items": 8}
    file.write_text(json.dumps(document))
    code, out, err = in_process("run", file, "--root", tmp_path, "--allow-python", "--accept-floor")
    assert (code, out) != (0, ""), err
    assert "task 'size' has no text with a right answer" in err
    assert not (tmp_path / "python" / "study.db").exists()


def test_learned_then_weights_goes_on_from_the_learned_recipe(tmp_path: Path) -> None:
    file = learned_file(tmp_path, "both")
    document = json.loads(file.read_text())
    document["stages"].append({"stage": "weights", "evaluations": 4, "population": 4})
    file.write_text(json.dumps(document))
    code, _, err = in_process("run", file, "--root", tmp_path)
    assert code == 0, err
    with Store.open(tmp_path / "both" / "study.db") as store:
        second = [trial for trial in store.trials() if trial.stage == 1]
        assert len(second) >= 4
        assert all(isinstance(store.recipe(trial.recipe_id), Recipe) for trial in second)
    code, out, err = in_process("status", "both", "--json", "--root", tmp_path)
    assert code == 0, err
    first, then = json.loads(out)["stages"]
    assert (first["stage"], first["candidates"], first["genes"]) == ("learned", STEPS, 164)
    assert (first["forwards"], first["gradients"]) == (0, STEPS * 4 * ITEMS)
    assert first["item_forwards"] == 3 * STEPS * 4 * ITEMS
    assert (then["stage"], then["candidates"], then["gradients"]) == ("weights", 4, 0)
    assert then["forwards"] == then["item_forwards"] == 4 * 4 * 8
    code, out, err = in_process("status", "both", "--root", tmp_path)
    assert (
        f"stage 1, learned: {first['validation']:.3f} on validation for {3 * STEPS * 4 * ITEMS} item" in out
    )
    report = (tmp_path / "both" / "report.md").read_text()
    assert f"| learned | 1 to {STEPS} | 164 | 0 | {STEPS * 4 * ITEMS} |" in report
