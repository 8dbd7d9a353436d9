"""Parameters of a mergekit recipe: what a document gives, checked, and the number that each layer gets of it.

mergekit resolves a parameter by precedence (the model's own, the slice's, the file's), by gradients (numbers
over the depth) and by filters (values for tensors whose names hold a text).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evomerge._yaml import Key
from evomerge.errors import RecipeError, suggest
from evomerge.methods import Method, Param
from evomerge.recipes.mergekit_yaml.document_checks import DocumentChecks
from evomerge.recipes.recipe import Filtered, Setting, setting

_SWITCH = "int8_mask"  # saves memory in mergekit, and does not change the result
_WITH_SWITCH = (
    *("breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della", "della_linear", "sce"),
    *("task_arithmetic", "ties"),
)
_SCALAR = (bool, int, float, str)
Levels = Sequence[Mapping[str, Any]]
"""Results of `ParameterReader.given`, the most particular first."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose value of a parameter is asked for, for messages.

    Attributes:
        path: Key path of the model, the slice or the document.
        model: The model, None for a parameter of the whole merge.
    """

    path: Key = ()
    model: str | None = None

    def __str__(self) -> str:
        return "" if self.model is None else f" for model '{self.model}'"


class ParameterReader:
    """Reads the `parameters` of a document for its merge method.

    Attributes:
        filters: The filter lists of all parameters, in the document's order: key paths and texts of the
            entries of each; '*' is in every name.
    """

    def __init__(self, checks: DocumentChecks, method: Method) -> None:
        """A reader of one document.

        Args:
            checks: Of the document.
            method: The document's merge method.
        """
        self._checks = checks
        self._method = method
        self.filters: list[tuple[tuple[Key, str], ...]] = []

    def given(self, path: Key, entry: Mapping[str, Any], *, is_base: bool = False) -> Mapping[str, Any]:
        """The parameters of a model, a slice, a module or the whole document, checked, as they are written.

        What mergekit would ignore is left out and noted.

        Args:
            path: Key path of the entry.
            entry: The mapping that may have `parameters`; one with `model` is a model's.
            is_base: Whether it is of the base, to which the others' differences are added.

        Returns:
            Name -> a number, a gradient, or one or several filter entries.

        Raises:
            RecipeError: A value that the method refuses, or one that no parameter can have.
        """
        place = (*path, "parameters")
        values = entry.get("parameters") or {}
        if not isinstance(values, dict):
            raise self._checks.fail(place, "parameters is a mapping from names to values")
        inside_model = bool(path) and "model" in entry
        checked = {}
        for name, value in values.items():
            param = self._method.param(name)
            reason = self._why_ignored(name, inside_model=inside_model, is_base=is_base)
            if reason:
                self._check_form((*place, name), name, value)
                self._checks.ignore((*place, name), reason)
            elif param is not None:
                self._check_value((*place, name), param, value)
                self._note_filters((*place, name), value)
                checked[name] = value
        return checked

    def _why_ignored(self, name: str, *, inside_model: bool, is_base: bool) -> str | None:
        """A sentence about a parameter that changes nothing where it stands; None for one that does."""
        param = self._method.param(name)
        if name == _SWITCH and self._method.name in _WITH_SWITCH and not inside_model:
            return None
        if param is None:
            declared = [p.name for p in self._method.params]
            return (
                f"{self._method.name} has no parameter '{name[:80]}'; it is left out, as mergekit does. "
                + suggest(name, declared)
            )
        if inside_model and param.per == "merge":
            return (
                f"{name} belongs to the whole merge; under a model it is left out, as mergekit does: "
                "move it to the top parameters"
            )
        if is_base and param.per == "model":
            return f"{name} of the base is left out, as mergekit does: {self._method.name} adds to the base"
        return None

    def _check_form(self, path: Key, name: str, value: Any) -> None:
        """Checks that mergekit can read a value, although it then ignores it."""
        entries = value if isinstance(value, list) else [value]
        if any(isinstance(entry, dict) for entry in entries):
            has_form = all(isinstance(entry, dict) and _is_filter(entry) for entry in entries)
        else:
            has_form = all(isinstance(entry, _SCALAR) for entry in entries)
        if not has_form:
            raise self._checks.fail(
                path, f"{name} must be a number, a list of numbers or filter entries, got {value!r:.80}"
            )

    def _note_filters(self, path: Key, value: Any) -> None:
        entries = [value] if isinstance(value, dict) else value
        if isinstance(entries, list) and isinstance(entries[0], dict):
            places = [(*path, i) if isinstance(value, list) else path for i in range(len(entries))]
            texts = [str(entry.get("filter") or "*") for entry in entries]
            self.filters.append(tuple(zip(places, texts, strict=True)))

    def setting(self, param: Param, levels: Levels, t: float, owner: Owner) -> Setting:
        """What one layer gets of a parameter.

        The first level that has a value decides; a filter list that may miss a tensor falls through to the
        next.

        Args:
            param: The parameter.
            levels: Where it may be given.
            t: Depth of the layer in its slice, in [0, 1].
            owner: Whose value it is, for the message.

        Returns:
            A number, or a list of filters whose last case takes every tensor.

        Raises:
            RecipeError: No level has a value for all tensors, and the parameter has no default in mergekit.
        """
        if param.required and not any(param.name in level for level in levels):
            raise self._checks.fail(owner.path, self._missing(param, owner))
        cases: list[tuple[str, float]] = []
        for level in levels:
            if param.name in level:
                cases += _cases(level[param.name], param.name, t)
            if cases and cases[-1][0] == "*":
                break
        else:
            if param.required:
                raise self._checks.fail(
                    owner.path,
                    f"{param.name}{owner} has no value for tensors that its filters miss; "
                    "add an entry without filter at the end",
                )
            cases.append(("*", param.default))
        first_of_all = next(i for i, (text, _) in enumerate(cases) if text == "*")
        if first_of_all == 0:
            return cases[0][1]
        return Filtered(tuple(cases[: first_of_all + 1]))

    def _missing(self, param: Param, owner: Owner) -> str:
        """A sentence about a parameter that has no value; with what is ignored and may have been meant."""
        where = "under its parameters, or under those of the file" if owner.model else "under parameters"
        names = re.compile(rf"\b{param.name}\b")
        ignored = sorted(self._checks.ignored, key=lambda entry: not names.search(entry[1]))
        note = " Left out was: " + " ".join(ignored[0]) if ignored else ""
        return f"{self._method.name} needs {param.name}{owner}; give it {where}.{note}"

    def _check_value(self, path: Key, param: Param, value: Any) -> None:
        """Checks the form of a value and every number in it."""
        name = param.name
        entries = value if isinstance(value, list) else [value]
        if not entries:
            raise self._checks.fail(path, f"{name} is an empty list")
        filters = [isinstance(entry, dict) for entry in entries]
        if any(filters) and not all(filters):
            raise self._checks.fail(path, f"{name} mixes numbers and filter entries; use one form")
        for i, entry in enumerate(entries):
            place = (*path, i) if isinstance(value, list) else path
            for number in self._numbers(place, entry):
                try:
                    param.check(setting(number, name), self._method.name)
                except RecipeError as error:
                    raise self._checks.fail(place, str(error)) from None

    def _numbers(self, path: Key, entry: Any) -> list[Any]:
        """The numbers of an entry: itself, or the value or gradient of a filter."""
        if not isinstance(entry, dict):
            return [entry]
        self._checks.keys(path, entry, ("filter", "value"))
        if not isinstance(entry.get("filter"), str | None):
            raise self._checks.fail((*path, "filter"), f"a filter is text, got {entry['filter']!r}")
        value = entry.get("value")
        numbers = value if isinstance(value, list) else [value]
        return numbers or [None]


def _is_filter(entry: Mapping[str, Any]) -> bool:
    """Whether mergekit reads a mapping as a value for the tensors that a filter names."""
    value = entry.get("value")
    numbers = value if isinstance(value, list) else [value]
    return isinstance(entry.get("filter"), str | None) and all(isinstance(n, _SCALAR) for n in numbers)


def _cases(value: Any, name: str, t: float) -> list[tuple[str, float]]:
    """(filter, number) pairs of a parameter's value; the filter '*' takes every tensor."""
    entries = [value] if isinstance(value, dict) else value
    if not (isinstance(entries, list) and entries and isinstance(entries[0], dict)):
        return [("*", _gradient(value, t, name))]
    return [(str(entry.get("filter") or "*"), _gradient(entry["value"], t, name)) for entry in entries]


def _gradient(value: Any, t: float, name: str) -> float:
    """mergekit's gradient: n numbers over the depth t in [0, 1], linear between neighbours; switches step."""
    if not isinstance(value, list):
        return setting(value, name)
    if all(isinstance(v, bool) for v in value):
        return setting(value[int(t * (len(value) - 1))], name)
    position = t * (len(value) - 1)
    low = int(position)
    high = min(len(value) - 1, low + 1)
    share = position - low
    return (1 - share) * setting(value[low], name) + share * setting(value[high], name)
