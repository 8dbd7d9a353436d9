"""Derivatives by all coefficients: against central differences and the scan, with errors, or refused."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest

from evomerge.errors import ConfigError
from evomerge.evaluation import GradientRequest
from evomerge.launch.learned_spaces import tensor_cells
from evomerge.launch.opening import open_stored_search
from evomerge.launch.rescoring import ScanRequest, scan_items
from evomerge.reports import derivatives, resolve
from evomerge.spaces.cell_weights import axis_derivatives
from evomerge.store import Store
from evomerge.workers.worker import Worker
from tests.support.toy import count_rows, in_process, search_file, weight_space


def test_parts_hold_every_item_once_and_as_many_of_each_task() -> None:
    items = {"first": tuple(f"a{i}" for i in range(37)), "second": tuple(f"b{i}" for i in range(20))}
    parts = derivatives.shards(items)
    assert len(parts) == derivatives.MOST_SHARDS
    for task, ids in items.items():
        assert sorted(item for part in parts for item in part[task]) == sorted(ids)
        sizes = [len(part[task]) for part in parts]
        assert max(sizes) - min(sizes) <= 1
    assert len(derivatives.shards({"first": ("a", "b", "c"), "second": ("d", "e")})) == 2
    with pytest.raises(ConfigError, match="at least 2 items"):
        derivatives.shards({"first": ("a",)})


def test_the_error_of_a_sum_is_that_of_the_mean_of_its_parts_scaled_up() -> None:
    values = np.random.default_rng(0).standard_normal(12)
    found = derivatives.estimate([float(v) for v in values])
    assert found.mean == pytest.approx(values.sum())
    wanted = len(values) * statistics.stdev(values.tolist()) / len(values) ** 0.5
    assert found.error == pytest.approx(wanted)


def test_an_axis_has_the_sum_of_its_tensors_and_shares_those_of_other_components() -> None:
    space = weight_space("dare_linear", groups=(2, 1))
    places = {
        "up": (("layers 0-1", "mlp"),),
        "down": (("layers 0-1", "mlp"),),
        "norm": (("layers 0-1", "attention"), ("layers 0-1", "mlp")),
    }
    partials = {
        ("up", "weight", "a"): 1.0,
        ("down", "weight", "a"): 2.0,
        ("norm", "weight", "a"): 4.0,
        ("norm", "weight", "b"): 8.0,
        ("elsewhere", "weight", "a"): 16.0,
    }
    by_name = dict(
        zip([axis.name for axis in space.axes], axis_derivatives(space, places, partials), strict=True)
    )
    assert by_name["weight of a in layers 0-1, mlp"] == 5.0
    assert by_name["weight of a in layers 0-1, attention"] == 2.0
    assert by_name["weight of b in layers 0-1, mlp"] == 4.0
    assert by_name["weight of b in head"] == 0.0


@pytest.fixture(scope="module")
def copied(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("derivatives")
    shutil.copytree(finished / "small", root / "small")
    return root


def test_derivatives_are_central_differences_of_the_probability(copied: Path) -> None:
    """The verb's numbers against losses of moved candidates, through the merge and lm-eval's tasks."""
    words = ("sensitivity", "small/best", "--root", copied, "--gradient", "--items", 6)
    code, out, err = in_process(*words, "--json")
    assert code == 0, err
    data = json.loads(out)
    assert (data["items"], data["shards"]) == (24, 6)
    with Store.open(copied / "small" / "study.db") as store:
        opened = open_stored_search(store)
        trial = resolve(store, "best")
        genome = list(trial.genome or ())
        space, harness = opened.space, opened.harness
        assert [row["axis"] for row in data["axes"]] == [axis.name for axis in space.axes]
        worker = Worker(opened.parents, "base", harness, dtype="float32")
        items = scan_items(opened, ScanRequest(count=6))
        request = GradientRequest(dict.fromkeys(items, 1 / 24), "probability")
        largest = max(range(len(genome)), key=lambda place: abs(data["axes"][place]["derivative"]))
        axis, ends = space.axes[largest], []
        for move in (0.05, -0.05):
            gene = axis.gene(data["axes"][largest]["value"] + move)
            moved = worker.slopes(
                space.decode([*genome[:largest], gene, *genome[largest + 1 :]]), items, request
            )
            assert moved.slopes is not None
            ends.append(moved.slopes.loss)
        assert tensor_cells(space, opened.parents["base"])["model.norm.weight"] == (("head", None),)
    row = data["axes"][largest]
    assert row["value"] == pytest.approx(axis.value(genome[largest]))
    assert row["derivative"] == pytest.approx(-(ends[0] - ends[1]) / 0.1, rel=0.15), "a step of .05"
    assert row["derivative_error"] > 0


def test_the_table_has_the_slope_of_a_stored_scan_beside_it_and_nothing_is_stored(copied: Path) -> None:
    words = ("sensitivity", "small/best", "--root", copied, "--axes", "embeddings", "--items", 4)
    steps = ("--step", "0.2", "--span", "0.2")
    assert in_process(*words, *steps)[0] == 0
    tables = ("sensitivity", "evaluations")
    before = {table: count_rows(copied / "small" / "study.db", table) for table in tables}
    code, out, err = in_process(*words, *steps, "--gradient")
    assert code == 0, err
    rows = [line for line in out.splitlines() if line.startswith("weight of")]
    assert rows
    assert all(row.count("±") == 2 for row in rows)
    code, out, err = in_process(*words, "--gradient")
    assert code == 0, err
    rows = [line for line in out.splitlines() if line.startswith("weight of")]
    assert all(row.count("±") == 1 and row.endswith("–") for row in rows), "another scan is not stored"
    assert before == {table: count_rows(copied / "small" / "study.db", table) for table in tables}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--gradient", "--plot", "curves.png"), "leave one of them out"),
        (("--gradient", "--items", 1), "at least 2 items"),
        (("--gradient", "--axes", "layer 77"), "no axis of the space matches"),
    ],
)
def test_a_wrong_wish_is_one_line(words: tuple[object, ...], sentence: str, copied: Path) -> None:
    code, out, err = in_process("sensitivity", "small/best", "--root", copied, *words)
    assert (code, out) == (2, ""), err
    assert sentence in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"stages": [{"stage": "routes", "evaluations": 4}], "routes": {"models": ["base", "math"]}},
            "is a route or came after one",
        ),
        ({"method": "multislerp", "space": {"groups": 1}}, "'multislerp' is no sum of task vectors"),
    ],
)
def test_candidates_without_derivatives_are_refused_with_the_reason(
    change: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    file = search_file(tmp_path, "other", evaluations=4, population=4)
    document = json.loads(file.read_text()) | change
    document["models"] = {name: path for name, path in document["models"].items() if name != "string"}
    document["evaluation"] |= {"items": 2, "validation": 2, "test": 2}
    file.write_text(json.dumps(document))
    assert in_process("run", file, "--root", tmp_path, "--accept-floor")[0] == 0
    code, out, err = in_process("sensitivity", "other/best", "--root", tmp_path, "--gradient")
    assert (code, out) == (2, ""), err
    assert sentence in err


def test_a_learned_candidate_has_a_derivative_for_each_of_its_weights(tmp_path: Path) -> None:
    file = search_file(tmp_path, "learned")
    document = json.loads(file.read_text())
    del document["search"]["evaluations"], document["search"]["population"], document["search"]["sigma"]
    document["stages"] = [{"stage": "learned", "steps": 2, "items": 4, "genome": "tensor"}]
    file.write_text(json.dumps(document))
    code, _, err = in_process("run", file, "--root", tmp_path)
    assert code == 0, err
    with Store.open(tmp_path / "learned" / "study.db") as store:
        end = next(trial for trial in store.trials() if trial.label == "end of the learned stage")
    words = ("sensitivity", f"learned/{end.id}", "--root", tmp_path, "--gradient", "--items", 4, "--json")
    code, out, err = in_process(*words, "--axes", "layers.3.mlp")
    assert code == 0, err
    axes = json.loads(out)["axes"]
    assert len(axes) == 9
    assert all(axis["derivative_error"] > 0 for axis in axes)
