"""Renders chat templates of models in a process of its own, whose memory is bounded: a program, not a module.

Reads a line of JSON for each conversation, the arguments of transformers' `render_jinja_template`, and writes
one with the text or the error. Whoever starts it bounds its time.
"""

import json
import resource
import signal
import sys
from pathlib import Path

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

_MEMORY = 512 * 2**20  # bytes beyond what the program itself takes
_SECONDS = 60  # after which it ends even if nobody is there to end it
_LONGEST = 10_000_000  # characters of a rendered text


def _bound_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    most = pages * resource.getpagesize() + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _answer(line: str) -> dict[str, str]:
    try:
        text = render_jinja_template(**json.loads(line))[0][0]
    except jinja2.exceptions.TemplateError as error:
        return {"template": str(error)}
    except (MemoryError, RecursionError, OverflowError) as error:
        return {"limit": f"takes more than {_MEMORY // 2**20} MB or nests too deep ({type(error).__name__})"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"text": text} if len(text) <= _LONGEST else {"limit": f"makes more than {_LONGEST:,} characters"}


def main() -> None:
    """Answers until standard input ends."""
    if sys.platform == "linux":
        _bound_memory()
    for line in sys.stdin:
        signal.alarm(_SECONDS)
        sys.stdout.write(json.dumps(_answer(line)) + "\n")
        sys.stdout.flush()
        signal.alarm(0)


if __name__ == "__main__":
    main()
