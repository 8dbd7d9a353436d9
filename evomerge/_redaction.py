"""Removes passwords and tokens from text before it is stored, logged or shown.

What looks like a secret is replaced, and the values of environment variables whose names say that they are
one. A secret of another form, in no such variable, is not found: callers must not rely on this alone.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from evomerge._escaping import printable

HIDDEN = "***"
_SHORTEST = 6  # characters of a variable's value: replacing a shorter one, such as '1', would spoil a log
_NAMED = re.compile(
    r"(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|COOKIE|(?:^|_)(?:PASS|PAT|AUTH)|_PWD)"
    r"S?(?:_?\d+)?$",
    re.IGNORECASE,
)
"""Names of variables whose values are secrets. PWD alone is the working directory."""
_TOKENS = (  # by how their makers say that they begin
    r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}",  # Hugging Face
    r"\bsk-[A-Za-z0-9_-]{16,}",  # OpenAI, Anthropic and those that followed
    r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,})",
    r"\bgl(?:pat|dt|rt|ptt|cbt|oas|agent|soat|ffct)-[A-Za-z0-9_.-]{16,}",  # GitLab
    r"\b(?:AKIA|ASIA|ABIA|ACCA)[0-9A-Z]{16}\b",  # AWS
    r"\bAIza[0-9A-Za-z_-]{30,}|\bGOCSPX-[0-9A-Za-z_-]{20,}|\bya29\.[0-9A-Za-z_-]{20,}",  # Google
    r"\bx(?:ox[abeoprs]|app)-[0-9A-Za-z-]{10,}",  # Slack
    r"https://hooks\.slack\.com/(?:services|workflows|triggers)/[\w/+-]+",
    r"https://(?:canary\.|ptb\.)?discord(?:app)?\.com/api/webhooks/\d+/[\w-]+",
    r"\b(?:sk|rk|pk)_(?:live|test|prod)_[0-9A-Za-z]{16,}|\bwhsec_[0-9A-Za-z]{16,}",  # Stripe
    r"\bSG\.[\w-]{16,}\.[\w-]{16,}|\bkey-[0-9a-f]{32}\b|\bSK[0-9a-f]{32}\b",  # SendGrid, Mailgun, Twilio
    r"\bnpm_[A-Za-z0-9]{30,}|\bpypi-[A-Za-z0-9_-]{20,}|\brubygems_[0-9a-f]{40,}|\bcio[A-Za-z0-9]{32}\b",
    r"\bdapi[0-9a-f]{32}(?:-\d)?\b|\bdckr_pat_[\w-]{20,}|\bdo[opr]_v1_[0-9a-f]{40,}",  # Databricks, Docker
    r"\b(?:r8_|pplx-|gsk_|xai-|nvapi-|fw_|tgp_v1_|cpk_|voyage-key-)[A-Za-z0-9_-]{20,}",  # hosts of models
    r"\bhv[sbr]\.[\w-]{20,}|\bops_eyJ[\w-]{20,}|\bdp\.(?:pt|st|ct|sa|scim|audit)\.[\w.-]{20,}",  # vaults
    r"\bgl(?:sa|c)_[A-Za-z0-9_=+/-]{20,}|\bNRAK-[A-Z0-9]{20,}|\blin_api_[A-Za-z0-9]{20,}",  # Grafana, …
    r"\bPMAK-[0-9a-f-]{30,}|\bpul-[0-9a-f]{40}\b|\bshp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}",
    r"\bsq0[a-z]{3}-[\w-]{20,}",  # Square
    r"\b\d{8,10}:AA[\w-]{30,}",  # Telegram
    r"\bAGE-SECRET-KEY-1[0-9A-Z]{50,}|\bLTAI[A-Za-z0-9]{16,}\b|\bAKC[a-zA-Z0-9]{60,}",
    r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{4,}(?:\.[A-Za-z0-9_-]*)?",  # a JSON web token
)
_SHAPES = tuple(
    (re.compile(pattern), text)
    for pattern, text in (
        (
            r"(?s)-----BEGIN [A-Z ]{0,40}PRIVATE KEY(?: BLOCK)?-----.*?"
            r"(?:-----END [A-Z ]{0,40}PRIVATE KEY(?: BLOCK)?-----|\Z)",
            HIDDEN,
        ),
        *((token, HIDDEN) for token in _TOKENS),
        (r"://[^\s/?#]+@", f"://{HIDDEN}@"),  # user:password@ of a URL
        # a password with a slash or hash; digits and a slash after the colon are a port
        (r"://[^\s/?#@:\"'*]+:(?!\d{1,5}[/?#])[^\s@\"'<>]+@(?=[\w\[])", f"://{HIDDEN}@"),
        (r"(?<![\w/:@.])([\w.+-]{1,64}:)(?!//)[^\s@:/\"'<>]{2,128}@(?=[A-Za-z][\w-]*\.?)", rf"\1{HIDDEN}@"),
        (
            r"(?i)\b((?:proxy-)?authorization[\"']?\s{0,3}[:=]\s{0,3}[\"']?)"
            r"(?:(?:bearer|basic|token|digest)\s{1,3})?[^\s\"',;]+",
            rf"\1{HIDDEN}",
        ),
        (r"(?i)\b((?:set-)?cookies?[\"']?\s{0,3}[:=]\s{0,3}[\"']?)[^\"'\r\n]+", rf"\1{HIDDEN}"),
        (r"(?i)\b((?:bearer|basic)\s{1,3})[A-Za-z0-9._~+/=-]{12,}", rf"\1{HIDDEN}"),
        (
            r"(?i)((?:password|passwd|passphrase|\bpwd|secret)[\"']?\s{0,3}[:=]\s{0,3}[\"']?)"
            r"(?!/)[^\s\"',;&]+",
            rf"\1{HIDDEN}",
        ),
        # a variable in capitals, as a shell or a file of settings has it
        (
            r"\b([A-Z][A-Z0-9_]{0,60}(?:TOKEN|KEY|SECRET|CREDENTIAL|COOKIE|_PASS|_PWD|_PAT|_AUTH)"
            r"S?(?:_?\d{1,3})?"
            r"[\"']?\s{0,3}[:=]\s{0,3}[\"']?)[^\s\"',;&]{4,}",
            rf"\1{HIDDEN}",
        ),
        (
            r"(?i)((?:\bkey|_key|-key|accountkey|token|signature)[\"']?=[\"']?)[^\s\"'<>,;&()\[\]{}]{8,}",
            rf"\1{HIDDEN}",
        ),
        (
            r"(?i)((?:api|access|private|auth|session)[_-]?(?:key|token)[\"']?\s{0,3}[:=]\s{0,3}[\"']?)"
            r"[^\s\"'<>,;&()\[\]{}]{8,}",
            rf"\1{HIDDEN}",
        ),
        (  # in JSON or a dict; "eos_token" is none
            r"(?i)([\"'](?:(?:access|api|auth|bearer|csrf|hf|id|oauth|refresh|secret|session)[_-]?)?"
            r"(?:token|api[_-]?key|credentials?|auth|sessionid|pass)[\"']\s{0,3}:\s{0,3}[\"'])[^\"']+",
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


def scrub_data(value: Any) -> Any:
    """Replaces every secret in plain data by '***'.

    Args:
        value: Nested mappings, lists and scalars.

    Returns:
        The same with its texts scrubbed; what stands under a secret's name is hidden whole.
    """
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, dict):
        return {key: scrub_data(inner) if _tells(key, inner) else HIDDEN for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [scrub_data(inner) for inner in value]
    return value


def _tells(key: Any, value: Any) -> bool:
    """Whether an entry of a mapping may be shown."""
    return not isinstance(value, str) or scrub(f'"{key}": "{value}"') == f'"{key}": "{scrub(value)}"'


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
