"""Documents -> lm-eval requests, in lm-eval's own words and order.

Few-shot examples are thereby those that lm-eval draws.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import jinja2

from evomerge.errors import TaskError
from evomerge.evaluation.lm_harness import chat_rendering
from evomerge.evaluation.lm_harness.items import TaskDocument, item_id
from evomerge.evaluation.lm_harness.lm_eval_patches import never_its_own_example, rendered_once
from evomerge.evaluation.lm_harness.splits import Splits, dealt_setting, split_documents
from evomerge.evaluation.records import Role

_SEED = 1234  # lm-eval's own, for each run over a split


@dataclass(frozen=True, slots=True)
class Prompting:
    """How prompts are made, by the names of `lm_eval.simple_evaluate`.

    Attributes:
        tokenizer: Its chat template is used.
        chat: Whether to apply the chat template (`apply_chat_template`).
        multiturn: Whether few-shot examples are turns of the conversation (`fewshot_as_multiturn`).
        system_instruction: Text before every prompt; None for none.
    """

    tokenizer: Any
    chat: bool = False
    multiturn: bool = False
    system_instruction: str | None = None


def build_requests(
    task: Any, name: str, splits: Splits, prompting: Prompting
) -> tuple[list[TaskDocument] | None, dict[Role, list[TaskDocument]]]:
    """Builds the requests of every document of a task.

    Args:
        task: lm-eval's task.
        name: Its name.
        splits: Which documents, see `TaskSpec.splits`.
        prompting: How prompts are made.

    Returns:
        Documents with requests: those to be dealt by hash, None for none, and those of roles.
    """
    dealt, of_roles = split_documents(task, splits)
    settings: dict[Role, str | None] = {
        "search": "training_split",
        "validation": "validation_split",
        "test": None,
    }
    documents = {}
    for role, of_role in of_roles.items():
        with never_its_own_example(task, settings[role]), rendered_once(task):
            documents[role] = _documents(task, name, of_role, prompting)
    if dealt is None:
        return None, documents
    with never_its_own_example(task, dealt_setting(splits)), rendered_once(task):
        return _documents(task, name, dealt, prompting), documents


def _documents(task: Any, name: str, docs: Sequence[Any], prompting: Prompting) -> list[TaskDocument]:
    """The documents with their requests, as lm-eval builds them in a run over these documents."""
    task.set_fewshot_seed(seed=_SEED)
    template = functools.partial(chat_template, prompting.tokenizer) if prompting.chat else None
    documents = []
    for number, doc in enumerate(docs):
        check_right_answer(task, name, doc)
        context = task.fewshot_context(
            doc,
            num_fewshot=task.config.num_fewshot or 0,
            system_instruction=prompting.system_instruction,
            apply_chat_template=prompting.chat,
            fewshot_as_multiturn=prompting.multiturn,
            chat_template=template,
            gen_prefix=task.doc_to_prefix(doc),
        )
        requests = task.construct_requests(
            doc=doc,
            ctx=context,
            metadata=(name, number, task.config.repeats),
            apply_chat_template=prompting.chat,
            chat_template=template,
        )
        content, text = _content(task, doc)
        requests = requests if isinstance(requests, list) else [requests]
        documents.append(TaskDocument(item_id(doc), content, number, text, requests))
    return documents


def chat_template(tokenizer: Any, history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """Renders a conversation as HFLM does: without the system's turns if the template takes none.

    Args:
        tokenizer: A transformers tokenizer with a chat template.
        history: Turns with 'role' and 'content'.
        add_generation_prompt: Whether the assistant's turn begins at the end; else the last turn is
            continued.

    Returns:
        The text.

    Raises:
        TaskError: The template takes too long or too much memory.
    """
    try:
        return chat_rendering.render(tokenizer, history, add_generation_prompt)
    except jinja2.exceptions.TemplateError:
        users = [turn for turn in history if turn["role"] != "system"]
        return chat_rendering.render(tokenizer, users, add_generation_prompt)


def check_right_answer(task: Any, name: str, doc: Any) -> None:
    """Checks that a document's right answer is one of its choices.

    Else lm-eval would silently score it as wrong.

    Args:
        task: lm-eval's task.
        name: Its name, for errors.
        doc: The document.

    Raises:
        TaskError: The right answer is none of the choices.
    """
    if task.OUTPUT_TYPE != "multiple_choice" or not hasattr(task, "doc_to_choice"):
        return
    options = task.doc_to_choice(doc)
    target = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    for right in target if isinstance(target, list) else [target]:
        is_number = isinstance(right, int) and 0 <= right < len(options)
        if not (is_number or right in options):
            raise TaskError(f"task '{name}' has an item whose answer {right!r} is none of its choices: {doc}")


def _content(task: Any, doc: Any) -> tuple[str, str]:
    """(hash of the question, choices and answer, text of question and right answer)."""
    question, target = task.doc_to_text(doc), task.doc_to_target(doc)
    choices = task.doc_to_choice(doc) if getattr(task.config, "doc_to_choice", None) is not None else None
    key = sha256(json.dumps([question, choices, target], sort_keys=True, default=str).encode()).hexdigest()
    right = target[0] if isinstance(target, list) and target else target
    if isinstance(right, int) and choices and 0 <= right < len(choices):
        right = choices[right]
    if not isinstance(question, str):
        # of several contexts and one continuation, it is the number of the right context
        if choices and isinstance(question, int) and 0 <= question < len(choices):
            question = choices[question]
        else:
            question = ""
    return key, f"{question} {right}".strip()
