"""Which documents are items: each once, in one role; benchmarks not searched on; groups and prompts as
lm-eval has them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from evomerge.checkpoints import Checkpoint
from evomerge.config import loading
from evomerge.config.schema import TaskConfig
from evomerge.errors import ConfigError, TaskError
from evomerge.evaluation import ROLES, Objective, Role, Term
from evomerge.evaluation.lm_harness import task_catalogue
from evomerge.evaluation.lm_harness.groups import Group, group_metric
from evomerge.evaluation.lm_harness.harness import LmHarness
from evomerge.evaluation.lm_harness.items import ItemRules
from evomerge.evaluation.lm_harness.task_loading import TaskSpec
from evomerge.evaluation.records import role_of_hash
from evomerge.evaluation.task_set import items_digest
from evomerge.launch import opening
from evomerge.launch.tasks import listed_items
from evomerge.merging import model_loading
from tests.support.lm_eval_tasks import (
    BATCH,
    CHOOSE,
    GENERATE,
    LIKELIHOOD,
    ROLLING,
    SPLITS,
    own_id,
    sums,
    write_task,
)
from tests.support.toy import REPO, search_file, zoo_folder

PLAIN = GENERATE | {"doc_to_text": "{{prompt}}"}
DROP = ItemRules(duplicates="drop")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return model_loading.load_tokenizer(Checkpoint(zoo_folder() / "base"))


@pytest.fixture(scope="module")
def model() -> Any:
    return model_loading.load_base(Checkpoint(zoo_folder() / "math"), "float32")


def load(folder: Path, tokenizer: Any, *specs: TaskSpec, **more: Any) -> LmHarness:
    return LmHarness(list(specs), tokenizer, batch_size=BATCH, include=[folder], **more)


def declared(name: str = "trial", **more: Any) -> TaskSpec:
    return TaskSpec(name, splits="declared", **more)


def prompts(harness: LmHarness, role: Role, name: str = "trial") -> list[str]:
    return [harness.tasks[name].requests[item][0].args[0] for item in harness.items(role)[name]]


# ---- twins -------------------------------------------------------------------------------------------------


def test_twins_within_a_role_are_scored_once_and_named(tmp_path: Path, tokenizer: Any) -> None:
    docs = sums(30)
    write_task(
        tmp_path,
        "trial",
        PLAIN,
        {
            "search": [*docs, docs[3], docs[5] | {"n": "another id"}],
            "validation": sums(5, 30),
            "test": sums(5, 40),
        },
    )
    harness = load(tmp_path, tokenizer, declared())
    assert harness.items("search")["trial"] == tuple(own_id(d) for d in docs)
    (finding,) = harness.warnings()
    assert "2 items of search" in finding
    assert "'Q: zero plus three A: 3' (documents 3 and 30)" in finding
    assert "(documents 5 and 31)" in finding, "the same question under another id"


def test_another_answer_to_the_same_question_is_no_twin(tmp_path: Path, tokenizer: Any) -> None:
    write_task(
        tmp_path,
        "trial",
        PLAIN,
        {"search": [*sums(5), sums(1)[0] | {"answer": "9"}], "validation": sums(5, 30), "test": sums(5, 40)},
    )
    harness = load(tmp_path, tokenizer, declared())
    assert len(harness.items("search")["trial"]) == 6
    assert harness.warnings() == ()


def test_twins_across_declared_splits_are_refused_by_name_or_kept_in_the_later(
    tmp_path: Path, tokenizer: Any
) -> None:
    docs: dict[str, list[Any]] = {
        "search": sums(30),
        "validation": [*sums(5, 30), *sums(2)],
        "test": [*sums(5, 40), *[d | {"n": -1} for d in sums(4, 1)]],
    }
    write_task(tmp_path, "trial", PLAIN, docs)
    with pytest.raises(
        TaskError,
        match=r"'trial' has 6 items in more than one split: .*\(validation 6 and test 5\)"
        r".*and 3 more.*duplicates: drop",
    ):
        load(tmp_path, tokenizer, declared())
    harness = load(tmp_path, tokenizer, declared(), rules=DROP)
    wanted = {"search": docs["search"][5:], "validation": docs["validation"][:6], "test": docs["test"]}
    for role in ROLES:
        assert harness.items(role)["trial"] == tuple(own_id(d) for d in wanted[role]), role
    asked = [text for role in ROLES for text in prompts(harness, role)]
    assert len(set(asked)) == len(asked)
    assert "6 items in more than one role" in harness.warnings()[0]


def test_twins_of_one_split_end_in_one_role(tmp_path: Path, tokenizer: Any) -> None:
    docs = sums(100)
    copies = [d | {"n": f"copy {i}"} for i, d in enumerate(docs)]
    write_task(tmp_path, "trial", PLAIN, {"test": [*docs, *copies]})
    harness = load(tmp_path, tokenizer, TaskSpec("trial"))
    asked = [text for role in ROLES for text in prompts(harness, role)]
    assert sorted(asked) == sorted(d["prompt"] for d in docs)
    rank = {"test": 2, "validation": 1, "search": 0}
    for doc, copy in zip(docs, copies, strict=True):
        best = max((role_of_hash(own_id(d)) for d in (doc, copy)), key=rank.__getitem__)
        assert doc["prompt"] in prompts(harness, best), "the later role keeps it"


# ---- which items -------------------------------------------------------------------------------------------


def test_training_documents_are_dealt_and_no_document_is_its_own_example(
    tmp_path: Path, tokenizer: Any
) -> None:
    write_task(tmp_path, "trial", PLAIN)
    harness = load(tmp_path, tokenizer, TaskSpec("trial", splits="hash-train", num_fewshot=4))
    asked = [p for role in ROLES for p in prompts(harness, role)]
    assert sorted(p.split("\n\n")[-1] for p in asked) == sorted(d["prompt"] for d in sums(30))
    for prompt in asked:
        *shots, question = prompt.split("\n\n")
        assert len(shots) == 4
        assert all(not shot.startswith(question) for shot in shots)
    for role in ROLES:
        assert set(harness.items(role)["trial"]) == {
            own_id(d) for d in sums(30) if role_of_hash(own_id(d)) == role
        }


def test_declared_search_items_are_not_their_own_examples(tmp_path: Path, tokenizer: Any) -> None:
    docs = {"search": sums(6), "validation": sums(6, 30), "test": sums(6, 50)}
    write_task(tmp_path, "trial", PLAIN, docs)
    harness = load(tmp_path, tokenizer, declared(num_fewshot=5))
    for prompt in prompts(harness, "search"):
        *shots, question = prompt.split("\n\n")
        assert {question, *(s.rpartition("A:")[0] + "A:" for s in shots)} == {
            d["prompt"] for d in docs["search"]
        }


def test_listed_items_are_exactly_those(tmp_path: Path, tokenizer: Any) -> None:
    docs = sums(60)
    write_task(tmp_path, "trial", PLAIN, {"test": docs})
    chosen = {"search": [9, 2, own_id(docs[4])], "test": [0]}
    harness = load(
        tmp_path, tokenizer, TaskSpec("trial", items=chosen), limits={"search": 1, "validation": 3}
    )  # type: ignore[arg-type]
    assert harness.items("search")["trial"] == tuple(own_id(docs[i]) for i in (2, 4, 9))
    assert harness.items("test")["trial"] == (own_id(docs[0]),)
    rest = [
        own_id(d)
        for i, d in enumerate(docs)
        if i not in (0, 2, 4, 9) and role_of_hash(own_id(d)) == "validation"
    ]
    assert harness.items("validation")["trial"] == tuple(i for i in rest if i in sorted(rest)[:3])


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"search": []}, "empty"),
        ({"search": [60]}, "no item 60 for search.*0 to 59"),
        ({"test": ["0123456789abcdef", 1, -1]}, "no item 0123456789abcdef, -1 for test"),
        ({"search": [1, 2], "test": [2, 3]}, "listed for search and for test"),
    ],
    ids=["empty", "number", "id", "two roles"],
)
def test_a_list_that_cannot_be_honoured_is_refused(
    chosen: Any, words: str, tmp_path: Path, tokenizer: Any
) -> None:
    write_task(tmp_path, "trial", PLAIN, {"test": sums(60)})
    with pytest.raises(TaskError, match=f"'trial'.*{words}"):
        load(tmp_path, tokenizer, TaskSpec("trial", items=chosen))


def test_items_are_listed_in_the_search_file_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("3\n0123456789012345\nffff456789abcdef 12\n")
    (tmp_path / "none").write_text("\n")
    given = TaskConfig(task="x", items={"search": str(tmp_path / "ids"), "test": (4, "ffff456789abcdef")})
    assert listed_items(given) == {
        "search": [3, "0123456789012345", "ffff456789abcdef", 12],
        "test": (4, "ffff456789abcdef"),
    }
    for name, words in (("none", "lists no item"), ("missing", "no file")):
        with pytest.raises(ConfigError, match=words):
            listed_items(TaskConfig(task="x", items={"search": str(tmp_path / name)}))
    with pytest.raises(ValueError, match="at least 1"):
        TaskConfig(task="x", items={"search": ()})


def test_the_digest_of_a_set_knows_every_item_and_their_order() -> None:
    assert len({items_digest(ids) for ids in ([], ["a"], ["a", "b"], ["b", "a"], ["ab"])}) == 5


@pytest.mark.parametrize("drop", [False, True])
def test_items_of_a_training_text_are_named_and_may_be_dropped(
    drop: bool, tmp_path: Path, tokenizer: Any
) -> None:
    write_task(tmp_path, "trial", PLAIN | {"doc_to_text": "{{prompt}} and the long way round gives"})
    corpus = tmp_path / "corpus.jsonl"
    told = sums(30)[7]
    corpus.write_text(
        json.dumps(
            {"text": f"He said: {told['prompt'].upper()} And the long way, round; gives {told['answer']}."}
        )
        + "\n"
    )
    rules = ItemRules(training_texts=(corpus,), overlap="drop" if drop else "warn", overlap_ngram=10)
    harness = load(tmp_path, tokenizer, declared(), rules=rules)
    (finding,) = harness.warnings()
    assert "1 of 30 items of search share 10 words" in finding
    assert "(document 7)" in finding
    assert (own_id(told) in harness.items("search")["trial"]) == (not drop)
    assert len(harness.items("search")["trial"]) == 30 - drop
    short = load(tmp_path, tokenizer, declared("zoo_lookup"), rules=rules, limits={"test": 3})
    assert any("too short to compare" in f for f in short.warnings())


# ---- benchmarks --------------------------------------------------------------------------------------------

BENCHMARKS: list[dict[str, Any]] = [
    {"test": sums(60)},
    {"validation": sums(60)},
    {"search": sums(40), "validation": sums(30, 50), "test": sums(20, 80)},
]


@pytest.mark.parametrize("docs", BENCHMARKS)
def test_a_benchmark_is_not_searched_on_unasked(
    docs: Any, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_catalogue, "TREE", tmp_path / "tree")
    write_task(tmp_path / "tree", "bench", PLAIN, docs)
    write_group(
        tmp_path / "tree", "benches", task=["bench"], aggregate_metric_list=[{"metric": "exact_match"}]
    )
    (tmp_path / "own").mkdir()
    write_group(tmp_path / "own", "mine", task=["bench"])
    which = "test" if "test" in docs else "validation"
    instead = "hash-train" if "search" in docs else "take another task"
    for name in ("bench", "benches", "mine"):
        with pytest.raises(
            TaskError,
            match=f"'bench' is lm-eval's: .*optimise on the benchmark's own {which} items.*{instead}"
            ".*allow_benchmark_test",
        ):
            load(tmp_path / "own", tokenizer, TaskSpec(name))
    assert load(
        tmp_path / "own", tokenizer, TaskSpec("bench"), rules=ItemRules(allow_benchmark_test=True)
    ).items("test")["bench"]
    assert load(tmp_path / "tree", tokenizer, TaskSpec("bench")).items("test")["bench"], (
        "a folder of the user's own"
    )
    if "search" in docs:
        assert load(tmp_path / "own", tokenizer, declared("bench")).items("search")["bench"]
        assert load(tmp_path / "own", tokenizer, TaskSpec("bench", splits="hash-train")).items("search")[
            "bench"
        ]


# ---- groups ------------------------------------------------------------------------------------------------


def lm_eval_says(model: Any, tokenizer: Any, names: list[str], folder: Path, **more: Any) -> dict[str, Any]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH),
        tasks=names,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        **more,
    )
    assert found is not None
    return dict(found)


def write_group(folder: Path, name: str, **settings: Any) -> None:
    (folder / f"group-{name}.yaml").write_text(json.dumps({"group": name, **settings}))


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("groups")
    sizes = {"one": 40, "two": 7, "three": 13}
    for i, (name, n) in enumerate(sizes.items()):
        write_task(
            folder, name, CHOOSE, {"search": sums(12, 60), "validation": sums(6, 80), "test": sums(n, 2 * i)}
        )
    write_task(
        folder,
        "other",
        GENERATE | {"tag": "tagged"},
        {"search": sums(12, 60), "validation": sums(6, 80), "test": sums(30)},
    )
    write_task(
        folder,
        "worse",
        LIKELIHOOD | {"tag": "mixed"},
        {"search": sums(12, 60), "validation": sums(6, 80), "test": sums(30)},
    )
    write_task(
        folder,
        "better",
        GENERATE | {"tag": ["tagged", "mixed"]},
        {"search": sums(12, 60), "validation": sums(6, 80), "test": sums(9)},
    )
    write_group(
        folder,
        "inner",
        task=["one", "two"],
        aggregate_metric_list=[{"metric": "acc_norm", "weight_by_size": False}],
    )
    write_group(
        folder,
        "outer",
        task=["inner", "three", "other"],
        aggregate_metric_list=[
            {"metric": "acc", "weight_by_size": True},
            {"metric": "acc_norm", "weight_by_size": False},
        ],
    )
    return folder


@pytest.mark.parametrize(("name", "metric"), [("outer", None), ("outer", "acc_norm"), ("inner", None)])
def test_a_groups_metric_is_lm_evals(
    name: str, metric: str | None, grouped: Path, tokenizer: Any, model: Any
) -> None:
    harness = load(grouped, tokenizer, declared(name, metric=metric), backend="lm-eval")
    scores, metrics = harness.score(model, harness.items("test"))
    theirs = lm_eval_says(model, tokenizer, [name], grouped)
    key = f"{harness.metric(name)},none"
    assert metrics[name] == theirs["results"][name][key]
    assert 0 < metrics[name] < 1
    leaves = dict(harness.subtasks(name))
    assert set(leaves) == ({"one", "two", "three"} if name == "outer" else {"one", "two"})
    assert math.fsum(leaves.values()) == pytest.approx(1)
    assert math.fsum(share * metrics[leaf] for leaf, share in leaves.items()) == pytest.approx(
        metrics[name], rel=1e-12
    )
    if (name, metric) == ("outer", None):
        assert leaves["one"] == 40 / 60
        assert any("other report no 'acc'" in f for f in harness.warnings())
    term = Term(name, subtasks=harness.subtasks(name))
    assert Objective((term,))(metrics) == metrics[name]
    assert set(harness.fingerprint()) == {name}
    assert metrics[f"{name}:probability"] == pytest.approx(
        math.fsum(share * metrics[f"{leaf}:probability"] for leaf, share in leaves.items())
    )
    assert {s.task for s in scores} == set(leaves)


def test_a_limit_changes_no_share(grouped: Path, tokenizer: Any) -> None:
    whole, few = (
        load(grouped, tokenizer, declared("outer"), limits=limits) for limits in (None, {"test": 3})
    )
    assert few.subtasks("outer") == whole.subtasks("outer")
    assert few.fingerprint() != whole.fingerprint()


def test_a_tag_is_the_plain_mean_of_its_tasks_and_says_so(grouped: Path, tokenizer: Any, model: Any) -> None:
    harness = load(grouped, tokenizer, declared("tagged"), backend="lm-eval")
    _, metrics = harness.score(model, harness.items("test"))
    assert metrics["tagged"] == pytest.approx((metrics["other"] + metrics["better"]) / 2)
    assert metrics["other"] != metrics["better"]
    assert any("no number for 'tagged'" in f for f in harness.warnings())
    part = {"other": harness.items("test")["other"]}
    assert "tagged" not in harness.score(model, part)[1], "a part of a group has no group's metric"


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        ([declared("mixed")], "a higher metric is better"),
        ([declared("outer", metric="exact_match")], "aggregates no 'exact_match'"),
        ([declared("outer", metric="acc_nrm")], "Did you mean 'acc_norm'"),
        ([declared("inner"), declared("outer")], "task 'one' is part of 'inner' and of 'outer'; list"),
        ([declared("one"), declared("inner")], "task 'one' is listed, and part of 'inner' too; list it once"),
        ([declared("inner"), declared("one")], "task 'one' is listed, and part of 'inner' too; list it once"),
        ([declared("inner", items={"search": [1]})], "a group of 2 tasks"),
        ([declared("innr")], "Did you mean 'inner'"),
    ],
)
def test_a_group_that_is_no_one_number_is_refused(
    specs: list[TaskSpec], words: str, grouped: Path, tokenizer: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(task_catalogue, "TREE", grouped)
    with pytest.raises(TaskError, match=words):
        load(grouped, tokenizer, *specs)


def test_shipped_tasks_can_be_members_from_any_folder(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_group(
        tmp_path,
        "skills",
        task=["zoo_arithmetic", "zoo_cross"],
        aggregate_metric_list=[{"metric": "exact_match"}],
    )
    harness = load(tmp_path, tokenizer, declared("skills"))
    assert {t: len(ids) for t, ids in harness.items("test").items()} == {
        t: len((REPO / "evaluators" / "zoo" / f"{t}.test.jsonl").read_text().splitlines())
        for t in ("zoo_arithmetic", "zoo_cross")
    }


def test_a_group_is_one_term_of_a_search(tmp_path: Path) -> None:
    write_group(
        tmp_path,
        "skills",
        task=["zoo_arithmetic", "zoo_cross"],
        aggregate_metric_list=[{"metric": "exact_match"}],
    )
    file = search_file(tmp_path, "trial", include=[str(tmp_path)])
    document = json.loads(file.read_text())
    document["tasks"] = [{"task": "skills", "weight": 3.0}, {"task": "zoo_lookup"}]
    file.write_text(json.dumps(document))
    opened = opening.open_search(loading.load(str(file))[0], opening.Allowed(tasks=True))
    items = opened.harness.items("validation")
    assert set(items) == {"zoo_arithmetic", "zoo_cross", "zoo_lookup"}
    evaluation = opened.load().evaluate(opened.space.decode([0.0] * len(opened.space.axes)), items)
    assert evaluation.error is None
    shares = dict(opened.harness.subtasks("skills"))
    skills = math.fsum(share * evaluation.metrics[leaf] for leaf, share in shares.items())
    assert opened.objective.reported_score(evaluation) == pytest.approx(
        (3 * skills + evaluation.metrics["zoo_lookup"]) / 4
    )
    assert opened.objective.shares() == pytest.approx(
        {**{leaf: 0.75 * share for leaf, share in shares.items()}, "zoo_lookup": 0.25}
    )


def test_the_groups_mean_is_weighted_by_hand() -> None:
    group = Group("g", ("a", "b", "a"), (3, 4, 1), "acc", True)
    assert group.shares() == (("a", 0.5), ("b", 0.5))
    assert group_metric([0.5, 0.25, 1.0], group.sizes) == (1.5 + 1.0 + 1.0) / 8


# ---- prompts -----------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% if not loop.last %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}\n<assistant>{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
)
KINDS: dict[str, Mapping[str, Any]] = {
    "plain": CHOOSE,
    "description": CHOOSE | {"description": "Add numbers.\n"},
    "prefix": GENERATE | {"gen_prefix": "The sum is"},
    "first": CHOOSE | {"fewshot_config": {"sampler": "first_n"}},
    "rolling": ROLLING,
}


@pytest.mark.parametrize("chat", [None, TEMPLATE, NO_SYSTEM], ids=["text", "chat", "chat without system"])
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_lm_evals(
    kind: str, chat: str | None, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", chat)
    write_task(
        tmp_path, "trial", KINDS[kind], {"search": sums(12, 60), "validation": sums(6, 80), "test": sums(8)}
    )
    from lm_eval.tasks import TaskManager

    shots = (0,) if kind == "rolling" else (0, 5)
    for few in shots:
        for multiturn in (False, True) if chat else (False,):
            for said in (None, "Be brief."):
                task = TaskManager(include_path=str(tmp_path), include_defaults=False).load(["trial"])[
                    "tasks"
                ]["trial"]
                task.set_config(key="num_fewshot", value=few)
                task.set_fewshot_seed(seed=1234)
                task.build_all_requests(
                    system_instruction=said,
                    apply_chat_template=chat is not None,
                    fewshot_as_multiturn=multiturn,
                    chat_template=hflm(tokenizer) if chat else None,
                )
                harness = load(
                    tmp_path,
                    tokenizer,
                    declared(num_fewshot=few),
                    apply_chat_template=chat is not None,
                    fewshot_as_multiturn=multiturn,
                    system_instruction=said,
                )
                own = harness.tasks["trial"].requests
                ours = [request.args for item in harness.items("test")["trial"] for request in own[item]]
                assert ours == [request.args for request in task.instances]
                if said and chat != NO_SYSTEM and kind != "rolling":
                    assert all(said in arguments[0] for arguments in ours)


def hflm(tokenizer: Any) -> Any:
    """HFLM's own rendering of a conversation, without a model."""
    from lm_eval.models.huggingface import HFLM

    lm = object.__new__(HFLM)
    lm.tokenizer, lm.chat_template_args = tokenizer, {}
    return lm.apply_chat_template


def test_examples_that_lm_eval_would_not_change_are_said(tmp_path: Path, tokenizer: Any) -> None:
    write_task(tmp_path, "trial", PLAIN | {"num_fewshot": 0})
    assert (
        "--num_fewshot would not change" in load(tmp_path, tokenizer, declared(num_fewshot=2)).warnings()[0]
    )
    assert load(tmp_path, tokenizer, declared(num_fewshot=0)).warnings() == ()


def test_splits_are_named_as_in_the_other_tests() -> None:
    assert tuple(SPLITS) == ROLES
