"""What `evaluation.splits` takes, what it refuses, and that the advice of a refusal is not refused next."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from evomerge.checkpoints import Checkpoint
from evomerge.errors import TaskError
from evomerge.evaluation import ROLES
from evomerge.evaluation.lm_harness import task_catalogue
from evomerge.evaluation.lm_harness.harness import LmHarness
from evomerge.evaluation.lm_harness.items import ItemRules
from evomerge.evaluation.lm_harness.splits import SPLITS, Splits
from evomerge.evaluation.lm_harness.task_loading import TaskSpec
from evomerge.merging import model_loading
from tests.support.lm_eval_tasks import CHOOSE, GENERATE, own_id, sums, write_task
from tests.support.toy import zoo_folder

DOCS = {"search": sums(40), "validation": sums(30, 40), "test": sums(30, 70)}
SETS = [of for n in (1, 2, 3) for of in itertools.combinations(DOCS, n)]
NO_REFUSAL = ItemRules(allow_benchmark_test=True)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return model_loading.load_tokenizer(Checkpoint(zoo_folder() / "base"))


def load(folder: Path, tokenizer: Any, splits: Splits, rules: ItemRules | None = None) -> LmHarness:
    return LmHarness([TaskSpec("bench", splits=splits)], tokenizer, include=[folder], rules=rules)


def refused(folder: Path, tokenizer: Any, splits: Splits) -> str | None:
    try:
        load(folder, tokenizer, splits)
    except TaskError as error:
        return str(error)
    return None


@pytest.mark.parametrize("benchmark", [True, False], ids=["benchmark", "own"])
@pytest.mark.parametrize("of", SETS, ids=["+".join(of) for of in SETS])
def test_advice_led_into_the_next_refusal(
    of: tuple[str, ...], benchmark: bool, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gsm8k has training and test items: declared said hash, and hash said declared."""
    if of == ("search",) and benchmark:
        pytest.skip("lm-eval itself scores nothing of a task with training items alone")
    tree, own = tmp_path / "tree", tmp_path / "own"
    own.mkdir()
    write_task(tree, "bench", GENERATE, {role: DOCS[role] for role in of})
    if benchmark:
        monkeypatch.setattr(task_catalogue, "TREE", tree)
    folder = own if benchmark else tree
    if of == ("search",):
        with pytest.raises(TaskError):
            load(folder, tokenizer, "hash")
        return
    sentences = {splits: refused(folder, tokenizer, splits) for splits in SPLITS}
    possible = {splits for splits, sentence in sentences.items() if sentence is None}
    for sentence in sentences.values():
        if sentence is None:
            continue
        offered = re.findall(r"splits: ([a-z-]+), which (?:takes|deals|searches)", sentence)
        assert set(offered) == possible, sentence
        assert ("take another task" in sentence) == (not possible)
        assert ("allow_benchmark_test: true" in sentence) == benchmark
    if benchmark:
        assert load(folder, tokenizer, "hash", NO_REFUSAL).items("search")["bench"]
        assert "hash" not in possible


def test_a_benchmark_without_training_items_could_not_be_searched_at_all(
    tmp_path: Path, tokenizer: Any
) -> None:
    """mmlu and xcopa: validation items are searched, test items stay the test."""
    docs = {role: DOCS[role] for role in ("validation", "test")}
    write_task(tmp_path, "bench", CHOOSE, docs)
    items = {role: load(tmp_path, tokenizer, "validation").items(role)["bench"] for role in ROLES}
    ids = {role: [own_id(doc) for doc in of] for role, of in docs.items()}
    assert list(items["test"]) == ids["test"], "in the order of the documents, as lm-eval scores them"
    assert sorted([*items["search"], *items["validation"]]) == sorted(ids["validation"])
    assert (len(items["search"]), len(items["validation"])) == (18, 12)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_few_validation_items_leave_no_role_empty(count: int, tmp_path: Path, tokenizer: Any) -> None:
    """A group such as mmlu has tasks with eight validation items; by chance one role had none."""
    write_task(tmp_path, "bench", CHOOSE, {"validation": sums(count), "test": sums(4, 50)})
    harness = load(tmp_path, tokenizer, "validation")
    assert all(harness.items(role)["bench"] for role in ROLES)


def test_few_shot_examples_come_from_dev(tmp_path: Path, tokenizer: Any) -> None:
    docs = {"dev": sums(4, 90), "validation": sums(30), "test": sums(9, 50)}
    settings = {"fewshot_split": "dev", "fewshot_config": {"sampler": "first_n"}, "num_fewshot": 3}
    write_task(tmp_path, "bench", CHOOSE | settings, docs)
    harness = load(tmp_path, tokenizer, "validation")
    shots = [doc["prompt"] for doc in docs["dev"][:3]]
    for role in ROLES:
        for item in harness.items(role)["bench"]:
            prompt = harness.tasks["bench"].requests[item][0].args[0]
            assert all(shot in prompt for shot in shots)


def test_an_item_of_validation_was_its_own_few_shot_example(tmp_path: Path, tokenizer: Any) -> None:
    """Without a split of its own lm-eval draws examples from validation, where items are searched now."""
    settings = {"num_fewshot": 5}
    write_task(tmp_path, "bench", GENERATE | settings, {"validation": sums(7), "test": sums(9, 50)})
    harness = load(tmp_path, tokenizer, "validation")
    for role in ("search", "validation"):
        for item in harness.items(role)["bench"]:
            prompt = harness.tasks["bench"].requests[item][0].args[0]
            question = prompt.rpartition("Q:")[2]
            assert prompt.count(question) == 1, prompt


def test_validation_items_that_the_task_does_not_declare_are_found(tmp_path: Path, tokenizer: Any) -> None:
    """lm-eval's mmlu declares its test split alone, and its data have one called validation."""
    docs = {"validation": sums(30), "test": sums(9, 50)}
    write_task(tmp_path, "bench", CHOOSE, docs)
    file = tmp_path / "bench.yaml"
    file.write_text(re.sub(r"validation_split: .*\n", "", file.read_text()))
    assert "validation_split" not in file.read_text()
    assert len(load(tmp_path, tokenizer, "validation").items("search")["bench"]) == 18
