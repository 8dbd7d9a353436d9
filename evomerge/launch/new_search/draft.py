"""A search file with a comment at every choice, as text."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

_WIDTH = 100
_NUMBER = re.compile(r"[-+.]*[0-9][-+0-9.eE]*$")
Path = tuple[str | int, ...]
"""Keys that lead to a value, from the top."""
LISTS = ("tasks", "stages")
"""Keys whose values are lists with an entry a line."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A search file before it is written.

    Attributes:
        document: Its content, in the order of the file.
        comments: Key path -> the sentence above it.
        head: Lines of comment at the top.
        foot: Lines of comment at the end.
    """

    document: Mapping[str, Any]
    comments: Mapping[Path, str] = field(default_factory=dict)
    head: Sequence[str] = ()
    foot: Sequence[str] = ()

    def text(self) -> str:
        """The file: blocks in YAML's block style, what is in them on one line each."""
        lines = [line for sentence in self.head for line in _comment(sentence, "")]
        for key, value in self.document.items():
            lines += ["", *self._above((key,), ""), *self._block(key, value)]
        lines += ["", *(line for sentence in self.foot for line in _comment(sentence, ""))]
        return "\n".join(lines).strip("\n") + "\n"

    def _block(self, key: str, value: Any) -> Iterator[str]:
        if key in LISTS and value:
            yield f"{_flow(key)}:"
            for number, entry in enumerate(value):
                yield from self._above((key, number), "  ")
                yield f"  - {_flow(entry)}"
        elif isinstance(value, Mapping) and value:
            yield f"{_flow(key)}:"
            yield from self._entries((key,), value, "  ")
        else:
            yield f"{_flow(key)}: {_flow(value)}"

    def _entries(self, path: Path, values: Mapping[str, Any], indent: str) -> Iterator[str]:
        for key, value in values.items():
            yield from self._above((*path, key), indent)
            if isinstance(value, Mapping) and any(isinstance(inner, Mapping) for inner in value.values()):
                yield f"{indent}{_flow(key)}:"
                yield from self._entries((*path, key), value, indent + "  ")
            else:
                yield f"{indent}{_flow(key)}: {_flow(value)}"

    def _above(self, path: Path, indent: str) -> list[str]:
        sentence = self.comments.get(path)
        return _comment(sentence, indent) if sentence else []


def _comment(sentence: str, indent: str) -> list[str]:
    start = f"{indent}# "
    if not sentence:
        return [f"{indent}#"]
    if sentence.startswith("yaml-language-server:"):
        return [f"{start}{sentence}"]  # which editors look for on one line
    clean = " ".join(sentence.split(" ")).replace("\n", " ")
    return textwrap.wrap(
        clean,
        _WIDTH,
        initial_indent=start,
        subsequent_indent=start,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    )


class _Dumper(yaml.SafeDumper):
    """Quotes texts that a search file's reader takes for numbers and PyYAML does not, such as 1e5."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    style = "'" if _NUMBER.match(value) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def _flow(value: Any) -> str:
    """A value on one line."""
    text = yaml.dump(
        value,
        Dumper=_Dumper,
        default_flow_style=True,
        sort_keys=False,
        allow_unicode=True,
        width=float("inf"),
    )
    return text.removesuffix("\n").removesuffix("\n...").strip()
