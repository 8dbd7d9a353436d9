"""Python functions as tasks: learnt once, dealt by hash, believed only where they give every item a finite
number.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from evomerge import config
from evomerge.config import loading, schema
from evomerge.errors import CandidateError, ConfigError, TaskError
from evomerge.evaluation import ROLES, CombinedTasks
from evomerge.evaluation.python_tasks import PythonSpec, PythonTasks
from evomerge.launch import opening
from evomerge.launch.prepare import prepare_study
from evomerge.launch.search_request import SearchRequest
from tests.support.toy import in_process, search_file

ITEMS = [f"item {i}" for i in range(50)]
SOURCE = """
import torch

ITEMS = [f"item {i}" for i in range(50)]
CALLS = []

def weigh(model, tokenizer):
    CALLS.append(torch.is_grad_enabled())
    return {item: float(model.weight.sum()) + i for i, item in enumerate(ITEMS)}

def some(model, tokenizer, items):
    CALLS.append(items)
    return {item: float(model.weight.sum()) + len(item) for item in (ITEMS if items is None else items)}

def poisoned(model, tokenizer):
    found = weigh(model, tokenizer)
    what = tokenizer["poison"]
    if what == "missing": del found["item 7"]
    if what == "extra": found["item 99"] = 1.0
    if what == "nan": found["item 7"] = float("nan")
    if what == "text": found["item 7"] = "good"
    if what == "list": return list(found)
    if what == "raises": raise RuntimeError("the function broke")
    return found

def eager(model, tokenizer, items):
    return weigh(model, tokenizer)

def few(model, tokenizer):
    return {"a": 1.0}

def numbers(model, tokenizer):
    return {1: 1.0, 2: 0.5}

constant = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Name of a module in the working directory that no other test uses."""
    name = "own_" + hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return name


def model(value: float = 0.25) -> nn.Linear:
    own = nn.Linear(2, 2, bias=False)
    torch.nn.init.constant_(own.weight, value)
    return own


def load(module: str, function: str = "weigh", tokenizer: Any = None, **more: Any) -> PythonTasks:
    return PythonTasks([PythonSpec("mine", f"{module}:{function}", **more)], tokenizer, model())


def calls(module: str) -> list[Any]:
    import sys

    return sys.modules[module].CALLS  # type: ignore[no-any-return]


def role_of(item: str) -> str:
    """6, 2 and 2 tenths of the first 8 digits of the id's SHA-256, written out again."""
    tenth = int(hashlib.sha256(item.encode()).hexdigest()[:8], 16) % 10
    return "search" if tenth < 6 else "validation" if tenth < 8 else "test"


def test_items_are_learnt_from_the_base_and_dealt_by_hash(module: str) -> None:
    tasks = load(module)
    assert calls(module) == [False], "one call, without gradients"
    for role in ROLES:
        assert tasks.items(role) == {"mine": tuple(sorted(i for i in ITEMS if role_of(i) == role))}


@pytest.mark.parametrize("function", ["weigh", "some"])
def test_scores_are_the_functions_and_the_metric_their_mean(function: str, module: str) -> None:
    tasks = load(module, function)
    items = tasks.items("test")["mine"]
    scores, metrics = tasks.score(model(0.5), {"mine": items})
    wanted = [2.0 + (ITEMS.index(i) if function == "weigh" else len(i)) for i in items]
    assert [(s.task, s.item, s.value) for s in scores] == [
        ("mine", i, v) for i, v in zip(items, wanted, strict=True)
    ]
    assert metrics == {"mine": math.fsum(wanted) / len(wanted)}
    if function == "some":
        assert calls(module) == [None, items], "a function with a third argument is asked for some items only"


def test_limits_take_a_part_that_grows(module: str) -> None:
    sets = [
        set(
            PythonTasks([PythonSpec("m", f"{module}:weigh")], None, model(), limits={"search": n}).items(
                "search"
            )["m"]
        )
        for n in (2, 5, 999)
    ]
    assert [len(s) for s in sets] == [2, 5, sum(role_of(i) == "search" for i in ITEMS)]
    assert sets[0] < sets[1] < sets[2]


@pytest.mark.parametrize(
    ("poison", "words"),
    [
        ("missing", "no score for 1 of .* 'item 7'"),
        ("extra", "not asked for, the first 'item 99'"),
        ("nan", "gave nan for item 'item 7'"),
        ("text", "gave 'good' for item 'item 7'"),
        ("list", "gave list"),
    ],
)
def test_what_is_not_a_number_for_each_item_fails_the_candidate(poison: str, words: str, module: str) -> None:
    tokenizer = {"poison": None}
    tasks = load(module, "poisoned", tokenizer)
    items = {"mine": [i for i in ITEMS if role_of(i) == role_of("item 7")]}
    good = tasks.score(model(), items)
    tokenizer["poison"] = poison  # type: ignore[assignment]
    with pytest.raises(CandidateError, match=f"'mine'.*{words}"):
        tasks.score(model(), items)
    tokenizer["poison"] = None
    assert tasks.score(model(), items) == good, "the next candidate is not harmed"


def test_a_function_that_is_asked_for_some_items_gives_no_others(module: str) -> None:
    tasks = load(module, "eager")
    with pytest.raises(CandidateError, match="not asked for"):
        tasks.score(model(), {"mine": tasks.items("test")["mine"]})


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("few", "scores 1 items, and none of them falls to"),
        ("numbers", "items named by strings"),
        ("constant", "no function 'constant'"),
        ("nothing", "no function 'nothing'"),
        ("poisoned", "fails for the base: .*TypeError"),
    ],
)
def test_a_function_that_cannot_be_had_is_refused_at_the_start(
    function: str, words: str, module: str
) -> None:
    with pytest.raises(TaskError, match=f"'mine'.*{words}"):
        load(module, function)


def test_a_module_that_cannot_be_imported_is_refused(module: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}_broken.py").write_text("1 / 0\n")
    for name in (f"{module}_broken", f"{module}_missing"):
        with pytest.raises(TaskError, match=f"'{name}' cannot be imported"):
            load(name)


def test_changed_source_or_items_have_another_fingerprint(module: str, tmp_path: Path) -> None:
    first = load(module).fingerprint()
    assert load(module).fingerprint() == first
    assert load(module, higher_is_better=False).fingerprint() != first
    assert load(module, "some").fingerprint() != first
    (tmp_path / f"{module}.py").write_text(SOURCE + "# changed\n")
    assert load(module).fingerprint() != first
    assert (
        hashlib.sha256((SOURCE + "# changed\n").encode()).hexdigest()
        in load(module).backends(model())["mine"]
    )


def test_several_sets_are_asked_for_their_own(module: str) -> None:
    one = PythonTasks([PythonSpec("one", f"{module}:weigh")], None, model())
    two = PythonTasks([PythonSpec("two", f"{module}:some", higher_is_better=False)], None, model())
    both = CombinedTasks([one, two])
    for role in ROLES:
        assert both.items(role) == {**one.items(role), **two.items(role)}
    asked = {"two": both.items("test")["two"][:2], "one": both.items("search")["one"][:3]}
    first, second = one.score(model(), {"one": asked["one"]}), two.score(model(), {"two": asked["two"]})
    assert both.score(model(), asked) == ((*first[0], *second[0]), first[1] | second[1])
    assert (both.sign("one"), both.sign("two")) == (1, -1)
    assert both.fingerprint() == one.fingerprint() | two.fingerprint()
    with pytest.raises(TaskError, match="called 'one'"):
        CombinedTasks([one, one])


# ---- in a search -------------------------------------------------------------------------------------------

SEARCHED = """
def norm(model, tokenizer, items):
    names = [f"item {i}" for i in range(40)] if items is None else items
    size = float(model.model.norm.weight.float().norm())
    assert tokenizer("zero").input_ids
    return {name: size + len(name) for name in names}
"""


def searching(folder: Path, module: str, **task: Any) -> tuple[config.Config, str]:
    (folder / f"{module}.py").write_text(SEARCHED)
    file = search_file(folder, "trial", evaluations=4, population=4)
    document = json.loads(file.read_text())
    document["tasks"] = [
        {"task": "zoo_lookup", "weight": 1},
        {"python": f"{module}:norm", "name": "size", "weight": 1, **task},
    ]
    file.write_text(json.dumps(document))
    return loading.load(str(file))


def test_a_search_runs_python_only_where_allowed(module: str, tmp_path: Path) -> None:
    settings, text = searching(tmp_path, module)
    with pytest.raises(ConfigError, match=rf"'size' runs the Python function {module}:norm.*--allow-python"):
        prepare_study(SearchRequest(settings, text), tmp_path / "studies")
    assert not list((tmp_path / "studies").rglob("*.db*")), "nothing was begun"
    study = prepare_study(
        SearchRequest(settings, text), tmp_path / "studies", allowed=opening.Allowed(python=True)
    )
    with study.store:
        outcome = study.run()
        found = study.store.study()
        assert found is not None
        facts = found.facts
        trials = study.store.trials()
    assert set(facts.tasks) == {"zoo_lookup", "size"}
    assert hashlib.sha256(SEARCHED.encode()).hexdigest() in facts.backends["size"]
    assert facts.items["search"]["size"] == sum(role_of(f"item {i}") == "search" for i in range(40))
    assert len(facts.item_sets["test"]["size"]) == 64
    assert all(trial.error is None for trial in trials)
    assert {"zoo_lookup", "size"} <= set(outcome.best["test_metrics"])
    assert outcome.best["test"] == pytest.approx(
        (outcome.best["test_metrics"]["zoo_lookup"] + outcome.best["test_metrics"]["size"]) / 2
    )
    again = prepare_study(
        SearchRequest(settings, text, resume=True), tmp_path / "studies", allowed=opening.Allowed(python=True)
    )
    again.store.close()


@pytest.mark.parametrize("verb", ["run", "plan"])
def test_the_command_line_says_what_it_would_run(verb: str, module: str, tmp_path: Path) -> None:
    searching(tmp_path, module)
    code, _, err = in_process(verb, tmp_path / "trial.yaml", *(["--root", tmp_path] if verb == "run" else []))
    assert code == ConfigError.exit_code
    assert "--allow-python" in err
    assert f"{module}:norm" in err


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"python": "a:b"}, "name"),
        ({"python": "a:b", "task": "x"}, "name"),
        ({"python": "a:b", "name": "x", "metric": "acc"}, "no metric"),
        ({"python": "a b", "name": "x"}, "match pattern|pattern"),
        ({"task": "x", "name": "x"}, "belongs to a task with python"),
    ],
)
def test_an_entry_is_a_task_or_a_function(task: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        schema.TaskConfig.model_validate(task)
    assert (
        schema.TaskConfig.model_validate({"python": "a.b:c", "name": "x", "higher_is_better": False}).task
        == "x"
    )


def test_a_worker_makes_a_functions_failure_a_value(module: str, tmp_path: Path) -> None:
    settings, _ = searching(tmp_path, module)
    opened = opening.open_search(settings, allowed=opening.Allowed(python=True))
    opened.harness._owner["size"].tokenizer = lambda text: 1 / 0  # type: ignore[attr-defined]
    recipe = opened.space.decode([0.0] * len(opened.space.axes))
    evaluation = opened.load().evaluate(recipe, {"size": opened.harness.items("search")["size"]})
    assert evaluation.error == "ZeroDivisionError: division by zero"
    assert evaluation.items == ()
