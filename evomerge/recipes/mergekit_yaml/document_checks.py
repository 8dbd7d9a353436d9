"""Checks of one parsed document that name the file, line and column of what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from evomerge._yaml import Document, Key
from evomerge.errors import RecipeError, suggest
from evomerge.recipes.mergekit_yaml import references

T = TypeVar("T")
_LONGEST_MESSAGE = 500  # characters of an error that quotes the file


class DocumentChecks:
    """Reads texts, lists, mappings and model references out of one document; every error names its place.

    Attributes:
        document: The parsed document.
        ignored: What stands in it and changes nothing, in mergekit neither: (place, sentence) of each.
    """

    def __init__(self, document: Document) -> None:
        """Checks of a document.

        Args:
            document: The parsed document.
        """
        self.document = document
        self.ignored: list[tuple[str, str]] = []

    def ignore(self, path: Key, sentence: str) -> None:
        """Notes something that changes nothing.

        Args:
            path: Key path of its place.
            sentence: What it is, and why it changes nothing; without its place.
        """
        line = " ".join(sentence.split())
        self.ignored.append((self.document.where(path), line[:_LONGEST_MESSAGE]))

    def fail(self, path: Key, message: str) -> RecipeError:
        """An error at a place; the caller raises it.

        Args:
            path: Key path of the place.
            message: What is wrong and what to do; cut where it is long, for it may quote the file.

        Returns:
            The error, whose message begins with file, line and column.
        """
        line = " ".join(message.split())
        if len(line) > _LONGEST_MESSAGE:
            line = line[:_LONGEST_MESSAGE] + " …"
        return RecipeError(f"{self.document.where(path)} {line}")

    def at(self, path: Key, read: Callable[[], T]) -> T:
        """Gives an error that names no place the one of a key path.

        Args:
            path: Key path of the place.
            read: Reads what is there.

        Returns:
            What `read` returned.

        Raises:
            RecipeError: `read` raised one.
        """
        try:
            return read()
        except RecipeError as error:
            has_place = str(error).startswith(self.document.name)
            raise (error if has_place else self.fail(path, str(error))) from None

    def text(self, path: Key, value: Any, what: str) -> str:
        """A text that is not empty.

        Args:
            path: Key path of its place.
            value: What the document has there.
            what: What it is called in the message.

        Returns:
            The value.

        Raises:
            RecipeError: It is no text, or an empty one.
        """
        if not isinstance(value, str) or not value:
            raise self.fail(path, f"{what} must be text, got {value!r}")
        return value

    def model(self, path: Key, value: Any) -> str:
        """A model reference.

        Args:
            path: Key path of its place.
            value: A text, or mergekit's mapping form of a reference.

        Returns:
            The reference as one text.

        Raises:
            RecipeError: It is neither.
        """
        if isinstance(value, dict):
            return self.at(path, lambda: references.text(value, lambda sentence: self.ignore(path, sentence)))
        return self.text(path, value, "a model")

    def mappings(self, path: Key, value: Any) -> list[Any]:
        """A list of mappings.

        Args:
            path: Key path of its place; the last key is its name in the message.
            value: What the document has there.

        Returns:
            The list.

        Raises:
            RecipeError: It is no list, is empty or holds something else.
        """
        if not isinstance(value, list) or not value or not all(isinstance(e, dict) for e in value):
            raise self.fail(path, f"{path[-1]} must be a list of mappings with at least one entry")
        return value

    def keys(self, path: Key, value: Mapping[str, Any], allowed: Sequence[str], hint: str = "") -> None:
        """Notes the unknown keys of a mapping, which mergekit ignores.

        Args:
            path: Key path of its place.
            value: The mapping.
            allowed: The keys it may have.
            hint: What to say besides of an unknown key.
        """
        for key in value:
            if key not in allowed:
                self.ignore((*path, key), unknown_key(str(key), allowed, hint))


def unknown_key(key: str, allowed: Sequence[str], hint: str = "") -> str:
    """A sentence about a key that mergekit ignores.

    Args:
        key: The key.
        allowed: The keys that may stand there.
        hint: What to say besides.

    Returns:
        The sentence.
    """
    return f"unknown key '{key[:80]}'{hint} is left out, as mergekit does. {suggest(key, allowed)}"
