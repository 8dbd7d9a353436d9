"""A task's name that is written wrong is said at once, with its place, before a model is opened."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from evomerge import _resources
from evomerge.evaluation.lm_harness import task_names
from evomerge.evaluation.lm_harness.task_names import names_in, unknown_name
from tests.support.lm_eval_tasks import CHOOSE, write_task
from tests.support.toy import REPO, environment, in_process, search_file


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(REPO)


def test_every_name_of_lm_evals_index_is_known() -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(_resources.evaluators()))
    own = task_names._own_names()
    assert own is not None
    assert set(manager.all_tasks) - own - names_in([_resources.evaluators()]) == set()
    assert task_names._own_names() == own, "as it is read from the cache"


@pytest.mark.parametrize("verb", ["run", "plan"])
def test_a_misspelt_task_has_a_line_and_costs_no_model(verb: str, tmp_path: Path) -> None:
    file = search_file(tmp_path, "slip")
    document = json.loads(file.read_text())
    document["models"]["math"] = "no/such/model"
    document["tasks"][2]["task"] = "zoo_strng"
    file.write_text(json.dumps(document, indent=1))
    line = next(i for i, text in enumerate(file.read_text().splitlines(), 1) if "zoo_strng" in text)
    code, _, err = in_process(verb, file)
    assert code == 2
    assert f"{file}:{line}:" in err
    assert "unknown task 'zoo_strng'. Did you mean 'zoo_string'?" in err


def test_lm_eval_is_not_imported_for_it(tmp_path: Path) -> None:
    file = search_file(tmp_path, "slip")
    file.write_text(file.read_text().replace('"zoo_lookup"', '"arc_eazy"'))
    code = (
        "import sys, evomerge\nfrom evomerge.errors import ConfigError\n"
        "try:\n    evomerge.plan(sys.argv[1])\n"
        "except ConfigError as error:\n    print(error)\n"
        "print('lm_eval' in sys.modules, 'transformers' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "unknown task 'arc_eazy'. Did you mean 'arc_easy'?" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "False False"


def test_included_folders_groups_and_tags_are_known(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "tasks", "mine", CHOOSE | {"tag": ["one_tag", "other_tag"]})
    (folder / "group.yaml").write_text("group: many\ntask:\n  - mine\n  - {task: inline, group: inner}\n")
    known = ["mine", "one_tag", "other_tag", "many", "inline", "inner", "zoo_cross", "arc_easy", "mmlu"]
    assert unknown_name(known, [folder]) is None
    found = unknown_name([*known, "manny"], [folder])
    assert found == (len(known), "unknown task 'manny'. Did you mean 'many'?")


def test_a_search_that_is_right_reads_no_tree(tmp_path: Path) -> None:
    assert unknown_name(["zoo_cross", "zoo_lookup"], []) is None
    assert not (tmp_path / "cache").exists()
