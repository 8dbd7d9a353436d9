"""Tasks that have what models write executed, as lm-eval's humaneval and mbpp: only where that is allowed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import evaluate  # type: ignore[import-untyped]
import pytest

from evomerge.checkpoints import Checkpoint
from evomerge.errors import TaskError
from evomerge.evaluation.lm_harness import sandbox
from evomerge.evaluation.lm_harness.harness import LmHarness
from evomerge.evaluation.lm_harness.results import TaskValues
from evomerge.evaluation.lm_harness.task_loading import TaskSpec
from evomerge.merging import model_loading
from tests.support.toy import zoo_folder


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return model_loading.load_tokenizer(Checkpoint(zoo_folder() / "base"))


@pytest.fixture(autouse=True)
def unimported() -> Iterator[None]:
    def forget() -> None:
        for name in [
            n for n in sys.modules if n.startswith(("lm_eval.tasks.humaneval", "lm_eval.tasks.mbpp"))
        ]:
            del sys.modules[name]

    forget()
    yield
    forget()


HUMANEVAL = [
    {
        "task_id": f"own/{n}",
        "prompt": f"def add{n}(a):\n",
        "test": f"def check(f):\n    assert f(1) == {n + 1}\n",
        "entry_point": f"add{n}",
        "canonical_solution": f"    return a + {n}\n",
    }
    for n in range(12)
]
MBPP = [
    {
        "task_id": n,
        "text": f"Add {n}.",
        "code": f"def add{n}(a):\n    return a + {n}",
        "test_list": [f"assert add{n}({i}) == {n + i}" for i in range(3)],
    }
    for n in range(12)
]


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own.yaml").write_text(
        f"include: {sandbox.TREE / name / f'{name}.yaml'}\n"
        "task: own\ndataset_path: json\ndataset_name: null\n"
        "dataset_kwargs: {data_files: {test: items.jsonl}}\n"
    )
    return folder


def test_what_models_write_is_not_executed_unasked(tmp_path: Path, tokenizer: Any) -> None:
    folder = write(tmp_path / "own", "humaneval", HUMANEVAL)
    with pytest.raises(TaskError, match=r"'own' executes code that models write.*--allow-code-execution"):
        LmHarness([TaskSpec("own")], tokenizer, include=[folder])


@pytest.mark.parametrize(("name", "rows"), [("humaneval", HUMANEVAL), ("mbpp", MBPP)])
def test_code_tasks_could_not_be_searched_on(
    name: str, rows: list[dict[str, Any]], tmp_path: Path, tokenizer: Any
) -> None:
    """A right program counts 1 and a wrong one 0, by the task's own functions."""
    load = evaluate.load
    folder = write(tmp_path / "own", name, rows)
    harness = LmHarness([TaskSpec("own")], tokenizer, include=[folder], allow_code=True)
    assert evaluate.load is load
    loaded = harness.tasks["own"]
    solution = {str(doc["task_id"]): doc.get("canonical_solution", doc.get("code")) for doc in rows}
    pairs = [(item, loaded.requests[item]) for item in harness.items("search")["own"]]
    for position, (_, requests) in enumerate(pairs):
        right = solution[str(requests[0].doc["task_id"])]
        requests[0].resps = [right if position % 2 == 0 else "    return None\n"]
    values = TaskValues(loaded).values(pairs)
    assert values == [float(position % 2 == 0) for position in range(len(pairs))]
    assert harness.sign("own") == 1


def test_tasks_that_execute_answers_in_our_own_process_stay_refused(tokenizer: Any) -> None:
    """cruxeval calls exec itself: no child process would hold it."""
    places = {
        folder.name: sandbox.executing_line(folder, but_metric=True)
        for folder in (sandbox.TREE / "cruxeval", sandbox.TREE / "humaneval", sandbox.TREE / "mbpp")
    }
    assert places["cruxeval"]
    assert places["humaneval"] is places["mbpp"] is None
