"""Files and tasks as attackers: each attack is made, shown to work where nothing guards, and must do nothing
here.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from lm_eval import utils as lm_utils
from safetensors.torch import load_file, save_file

from evomerge import _resources, _yaml, config
from evomerge._redaction import ScrubbedFormatter, scrub, scrub_data
from evomerge.checkpoints import Checkpoint, locate, reference
from evomerge.config import loading as loading_module
from evomerge.errors import CheckpointError, ConfigError, EvomergeError, StudyError, TaskError
from evomerge.evaluation.lm_harness import lm_eval_patches, sandbox, task_catalogue
from evomerge.evaluation.lm_harness.harness import LmHarness
from evomerge.evaluation.lm_harness.prompts import chat_template
from evomerge.evaluation.lm_harness.task_loading import TaskSpec
from evomerge.launch import opening
from evomerge.launch.tasks import open_tasks, scoring_facts
from evomerge.merging import checkpoint_writer, model_loading
from evomerge.recipes import Mix, Recipe
from evomerge.store.paths import store_path
from evomerge.workers import worker
from tests.support.lm_eval_tasks import CHOOSE, GENERATE, LIKELIHOOD, sums, write_task
from tests.support.toy import REPO, llama, search_file, zoo_folder

FEW = {"search": sums(4), "validation": sums(3, 10), "test": sums(6, 20)}


@pytest.fixture(scope="module")
def base() -> Checkpoint:
    return Checkpoint(zoo_folder() / "base")


@pytest.fixture(scope="module")
def tokenizer(base: Checkpoint) -> Any:
    return model_loading.load_tokenizer(base)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that an attack makes where it succeeds."""
    return tmp_path / "owned"


# ---- search files ------------------------------------------------------------------------------------------

HOSTILE = {
    "an alias of nothing": "a: *x\n",
    "an alias inside itself": "a: &x [*x]\n",
    "a merge of itself": "a: &x {<<: *x}\n",
    "a bomb of merge keys": "a: &a {x: 1}\n"
    + "".join(
        f"{c}: &{c} {{<<: [*{p}, *{p}]}}\n" for p, c in zip("abcdefghijklmno", "bcdefghijklmnop", strict=True)
    ),
    "a bomb of aliases": "a: &a [x, x]\n"
    + "".join(f"{c}: &{c} [*{p}, *{p}]\n" for p, c in zip("abcdefghijklmno", "bcdefghijklmnop", strict=True)),
    "a key twice": "a: 1\nb: 2\na: 3\n",
    "33 levels": "[" * 33 + "]" * 33,
    "100,000 levels": "[" * 100_000,
    "a megabyte": "a: " + "x" * 1_000_001,
    "a Python object": "a: !!python/name:os.system\n",
    "a tag of its own": "a: !function os.system\n",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_search_file_is_refused_with_its_place(what: str, tmp_path: Path) -> None:
    file = tmp_path / "search.yaml"
    file.write_text(HOSTILE[what])
    with pytest.raises(ConfigError, match=r"search\.yaml"):
        _yaml.read(file)


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/full", "/dev/null", "a pipe"])
def test_a_device_is_no_search_file(device: str, tmp_path: Path) -> None:
    path = Path(device)
    if device == "a pipe":
        path = tmp_path / "pipe"
        os.mkfifo(path)
    with pytest.raises(ConfigError, match="a device or a pipe"):
        _yaml.read(path)


def test_the_bounds_of_a_search_file_are_those_that_were_asked_for() -> None:
    assert _yaml.MAX_BYTES <= 1_000_000
    assert _yaml.MAX_DEPTH <= 32
    depth = _yaml.MAX_DEPTH
    assert _yaml.parse("[" * depth + "]" * depth, "deep").data, "up to the bound it is read"


# ---- folders of tasks --------------------------------------------------------------------------------------


def settings(tmp_path: Path, task: str, *include: Path) -> config.Config:
    file = search_file(tmp_path, "trial", include=[str(p) for p in include])
    document = json.loads(file.read_text())
    document["tasks"] = [{"task": task}]
    file.write_text(json.dumps(document))
    return loading_module.load(str(file))[0]


def hostile_task(folder: Path, mark: Path) -> Path:
    """A task whose module leaves a mark where it is imported."""
    write_task(folder, "hostile", GENERATE | {"process_results": "!function own.score"}, FEW)
    (folder / "own.py").write_text(
        f"open({str(mark)!r}, 'w').close()\ndef score(doc, results):\n    return {{'exact_match': 1.0}}\n"
    )
    return folder


def test_code_of_a_task_folder_runs_by_a_flag_alone(tmp_path: Path, mark: Path, base: Checkpoint) -> None:
    asked = settings(tmp_path, "hostile", hostile_task(tmp_path / "theirs", mark))
    with pytest.raises(ConfigError, match=r"'.*theirs': task files there can run Python .* --allow-tasks"):
        open_tasks(asked, base)
    assert not mark.exists()
    open_tasks(asked, base, allow_tasks=True)
    assert mark.exists(), "allowed, it runs"


def test_a_search_does_not_open_others_task_folders(tmp_path: Path, mark: Path) -> None:
    asked = settings(tmp_path, "hostile", hostile_task(tmp_path / "theirs", mark))
    with pytest.raises(ConfigError, match="--allow-tasks"):
        opening.open_search(asked)
    assert not mark.exists()


def test_shipped_folders_need_no_flag(
    tmp_path: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_tasks(
        settings(tmp_path, "zoo_cross", _resources.evaluators(), _resources.evaluators() / "zoo"), base
    ).items("test")["zoo_cross"]
    monkeypatch.chdir(_resources.evaluators())
    (tmp_path / "link").symlink_to(tmp_path)
    for way_out in (Path("..") / "tests", Path("zoo") / ".." / ".." / "tests", tmp_path / "link"):
        with pytest.raises(ConfigError, match="--allow-tasks"):
            open_tasks(settings(tmp_path, "zoo_cross", way_out), base)


def test_code_of_a_task_folder_is_recorded_by_its_hash(tmp_path: Path, tokenizer: Any) -> None:
    found = []
    for name, text in (("one", "N = 1"), ("same", "N = 1"), ("other", "N = 2")):
        task = GENERATE | {"process_results": "!function own.score"}
        write_task(tmp_path / name, "trial", task, FEW)
        (tmp_path / name / "own.py").write_text(
            "from theirs import N\ndef score(doc, results):\n    return {'exact_match': float(N)}\n"
        )
        (tmp_path / name / "deep").mkdir()
        (tmp_path / name / "deep" / "beside.py").write_text(text)
        (tmp_path / name / "theirs.py").write_text("N = 1")
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(tmp_path / name))
            patch.delitem(sys.modules, "theirs", raising=False)
            found.append(
                LmHarness(
                    [TaskSpec("trial", splits="declared")], tokenizer, include=[tmp_path / name]
                ).fingerprint()
            )
            patch.delitem(sys.modules, "theirs", raising=False)
    assert found[0] == found[1]
    assert found[0] != found[2], "any Python of the folder counts, for functions import what lies beside them"


# ---- templates ---------------------------------------------------------------------------------------------


def escapes(mark: Path) -> dict[str, str]:
    touch = f"open('{mark}', 'w').close()"
    return {
        "globals of a function": "{{ lipsum.__globals__['__builtins__']['exec'](\"" + touch + '") }}',
        "a filter for attributes": "{{ (lipsum|attr('__globals__'))['__builtins__']['exec'](\""
        + touch
        + '") }}',
        "subclasses": "{% for c in ''.__class__.__mro__[1].__subclasses__() %}{% if c.__init__.__globals__ "
        "is mapping and "
        "c.__init__.__globals__['__builtins__'] is mapping %}{{ "
        "c.__init__.__globals__['__builtins__']['exec'](\"" + touch + '") }}{% endif %}{% endfor %}',
        "a map of attributes": "{{ ([lipsum]|map(attribute='__globals__')|first)['__builtins__']['exec'](\""
        + touch
        + '") }}',
    }


ESCAPES = tuple(escapes(Path("x")))
FIELDS = ("doc_to_text", "doc_to_target", "doc_to_choice", "description", "doc_to_text of shots")


@pytest.mark.parametrize("how", ESCAPES)
def test_an_escape_from_a_template_is_one(how: str, mark: Path) -> None:
    """The control: without a sandbox the attack runs Python."""
    jinja2.Environment().from_string(escapes(mark)[how]).render()
    assert mark.exists()


def hostile_template(tmp_path: Path, mark: Path, how: str, field: str) -> Path:
    attack = escapes(mark)[how]
    own = (
        {field: attack}
        if field != "doc_to_text of shots"
        else {"fewshot_config": {"doc_to_text": attack}, "num_fewshot": 1}
    )
    return write_task(tmp_path / "theirs", "trial", CHOOSE | own, FEW)


@pytest.mark.parametrize("field", FIELDS)
def test_every_template_of_a_task_is_a_way_in(
    field: str, tmp_path: Path, mark: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: with lm-eval's own environment the attack runs Python."""
    lm_eval_patches.harden()  # once a process, and undone here
    monkeypatch.setattr(
        lm_utils, "env", jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    )
    theirs = hostile_template(tmp_path, mark, ESCAPES[0], field)
    with contextlib.suppress(TaskError):
        LmHarness([TaskSpec("trial", splits="declared")], tokenizer, include=[theirs])
    assert mark.exists()


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("how", ESCAPES)
def test_no_template_of_a_task_runs_python(
    how: str, field: str, tmp_path: Path, mark: Path, tokenizer: Any
) -> None:
    theirs = hostile_template(tmp_path, mark, how, field)
    with contextlib.suppress(TaskError):
        LmHarness([TaskSpec("trial", splits="declared")], tokenizer, include=[theirs])
    assert not mark.exists()


def test_a_template_is_refused_by_name_and_changes_nothing_it_is_given(
    tmp_path: Path, tokenizer: Any
) -> None:
    for number, attack in enumerate(
        ("{{ ''.__class__ }}", "{{ choices.append('x') }}", "{{ '{0.__class__}'.format(answer) }}")
    ):
        write_task(tmp_path / str(number), "trial", CHOOSE | {"doc_to_text": attack}, FEW)
        with pytest.raises(TaskError, match=r"'trial'.*(unsafe|SecurityError)"):
            LmHarness([TaskSpec("trial", splits="declared")], tokenizer, include=[tmp_path / str(number)])


def test_prompts_are_those_of_a_plain_environment(tokenizer: Any, tmp_path: Path) -> None:
    """The sandbox changes no text: rendered here by jinja2 without one."""
    listed = "{% set n = namespace(x=0) %}{% for c in choices %}{{loop.index}}. {{c|upper}}, {% endfor %}"
    template = listed + "{{prompt.split()[1:3]|join('-')}}{{'%03d' % n.x}}\n"
    write_task(tmp_path, "trial", LIKELIHOOD | {"doc_to_text": template}, FEW)
    harness = LmHarness([TaskSpec("trial", splits="declared")], tokenizer, include=[tmp_path])
    plain = jinja2.Environment(keep_trailing_newline=True).from_string(template)
    ours = [
        request.args[0]
        for item in harness.items("test")["trial"]
        for request in harness.tasks["trial"].requests[item]
    ]
    assert ours == [plain.render(**doc) for doc in FEW["test"]]


@pytest.mark.parametrize("how", ESCAPES)
def test_no_chat_template_of_a_model_runs_python(how: str, mark: Path, base: Checkpoint) -> None:
    own: Any = model_loading.load_tokenizer(base)
    own.chat_template = "{{ messages[0]['content'] }}"
    assert chat_template(own, [{"role": "user", "content": "hello"}]) == "hello"
    own.chat_template = escapes(mark)[how]
    with pytest.raises(jinja2.exceptions.TemplateError):
        chat_template(own, [{"role": "user", "content": "hello"}])
    assert not mark.exists()


def test_a_task_file_makes_no_python_objects(
    tmp_path: Path, mark: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_catalogue, "TREE", write_task(tmp_path / "tree", "other", GENERATE, FEW))
    theirs = write_task(tmp_path / "theirs", "trial", GENERATE, FEW)
    with (theirs / "trial.yaml").open("a") as file:
        file.write(f"metadata: !!python/object/apply:os.mkdir [{str(mark)!r}]\n")
    with pytest.raises(TaskError, match="unknown task 'trial'"):
        LmHarness([TaskSpec("trial", splits="declared")], tokenizer, include=[theirs])
    assert not mark.exists()


# ---- code that is fetched, or that models write ------------------------------------------------------------

EXECUTING = {
    "humaneval": "humaneval",
    "humaneval_infilling": "humaneval_multi_line_infilling",
    "mbpp": "mbpp",
    "cruxeval": "cruxeval_output",
    "longproc": "longproc_countdown_0.5k",
    "noreval/ask_gec": "ask_gec_p0",
}


@pytest.mark.parametrize("place", EXECUTING)
def test_lm_evals_tasks_that_execute_answers_are_refused_before_their_code_is_imported(
    place: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four of these six do not declare `unsafe_code`, or not in all their tasks."""
    there = sandbox.TREE / place
    monkeypatch.setattr(task_catalogue, "TREE", there)
    module = f"lm_eval.tasks.{place.replace('/', '.')}"
    with pytest.raises(TaskError, match=f"'{EXECUTING[place]}.*' executes code that models write"):
        LmHarness([TaskSpec(EXECUTING[place])], tokenizer)
    assert [name for name in sys.modules if name.startswith(module + ".")] == []


@pytest.mark.parametrize("how", ["a group", "a member with other settings", "an include"])
def test_a_task_that_executes_answers_hides_nowhere(
    how: str, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_catalogue, "TREE", sandbox.TREE / "humaneval")
    given: dict[str, Any] = {
        "a group": {"group": "skills", "task": ["humaneval"]},
        "a member with other settings": {
            "group": "skills",
            "task": [{"task": "humaneval", "unsafe_code": False}],
        },
        "an include": {
            "include": str(sandbox.TREE / "humaneval" / "humaneval.yaml"),
            "task": "skills",
            "unsafe_code": False,
        },
    }
    (tmp_path / "skills.yaml").write_text(json.dumps(given[how]))
    with pytest.raises(TaskError, match="executes code that models write"):
        LmHarness([TaskSpec("skills")], tokenizer, include=[tmp_path])


def test_most_of_lm_evals_tree_executes_nothing() -> None:
    """The scan tells apart: of the folders with Python, only those few are refused."""
    folders = {file.parent for file in sandbox.TREE.rglob("*.py") if file.parent != sandbox.TREE}
    refused = {str(f.relative_to(sandbox.TREE)) for f in folders if sandbox.executing_line(f)}
    assert set(EXECUTING) <= refused
    assert len(refused) < len(folders) / 10


@pytest.mark.parametrize(
    "metric", [{"metric": "someone/metric"}, {"metric": "accuracy", "hf_evaluate": True}]
)
def test_no_metric_is_fetched(
    metric: dict[str, Any], tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("evaluate.load", lambda name, *more, **named: asked.append(name))
    listed = {"metric_list": [metric | {"aggregation": "mean", "higher_is_better": True}]}
    write_task(tmp_path, "trial", GENERATE | listed, FEW)
    write_task(
        tmp_path, "choices", CHOOSE | {"metric_list": [*CHOOSE["metric_list"], *listed["metric_list"]]}, FEW
    )
    with pytest.raises(TaskError, match=f"'trial' is scored by '{metric['metric']}', a program"):
        LmHarness([TaskSpec("trial", splits="declared")], tokenizer, include=[tmp_path])
    assert LmHarness([TaskSpec("choices", "acc", splits="declared")], tokenizer, include=[tmp_path]).items(
        "test"
    )["choices"]
    assert asked == []


@functools.cache
def parsed() -> list[tuple[str, ast.AST]]:
    """(file, every node of it) of the package."""
    files = sorted((REPO / "evomerge").rglob("*.py"))
    return [
        (str(file.relative_to(REPO)), node)
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
    ]


def calls(*names: str) -> list[tuple[str, ast.Call]]:
    """(place, call) of every call of such a function or method in the package."""
    found = []
    for file, node in parsed():
        if isinstance(node, ast.Call):
            name = (
                node.func.attr
                if isinstance(node.func, ast.Attribute)
                else node.func.id
                if isinstance(node.func, ast.Name)
                else ""
            )
            if name in names:
                found.append((f"{file}:{node.lineno}", node))
    return found


def test_remote_code_is_refused_wherever_a_model_is_loaded() -> None:
    loading = calls("from_pretrained", "from_config", "HFLM", "pipeline", "load_dataset")
    assert len(loading) >= 4
    loose = [
        place
        for place, call in loading
        if not any(k.arg == "trust_remote_code" and ast.unparse(k.value) == "False" for k in call.keywords)
    ]
    assert loose == []


# ---- pickles -----------------------------------------------------------------------------------------------


class Payload:
    """Makes a folder where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_a_payload_is_one(mark: Path) -> None:
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.is_dir()


def test_nothing_is_unpickled() -> None:
    """No file is: pickles go between our own processes alone, over Ray and over pipes."""
    modules = {"pickle", "dill", "joblib", "shelve", "marshal"}
    wrong = []
    for file, node in parsed():
        names = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [str(node.module)]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        wrong += [f"{file} {n}" for n in names if n.split(".")[0] in modules]
    assert wrong == [
        "evomerge/workers/held_parents.py pickle",  # to and from a process of the same user, which is checked
        "evomerge/workers/parent_holder.py pickle",
        "evomerge/workers/worker_process.py pickle",  # a job is packed for the pipe
    ]
    unpickling = [
        place
        for place, call in calls("load", "loads")
        if ast.unparse(call.func) in ("torch.load", "np.load", "numpy.load", "pd.read_pickle")
        and "allow_pickle=False" not in ast.unparse(call)
    ]
    assert unpickling == []
    assert {place.split(":")[0] for place, call in calls("loads") if "pickle" in ast.unparse(call.func)} == {
        "evomerge/workers/parent_holder.py",
        "evomerge/workers/ray_pool/actor.py",
    }


def attacked(folder: Path, mark: Path, name: str) -> Path:
    """A model folder with a pickle of weights that leaves a mark."""
    torch.save({"model.norm.weight": Payload(mark)}, folder / name)
    return folder


def test_weights_in_a_pickle_are_refused_unread(tmp_path: Path, mark: Path) -> None:
    folder = attacked(llama(tmp_path / "model", 1), mark, "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        Checkpoint(folder)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    torch.save({"x": Payload(mark)}, adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        reference.open_parent(f"{llama(tmp_path / 'base', 2)}+{adapter}")
    assert not mark.exists()


@pytest.mark.parametrize("weights", ["model.safetensors", "weights.safetensors"])
def test_a_pickle_beside_safetensors_is_not_read(weights: str, tmp_path: Path, mark: Path) -> None:
    folder = attacked(llama(tmp_path / "model", 1), mark, "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / weights)
    try:
        model_loading.load_base(Checkpoint(folder), "float32")
    except EvomergeError:
        assert weights != "model.safetensors"
    assert not mark.exists()


def test_a_pickle_as_a_tasks_data_is_not_read(tmp_path: Path, mark: Path, tokenizer: Any) -> None:
    file = tmp_path / "data.pkl"
    file.write_bytes(pickle.dumps(Payload(mark)))
    kwargs = {"data_files": dict.fromkeys(FEW, str(file))}
    write_task(tmp_path, "trial", GENERATE | {"dataset_path": "pandas", "dataset_kwargs": kwargs}, FEW)
    with pytest.raises(TaskError, match="'trial'"):
        LmHarness([TaskSpec("trial", splits="declared")], tokenizer, include=[tmp_path])
    assert not mark.exists()


# ---- names that look like paths ----------------------------------------------------------------------------


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_tensors_name_is_no_path(tmp_path: Path) -> None:
    model = llama(tmp_path / "in" / "model", 1, layers=2)
    tensors = load_file(model / "model.safetensors")
    save_file(
        tensors | {"../../escape": torch.ones(2), "/tmp/evomerge-escape": torch.ones(2)},
        model / "model.safetensors",
        metadata={"format": "pt"},
    )
    before, parents = everything(tmp_path), {"../../base": Checkpoint(model)}

    def whole(layer: int | None) -> Mix:
        return Mix("passthrough", (("../../base", layer),))

    checkpoint_writer.write(
        Recipe("../../base", (whole(0), whole(1)), whole(None), whole(None)), parents, tmp_path / "out"
    )
    after = everything(tmp_path)
    assert {name for name in after - before if not name.startswith("out")} == set()
    assert "../../escape" in load_file(next((tmp_path / "out").glob("*.safetensors"))), (
        "a name like any other"
    )
    assert not Path("/tmp/evomerge-escape").exists()


def test_a_tasks_name_is_no_path(
    tmp_path: Path, mark: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = write_task(tmp_path / "a" / "b", "trial", GENERATE | {"task": "../../escape"}, FEW)
    before = everything(tmp_path)
    harness = LmHarness([TaskSpec("../../escape", splits="declared")], tokenizer, include=[inside])
    assert harness.items("test")["../../escape"]
    assert everything(tmp_path) == before
    monkeypatch.setattr(task_catalogue, "TREE", write_task(tmp_path / "tree", "other", GENERATE, FEW))
    outside = hostile_task(tmp_path / "outside", mark) / "hostile.yaml"
    for name in (str(outside), os.path.relpath(outside), "../outside/hostile", "*"):
        with pytest.raises(TaskError, match="unknown task"):
            LmHarness([TaskSpec(name)], tokenizer)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../x", "a/b", "/tmp/x", "..", ".", ""])
def test_a_studys_name_is_no_path(name: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError):
        store_path(name, tmp_path, new=True)
    file = search_file(tmp_path, "trial")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"study": name}))
    with pytest.raises(ConfigError, match="study"):
        loading_module.load(str(file))


@pytest.mark.parametrize("name", ["../../x", "a/b/c", "/no-such-folder/model", "a\nb", "https://host/model"])
def test_a_models_name_is_a_folder_or_a_repository(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    with pytest.raises(CheckpointError):
        locate(name)


def test_a_shard_outside_the_models_folder_is_refused(tmp_path: Path) -> None:
    model, other = llama(tmp_path / "model", 1), llama(tmp_path / "other", 2)
    names = dict.fromkeys(load_file(model / "model.safetensors"), "../other/model.safetensors")
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError, match=r"no \.safetensors file of its folder"):
        Checkpoint(model)
    (model / "model.safetensors.index.json").unlink()
    (model / "model.safetensors").symlink_to(other / "model.safetensors")
    with pytest.raises(CheckpointError, match="link that leaves"):
        Checkpoint(model)


# ---- secrets -----------------------------------------------------------------------------------------------

TOKEN = "hf_" + "aB3" * 11
SECRETS: dict[str, tuple[str, str, str]] = {
    "Hugging Face": (f"401 for {TOKEN}: no access", TOKEN, "401 for ***: no access"),
    "OpenAI": (
        "key sk-proj-abcdefghijklmnop1234 is wrong",
        "sk-proj-abcdefghijklmnop1234",
        "key *** is wrong",
    ),
    "GitHub": ("ghp_" + "x1" * 18, "ghp_" + "x1" * 18, "***"),
    "AWS": ("AKIAABCDEFGHIJKLMNOP denied", "AKIAABCDEFGHIJKLMNOP", "*** denied"),
    "a query": (
        "GET https://host/x?key=0123456789abcdef&n=3",
        "0123456789abcdef",
        "GET https://host/x?key=***&n=3",
    ),
    "a header": ("Authorization: Bearer abc.def-ghi_123456", "abc.def-ghi_123456", "Authorization: ***"),
    "a header in a dict": (
        "{'Authorization': 'Basic dXNlcjpwYXNz'}",
        "dXNlcjpwYXNz",
        "{'Authorization': '***'}",
    ),
    "a URL": (
        "proxy http://me:pa%40ss@proxy.local:8080/x failed",
        "pa%40ss",
        "proxy http://***@proxy.local:8080/x failed",
    ),
    "a setting": ("WANDB_API_KEY=0123456789abcdef0123", "0123456789abcdef0123", "WANDB_API_KEY=***"),
    "JSON": ('{"password": "hunter2", "n": 1}', "hunter2", '{"password": "***", "n": 1}'),
    "a query of JSON": ('{"token": "abcd1234", "n": 1}', "abcd1234", '{"token": "***", "n": 1}'),
    "JSON of another name": ("{'access_token': 'abcd1234'}", "abcd1234", "{'access_token': '***'}"),
    "a variable": ("DB_PASS=hunter2 next", "hunter2", "DB_PASS=*** next"),
    "a variable in YAML": ("DB_PWD: hunter2", "hunter2", "DB_PWD: ***"),
    "a personal access token": ("export AZURE_PAT='abcd1234'", "abcd1234", "export AZURE_PAT='***'"),
    "basic auth": ("NPM_AUTH=abcd1234==", "abcd1234", "NPM_AUTH=***"),
    "a credential": ("MY_CREDENTIAL=abcd1234", "abcd1234", "MY_CREDENTIAL=***"),
    "a second key": ("MY_KEY_2=abcd1234", "abcd1234", "MY_KEY_2=***"),
    "a URL with a slash": ("http://me:pa/ss@host.io/x", "pa/ss", "http://***@host.io/x"),
    "a URL with a hash": ("http://me:p#a/s@host.io:80/x", "p#a/s", "http://***@host.io:80/x"),
    "user and password": ("rsync me:hunter2@host.io:/x", "hunter2", "rsync me:***@host.io:/x"),
    "a cookie": ("Cookie: sid=abcd1234; theme=dark", "abcd1234", "Cookie: ***"),
    "a cookie that is set": ('"set-cookie": "sid=abcd1234; Path=/"', "abcd1234", '"set-cookie": "***"'),
    "GitLab": ("glpat-abcdefghij0123456789 x", "glpat-abcdefghij0123456789", "*** x"),
    "PyPI": ("pypi-AgEIcHlwaS5vcmcCJDEyMzQ1Njc4", "AgEIcHlwaS5vcmc", "***"),
    "npm": ("npm_" + "a1B2" * 9, "npm_" + "a1B2" * 9, "***"),
    "Stripe": ("sk_live_" + "a1B2" * 6, "sk_live_" + "a1B2" * 6, "***"),
    "SendGrid": ("SG." + "a" * 22 + "." + "b" * 43, "a" * 22, "***"),
    "Databricks": ("dapi" + "0123456789abcdef" * 2, "0123456789abcdef", "***"),
    "Slack's app": ("xapp-1-A0123-456-abcdef0123", "abcdef0123", "***"),
    "a web hook of Slack": ("https://hooks.slack.com/services/T0/B0/abcdefgh", "abcdefgh", "***"),
    "Replicate": ("r8_" + "a1B2" * 10, "r8_" + "a1B2" * 10, "***"),
    "Vault": ("hvs." + "a1B2" * 10, "hvs." + "a1B2" * 10, "***"),
    "Telegram": ("bot 123456789:AA" + "a1B2_" * 6 + "abc", "a1B2_a1B2_", "bot ***"),
    "Azure": ("AccountKey=" + "a1B2" * 10 + "==;x", "a1B2a1B2", "AccountKey=***;x"),
    "a web token": ("eyJhbGciOi12.eyJzdWIiOiIx.SflKxw", "eyJzdWIiOiIx", "***"),
}
PLAIN = (
    "KeyError: 'model.layers.3.mlp.up_proj.weight'", "density must be in (0, 1], got 1.3 (layer 7, model "
                                                     "math)",
    "eos_token=<|endoftext|>, pad_token_id=0",
    "num_key_value_heads=8 of 32; see "
    "https://huggingface.co/docs@main", "task-arithmetic-of-three-models failed", "",
)  # fmt: skip


@pytest.mark.parametrize("what", SECRETS)
def test_secrets_are_taken_out_and_the_rest_stays(what: str) -> None:
    text, secret, clean = SECRETS[what]
    assert scrub(text, {}) == clean
    assert secret not in scrub(text, {})
    assert scrub(clean, {}) == clean, "a second time changes nothing"


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_no_secret_stays(text: str) -> None:
    assert scrub(text, {}) == text


def test_values_of_variables_that_are_named_like_secrets_are_taken_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    named = {
        "MY_TOKEN": "correct horse",
        "db_password": "correct horse battery",
        "SIGNING_KEY": "a/b+c d",
        "SOME_SECRET": "1",
        "COLOR": "visible",
    }
    text = "correct horse battery; correct horse; a%2Fb%2Bc%20d; 1; visible"
    assert scrub(text, named) == "***; ***; ***; 1; visible", (
        "the longest first; a value of one character would blacken every log"
    )
    for name in (
        "DB_PASS",
        "DB_PWD",
        "GH_PAT",
        "NPM_AUTH",
        "MY_CREDENTIAL",
        "MY_KEY_2",
        "API_TOKENS",
        "COOKIE",
    ):
        assert scrub("it is correct-horse", {name: "correct-horse"}) == "it is ***", name
    for name in ("PWD", "OLDPWD", "PATH", "COMPASS", "PATTERN", "AUTHOR", "MONKEY_BARS"):
        assert scrub("it is correct-horse", {name: "correct-horse"}) == "it is correct-horse", name
    monkeypatch.setenv("EVOMERGE_TEST_TOKEN", "only in the environment")
    assert scrub("it is only in the environment") == "it is ***"


def test_a_secret_in_plain_data_is_taken_out_by_its_name_too() -> None:
    data = {"token": "abcd1234", "n": [1, {"api_key": "abcd1234", "eos_token": "</s>"}], "at": f"x {TOKEN}"}
    clean = {"token": "***", "n": [1, {"api_key": "***", "eos_token": "</s>"}], "at": "x ***"}
    assert scrub_data(data) == clean
    assert scrub_data(clean) == clean


def test_a_logs_lines_and_tracebacks_hold_no_secrets() -> None:
    import logging

    try:
        raise OSError(f"cannot fetch with {TOKEN}")
    except OSError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "token %s", (TOKEN,), sys.exc_info())
    line = ScrubbedFormatter("%(message)s").format(record)
    assert TOKEN not in line
    assert "cannot fetch with ***" in line


class Leaking:
    """An evaluator whose failure quotes a token."""

    def items(self, role: str) -> Any:
        return {}

    def score(self, model: Any, items: Any) -> Any:
        raise OSError(f"403 for {TOKEN}")


def test_a_candidates_stored_error_holds_no_secret(tmp_path: Path) -> None:
    scorer = worker.Worker(
        {"base": Checkpoint(llama(tmp_path / "base", 1, layers=2))}, "base", Leaking(), dtype="float32"
    )
    mix: Callable[[int | None], Mix] = lambda layer: Mix("passthrough", (("base", layer),))  # noqa: E731
    error = scorer.evaluate(
        Recipe("base", (mix(0), mix(1)), mix(None), mix(None), out_dtype="float32"), {}
    ).error
    assert error == "OSError: 403 for ***"


def test_how_scores_are_computed_is_a_fact(tmp_path: Path, base: Checkpoint) -> None:
    """What another study's scores are compared by: the tokenizer's files are in it, for a model's hash leaves
    them out.
    """
    import shutil

    asked = settings(tmp_path, "zoo_cross")
    copied = Path(shutil.copytree(base.path, tmp_path / "copied"))
    first = scoring_facts(asked, base, "cpu")
    assert scoring_facts(asked, Checkpoint(copied), "cpu") == first
    assert scoring_facts(asked, base, "cuda") != first
    with (copied / "tokenizer.json").open("a") as file:
        file.write("\n")
    assert Checkpoint(copied).content_hash() == base.content_hash()
    assert scoring_facts(asked, Checkpoint(copied), "cpu")["tokenizer"] != first["tokenizer"]
