"""Weights, routes, weights in one study: each stage goes on from the best before it, and a killed study is
the unbroken one."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from evomerge import _yaml
from evomerge.checkpoints import Checkpoint, Parent
from evomerge.config import Config, loading
from evomerge.errors import ConfigError
from evomerge.launch import route_stages
from evomerge.launch import stages as stages_module
from evomerge.merging import checkpoint_writer
from evomerge.merging.live_model import ModelBuilder
from evomerge.merging.model_loading import load_base
from evomerge.methods.fused.magnitude_tables import MagnitudeTables
from evomerge.recipes import Mix, Recipe, params
from evomerge.search import Start
from evomerge.spaces import RouteWeightSpace
from evomerge.store import Store
from tests.support.killing import check, kill_after
from tests.support.sweeps import sweep
from tests.support.toy import Prepared, count_rows, in_process, llama, search_file, stored_rows

STAGES = [
    {"stage": "weights", "evaluations": 8},
    {"stage": "routes", "evaluations": 16},
    {"stage": "weights", "evaluations": 8},
]


def staged_file(folder: Path, study: str, stages: list[Any], **routes: Any) -> Path:
    file = search_file(folder, study)
    document = json.loads(file.read_text())
    document |= {"stages": stages, "routes": {"perplexity_screen": {"tokens": 200}, **routes}}
    file.write_text(json.dumps(document, indent=1))
    return file


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("kills", sweep([1, 2, 7], [1]))
def test_a_killed_search_of_three_stages_is_the_unbroken_one_row_by_row(kills: int, tmp_path: Path) -> None:
    rng = random.Random(3)
    file = staged_file(tmp_path, "staged", STAGES, penalty=0.01)
    store = tmp_path / "parts" / "staged" / "study.db"
    words = ("run", file, "--resume", "--root", tmp_path / "parts")
    rows: dict[str, list[dict[str, Any]]] = {}
    killed = 0
    with Prepared(tmp_path) as prepared:
        whole = prepared.start("run", file, "--root", tmp_path / "whole")
        for _ in range(kills):
            search = prepared.start(*words)
            kill_after(search, store, rng.randrange(4, 18), rng.uniform(0, 0.05))
            code = search.wait()
            assert code in (-signal.SIGKILL, 0), search.err.read_text()
            killed += code == -signal.SIGKILL
            rows = check(store, rows)
        last = prepared.start(*words)
        assert last.wait() == 0, last.err.read_text()
        assert whole.wait() == 0, whole.err.read_text()
    assert killed >= max(1, kills - 2)
    final, unbroken = stored_rows(store), stored_rows(tmp_path / "whole" / "staged" / "study.db")
    assert final.keys() == unbroken.keys()
    for table, found in final.items():
        assert found == unbroken[table], table
    assert count_rows(store, "trials") == len(final["trials"])
    _lineage(store)


def _lineage(file: Path) -> None:
    with Store.open(file) as store:
        trials, study = store.trials(), store.study()
        assert study is not None
        assert study.outcome is not None
        assert [s.stage for s in study.outcome.stages] == ["weights", "routes", "weights"]
        for number, stage in enumerate(study.outcome.stages):
            own = [t for t in trials if t.stage == number and t.origin == "sampled"]
            assert len(own) >= STAGES[number]["evaluations"] - 3
            assert {t.generation for t in own} <= set(range(stage.first, stage.last + 1))
            first = [t for t in own if t.generation == stage.first]
            if number:
                (parents,) = {t.parents for t in first}
                assert len(parents) == 1
                assert parents[0] < min(t.id for t in first), (
                    "a stage begins from a candidate of an earlier one"
                )
        routes = [t for t in trials if t.stage == 1]
        assert all(
            t.costs["layers"] == len(store.recipe(t.recipe_id).layers) for t in routes if t.score is not None
        )
        assert len({t.costs["layers"] for t in routes if t.score is not None}) > 1
        for t in routes:
            if t.score is not None and t.reported is not None:
                assert t.score == pytest.approx(t.reported - 0.01 * max(0.0, t.costs["layers"] - 6))


def test_a_search_of_routes_alone_runs_shows_and_exports(tmp_path: Path) -> None:
    file = staged_file(
        tmp_path, "alone", [{"stage": "routes", "evaluations": 8}], genome="indicator", layers=[4, 8]
    )
    root = ("--root", str(tmp_path))
    assert in_process("run", file, *root)[0] == 0
    assert "layers" in in_process("show", "alone/best", *root)[1]
    with Store.open(tmp_path / "alone" / "study.db") as store:
        routes = [
            t for t in store.trials() if t.generation > 0 and t.score is not None and t.costs["layers"] != 6
        ]
    found = max(routes, key=lambda t: t.id)
    code, _, err = in_process("export", f"alone/{found.id}", tmp_path / "out", "--weights", *root)
    assert code == 0, err
    card = (tmp_path / "out" / "README.md").read_text()
    assert "a greedy generation" in card
    assert "a greedy generation differs" not in card
    assert (tmp_path / "out" / "recipe.yaml").is_file()
    assert (tmp_path / "out" / "shell" / "config.json").is_file()
    code, _, err = in_process("merge", tmp_path / "out" / "recipe.json", tmp_path / "again")
    assert code == 0, err
    ours, theirs = (_tensors(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "## Score against depth" in (tmp_path / "alone" / "report.md").read_text()


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = load_file(file)
    return found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": ["routes", "routes"]}, "two stages of routes follow one another"),
        ({"stages": []}, "stages"),
        ({"stages": ["wieghts"]}, "stages"),
        ({"routes": {"start": "maths"}}, "Did you mean 'math'"),
        ({"routes": {"models": ["math", "lnag"]}}, "Did you mean 'lang'"),
        ({"routes": {"layers": [4, 2]}}, "least, most"),
        ({"routes": {"scale_range": [1.1, 1.5]}}, "must hold 1"),
        ({"routes": {"scales": "matrix"}}, "belongs to genome: indicator"),
        ({"routes": {"genom": "indicator"}}, "Did you mean 'genome'"),
        ({"routes": {"penalty": -1}}, "penalty"),
        ({"stages": ["routes"], "routes": {"penalty": 0.1}, "search": {"race": {}}}, "penalty"),
    ],
)
def test_a_wrong_setting_is_one_clear_error(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    document = json.loads(search_file(tmp_path, "wrong").read_text())
    document |= {
        key: document.get(key, {}) | value if isinstance(value, dict) else value
        for key, value in change.items()
    }
    (tmp_path / "wrong.yaml").write_text(json.dumps(document))
    code, _, err = in_process("run", tmp_path / "wrong.yaml", "--root", tmp_path / "studies")
    assert code == 2
    assert message in err
    assert len([line for line in err.splitlines() if line.startswith("error[")]) == 1
    assert "Traceback" not in err


def settings(tmp_path: Path, **changes: Any) -> Config:
    document = json.loads(search_file(tmp_path, "some").read_text()) | changes
    return loading.check(_yaml.parse(json.dumps(document), "some.yaml"))


def test_the_budget_that_a_flag_changes_is_that_of_the_last_stage(tmp_path: Path) -> None:
    changed = loading.override(
        settings(tmp_path, stages=[{"stage": "weights", "evaluations": 8}, "routes"]), {"evaluations": 99}
    )
    assert changed.budgets == (8, 99)
    assert loading.override(settings(tmp_path), {"evaluations": 99}).budgets == (99,)
    own = settings(tmp_path, stages=[{"stage": "routes", "evaluations": 7}])
    assert (own.budgets, loading.override(own, {"evaluations": 9}).budgets) == ((7,), (9,))


def test_a_hand_written_stack_of_mergekit_is_where_routes_begin(tmp_path: Path) -> None:
    parents: dict[str, Parent] = {
        name: Checkpoint(llama(tmp_path / name, seed)) for seed, name in enumerate(("base", "a"))
    }
    lines = [
        f"- sources: [{{model: {tmp_path}/a, layer_range: [{first}, {last}]}}]"
        for first, last in ((0, 4), (2, 5))
    ]
    stack = "\n".join(["merge_method: passthrough", "slices:", *lines, ""])
    (tmp_path / "solar.yaml").write_text(stack)
    given = settings(
        tmp_path,
        models={name: str(tmp_path / name) for name in parents},
        stages=["routes"],
        routes={"stacks": [str(tmp_path / "solar.yaml")], "genome": "indicator"},
    )
    from evomerge.launch.weight_space import make_space

    found = {
        b.label: b.recipe for b in stages_module.reference_recipes(given, make_space(given, parents), parents)
    }
    recipe = found["solar.yaml"]
    assert [m.sources[0] for m in recipe.layers] == [("a", i) for i in (0, 1, 2, 3, 2, 3, 4)]
    space = route_stages.route_space(given, parents, Start(recipe, "solar.yaml"))
    genome = space.encode(recipe)
    assert genome is not None
    assert space.decode(genome) == recipe
    elsewhere = llama(tmp_path / "elsewhere", 9)
    (tmp_path / "solar.yaml").write_text(stack.replace(f"{tmp_path}/a", str(elsewhere)))
    with pytest.raises(ConfigError, match=r"elsewhere.*not among the models"):
        stages_module.reference_recipes(given, make_space(given, parents), parents)


# ---- weights on a route ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Parent]:
    root = tmp_path_factory.mktemp("hop")
    base = llama(root / "base", 0, dtype=torch.float32)
    made = {
        name: Checkpoint(llama(root / name, seed, near=base, dtype=torch.float32))
        for name, seed in (("a", 1), ("b", 2))
    }
    return {"base": Checkpoint(base), **made}


def passed(model: str, layer: int | None) -> Mix:
    return Mix("passthrough", ((model, layer),))


def mixed(layer: int | None) -> Mix:
    return Mix(
        "task_arithmetic",
        (("a", layer), ("b", layer)),
        ("base", layer),
        params({"weight": (0.5, 0.25), "lambda": 1.0}),
    )


MERGED = Recipe("base", tuple(mixed(i) for i in range(5)), mixed(None), mixed(None), out_dtype="float32")
ROUTE = Recipe(
    "base",
    (
        passed("merged", 0),
        passed("a", 1),
        passed("base", 2),
        passed("merged", 2),
        passed("merged", 4),
        passed("b", 4),
    ),
    passed("merged", None),
    passed("merged", None),
    out_dtype="float32",
    stages=(("merged", MERGED),),
    scales=(1.0, 0.9, 1.0, 1.0, 1.1, 1.0),
)


def test_a_genome_of_zeros_is_the_route_and_the_axes_are_groups_by_models() -> None:
    space = RouteWeightSpace(ROUTE, "base", ("a", "b"), groups=3)
    assert space.decode(space.start) is ROUTE
    assert space.encode(ROUTE) == space.start
    assert space.encode(MERGED) is None
    assert [span.stop - span.start for span in space.spans()] == [2, 2, 2]
    assert len(space.axes) == 6


def test_a_small_step_from_a_route_is_a_small_change_of_its_weights(parents: dict[str, Parent]) -> None:
    """Every layer moves by the step times the task vector, whether it was merged, passed through, or the
    base's."""
    space = RouteWeightSpace(ROUTE, "base", ("a", "b"), groups=3)
    genome = list(space.start)
    genome[2] = space.axes[2].gene(0.125)  # the weight of `a` in the second group: hops 2 and 3
    recipe = space.decode(genome)
    assert recipe.stages == ()
    assert recipe.scales == ROUTE.scales
    name, at = (
        "mlp.up_proj.weight",
        {
            m: {i: parents[m].tensor(f"model.layers.{i}.mlp.up_proj.weight") for i in range(5)}
            for m in parents
        },
    )

    def vector(model: str, layer: int) -> torch.Tensor:
        return at[model][layer] - at["base"][layer]

    merged = {i: at["base"][i] + 0.5 * vector("a", i) + 0.25 * vector("b", i) for i in range(5)}
    wanted = [
        merged[0],
        at["a"][1],
        at["base"][2] + 0.125 * vector("a", 2),
        merged[2] + 0.125 * vector("a", 2),
        merged[4],
        at["b"][4],
    ]
    live = ModelBuilder(
        parents, parents, "base", load_base(parents["base"], "float32"), "float32", "cpu", MagnitudeTables()
    )
    unscaled = Recipe(recipe.base, recipe.layers, recipe.embeddings, recipe.head, out_dtype="float32")
    view = live.build(unscaled)
    view.install()
    layers: Any = view.module.get_submodule("model.layers")
    for layer, expected in zip(layers, wanted, strict=True):
        torch.testing.assert_close(layer.get_parameter(name), expected, rtol=1e-5, atol=1e-6)
    assert isinstance(view.module, nn.Module)
    torch.testing.assert_close(
        view.module.get_input_embeddings().weight, _embedding(parents), rtol=1e-5, atol=1e-6
    )  # type: ignore[operator]


def _embedding(parents: dict[str, Parent]) -> torch.Tensor:
    tables = {m: parents[m].tensor("model.embed_tokens.weight") for m in parents}
    return tables["base"] + 0.5 * (tables["a"] - tables["base"]) + 0.25 * (tables["b"] - tables["base"])


def test_methods_without_a_weight_for_each_model_stay_as_they_are(
    tmp_path: Path, parents: dict[str, Parent]
) -> None:
    arc = Mix("slerp", (("a", 1),), ("base", 1), params({"t": 0.5}))
    recipe = Recipe("base", (passed("a", 0), arc), passed("a", None), passed("a", None), out_dtype="float32")
    space = RouteWeightSpace(recipe, "base", ("a", "b"), groups=1)
    found = space.decode([0.3, -0.2])
    assert found.layers[1] == arc
    assert found.layers[0].method == "task_arithmetic"
    checkpoint_writer.write(found, parents, tmp_path / "out")
