"""Chat templates of models: transformers' text, or a refusal within bounds of time and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import pytest

from evomerge.checkpoints import Checkpoint
from evomerge.errors import TaskError
from evomerge.evaluation.lm_harness import chat_rendering
from evomerge.evaluation.lm_harness.prompts import chat_template
from evomerge.merging import model_loading
from tests.support.toy import zoo_folder

TURNS = [
    {"role": "system", "content": 'be <brief> & "exact" ü 漢\n'},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2"},
]
TEMPLATES = {
    "ChatML": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "special tokens": "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | tojson }}"
    "{{ eos_token }}{% endfor %}",
    "a namespace and a macro": "{% macro turn(m) %}{{ loop_sign }}{{ m.role|upper }}: {{ m.content }}\n"
    "{% endmacro %}{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}."
    "{{ turn(m) }}{% endfor %}",
    "another for tools": "{% if tools %}{{ tools }}{% endif %}{{ messages[0].content }}{{ messages|length }}",
}
HOSTILE = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "doubling": "{% set n = namespace(x='x' * 1000) %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
    "{% endfor %}{{ n.x|length }}",
    "a product": "{{ 'x' * 10000000000 }}",
    "a power": "{{ (9 ** 9) ** 999999999 }}",
    "a wide field": "{{ 'x'.center(10000000000) }}",
    "a macro that calls itself": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(200) }}",
    "a long text": "{% for a in range(99999) %}{% for b in range(999) %}xxxxxxxxxxxxxxxx{% endfor %}"
    "{% endfor %}",
}


@pytest.fixture
def tokenizer() -> Any:
    return model_loading.load_tokenizer(Checkpoint(zoo_folder() / "base"))


@pytest.mark.parametrize("what", TEMPLATES)
@pytest.mark.parametrize("begins", [True, False])
def test_the_text_is_that_of_transformers(what: str, begins: bool, tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATES[what]
    theirs = tokenizer.apply_chat_template(
        TURNS, tokenize=False, add_generation_prompt=begins, continue_final_message=False
    )
    if begins:
        assert chat_rendering.render(tokenizer, TURNS, True) == theirs
    elif what == "ChatML":
        theirs = tokenizer.apply_chat_template(TURNS, tokenize=False, continue_final_message=True)
        assert chat_rendering.render(tokenizer, TURNS, False) == theirs


def test_a_template_without_a_system_turn_gets_none(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        "{{ messages|length }}"
    )
    assert chat_template(tokenizer, TURNS) == "2"
    with pytest.raises(jinja2.exceptions.TemplateError, match="no system turn"):
        chat_rendering.render(tokenizer, TURNS, True)


@pytest.mark.parametrize("what", HOSTILE)
def test_a_chat_template_without_bounds_is_refused_by_its_model(
    what: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_rendering, "_SECONDS", 2.0)
    tokenizer.chat_template = HOSTILE[what]
    with pytest.raises(TaskError, match=r"the chat template of .*base.* without apply_chat_template"):
        chat_template(tokenizer, TURNS)
    tokenizer.chat_template = "{{ messages|length }}"
    assert chat_template(tokenizer, TURNS) == "3", "the next one is rendered"


def test_a_tokenizer_without_a_template_is_one_sentence(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = None
    with pytest.raises((TaskError, ValueError), match=r"chat.template"):
        chat_template(tokenizer, TURNS)
