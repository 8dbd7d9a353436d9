"""What evomerge replaces of lm-eval is still there and still used; these tests fail when lm-eval changes."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import lm_eval.api.task
import pytest
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment
from lm_eval import utils as lm_utils
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import _yaml_loader

from evomerge.checkpoints import Checkpoint
from evomerge.errors import TaskError
from evomerge.evaluation.lm_harness import lm_eval_patches
from evomerge.merging import model_loading
from tests.support.lm_eval_tasks import CHOOSE, LIKELIHOOD, write_task
from tests.support.toy import zoo_folder


@pytest.fixture(autouse=True)
def hardened() -> None:
    lm_eval_patches.harden()


def test_lm_eval_renders_templates_by_the_environment_that_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert isinstance(lm_utils.env, ImmutableSandboxedEnvironment)
    rendered: list[str] = []
    monkeypatch.setattr(lm_utils.env, "from_string", lambda text: rendered.append(text) or _Constant())
    assert lm_utils.apply_template("{{a}}", {"a": 1}) == "constant"
    assert rendered == ["{{a}}"]


class _Constant:
    def render(self, **named: Any) -> str:
        return "constant"


def test_the_sandbox_has_lm_evals_own_filters_and_settings() -> None:
    assert "regex_replace" in lm_utils.env.filters
    assert lm_utils.env.keep_trailing_newline
    with pytest.raises(Exception, match="missing"):
        lm_utils.apply_template("{{missing}}", {})


def test_lm_eval_reads_yaml_by_the_loader_that_is_replaced(tmp_path: Path) -> None:
    assert issubclass(_yaml_loader._Base, yaml.CSafeLoader | yaml.SafeLoader)
    file = tmp_path / "task.yaml"
    file.write_text("task: trial\nvalue: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(yaml.YAMLError):
        _yaml_loader.load_yaml(file)


def test_lm_eval_takes_metrics_by_the_function_that_is_replaced(tmp_path: Path) -> None:
    assert lm_eval.api.task.get_metric is lm_eval_patches._get_metric
    with pytest.raises(TaskError, match="fetch and run"):
        lm_eval.api.task.get_metric("someone/metric")([1], [1])
    from lm_eval.tasks import TaskManager

    fetched = {"metric": "accuracy", "hf_evaluate": True, "aggregation": "mean", "higher_is_better": True}
    write_task(tmp_path, "trial", CHOOSE | {"metric_list": [fetched]})
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    task = manager.load(["trial"])["tasks"]["trial"]
    assert [type(metric) for metric in task._metric_fn_list.values()] == [lm_eval_patches.RefusedMetric]


def test_hflms_loglikelihood_passes_token_ids_to_the_method_that_is_replaced() -> None:
    folder = Checkpoint(zoo_folder() / "base")
    tokenizer = model_loading.load_tokenizer(folder)
    lm = HFLM(pretrained=model_loading.load_base(folder, "float32"), tokenizer=tokenizer, batch_size=1)
    request = Instance(request_type="loglikelihood", doc={}, arguments=("one plus", " two"), idx=0)
    ((_, context, continuation),) = lm_eval_patches.captured_token_pairs(lm, request)
    assert [*context, *continuation] == tokenizer.encode("one plus two")
    assert continuation
    assert "_loglikelihood_tokens" not in vars(lm), "the class's method is seen again"


def test_lm_eval_leaves_a_document_out_of_its_examples_where_they_come_from_the_test_split() -> None:
    source = inspect.getsource(lm_eval.api.task.ConfigurableTask.fewshot_context)
    assert "test_split" in source


def test_documents_are_rendered_once(tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    write_task(tmp_path, "trial", LIKELIHOOD)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    task = manager.load(["trial"])["tasks"]["trial"]
    doc = next(iter(task.test_docs()))
    plain = task.doc_to_target(doc)
    calls: list[Any] = []
    render = task.doc_to_target
    task.doc_to_target = lambda doc, *more, **named: calls.append(doc) or render(doc, *more, **named)
    lm_eval_patches.cache_document_rendering(task)
    assert [task.doc_to_target(doc) for _ in range(3)] == [plain] * 3
    assert len(calls) == 1
