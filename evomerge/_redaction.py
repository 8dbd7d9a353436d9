"""Removes passwords and tokens from text before it is stored, logged or shown.

What looks like a secret is replaced, and the values of environment variables whose names say that they are
one. A secret of another form, in no such variable, is not found: callers must not rely on this alone.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from urllib.parse import quote

from evomerge._escaping import printable

HIDDEN = "***"
_SHORTEST = 6  # characters of a variable's value: replacing a shorter one, such as '1', would spoil a log
_NAMED = re.compile(r"(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS)S?$", re.IGNORECASE)
_SHAPES = tuple(
    (re.compile(pattern), text)
    for pattern, text in (
        (
            r"(?s)-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,40}PRIVATE KEY-----|\Z)",
            HIDDEN,
        ),
        (r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}", HIDDEN),  # Hugging Face
        (r"\bsk-[A-Za-z0-9_-]{16,}", HIDDEN),  # OpenAI and those that followed
        (r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,})", HIDDEN),
        (
            r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bAIza[0-9A-Za-z_-]{30,}|\bxox[abprs]-[0-9A-Za-z-]{10,}",
            HIDDEN,
        ),  # AWS, Google, Slack
        (r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{4,}(?:\.[A-Za-z0-9_-]*)?", HIDDEN),  # a JSON web token
        (r"://[^\s/?#]+@", f"://{HIDDEN}@"),  # user:password@ of a URL
        (
            r"(?i)\b((?:proxy-)?authorization[\"']?\s{0,3}[:=]\s{0,3}[\"']?)"
            r"(?:(?:bearer|basic|token|digest)\s{1,3})?[^\s\"',;]+",
            rf"\1{HIDDEN}",
        ),
        (r"(?i)\b((?:bearer|basic)\s{1,3})[A-Za-z0-9._~+/=-]{12,}", rf"\1{HIDDEN}"),
        (
            r"(?i)((?:password|passwd|passphrase|pwd|secret)[\"']?\s{0,3}[:=]\s{0,3}[\"']?)[^\s\"',;&]+",
            rf"\1{HIDDEN}",
        ),
        (r"(?i)((?:key|token|signature)[\"']?=[\"']?)[^\s\"'<>,;&()\[\]{}]{8,}", rf"\1{HIDDEN}"),
        (
            r"(?i)((?:api|access|private|auth|session)[_-]?(?:key|token)[\"']?\s{0,3}[:=]\s{0,3}[\"']?)"
            r"[^\s\"'<>,;&()\[\]{}]{8,}",
            rf"\1{HIDDEN}",
        ),
    )
)


def scrub(text: str, environment: Mapping[str, str] | None = None) -> str:
    """Replaces every secret in a text by '***'.

    Scrub before a text is cut: half a token is not recognized.

    Args:
        text: Any text.
        environment: Variables whose values are secrets where their name ends in TOKEN, KEY, SECRET, PASSWORD
            or the like; this process's own unless given.

    Returns:
        The text without secrets; one that has none, and one that was scrubbed, come back as they are.
    """
    variables = os.environ if environment is None else environment
    values = {v.strip() for k, v in variables.items() if _NAMED.search(k) and len(v.strip()) >= _SHORTEST}
    spellings = values | {quote(v, safe="") for v in values}
    for value in sorted(spellings, key=lambda v: (-len(v), v)):  # longest first: one may begin with another
        text = text.replace(value, HIDDEN)
    for pattern, replacement in _SHAPES:
        text = pattern.sub(replacement, text)
    return text


class ScrubbedFormatter(logging.Formatter):
    """A log's formatter whose lines, tracebacks among them, hold no secrets.

    handler.setFormatter(ScrubbedFormatter("%(levelname)s %(message)s"))
    """

    def format(self, record: logging.LogRecord) -> str:
        """Formats a record.

        Args:
            record: The record.

        Returns:
            Its line, scrubbed and printable.
        """
        return printable(scrub(super().format(record)))
