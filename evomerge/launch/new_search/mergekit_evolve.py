"""A file of mergekit-evolve -> wishes for a search, and what the search cannot hold.

The form is that of mergekit's docs/evolve.md; values that mergekit takes where a key is left out are taken
here too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge import _yaml
from evomerge._yaml import Document, Key
from evomerge.errors import ConfigError, RecipeError, suggest
from evomerge.launch.new_search.wishes import TaskWish, Wishes, named_models
from evomerge.recipes.mergekit_yaml import references

_GENOME = (
    *("models", "merge_method", "base_model", "tokenizer_source", "layer_granularity", "normalize"),
    *("allow_negative_weights", "filters", "smooth"),
)
_TOP = (
    *("genome", "tasks", "limit", "num_fewshot", "shuffle", "random_init", "apply_chat_template"),
    "fewshot_as_multiturn",
)
_METHODS = ("linear", "dare_ties", "task_arithmetic", "ties", "slerp")
_NORMALIZED = ("ties", "dare_ties", "linear")  # unless the file says
_FILTERS = {"attn": "attention", "attention": "attention", "mlp": "mlp"}
"""Part of a filter -> the component whose tensors it takes."""
_HIGHEST = 1.5  # bound of weights, which mergekit-evolve leaves open
_WIDE = 0.3  # sigma in place of a random first genome


class _Genome:
    """Reads one file; `notes` gathers what it says and a search cannot hold."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.notes: list[str] = []
        data = document.data
        if not isinstance(data, dict) or not isinstance(data.get("genome"), dict):
            raise ConfigError(
                f"{document.where()} is no file of mergekit-evolve: it has no `genome` mapping; "
                "a recipe goes to --from-mergekit"
            )
        self.top: dict[str, Any] = data
        self.genome: dict[str, Any] = data["genome"]
        self._check_keys((), data, _TOP)
        self._check_keys(("genome",), self.genome, _GENOME)

    def fail(self, path: Key, sentence: str) -> ConfigError:
        """An error with the place of a key."""
        return ConfigError(f"{self.document.where(path)} {sentence}")

    def note(self, path: Key, sentence: str) -> None:
        """Notes something that is not carried over."""
        line = self.document.marks.get(path, (0, 0))[0]
        self.notes.append(f"{'.'.join(map(str, path))}{f' (line {line})' if line else ''}: {sentence}")

    def flag(self, data: Mapping[str, Any], path: Key, default: bool) -> bool:
        """A switch."""
        value = data.get(str(path[-1]))
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(path, f"{path[-1]} is true or false, got {value!r:.60}")
        return value

    def whole(self, data: Mapping[str, Any], path: Key) -> int | None:
        """A whole number of at least 0."""
        value = data.get(str(path[-1]))
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.fail(path, f"{path[-1]} is a whole number from 0, got {value!r:.60}")
        return value

    def _check_keys(self, path: Key, data: Mapping[str, Any], allowed: Sequence[str]) -> None:
        for key in data:
            if key not in allowed:
                self.note((*path, key), f"is no key of mergekit-evolve. {suggest(str(key), allowed)}")


def read_evolve(file: Path) -> Wishes:
    """Reads a file of mergekit-evolve.

    Args:
        file: The YAML.

    Returns:
        The wishes, with what cannot be carried over in `notes`.

    Raises:
        ConfigError: It is no such file; says where.
    """
    reader = _Genome(_yaml.read(file))
    references_ = _models(reader)
    base_reference = _base(reader)
    models = named_models(references_)
    base = _name_of(base_reference, models)
    if base_reference is not None and base is None:
        models = {**named_models([base_reference, *references_])}
        base = next(iter(models))
    elif base is not None and len(models) > 1:
        reader.note(("genome", "models"), f"'{base}' is the base, and a search gives the base no weight")
    method = _method(reader, len([name for name in models if name != base]))
    if base is None:
        base = next(iter(models))
        reader.note(
            ("genome", "base_model"),
            f"is not given; '{base}' gives the merge its tokenizer and config, and "
            "is mixed in only where there is one other model",
        )
    space, reasons = _space(reader, method, len(models) - 1)
    evaluation, search = _evaluation(reader, reasons), _search(reader, reasons)
    _unheld(reader)
    granularity = reader.whole(reader.genome, ("genome", "layer_granularity")) or 0
    reasons["space", "groups"] = (
        f"layer_granularity: {granularity}"
        if granularity
        else "No layer_granularity: one group of all layers"
    ) + " in mergekit-evolve's file."
    return Wishes(
        models=models,
        tasks=tuple(_tasks(reader)),
        base=base,
        method=method,
        blocks={"space": space, "evaluation": evaluation, "search": search},
        reasons=reasons,
        notes=tuple(reader.notes),
        layer_granularity=granularity,
        chat_template=reader.flag(reader.top, ("apply_chat_template",), default=True),
    )


def _models(reader: _Genome) -> list[str]:
    given = reader.genome.get("models")
    if not isinstance(given, list) or len(given) < 1:
        raise reader.fail(("genome", "models"), "models is a list of models, with one entry at least")
    return [_reference(reader, ("genome", "models", i), value) for i, value in enumerate(given)]


def _reference(reader: _Genome, path: Key, value: Any) -> str:
    """A model as text, or as mergekit's mapping of model, revision and LoRA."""
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, dict):
        raise reader.fail(path, f"a model is a text or a mapping, got {value!r:.60}")
    try:
        return references.text(value, lambda sentence: reader.note(path, sentence))
    except RecipeError as error:
        raise reader.fail(path, str(error)) from None


def _base(reader: _Genome) -> str | None:
    value = reader.genome.get("base_model")
    return None if value is None else _reference(reader, ("genome", "base_model"), value)


def _name_of(reference: str | None, models: Mapping[str, str]) -> str | None:
    return next((name for name, known in models.items() if known == reference), None)


def _method(reader: _Genome, experts: int) -> str:
    """The merge method; slerp of several models becomes multislerp."""
    path: Key = ("genome", "merge_method")
    method = reader.genome.get("merge_method")
    if method not in _METHODS:
        known = ", ".join(_METHODS)
        raise reader.fail(path, f"merge_method is one of {known} in mergekit-evolve, got {method!r:.60}")
    if method != "linear" and method != "slerp" and reader.genome.get("base_model") is None:
        raise reader.fail(path, f"{method} needs genome.base_model; add it")
    if method == "slerp" and experts > 1 and (experts > 2 or reader.genome.get("base_model") is not None):
        reader.note(
            path, "slerp chooses two of several models for each layer group; multislerp mixes them all"
        )
        return "multislerp"
    return str(method)


def _space(
    reader: _Genome, method: str, experts: int
) -> tuple[dict[str, Any], dict[tuple[str | int, ...], str]]:
    """Bounds and components as the genome has them, and what stands above them."""
    genome = reader.genome
    parameters: dict[str, Any] = {}
    reasons: dict[tuple[str | int, ...], str] = {}
    negative = reader.flag(genome, ("genome", "allow_negative_weights"), default=False)
    if method == "slerp":
        parameters["t"] = {"low": 0.0, "high": 1.0, "start": 0.5}
    else:
        share = 1 / max(1, experts)
        low = -_HIGHEST if negative else 0.0
        parameters["weight"] = {"low": low, "high": _HIGHEST, "start": round(min(share, 0.98 * _HIGHEST), 4)}
        told = "allowed" if negative else "not allowed"
        reasons["space", "parameters", "weight"] = (
            f"Negative weights are {told}, and the start is an equal share, as in mergekit-evolve; its "
            "weights have no upper bound."
        )
    if method in ("ties", "dare_ties"):
        parameters["density"] = {"low": 0.05, "high": 1.0, "start": 0.95}
        reasons["space", "parameters", "density"] = (
            "mergekit-evolve begins at density 1, which is a bound here."
        )
    normalize = reader.flag(genome, ("genome", "normalize"), default=method in _NORMALIZED)
    key = {"multislerp": "normalize_weights", "slerp": None}.get(method, "normalize")
    if key is not None:
        parameters[key] = normalize
    space: dict[str, Any] = {"components": _components(reader), "parameters": parameters}
    reasons["space", "components"] = (
        "From genome.filters; a single one has all tensors of a layer follow it. Embeddings and head have "
        "coefficients of their own, where mergekit-evolve gives them those of the first and last layers."
    )
    return space, reasons


def _components(reader: _Genome) -> list[str]:
    """Filters as components of a layer; mergekit-evolve has one set more for all other tensors."""
    filters = reader.genome.get("filters")
    if filters is None:
        return ["attention"]
    if not isinstance(filters, list) or not all(isinstance(text, str) for text in filters):
        raise reader.fail(("genome", "filters"), f"filters is a list of texts, got {filters!r:.60}")
    components: list[str] = []
    for i, text in enumerate(filters):
        component = next((name for part, name in _FILTERS.items() if part in text), None)
        if component is None:
            reader.note(
                ("genome", "filters", i),
                f"filter '{text}' is no part of a layer that has coefficients of its own here (attention, "
                "mlp, other); its tensors are in 'other'",
            )
        elif component not in components:
            components.append(component)
    return [*components, "other"] if components else ["attention"]


def _tasks(reader: _Genome) -> Iterator[TaskWish]:
    given = reader.top.get("tasks")
    if not isinstance(given, list) or not given:
        raise reader.fail(("tasks",), "tasks is a list of tasks, with one entry at least")
    few_shot = reader.whole(reader.top, ("num_fewshot",))
    for i, entry in enumerate(given):
        path: Key = ("tasks", i)
        entry = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise reader.fail(path, "a task is a name, or a mapping with name, weight and metric")
        weight, metric = entry.get("weight", 1.0), entry.get("metric", "acc,none")
        if not isinstance(weight, int | float) or isinstance(weight, bool) or weight == 0:
            raise reader.fail((*path, "weight"), f"a weight is a number other than 0, got {weight!r:.60}")
        if not isinstance(metric, str):
            raise reader.fail((*path, "metric"), f"a metric is a text such as 'acc,none', got {metric!r:.60}")
        if weight < 0:
            reader.note(
                (*path, "weight"),
                "is negative, which says that lower values are better; a search knows that "
                "of the metric, and takes the weight's size",
            )
        name, _, filter_ = metric.partition(",")
        yield TaskWish(
            entry["name"], abs(float(weight)), name, None if filter_ in ("", "none") else filter_, few_shot
        )


def _evaluation(reader: _Genome, reasons: dict[tuple[str | int, ...], str]) -> dict[str, Any]:
    block: dict[str, Any] = {}
    limit = reader.whole(reader.top, ("limit",))
    if limit:
        block["items"] = limit
        reasons["evaluation", "items"] = (
            "The file's limit: items of each task in a generation. A generation takes others each time."
        )
    else:
        reader.note(
            ("limit",), "is not given, which is all items for every candidate; a generation takes a part"
        )
    if reader.flag(reader.top, ("fewshot_as_multiturn",), default=True) and reader.flag(
        reader.top, ("apply_chat_template",), default=True
    ):
        block["fewshot_as_multiturn"] = True
    return block


def _search(reader: _Genome, reasons: dict[tuple[str | int, ...], str]) -> dict[str, Any]:
    if not reader.flag(reader.top, ("random_init",), default=False):
        return {}
    reader.note(
        ("random_init",), f"a search begins at its start; sigma is {_WIDE} for a wide first generation"
    )
    reasons["search", "sigma"] = "Wide, in place of random_init."
    return {"sigma": _WIDE}


def _unheld(reader: _Genome) -> None:
    """Notes the keys that have no like."""
    checks: list[tuple[Key, Mapping[str, Any], Callable[[Any], bool], str]] = [
        (
            ("genome", "smooth"),
            reader.genome,
            bool,
            "parameters are interpolated over the layers there, and are steps of layer groups here",
        ),
        (
            ("genome", "tokenizer_source"),
            reader.genome,
            lambda value: value not in (None, "base"),
            "parents keep the base's tokens here; one with others is refused with the recipe that brings "
            "it to them",
        ),
        (("shuffle",), reader.top, bool, "items are taken by a hash here, another part in each generation"),
    ]
    for path, data, is_said, sentence in checks:
        if is_said(data.get(str(path[-1]))):
            reader.note(path, sentence)
