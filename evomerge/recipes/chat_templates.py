"""Chat templates by the names that mergekit's `chat_template` key knows, written from the formats' own descriptions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from evomerge.errors import RecipeError

_CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
_LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}
"""
_ALPACA = """\
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'user' -%}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}
{%- else -%}{{ '### Response:\\n' + message['content'] + '\\n\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '### Response:\\n' }}{%- endif -%}
"""
_MISTRAL = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}{{ message['content'] | trim + eos_token }}
{%- else -%}{{ '[INST] ' + message['content'] | trim + ' [/INST] ' }}
{%- endif -%}
{%- endfor -%}
"""
KNOWN = {"alpaca": _ALPACA, "chatml": _CHATML, "llama3": _LLAMA3, "mistral": _MISTRAL}
AUTO = "auto"


def check(wish: str) -> None:
    """Raises RecipeError unless a wish is 'auto', a known name or the text of a Jinja template."""
    if wish != AUTO and wish not in KNOWN and "{" not in wish:
        raise RecipeError(
            f"chat_template must be auto, {', '.join(KNOWN)} or the text of a Jinja template, got {wish[:60]!r}"
        )


def text(wish: str, own: Sequence[str]) -> str | None:
    """The template's text.

    own: those of the models merged; 'auto' takes the most common, of equals the first; None if there is none.
    """
    check(wish)
    if wish == AUTO:
        return Counter(own).most_common(1)[0][0] if own else None
    return KNOWN.get(wish, wish)
