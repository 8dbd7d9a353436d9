"""Chat templates by the names of mergekit's `chat_template` key, written from the formats' descriptions."""

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
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' \
+ message['content'] | trim + '<|eot_id|>' }}
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


def check(template: str) -> None:
    """Checks the value of a `chat_template` key.

    Args:
        template: 'auto', one of the names in `KNOWN`, or the text of a Jinja template.

    Raises:
        RecipeError: It is none of them.
    """
    if template != AUTO and template not in KNOWN and "{" not in template:
        raise RecipeError(
            f"chat_template must be auto, {', '.join(KNOWN)} or the text of a Jinja template, "
            f"got {template[:60]!r}"
        )


def text(template: str, models: Sequence[str]) -> str | None:
    """The text of the template that a `chat_template` key asks for.

    Args:
        template: 'auto' for the most common one of the models (of equals the first), a name, or a Jinja
            template.
        models: The templates of the merged models that have one.

    Returns:
        Jinja text; None for 'auto' where no model has a template.

    Raises:
        RecipeError: See `check`.
    """
    check(template)
    if template == AUTO:
        return Counter(models).most_common(1)[0][0] if models else None
    return KNOWN.get(template, template)
