"""The texts that a learned stage retains, read from a file of a user."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from evomerge.config import Config
from evomerge.errors import ConfigError

RETAINED = "stages.retain"
"""What a study's facts call the files of texts."""


def read_texts(file: str) -> dict[str, str]:
    """Reads texts whose next-token distributions are to stay.

    Args:
        file: A .jsonl with a "text" in each line, or any text file: paragraphs where it has blank lines,
            else lines.

    Returns:
        Id, a hash of the text, -> text, in the order of the file; equal ones are one.

    Raises:
        ConfigError: There is no such file, no text in it, or a line of a .jsonl without one.
    """
    path = Path(file)
    try:
        content = path.read_text(encoding="utf-8")
    except OSError:
        raise ConfigError(f"there is no file '{file}' with texts to retain; correct stages.retain") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"'{file}' is no text in UTF-8: {error.reason} at byte {error.start}") from None
    if path.suffix == ".jsonl":
        lines = enumerate(content.splitlines(), 1)
        texts = [_text_of(line, number, file) for number, line in lines if line.strip()]
    elif "\n\n" in content.strip():
        texts = [part.strip() for part in content.split("\n\n")]
    else:
        texts = [line.strip() for line in content.splitlines()]
    texts = [text for text in texts if text]
    if not texts:
        raise ConfigError(f"'{file}' holds no text to retain; give a prompt a line, or leave retain out")
    return {hashlib.sha256(text.encode()).hexdigest()[:16]: text for text in texts}


def retained_sources(settings: Config) -> dict[str, dict[str, str]]:
    """What resume compares of the texts that stages retain.

    Args:
        settings: The settings of a search.

    Returns:
        'stages.retain' -> name of the file -> hash of its texts; nothing where no stage has any.
    """
    files = [stage.retain for stage in settings.stages if stage.retain is not None]
    digests = {
        Path(file).name: hashlib.sha256("\0".join(read_texts(file).values()).encode()).hexdigest()
        for file in files
    }
    return {RETAINED: digests} if digests else {}


def _text_of(line: str, number: int, file: str) -> str:
    try:
        document = json.loads(line)
    except ValueError:
        document = None
    text = document.get("text") if isinstance(document, dict) else None
    if not isinstance(text, str):
        raise ConfigError(
            f'line {number} of \'{file}\' should be {{"text": "..."}}, got {line[:60]!r}; correct that line'
        )
    return text
