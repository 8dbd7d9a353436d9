"""What a model folder says of its own license and origin: the front matter of its card, its license files.

The folder is a stranger's: the card is read within the bounds of `_yaml`, and what cannot be read is said and
counts as unknown. An identifier is one of the Hugging Face Hub, such as 'apache-2.0'.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from evomerge import _yaml
from evomerge.checkpoints.lora import AdaptedCheckpoint
from evomerge.checkpoints.parent import Parent
from evomerge.checkpoints.safetensors_headers import check_file
from evomerge.errors import CheckpointError, ConfigError

PERMISSIVE = frozenset(
    {
        *("apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "isc", "zlib"),
        *("afl-3.0", "artistic-2.0", "bsl-1.0", "ecl-2.0", "ncsa", "postgresql", "unlicense", "wtfpl"),
        *("cc0-1.0", "pddl", "odc-by", "cdla-permissive-1.0", "cdla-permissive-2.0"),
        *("cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0"),
    }
)
"""Identifiers of licenses that allow any use of a changed model under other terms, with attribution."""
OTHER = "other"
"""The Hub's identifier of a license that it has no name for."""
LICENSE_FILES = ("licen[sc]e*", "copying*", "notice*", "*use_policy*")
"""Patterns of the names of files with terms of use, in lower case."""
_TERMS = LICENSE_FILES[:2]
_MOST_CARD = 2_000_000  # bytes of a card; longer ones are not read
_MOST_LICENSE = 1_000_000
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_UNKNOWN = ("unknown", "none", "")
# identifier, phrases that its text has, characters of the longest text without added terms
_TEXTS: tuple[tuple[str, tuple[str, ...], int], ...] = (
    ("apache-2.0", ("apache license", "version 2.0, january 2004"), 10_400),
    ("mit", ("permission is hereby granted, free of charge", "this permission notice shall be"), 1_150),
    ("bsd-3-clause", ("redistributions of source code must retain", "neither the name"), 1_720),
    ("bsd-2-clause", ("redistributions of source code must retain", "redistributions in binary"), 1_450),
    ("llama2", ("llama 2 community license agreement",), _MOST_LICENSE),
    ("llama3.1", ("llama 3.1 community license agreement",), _MOST_LICENSE),
    ("llama3.2", ("llama 3.2 community license agreement",), _MOST_LICENSE),
    ("llama3.3", ("llama 3.3 community license agreement",), _MOST_LICENSE),
    ("llama3", ("meta llama 3 community license agreement",), _MOST_LICENSE),
    ("gemma", ("gemma terms of use",), _MOST_LICENSE),
)


@dataclass(frozen=True, slots=True)
class License:
    """A license that a model folder names.

    Attributes:
        identifier: Of the Hub, in lower case; 'other' for one that it has no name for. A list of a card is
            joined by ' and '.
        name: The card's `license_name`, None without one.
        link: The card's `license_link`, None without one.
        source: The file that says so.
        content: SHA-256 of the license files, '' without any: tells two licenses called 'other' apart.
    """

    identifier: str
    name: str | None = None
    link: str | None = None
    source: str = "README.md"
    content: str = ""

    @property
    def terms(self) -> tuple[str, str]:
        """What is equal for two models under the same terms."""
        return self.identifier, (self.name or self.link or self.content) if self.identifier == OTHER else ""

    @property
    def shown(self) -> str:
        """The identifier, of 'other' with its name."""
        return f"{OTHER} ({self.name})" if self.identifier == OTHER and self.name else self.identifier

    def is_among(self, allowed: Sequence[str] | frozenset[str]) -> bool:
        """Whether it is allowed by a list of identifiers.

        Args:
            allowed: Identifiers; of a license called 'other', its name.

        Returns:
            True if it is, of several licenses if all are.
        """
        if self.identifier == OTHER:
            return bool(self.name) and self.name in allowed
        return all(part in allowed for part in self.identifier.split(" and "))


@dataclass(frozen=True, slots=True)
class FolderCard:
    """What the folder of a model or adapter says of itself.

    Attributes:
        folder: The folder.
        license: Its license, None where nothing says so.
        base_models: Repositories that its card names as base models.
        files: Its files with terms of use, sorted.
        fault: Why its card could not be read, '' if it could or there is none.
    """

    folder: Path
    license: License | None
    base_models: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    fault: str = ""

    @property
    def shown(self) -> str:
        """The license in words; 'unknown' with the reason where there is none."""
        if self.license is not None:
            return f"{self.license.shown} ({self.license.source})"
        return f"unknown ({self.fault or 'neither a license in README.md nor a license file'})"


def cards_of(parent: Parent) -> tuple[FolderCard, ...]:
    """Reads what a parent's folders say of themselves.

    Args:
        parent: An open model.

    Returns:
        The card of its folder, and that of its adapter, whose terms hold too.
    """
    folders = [parent.path, *([parent.adapter] if isinstance(parent, AdaptedCheckpoint) else [])]
    return tuple(read_card(folder) for folder in folders)


def read_card(folder: Path) -> FolderCard:
    """Reads the license and the base models that a model folder names.

    The card's `license` counts; without one, a license file whose text is known.

    Args:
        folder: Of a model or an adapter.

    Returns:
        What it says; nothing is raised for what cannot be read.
    """
    files = _license_files(folder)
    data, fault = _front_matter(folder / "README.md")
    found = _of_card(data, files) or _of_files(files)
    return FolderCard(folder, found, _base_models(data), files, fault)


def _front_matter(card: Path) -> tuple[dict[str, Any], str]:
    """(the YAML at the head of a card, why it could not be read)."""
    try:
        if not card.is_file():
            return {}, ""
        check_file(card)
        if card.stat().st_size > _MOST_CARD:
            return {}, f"its README.md has more than {_MOST_CARD:,} bytes"
        lines = card.read_text(encoding="utf-8-sig").splitlines()
        start = next((i for i, line in enumerate(lines) if line.strip()), 0)
        if not lines or lines[start].rstrip() != "---":
            return {}, ""
        end = next((i for i in range(start + 1, len(lines)) if lines[i].rstrip() == "---"), None)
        if end is None:
            return {}, "the front matter of its README.md has no end"
        data = _yaml.parse("\n".join(lines[start + 1 : end]) + "\n", "README.md").data
    except (OSError, ValueError, ConfigError, CheckpointError, RecursionError) as error:
        return {}, f"its README.md cannot be read: {' '.join(str(error).split())[:200]}"
    return (data, "") if isinstance(data, dict) else ({}, "")


def _of_card(data: dict[str, Any], files: Sequence[Path]) -> License | None:
    values = data.get("license")
    values = values if isinstance(values, list) else [values]
    words = [value.strip().lower() for value in values if isinstance(value, str)]
    known = [word for word in words if word not in _UNKNOWN and _IDENTIFIER.fullmatch(word)]
    if not known or len(known) < len(values):
        return None
    name, link = (_text(data.get(key)) for key in ("license_name", "license_link"))
    content = _content(files) if OTHER in known else ""
    return License(" and ".join(dict.fromkeys(known)), name, link, content=content)


def _of_files(files: Sequence[Path]) -> License | None:
    """The license that a file holds: one whose text is known, else 'other'."""
    terms = [file for file in files if any(fnmatchcase(file.name.lower(), pattern) for pattern in _TERMS)]
    if not terms:
        return None
    found = {_identified(file) for file in terms}
    if len(found) == 1 and None not in found:
        return License(str(found.pop()), source=terms[0].name)
    return License(OTHER, source=terms[0].name, content=_content(terms))


def _identified(file: Path) -> str | None:
    """The identifier of a license by its text, None for one that is not known or has added terms."""
    text = " ".join(file.read_text(encoding="utf-8", errors="replace").lower().split())
    for identifier, phrases, longest in _TEXTS:
        if all(phrase in text for phrase in phrases):
            return identifier if len(text) <= longest else None
    return None


def _license_files(folder: Path) -> tuple[Path, ...]:
    """Files with terms of use that lie in the folder itself and are no larger than such files are."""
    try:
        named = sorted(
            path
            for path in folder.iterdir()
            if any(fnmatchcase(path.name.lower(), pattern) for pattern in LICENSE_FILES)
        )
    except OSError:
        return ()
    files = []
    for path in named:
        try:
            check_file(path)
        except CheckpointError:
            continue
        if path.stat().st_size <= _MOST_LICENSE:
            files.append(path)
    return tuple(files)


def _content(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest() if files else ""


def _base_models(data: dict[str, Any]) -> tuple[str, ...]:
    values = data.get("base_model")
    values = values if isinstance(values, list) else [values]
    return tuple(
        dict.fromkeys(value for value in values if isinstance(value, str) and is_repository_name(value))
    )


def is_repository_name(text: str) -> bool:
    """Whether a text can be the name of a repository on the Hub, such as 'org/model'.

    Args:
        text: Any text.

    Returns:
        True if it can; whether there is one is not asked.
    """
    return _REPOSITORY.fullmatch(text) is not None and "--" not in text and ".." not in text


def _text(value: Any) -> str | None:
    """A short printable text of a card, None for anything else."""
    if not isinstance(value, str) or not value.strip() or len(value) > 300 or not value.isprintable():
        return None
    return value.strip()
