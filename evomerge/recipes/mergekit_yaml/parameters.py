"""Parameters of a mergekit recipe: what a document gives, checked, and the number that each layer gets of it.

mergekit resolves a parameter by precedence (the model's own, the slice's, the file's), by gradients (numbers
over the depth) and by filters (values for tensors whose names hold a text).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evomerge._yaml import Key
from evomerge.errors import RecipeError, suggest
from evomerge.methods import Method, Param
from evomerge.recipes.mergekit_yaml.document_checks import DocumentChecks
from evomerge.recipes.recipe import Filtered, Setting, setting

_IGNORED = ("int8_mask",)  # memory-saving switches that do not change the result


class ParameterReader:
    """Reads the `parameters` of a document for its merge method."""

    def __init__(self, checks: DocumentChecks, method: Method) -> None:
        """A reader of one document.

        Args:
            checks: Of the document.
            method: The document's merge method.
        """
        self._checks = checks
        self._method = method

    def given(self, path: Key, entry: Mapping[str, Any]) -> Mapping[str, Any]:
        """The parameters of a model, a slice, a module or the whole document, checked, as they are written.

        Args:
            path: Key path of the entry.
            entry: The mapping that may have `parameters`; one with `model` is a model's.

        Returns:
            Name -> a number, a gradient, or one or several filter entries.

        Raises:
            RecipeError: A parameter that the method does not have or that belongs elsewhere, or a value that
            it refuses.
        """
        place = (*path, "parameters")
        values = entry.get("parameters") or {}
        if not isinstance(values, dict):
            raise self._checks.fail(place, "parameters is a mapping from names to values")
        inside_model = bool(path) and "model" in entry
        checked = {}
        for name, value in values.items():
            if name in _IGNORED:
                continue
            param = self._declared((*place, name), name)
            if inside_model and param.per == "merge":
                raise self._checks.fail(
                    (*place, name),
                    f"{name} belongs to the whole merge; mergekit ignores it under a model, "
                    "move it to the top parameters",
                )
            self._check_value((*place, name), param, value)
            checked[name] = value
        return checked

    def setting(self, param: Param, levels: Sequence[Mapping[str, Any]], t: float) -> Setting:
        """What one layer gets of a parameter.

        The first level that has a value decides; a filter list that may miss a tensor falls through to the
        next.

        Args:
            param: The parameter.
            levels: Results of `given`, the most particular first.
            t: Depth of the layer in its slice, in [0, 1].

        Returns:
            A number, or a list of filters whose last case takes every tensor.

        Raises:
            RecipeError: No level has a value for all tensors, and the parameter has no default in mergekit.
        """
        if param.required and not any(param.name in level for level in levels):
            raise self._checks.fail((), f"{self._method.name} needs {param.name}; give it under parameters")
        cases: list[tuple[str, float]] = []
        for level in levels:
            if param.name in level:
                cases += _cases(level[param.name], param.name, t)
            if cases and cases[-1][0] == "*":
                break
        else:
            if param.required:
                raise self._checks.fail(
                    (),
                    f"{param.name} has no value for tensors that its filters miss; "
                    "add an entry without filter at the end",
                )
            cases.append(("*", param.default))
        first_of_all = next(i for i, (text, _) in enumerate(cases) if text == "*")
        if first_of_all == 0:
            return cases[0][1]
        return Filtered(tuple(cases[: first_of_all + 1]))

    def _declared(self, path: Key, name: str) -> Param:
        param = self._method.param(name)
        if param is None:
            declared = [p.name for p in self._method.params]
            raise self._checks.fail(
                path, f"{self._method.name} has no parameter '{name}'. {suggest(name, declared)}"
            )
        return param

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
