"""The only file that replaces anything of lm-eval's: why, and for how long.

A test fails when lm-eval changes underneath.

For as long as the process lives (`harden`, called before tasks are read; lm-eval has no settings for these):

- `lm_eval.utils.env`: task files are data of strangers, and their Jinja templates could run Python. Rendered
  in a sandbox.
- `lm_eval.tasks._yaml_loader._Base`: without libyaml lm-eval reads YAML with FullLoader, which builds Python
  objects.
- `lm_eval.api.task.get_metric`: metrics that lm-eval does not have are programs that `evaluate` fetches from
  the hub and runs.

For one call: `HFLM._loglikelihood_tokens` (`captured_token_pairs`), to get the token ids that
`HFLM.loglikelihood` makes, and a task's `test_split` (`never_its_own_example`). While tasks are imported that
have what models write executed: `evaluate.load` (`code_metric_in_children`). While requests are built:
`rendered_once`. For one task object: `cache_document_rendering`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import lm_eval.api.task
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment
from lm_eval import utils as lm_utils
from lm_eval.api.registry import metric_registry
from lm_eval.tasks import _yaml_loader

from evomerge.errors import TaskError
from evomerge.evaluation.code_execution import CodeMetric

_TEMPLATES = 4096  # compiled templates that are cached


@functools.cache
def harden() -> None:
    """Makes lm-eval of this process read YAML without Python objects, render in a sandbox, and fetch no code.

    It has an effect once a process.
    """
    lm_utils.env = _sandboxed(lm_utils.env)
    _yaml_loader._Base = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    lm_eval.api.task.get_metric = _get_metric


def _sandboxed(plain: Any) -> ImmutableSandboxedEnvironment:
    """A Jinja environment as in transformers' chat templates.

    No underscored attributes, nothing given to it is changed.
    """
    sandbox = ImmutableSandboxedEnvironment(
        loader=plain.loader, undefined=plain.undefined, keep_trailing_newline=plain.keep_trailing_newline
    )
    sandbox.filters |= plain.filters
    compile_template = sandbox.from_string

    # lm-eval compiles a task's templates anew for every document and call; compiled once, they render the
    # same text. Globals in a plain dictionary are copied for each rendering in a fraction of the time.
    @functools.lru_cache(maxsize=_TEMPLATES)
    def from_string(source: str) -> Any:
        template = compile_template(source)
        template.globals = dict(template.globals)
        return template

    sandbox.from_string = from_string  # type: ignore[method-assign, assignment]
    return sandbox


def _get_metric(name: str, hf_evaluate_metric: bool = False) -> Callable[..., Any]:
    """lm-eval's own metric of that name, or one that refuses.

    Others are programs that `evaluate` fetches from the hub.
    """
    if name in metric_registry and not hf_evaluate_metric:
        metric: Callable[..., Any] = metric_registry.get(name)
        return metric
    return RefusedMetric(name)


class RefusedMetric:
    """A metric that a task may declare and that is never computed."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Raises TaskError."""
        raise TaskError(
            f"metric '{self.__name__}' is a program that the evaluate library would fetch and run; "
            "use a metric of lm-eval's own"
        )


@contextlib.contextmanager
def code_metric_in_children() -> Iterator[None]:
    """While tasks are imported, gives them a metric `code_eval` that runs programs in child processes.

    They load it from the hub where they are imported, and it would run programs in forks of this process.

    Yields:
        Nothing.
    """
    import evaluate  # type: ignore[import-untyped]  # slow, and few tasks need it

    load = evaluate.load

    def load_metric(path: str, *arguments: Any, **named: Any) -> Any:
        return CodeMetric() if path == "code_eval" else load(path, *arguments, **named)

    evaluate.load = load_metric
    try:
        yield
    finally:
        evaluate.load = load


def captured_token_pairs(lm: Any, request: Any) -> list[Any]:
    """Returns what `HFLM.loglikelihood` would pass to its model for a request.

    lm-eval's own tokenisation of a context and its continuation is inside that method, so it is called with
    the scoring method replaced for the call.

    Args:
        lm: An `HFLM`.
        request: A log-likelihood request.

    Returns:
        lm-eval's triples (texts, context ids, continuation ids).
    """
    captured: list[Any] = []

    def capture(pairs: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        captured.extend(pairs)
        return [(0.0, False)] * len(pairs)

    lm._loglikelihood_tokens = capture  # hides the class's method on this object
    try:
        lm.loglikelihood([request], disable_tqdm=True)
    finally:
        del lm._loglikelihood_tokens
    return captured


@contextlib.contextmanager
def never_its_own_example(task: Any, split: str | None) -> Iterator[None]:
    """Keeps a document from being among its own few-shot examples, for splits other than the test's.

    lm-eval leaves the document out only if the examples come from `test_split`, the one split that it expects
    to be scored; so that is what the split is called meanwhile.

    Args:
        task: lm-eval's task.
        split: The setting that names the split whose documents are asked; None changes nothing.

    Yields:
        Nothing.
    """
    fewshot = getattr(task, "fewshot_cfg", None)
    scored = None if split is None else getattr(task.config, split, None)
    shots = task.config.num_fewshot or 0
    if fewshot is None or scored is None or not shots or not _drawn_from(task, split, scored):
        yield
        return
    before = task.config.test_split
    task.config.test_split = fewshot.split
    try:
        yield
    finally:
        task.config.test_split = before


def _drawn_from(task: Any, split: str | None, scored: str) -> bool:
    """Whether few-shot examples are drawn from the split that is scored."""
    fewshot = task.fewshot_cfg
    if fewshot.samples is not None:
        return False
    if fewshot.split is not None:
        return bool(fewshot.split == scored)
    # lm-eval's rule where none is named
    is_validation = split == "validation_split" and not task.has_training_docs()
    return split == "training_split" or is_validation


def cache_document_rendering(task: Any) -> None:
    """Makes a task render each document's choices and target once: they depend on the document alone.

    Args:
        task: lm-eval's task, whose methods are wrapped on the object.
    """
    for name in ("doc_to_choice", "doc_to_target"):
        render = getattr(task, name, None)
        if callable(render):
            setattr(task, name, _cached_by_document(render))


@contextlib.contextmanager
def rendered_once(task: Any) -> Iterator[None]:
    """Renders each document's text, choices and target once while the requests of many documents are built.

    Args:
        task: lm-eval's task, whose methods are wrapped on the object and unwrapped at the end.

    Yields:
        Nothing.
    """
    wrapped = [
        name
        for name in ("doc_to_text", "doc_to_choice", "doc_to_target")
        if callable(getattr(task, name, None)) and name not in vars(task)
    ]
    for name in wrapped:
        setattr(task, name, _cached_by_document(getattr(task, name)))
    try:
        yield
    finally:
        for name in wrapped:
            delattr(task, name)


def _cached_by_document(render: Callable[..., Any]) -> Callable[..., Any]:
    cache: dict[
        int, tuple[Any, Any]
    ] = {}  # by the document's id(), with the document, which keeps the id its own

    def rendered(doc: Any, *more: Any, **named: Any) -> Any:
        if more or named:
            return render(doc, *more, **named)
        entry = cache.get(id(doc))
        if entry is None or entry[0] is not doc:
            entry = cache[id(doc)] = (doc, render(doc))
        return entry[1]

    return rendered
