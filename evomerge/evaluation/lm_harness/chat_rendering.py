"""Renders a model's chat template, a program of whoever made the model, within bounds of time and memory.

transformers' sandbox keeps a template from everything outside it, but not from looping or growing for ever.
"""

from __future__ import annotations

import functools
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jinja2

from evomerge.errors import TaskError

_SECONDS = 10.0  # that one conversation may take
_OPENING_SECONDS = 120.0  # that the process may take to start
_FIRST = '{"conversations": [[]], "chat_template": ""}'  # answered when the process is ready
_PROGRAM = Path(__file__).with_name("template_child.py")


def render(tokenizer: Any, turns: list[dict[str, str]], add_generation_prompt: bool) -> str:
    """Renders a conversation as `tokenizer.apply_chat_template` does.

    Args:
        tokenizer: A transformers tokenizer with a chat template.
        turns: Turns with 'role' and 'content'.
        add_generation_prompt: Whether the assistant's turn begins at the end; else the last turn is
            continued.

    Returns:
        The text.

    Raises:
        TaskError: The template takes too long or too much memory.
        jinja2.exceptions.TemplateError: The template refuses the conversation, or is none.
    """
    arguments = {
        "conversations": [turns],
        "chat_template": tokenizer.get_chat_template(),
        "continue_final_message": not add_generation_prompt,
        "add_generation_prompt": add_generation_prompt,
        **tokenizer.special_tokens_map,
    }
    answer = _child(os.getpid()).ask(json.dumps(arguments, default=str))
    if "text" in answer:
        return answer["text"]
    if "template" in answer:
        raise jinja2.exceptions.TemplateError(answer["template"])
    what = f"the chat template of {tokenizer.name_or_path}"
    if "limit" in answer:
        raise TaskError(f"{what} {answer['limit']} on one prompt; search without apply_chat_template")
    raise TaskError(f"{what} cannot be rendered: {answer['error']}; search without apply_chat_template")


class _Child:
    """The process that renders; started when it is needed, and again where it had to be ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, line: str) -> dict[str, str]:
        """The answer to a line of JSON: 'text', or an error of one of three kinds."""
        with self._lock:
            try:
                if self._process is None:
                    self._process = self._start()
                    self._exchange(_FIRST, _OPENING_SECONDS)
                answer: dict[str, str] = json.loads(self._exchange(line, _SECONDS))
                return answer
            except TimeoutError:
                self._end()
                return {"limit": f"takes more than {_SECONDS:g} s"}
            except (OSError, ValueError):
                self._end()
                return {"limit": "takes more memory than there is"}

    def _start(self) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        program = [sys.executable, "-P", str(_PROGRAM)]
        own = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
        return subprocess.Popen(program, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=own)

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _exchange(self, line: str, seconds: float) -> bytes:
        """The line that comes back within so many seconds."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(line.encode() + b"\n")
        process.stdin.flush()
        end, found = time.monotonic() + seconds, b""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not found.endswith(b"\n"):
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise TimeoutError
                part = os.read(process.stdout.fileno(), 1 << 16)
                if not part:
                    raise OSError("the process has ended")
                found += part
        return found


@functools.lru_cache(maxsize=1)
def _child(process: int) -> _Child:
    """The child of a process; a fork has its own."""
    return _Child()
