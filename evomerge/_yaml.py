"""Reads YAML a user wrote: bounded, without surprises, with the place of every key for error messages.

Differs from plain PyYAML on purpose: `1e-5` is a number, `no` is text (YAML 1.2), a repeated key is an error,
and so is a file over 500 kB, with over 30,000 keys and values, or nested deeper than 32, where what an alias
or a merge key stands for counts each time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from evomerge.errors import ConfigError

MAX_BYTES = 500_000  # PyYAML reads about a megabyte in two seconds
MAX_DEPTH = 32
MAX_VALUES = 30_000  # keys and values of a file: PyYAML takes some 50 microseconds for each
_UNWRITABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters but tab and line feed, marks of direction, separators of lines, halves of pairs."""
Key = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed file.

    data: plain mappings, lists and scalars; marks: key path -> (line, column), both from 1.
    """

    name: str
    text: str
    data: Any
    marks: dict[Key, tuple[int, int]] = field(repr=False)

    def where(self, path: Key = ()) -> str:
        """The place of a key, for messages.

        Args:
            path: Key path; its longest prefix that the document has is taken.

        Returns:
            'file:line:column'.
        """
        while path and path not in self.marks:
            path = path[:-1]
        line, column = self.marks.get(path, (1, 1))
        return f"{self.name}:{line}:{column}"


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's numbers and booleans, which stops at the first thing beyond a limit."""

    yaml_implicit_resolvers = {  # type: ignore[misc, unused-ignore]  # noqa: RUF012
        first: [
            (tag, rule)
            for tag, rule in rules
            if tag.rpartition(":")[2] not in ("bool", "float", "int", "timestamp")
        ]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self._name, self._depth, self._values = name, 0, 0

    def get_event(self) -> yaml.Event:
        """The next event. Raises ConfigError where a limit is passed."""
        event: yaml.Event = super().get_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.CollectionStartEvent):
            self._depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            self._depth -= 1
        self._values += isinstance(
            event, yaml.ScalarEvent | yaml.CollectionStartEvent | yaml.DocumentStartEvent
        )
        _check_limits(self._depth, self._values, _place(self._name, event))
        return event


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?$|^[-+]?[0-9]+[eE][-+]?[0-9]+$"
        r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


def read(path: Path) -> Document:
    """The one document in a file.

    Args:
        path: The file.

    Returns:
        The document.

    Raises:
        ConfigError: It cannot be read, is malformed or has several documents; names file, line and column.
    """
    return parse(_text(path), str(path))


def _text(path: Path) -> str:
    try:
        if path.is_file() and path.stat().st_size > MAX_BYTES:
            raise ConfigError(
                f"{path} has {path.stat().st_size:,} bytes; a search or recipe file has at most {MAX_BYTES:,}"
            )
        if path.exists() and not path.is_file() and not path.is_dir() and not _is_given(path):
            raise ConfigError(f"{path} is no file with text but a device or a pipe; give a file")
        with path.open(encoding="utf-8") as file:
            return file.read(MAX_BYTES + 1)
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text; is it a YAML file?") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None


def read_all(path: Path) -> list[Document]:
    """Every document in a file, in order.

    Args:
        path: The file.

    Returns:
        The documents; one without data if there is none.

    Raises:
        ConfigError: It cannot be read or is malformed; names file, line and column.
    """
    return parse_all(_text(path), str(path))


def _is_given(path: Path) -> bool:
    """Whether a path is an open file of this process, such as a shell's <(command)."""
    return str(path).startswith(("/dev/fd/", "/dev/stdin", "/proc/self/fd/"))


def parse(text: str, name: str) -> Document:
    """The one document in a text.

    Args:
        text: YAML.
        name: Stands for it in messages.

    Returns:
        The document.

    Raises:
        ConfigError: It is malformed or has several documents; names line and column.
    """
    documents = parse_all(text, name)
    if len(documents) > 1:
        raise ConfigError(f"{documents[1].where()} begins the second of {len(documents)} documents; keep one")
    return documents[0]


def parse_all(text: str, name: str) -> list[Document]:
    """Every document in a text, in order.

    Args:
        text: YAML.
        name: Stands for it in messages.

    Returns:
        The documents; one without data if there is none.

    Raises:
        ConfigError: It is malformed; names line and column.
    """
    if len(text) > MAX_BYTES:
        raise ConfigError(
            f"{name} has {len(text):,} characters; a search or recipe file has at most {MAX_BYTES:,}"
        )
    try:
        loader, out = _Loader(text, name), []
        builder = _Builder(loader, name)
        while loader.check_node():
            root = loader.get_node()
            builder.marks = {}
            data = builder.build(root, (), 0) if root is not None else None
            out.append(Document(name, text, data, builder.marks))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise ConfigError(
            f"{place} is not valid YAML: {getattr(error, 'problem', None) or str(error).splitlines()[0]}"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{name} is not valid YAML: {error}") from None
    return out or [Document(name, text, None, {})]


def _place(name: str, thing: yaml.Event | yaml.Node) -> str:
    mark = thing.start_mark
    return f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name


def _check_characters(node: yaml.ScalarNode, name: str) -> None:
    """Raises ConfigError for text that would steer a terminal, or run in the other direction."""
    found = _UNWRITABLE.search(node.value)
    if found:
        raise ConfigError(
            f"{_place(name, node)} holds the character U+{ord(found[0]):04X}, which is no text; take it out"
        )


def _check_limits(depth: int, values: int, place: str) -> None:
    if depth > MAX_DEPTH:
        raise ConfigError(f"{place} is nested deeper than {MAX_DEPTH} levels")
    if values > MAX_VALUES:
        raise ConfigError(
            f"{place} is past the first {MAX_VALUES:,} keys and values; a search or recipe has no more"
        )


class _Builder:
    """Nodes of a text -> plain data and the places of its keys; what an alias stands for is built anew.

    marks: of the document at hand.
    """

    def __init__(self, loader: _Loader, name: str) -> None:
        self.marks: dict[Key, tuple[int, int]] = {}
        self._loader, self._name, self._values = loader, name, 0

    def build(self, node: yaml.Node, path: Key, depth: int) -> Any:
        self._count(node, depth)
        self.marks.setdefault(path, (node.start_mark.line + 1, node.start_mark.column + 1))
        if isinstance(node, yaml.SequenceNode):
            return [self.build(child, (*path, i), depth + 1) for i, child in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, depth + 1)
        assert isinstance(node, yaml.ScalarNode)
        _check_characters(node, self._name)
        return self._scalar(node)

    def _count(self, node: yaml.Node, depth: int) -> None:
        self._values += 1
        is_collection = isinstance(node, yaml.CollectionNode)
        _check_limits(depth + is_collection, self._values, _place(self._name, node))

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        place = _place(self._name, node)
        if node.tag == "tag:yaml.org,2002:int":
            try:
                return int(node.value)  # PyYAML would read 0100 as octal
            except ValueError:
                raise ConfigError(
                    f"{place} is not valid YAML: '{node.value[:40]}' is no whole number"
                ) from None
        try:
            return self._loader.construct_object(node)
        except (ValueError, KeyError, AttributeError, TypeError):
            kind = node.tag.rpartition(":")[2]
            raise ConfigError(f"{place} is not valid YAML: '{node.value}' is no {kind}") from None

    def _mapping(self, node: yaml.MappingNode, path: Key, depth: int) -> dict[Any, Any]:
        out = {}
        for key, (key_node, child) in self._entries(node, depth).items():
            self._count(key_node, depth)
            self.marks[(*path, key)] = (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
            out[key] = self.build(child, (*path, key), depth)
        return out

    def _entries(self, node: yaml.MappingNode, depth: int) -> dict[str, tuple[yaml.ScalarNode, yaml.Node]]:
        """Key -> (its node, the value's), in PyYAML's order: what merge keys bring, then what is written.

        What is written wins; of several mappings in one merge key, the first that has the key.
        """
        merged: dict[str, tuple[yaml.ScalarNode, yaml.Node]] = {}
        written: dict[str, tuple[yaml.ScalarNode, yaml.Node]] = {}
        for key_node, child in node.value:
            place = _place(self._name, key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{place} has a key that is not plain text; write the entries out")
            _check_characters(key_node, self._name)
            if not key_node.tag.endswith(":merge"):
                if key_node.value in written:
                    raise ConfigError(f"{place} repeats the key '{key_node.value}'; keep one of them")
                written[key_node.value] = (key_node, child)
                continue
            mappings = child.value if isinstance(child, yaml.SequenceNode) else [child]
            for mapping in reversed(mappings):
                if not isinstance(mapping, yaml.MappingNode):
                    raise ConfigError(f"{place} is a merge key, which takes a mapping or a list of mappings")
                self._count(mapping, depth)
                merged |= self._entries(mapping, depth + 1)
        return merged | written
