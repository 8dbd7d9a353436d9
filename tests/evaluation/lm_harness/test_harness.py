"""lm-eval tasks as an evaluator: item by item what lm-eval itself reports, and no silent zero for a broken
task.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evomerge.checkpoints import Checkpoint
from evomerge.errors import CandidateError, TaskError
from evomerge.evaluation import ROLES, Role
from evomerge.evaluation.lm_harness.harness import LmHarness
from evomerge.evaluation.lm_harness.task_loading import TaskSpec
from evomerge.merging import model_loading
from tests.support.lm_eval_tasks import (
    BATCH,
    CHOOSE,
    GENERATE,
    LIKELIHOOD,
    ROLLING,
    lm_eval_itself,
    load,
    own_id,
    sums,
    write_task,
)
from tests.support.toy import REPO, environment, zoo_folder

ZOO_TASKS = ("zoo_arithmetic", "zoo_lookup", "zoo_string", "zoo_cross")
DECLARED = [TaskSpec(task, splits="declared") for task in ZOO_TASKS]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return model_loading.load_tokenizer(Checkpoint(zoo_folder() / "base"))


@pytest.fixture(scope="module")
def model() -> Any:
    return model_loading.load_base(Checkpoint(zoo_folder() / "math"), "float32")


def documents(task: str, role: str) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for line in (REPO / "evaluators" / "zoo" / f"{task}.{role}.jsonl").read_text().splitlines()
    ]


# ---- the shipped tasks -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zoo_harness(tokenizer: Any) -> LmHarness:
    return LmHarness(DECLARED, tokenizer, batch_size=BATCH, limits={"test": 100, "validation": 40})


@pytest.fixture(scope="module")
def scored(zoo_harness: LmHarness, model: Any) -> Any:
    return zoo_harness.score(model, zoo_harness.items("test"))


def test_scores_are_lm_evals_item_by_item(
    zoo_harness: LmHarness, scored: Any, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPO)  # the tasks name their data from there
    items, metrics = scored
    wanted = zoo_harness.items("test")
    samples = {
        task: [i for i, d in enumerate(documents(task, "test")) if own_id(d) in set(wanted[task])]
        for task in ZOO_TASKS
    }
    assert {len(s) for s in samples.values()} == {100}
    names = {task: zoo_harness.metric(task) for task in ZOO_TASKS}
    theirs = lm_eval_itself(model, tokenizer, ZOO_TASKS, REPO / "evaluators", names, samples=samples)
    for task in ZOO_TASKS:
        values, _, metric = theirs[task]
        ours = {s.item: s.value for s in items if s.task == task}
        assert ours == values
        assert metrics[task] == metric
        assert [s.item for s in items if s.task == task] == list(wanted[task])
    assert 0 < metrics["zoo_arithmetic"] <= 1
    assert len({s.value for s in items}) == 2, "some right, some wrong"


def test_a_part_of_the_items_can_be_scored(zoo_harness: LmHarness, model: Any) -> None:
    part = {
        "zoo_lookup": zoo_harness.items("search")["zoo_lookup"][5:15],
        "zoo_cross": zoo_harness.items("validation")["zoo_cross"][:3],
    }
    items, metrics = zoo_harness.score(model, part)
    assert [(s.task, s.item) for s in items] == [(task, item) for task, ids in part.items() for item in ids]
    for task in part:
        own = [s.value for s in items if s.task == task]
        assert metrics[task] == pytest.approx(math.fsum(own) / len(own), abs=1e-12)


def test_another_model_is_scored_as_itself(zoo_harness: LmHarness, scored: Any, model: Any) -> None:
    other = model_loading.load_base(Checkpoint(zoo_folder() / "lang"), "float32")
    part = {task: zoo_harness.items("test")[task][:30] for task in ("zoo_lookup", "zoo_arithmetic")}
    _, metrics = zoo_harness.score(other, part)
    assert metrics["zoo_lookup"] > scored[1]["zoo_lookup"] + 0.3
    assert metrics["zoo_arithmetic"] < scored[1]["zoo_arithmetic"] - 0.3
    assert zoo_harness.score(model, zoo_harness.items("test")) == scored


@pytest.mark.parametrize("task", ZOO_TASKS)
def test_roles_are_the_declared_documents_and_share_none(task: str, tokenizer: Any) -> None:
    harness = LmHarness([TaskSpec(task, splits="declared")], tokenizer)
    ids = {role: harness.items(role)[task] for role in ROLES}
    for role in ROLES:
        assert ids[role] == tuple(own_id(d) for d in documents(task, role)), "in the order of the documents"
        assert len(set(ids[role])) == len(ids[role])
    assert len({i for role in ROLES for i in ids[role]}) == sum(len(ids[role]) for role in ROLES)


def test_ids_and_fingerprints_are_the_same_in_every_process(zoo_harness: LmHarness, tmp_path: Path) -> None:
    program = (
        "import json\n"
        "from tests.evaluation.lm_harness.test_harness import *\n"
        "words = model_loading.load_tokenizer(Checkpoint(zoo_folder() / 'base'))\n"
        "h = LmHarness(DECLARED, words, batch_size=7, limits={'test': 100, 'validation': 40})\n"
        "print(json.dumps([{r: h.items(r) for r in ROLES}, h.fingerprint()]))"
    )
    env = environment() | {"PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ours = [
        {role: {t: list(ids) for t, ids in zoo_harness.items(role).items()} for role in ROLES},
        zoo_harness.fingerprint(),
    ]
    assert json.loads(done.stdout.splitlines()[-1]) == ours


# ---- tasks of the test's own -------------------------------------------------------------------------------


def test_every_kind_of_request_and_metric_is_lm_evals(tmp_path: Path, tokenizer: Any, model: Any) -> None:
    kinds = {
        "trial_generate": GENERATE,
        "trial_choose": CHOOSE,
        "trial_likelihood": LIKELIHOOD,
        "trial_rolling": ROLLING,
    }
    for name, settings in kinds.items():
        write_task(tmp_path, name, settings)
    metrics = {
        "trial_generate": "exact_match",
        "trial_choose": "acc_norm",
        "trial_likelihood": "perplexity",
        "trial_rolling": "word_perplexity",
    }
    theirs = lm_eval_itself(model, tokenizer, list(kinds), tmp_path, metrics)
    harness = load(tmp_path, tokenizer, *[TaskSpec(t, m, splits="declared") for t, m in metrics.items()])
    items, ours = harness.score(model, harness.items("test"))
    for task in kinds:
        values, _, metric = theirs[task]
        assert ours[task] == pytest.approx(metric, rel=1e-5), (
            task
        )  # CPUs differ in what a batch does to a sum's last bits
        own = {s.item: s.value for s in items if s.task == task}
        assert set(own) == set(values)
        if task != "trial_rolling":  # whose item values are pairs
            assert own == pytest.approx(values, rel=1e-5), task
        assert all(math.isfinite(v) for v in own.values())
    assert {t: harness.sign(t) for t in kinds} == {
        "trial_generate": 1,
        "trial_choose": 1,
        "trial_likelihood": -1,
        "trial_rolling": -1,
    }
    assert 0 < ours["trial_generate"] <= 1


@pytest.mark.parametrize("kind", ["generate", "choose"])
@pytest.mark.parametrize("splits", ["declared", "hash"])
def test_few_shot_prompts_are_lm_evals(
    kind: str, splits: Any, tmp_path: Path, tokenizer: Any, model: Any
) -> None:
    name, settings = f"trial_{kind}", {"generate": GENERATE, "choose": CHOOSE}[kind]
    docs = None if splits == "declared" else {"test": sums(90)}
    write_task(tmp_path, name, settings, docs)
    metric = settings["metric_list"][0]["metric"]
    values, prompts, score = lm_eval_itself(
        model, tokenizer, [name], tmp_path, {name: metric}, num_fewshot=2
    )[name]
    harness = load(tmp_path, tokenizer, TaskSpec(name, metric, num_fewshot=2, splits=splits))
    roles: tuple[Role, ...] = ("test",) if splits == "declared" else ROLES
    for role in roles:
        for item in harness.items(role)[name]:
            ours = [request.args[0] for request in harness.tasks[name].requests[item]]
            assert ours[0].count("A:") == 3, "two examples and the question"
            assert ours == prompts[item]
    if splits == "declared":
        items, ours_ = harness.score(model, harness.items("test"))
        assert {s.item: s.value for s in items} == values
        assert ours_[name] == score


def test_few_shot_examples_of_declared_splits_come_from_the_search_items(
    tmp_path: Path, tokenizer: Any
) -> None:
    write_task(tmp_path, "trial_generate", GENERATE)
    harness = load(tmp_path, tokenizer, TaskSpec("trial_generate", num_fewshot=2, splits="declared"))
    known = {d["prompt"] for d in sums(30)}
    for item in harness.items("test")["trial_generate"]:
        first, second, question = harness.tasks["trial_generate"].requests[item][0].args[0].split("\n\n")
        assert first.rpartition("A:")[0] + "A:" in known
        assert second.rpartition("A:")[0] + "A:" in known
        assert question not in known


# ---- one split dealt by hash -------------------------------------------------------------------------------


@pytest.mark.parametrize("only", ["test", "validation"])
def test_one_split_is_dealt_to_the_roles(only: Any, tmp_path: Path, tokenizer: Any) -> None:
    docs = sums(300)
    write_task(tmp_path, "trial", GENERATE, {only: docs})
    harness = load(tmp_path, tokenizer, TaskSpec("trial"))
    ids = {role: harness.items(role)["trial"] for role in ROLES}
    assert sorted(i for role in ROLES for i in ids[role]) == sorted(own_id(d) for d in docs)
    for role, share in (("search", 0.6), ("validation", 0.2), ("test", 0.2)):
        assert abs(len(ids[role]) / 300 - share) < 0.1, "6, 2 and 2 tenths"
        assert all(len(harness.tasks["trial"].requests[i]) == 1 for i in ids[role])


def test_a_document_keeps_its_role_whatever_its_neighbours(tmp_path: Path, tokenizer: Any) -> None:
    write_task(tmp_path / "all", "trial", GENERATE, {"test": sums(100)})
    write_task(tmp_path / "some", "trial", GENERATE, {"test": sums(100)[::-1][:60]})
    whole, part = (load(tmp_path / name, tokenizer, TaskSpec("trial")) for name in ("all", "some"))
    for role in ROLES:
        left = {own_id(d) for d in sums(100)[::-1][:60]}
        assert set(part.items(role)["trial"]) == set(whole.items(role)["trial"]) & left


def test_a_repeated_document_is_one_item(tmp_path: Path, tokenizer: Any, model: Any) -> None:
    write_task(
        tmp_path,
        "trial",
        GENERATE,
        {"search": sums(10) + sums(10), "validation": sums(5, 10), "test": sums(5, 20)},
    )
    harness = load(tmp_path, tokenizer, TaskSpec("trial", splits="declared"))
    assert harness.items("search")["trial"] == tuple(own_id(d) for d in sums(10))
    assert len(harness.score(model, harness.items("search"))[0]) == 10


def test_a_smaller_limit_takes_a_part_of_a_larger_one(tmp_path: Path, tokenizer: Any) -> None:
    write_task(tmp_path, "trial", GENERATE)
    few, more, most = (
        set(
            load(tmp_path, tokenizer, TaskSpec("trial", splits="declared"), limits={"test": n}).items("test")[
                "trial"
            ]
        )
        for n in (5, 20, 99)
    )
    assert (len(few), len(more), len(most)) == (5, 20, 40)
    assert few < more < most


# ---- what resume compares ----------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "prompt": lambda s: s | {"doc_to_text": "{{prompt}} "},
    "target": lambda s: s | {"doc_to_target": "{{answer}}0"},
    "filter": lambda s: (
        s
        | {
            "filter_list": [
                {
                    "name": "number",
                    "filter": [{"function": "regex", "regex_pattern": r"(\d)"}, {"function": "take_first"}],
                }
            ]
        }
    ),
    "generation": lambda s: (
        s | {"generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 3}}
    ),
    "metric's options": lambda s: s | {"metric_list": [s["metric_list"][0] | {"ignore_case": True}]},
    "repeats": lambda s: s | {"repeats": 2},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_task_has_another_fingerprint(change: str, tmp_path: Path, tokenizer: Any) -> None:
    write_task(tmp_path / "before", "trial", GENERATE)
    write_task(tmp_path / "after", "trial", CHANGES[change](GENERATE))
    spec = TaskSpec("trial", splits="declared")
    assert (
        load(tmp_path / "before", tokenizer, spec).fingerprint()
        != load(tmp_path / "after", tokenizer, spec).fingerprint()
    )


def test_changed_code_has_another_fingerprint(tmp_path: Path, tokenizer: Any) -> None:
    found = []
    for name, value in (("before", 1.0), ("same", 1.0), ("after", 0.5)):
        settings = GENERATE | {
            "process_results": "!function own.score",
            "metric_list": [{"metric": "own", "aggregation": "mean", "higher_is_better": True}],
        }
        write_task(tmp_path / name, "trial", settings)
        (tmp_path / name / "own.py").write_text(f"def score(doc, results):\n    return {{'own': {value}}}\n")
        found.append(load(tmp_path / name, tokenizer, TaskSpec("trial", splits="declared")).fingerprint())
    assert found[0] == found[1] != found[2]


def test_changed_documents_and_choices_have_another_fingerprint(tmp_path: Path, tokenizer: Any) -> None:
    docs = {"search": sums(30), "validation": sums(20, 30), "test": sums(40, 50)}
    write_task(tmp_path / "same", "trial", GENERATE, docs)
    write_task(tmp_path / "moved", "trial", GENERATE, docs)
    write_task(
        tmp_path / "answer",
        "trial",
        GENERATE,
        docs | {"test": [*sums(39, 50), sums(1, 89)[0] | {"answer": "0"}]},
    )
    write_task(tmp_path / "fewer", "trial", GENERATE, docs | {"search": sums(29)})
    spec = TaskSpec("trial", splits="declared")
    first = load(tmp_path / "same", tokenizer, spec).fingerprint()
    assert load(tmp_path / "moved", tokenizer, spec).fingerprint() == first, (
        "the same task elsewhere is the same task"
    )
    others = [load(tmp_path / name, tokenizer, spec).fingerprint()["trial"] for name in ("answer", "fewer")]
    for other in (
        TaskSpec("trial", filter="plain", splits="declared"),
        TaskSpec("trial", num_fewshot=1, splits="declared"),
    ):
        others.append(load(tmp_path / "same", tokenizer, other).fingerprint()["trial"])
    others.append(load(tmp_path / "same", tokenizer, spec, limits={"test": 10}).fingerprint()["trial"])
    assert len({first["trial"], *others}) == 6


# ---- mistakes and poison -----------------------------------------------------------------------------------


def test_an_unknown_task_names_the_nearest(tokenizer: Any) -> None:
    with pytest.raises(TaskError, match=r"unknown task 'zoo_arithmetc'\. Did you mean 'zoo_arithmetic'"):
        LmHarness([TaskSpec("zoo_arithmetc")], tokenizer)


def test_an_unknown_metric_or_filter_names_the_known(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"no metric 'exact_mach'\. Did you mean 'exact_match'"):
        LmHarness([TaskSpec("zoo_arithmetic", "exact_mach", splits="declared")], tokenizer)
    write_task(tmp_path, "trial", GENERATE)
    with pytest.raises(TaskError, match=r"no filter 'numbr'\. Did you mean 'number'"):
        load(tmp_path, tokenizer, TaskSpec("trial", filter="numbr", splits="declared"))
    with pytest.raises(TaskError, match="no task folder"):
        load(tmp_path / "none", tokenizer, TaskSpec("trial"))


BROKEN: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "template with an error": (GENERATE | {"doc_to_text": "{{prompt"}, None),
    "template of a missing field": (GENERATE | {"doc_to_text": "{{promt}}"}, None),
    "template that raises": (GENERATE | {"doc_to_text": "{{1 / 0}}"}, None),
    "template that raises for one document": (GENERATE | {"doc_to_text": "{{7 // (n - 25)}}"}, None),
    "target of a missing field": (LIKELIHOOD | {"doc_to_target": "{{anwser}}"}, None),
    "choices of a missing field": (CHOOSE | {"doc_to_choice": "{{chioces}}"}, None),
    "unknown filter function": (
        GENERATE | {"filter_list": [{"name": "x", "filter": [{"function": "no_such_filter"}]}]},
        None,
    ),
    "unknown kind of request": (GENERATE | {"output_type": "generate_some"}, None),
    "split that is not there": (GENERATE | {"test_split": "tset"}, None),
    "empty split": (GENERATE, {"search": sums(10), "validation": sums(10, 10), "test": []}),
    "no search split": (GENERATE, {"validation": sums(10, 10), "test": sums(10)}),
    "item in two roles": (
        GENERATE,
        {"search": sums(10), "validation": sums(10, 10), "test": [*sums(10, 20), *sums(1)]},
    ),
    "gold missing": (
        CHOOSE,
        {
            "search": sums(10),
            "validation": sums(10, 10),
            "test": [*sums(9, 20), sums(1, 40)[0] | {"label": None}],
        },
    ),
    "gold out of range": (
        CHOOSE,
        {
            "search": sums(10),
            "validation": sums(10, 10),
            "test": [*sums(9, 20), sums(1, 40)[0] | {"label": 9}],
        },
    ),
    "gold that is no choice": (CHOOSE | {"doc_to_target": "{{answer}}th"}, None),
    "code that models write": (GENERATE | {"unsafe_code": True}, None),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_task_is_refused_by_name_when_it_is_loaded(how: str, tmp_path: Path, tokenizer: Any) -> None:
    settings, docs = BROKEN[how]
    write_task(tmp_path, "trial", settings, docs)
    with pytest.raises(TaskError, match="'trial'"):
        load(tmp_path, tokenizer, TaskSpec("trial", splits="declared"))


def test_data_files_that_are_missing_or_broken_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    for name, content in (("missing", None), ("broken", "{not json\n")):
        folder = write_task(tmp_path / name, "trial", GENERATE)
        file = folder / "trial-test.jsonl"
        file.unlink() if content is None else file.write_text(content)
        with pytest.raises(TaskError, match="'trial'"):
            load(folder, tokenizer, TaskSpec("trial", splits="declared"))


CODE = """
def raises(doc, results):
    raise RuntimeError("the metric broke")

def gives_nan(doc, results):
    return {"own": float("nan")}

def gives_text(doc, results):
    return {"own": "good"}

def gives_nothing(doc, results):
    return {}

def gives_none(doc, results):
    return {"own": None}
"""


@pytest.mark.parametrize("function", ["raises", "gives_nan", "gives_text", "gives_nothing", "gives_none"])
def test_a_broken_metric_is_an_error_not_a_score(
    function: str, tmp_path: Path, tokenizer: Any, model: Any
) -> None:
    write_task(
        tmp_path,
        "trial",
        GENERATE
        | {
            "process_results": f"!function code.{function}",
            "metric_list": [{"metric": "own", "aggregation": "mean", "higher_is_better": True}],
        },
    )
    (tmp_path / "code.py").write_text(CODE)
    harness = load(tmp_path, tokenizer, TaskSpec("trial", splits="declared"))
    with pytest.raises(Exception, match=r"the metric broke|'trial'|unsupported operand|own"):
        harness.score(model, harness.items("test"))


@pytest.mark.parametrize("task", ["zoo_lookup", "zoo_string"])
def test_nan_weights_are_an_error_not_a_score(
    task: str, tokenizer: Any, zoo_harness: LmHarness, model: Any
) -> None:
    import torch

    part = {task: zoo_harness.items("test")[task]}
    before = zoo_harness.score(model, part)
    sick = model_loading.load_base(Checkpoint(zoo_folder() / "math"), "float32")
    with torch.no_grad():
        sick.get_parameter("model.layers.3.mlp.up_proj.weight")[0, 0] = math.nan
    with pytest.raises(CandidateError, match=f"NaN log-likelihoods in task '{task}'"):
        zoo_harness.score(sick, part)
    assert zoo_harness.score(model, part) == before, "the next model is not harmed"
