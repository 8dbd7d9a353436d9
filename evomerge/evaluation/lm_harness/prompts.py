"""Documents -> lm-eval requests, in lm-eval's own words and order, so that few-shot examples are those that it draws."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import jinja2

from evomerge.errors import TaskError
from evomerge.evaluation.lm_harness.items import Asked, Splits, documents, item_id
from evomerge.evaluation.records import Role

_SEED = 1234  # lm-eval's own, for each run over a split


@dataclass(frozen=True, slots=True)
class Prompting:
    """How every task is asked, as `lm_eval.simple_evaluate` names it. system_instruction: put before every prompt."""

    tokenizer: Any
    chat: bool = False
    multiturn: bool = False
    system_instruction: str | None = None


def asked(
    task: Any, name: str, splits: Splits, prompting: Prompting
) -> dict[Role, list[Asked]] | list[Asked]:
    """Every document of a task with its requests: by role where splits are declared, else in one list, to be dealt."""
    docs = documents(task, name, splits)
    if isinstance(docs, list):
        with _never_its_own_example(task, "training_split" if splits == "hash-train" else None):
            return _asked(task, name, docs, prompting)
    splits_of: dict[Role, str | None] = {
        "search": "training_split",
        "validation": "validation_split",
        "test": None,
    }
    found = {}
    for role, own in docs.items():
        with _never_its_own_example(task, splits_of[role]):
            found[role] = _asked(task, name, own, prompting)
    return found


def _asked(task: Any, name: str, docs: Sequence[Any], prompting: Prompting) -> list[Asked]:
    """The documents' requests, as lm-eval builds them in a run over these documents."""
    task.set_fewshot_seed(seed=_SEED)
    template = functools.partial(chat_template, prompting.tokenizer) if prompting.chat else None
    rows = []
    for number, doc in enumerate(docs):
        check_gold(task, name, doc)
        context = task.fewshot_context(
            doc,
            num_fewshot=task.config.num_fewshot or 0,
            system_instruction=prompting.system_instruction,
            apply_chat_template=prompting.chat,
            fewshot_as_multiturn=prompting.multiturn,
            chat_template=template,
            gen_prefix=task.doc_to_prefix(doc),
        )
        made = task.construct_requests(
            doc=doc,
            ctx=context,
            metadata=(name, number, task.config.repeats),
            apply_chat_template=prompting.chat,
            chat_template=template,
        )
        content, text = _content(task, doc)
        rows.append(Asked(item_id(doc), content, number, text, made if isinstance(made, list) else [made]))
    return rows


@contextlib.contextmanager
def _never_its_own_example(task: Any, split: str | None) -> Iterator[None]:
    """While documents of a split other than the test's are asked, a document is not among its own few-shot examples.

    lm-eval leaves the document out if the examples come from `test_split`, the only one it expects to be scored; so that
    is what the split is called meanwhile. split: the setting that names it; None changes nothing.
    """
    few, shots = getattr(task, "fewshot_cfg", None), task.config.num_fewshot or 0
    scored = None if split is None else getattr(task.config, split, None)
    drawn_from = (
        few is not None
        and few.samples is None
        and (few.split == scored or (few.split is None and split == "training_split"))
    )
    if few is None or scored is None or not shots or not drawn_from:
        yield
        return
    kept = task.config.test_split
    task.config.test_split = few.split
    try:
        yield
    finally:
        task.config.test_split = kept


def chat_template(tokenizer: Any, history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """A conversation as text, as HFLM renders it: without the system's turns if the template takes none."""

    def rendered(turns: list[dict[str, str]]) -> str:
        return str(
            tokenizer.apply_chat_template(
                turns,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    try:
        return rendered(history)
    except jinja2.exceptions.TemplateError:
        return rendered([turn for turn in history if turn["role"] != "system"])


def check_gold(task: Any, name: str, doc: Any) -> None:
    """Raises TaskError for a right answer that is none of the choices: lm-eval would score it as wrong, whatever the model says."""
    if task.OUTPUT_TYPE != "multiple_choice" or not hasattr(task, "doc_to_choice"):
        return
    options = task.doc_to_choice(doc)
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    for right in gold if isinstance(gold, list) else [gold]:
        if not ((isinstance(right, int) and 0 <= right < len(options)) or right in options):
            raise TaskError(f"task '{name}' has an item whose answer {right!r} is none of its choices: {doc}")


def _content(task: Any, doc: Any) -> tuple[str, str]:
    """(hash of the question, choices and answer, text of question and right answer)."""
    question, target = task.doc_to_text(doc), task.doc_to_target(doc)
    choices = task.doc_to_choice(doc) if getattr(task.config, "doc_to_choice", None) is not None else None
    key = sha256(json.dumps([question, choices, target], sort_keys=True, default=str).encode()).hexdigest()
    right = target[0] if isinstance(target, list) and target else target
    if isinstance(right, int) and choices and 0 <= right < len(choices):
        right = choices[right]
    if not isinstance(
        question, str
    ):  # of several contexts and one continuation, it is the number of the right context
        question = (
            choices[question]
            if choices and isinstance(question, int) and 0 <= question < len(choices)
            else ""
        )
    return key, f"{question} {right}".strip()
