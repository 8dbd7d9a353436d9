"""What a merge is: frozen, hashable values with a canonical JSON form.

A `Recipe` lists one `Mix` per *output* layer, so that weight search (layer i mixes the parents' layers i) and
layer routing (output layer 17 is layer 9 of `math`, passed through) are the same type. Nothing here knows
tensors, files or optimizers.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from evomerge.errors import RecipeError
from evomerge.recipes.tokenizer_spec import TokenizerSpec

Source = tuple[str, int | None]
"""(model name, layer index); the layer is None for tensors outside the layer stack."""


@dataclass(frozen=True, slots=True)
class Filtered:
    """A value that depends on the tensor: the first case whose text is in the tensor's name decides.

    Attributes:
        cases: ((text, value), ...), at least one; the text '*' is in every name.
    """

    cases: tuple[tuple[str, float], ...]

    def __post_init__(self) -> None:
        if not self.cases:
            raise RecipeError("a filter list needs at least one case")
        object.__setattr__(self, "cases", tuple((text, float(value) + 0.0) for text, value in self.cases))

    def at(self, tensor: str) -> float | None:
        """The value for one tensor.

        Args:
            tensor: Its name.

        Returns:
            The value of the first case that matches, or None if none does.
        """
        for text, value in self.cases:
            if text == "*" or text in tensor:
                return value
        return None


@dataclass(frozen=True, slots=True)
class PerRow:
    """A value for each row of some tensors, and one for all others.

    Attributes:
        cases: ((text, values), ...), at least one: the first case whose text is in the tensor's name decides.
            One value is that of the whole tensor; else there is one for each of its rows (first dimension).
        rest: The value of a tensor that no case names.
    """

    cases: tuple[tuple[str, tuple[float, ...]], ...]
    rest: float

    def __post_init__(self) -> None:
        if not self.cases or not all(values for _, values in self.cases):
            raise RecipeError("values by row need at least one tensor, and each tensor at least one value")
        cases = tuple((text, tuple(float(value) + 0.0 for value in values)) for text, values in self.cases)
        object.__setattr__(self, "cases", cases)
        object.__setattr__(self, "rest", float(self.rest) + 0.0)

    def at(self, tensor: str) -> tuple[float, ...]:
        """The values for one tensor.

        Args:
            tensor: Its name.

        Returns:
            One for the whole tensor, or one for each row.
        """
        return next((values for text, values in self.cases if text in tensor), (self.rest,))

    @property
    def numbers(self) -> tuple[float, ...]:
        """Every value, those of the cases first."""
        return (*(value for _, values in self.cases for value in values), self.rest)


_SHOWN = 500  # characters of an error about a text that may hold anything
POLICIES = ("float32", "mergekit")
"""What arithmetic a merge does, see `Recipe.policy`."""
STORED = "stored"
"""The arithmetic type that is that of the inputs."""
Setting = float | Filtered | PerRow
ParamValue = Setting | tuple[Setting, ...]
"""A setting for a parameter of the merge; a tuple of one per source for a parameter of each model."""


@dataclass(frozen=True, slots=True)
class Mix:
    """How one output layer (or the tensors before or after the stack) is made.

    Attributes:
        method: Name in `evomerge.methods.METHODS`.
        sources: The models mixed, in order; the base is not among them.
        base: The base model's (name, layer) for methods that need one, else None.
        params: ((name, value), ...) sorted by name; see `ParamValue`.
    """

    method: str
    sources: tuple[Source, ...]
    base: Source | None = None
    params: tuple[tuple[str, ParamValue], ...] = ()

    def __post_init__(self) -> None:
        if not self.sources:
            raise RecipeError(f"a mix by '{self.method}' has no source models; list at least one")
        object.__setattr__(self, "params", tuple((name, _normal(value)) for name, value in self.params))
        for name, value in self.params:
            if isinstance(value, tuple) and len(value) != len(self.sources):
                raise RecipeError(
                    f"{name} has {len(value)} values for {len(self.sources)} source models; give one for each"
                )

    @property
    def models(self) -> tuple[str, ...]:
        """Every model named, sources first, without repeats."""
        named = [model for model, _ in self.sources] + ([self.base[0]] if self.base else [])
        return tuple(dict.fromkeys(named))

    @property
    def passed(self) -> Source | None:
        """The source of a mix that takes it over as it is, else None; a factor of 1 may be spelt out."""
        plain = self.method == "passthrough" and self.base is None and len(self.sources) == 1
        return self.sources[0] if plain and all(_is_one(value) for _, value in self.params) else None


@dataclass(frozen=True, slots=True)
class Recipe:
    """A whole merged model.

        layer = Mix("linear", (("math", 0), ("code", 0)), params=params({"weight": (0.5, 0.5)}))
        outer = Mix("linear", (("math", None), ("code", None)), params=params({"weight": (0.5, 0.5)}))
        recipe = Recipe(base="math", layers=(layer,), embeddings=outer, head=outer)

    Attributes:
        base: Model whose config, tokenizer and other files the output gets.
        layers: One mix per output layer; the depth is their number.
        embeddings: The tensors before the layer stack.
        head: Those after it: final norm and output head.
        dtype: The arithmetic type under the policy 'mergekit', STORED for that of the inputs; else 'float32'.
        out_dtype: Type of the tensors that are scored and shipped.
        seed: Keys the masks of randomized methods, in [0, 2**63).
        policy: 'float32': inputs are upcast and the result is rounded once; 'mergekit': the types, operations
            and faults of mergekit 0.1.5.
        tokenizer: What the output's tokenizer is made of; None: the base's files, and vocabularies must
            agree.
        chat_template: Jinja text, a known name, 'auto', or None for the base's.
        stages: (name, recipe) pairs: intermediate merges, merged before and read like models by those after
            them.
        scales: What the hidden state that enters each output layer is multiplied by, the first 1; empty where
            all are 1.
    """

    base: str
    layers: tuple[Mix, ...]
    embeddings: Mix
    head: Mix
    dtype: str = "float32"
    out_dtype: str = "bfloat16"
    seed: int = 0
    policy: str = "float32"
    tokenizer: TokenizerSpec | None = None
    chat_template: str | None = None
    stages: tuple[tuple[str, Recipe], ...] = ()
    scales: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.layers:
            raise RecipeError("a recipe needs at least one output layer, got none")
        object.__setattr__(self, "scales", _checked_scales(self.scales, len(self.layers)))
        if self.policy not in POLICIES:
            raise RecipeError(f"unknown arithmetic policy '{self.policy}'. Known: {', '.join(POLICIES)}")
        if self.policy == "float32" and self.dtype != "float32":
            raise RecipeError(
                f"under the policy 'float32' arithmetic is in float32, got dtype '{self.dtype}'; "
                "use the policy 'mergekit'"
            )
        names = [name for name, _ in self.stages]
        if len(set(names)) < len(names) or any(recipe.stages for _, recipe in self.stages):
            raise RecipeError("every stage has a name of its own and no stages inside")

    @property
    def mixes(self) -> tuple[Mix, ...]:
        """All mixes in output order: embeddings, layers, head."""
        return (self.embeddings, *self.layers, self.head)

    @property
    def reads(self) -> tuple[str, ...]:
        """Every model or stage that the mixes, the base and the tokenizer name, in order of first use."""
        named = [model for mix in self.mixes for model in mix.models] + [self.base]
        return tuple(dict.fromkeys([*named, *(self.tokenizer.models if self.tokenizer else ())]))

    @property
    def models(self) -> tuple[str, ...]:
        """Every model read by the recipe or a stage of it, in order of first use, the base included."""
        named = [model for _, stage in self.stages for model in stage.reads] + list(self.reads)
        stages = {name for name, _ in self.stages}
        return tuple(dict.fromkeys(model for model in named if model not in stages))

    @property
    def root_base(self) -> str:
        """The model whose config and files the output has: the base, or the base of the stage that it is."""
        stages = dict(self.stages)
        base = self.base
        while base in stages and stages[base].base != base:
            base = stages[base].base
        return base

    @property
    def row_numbers(self) -> int:
        """How many numbers settings by row hold; 0 for a recipe without any."""
        given = (value for mix in self.mixes for _, value in mix.params)
        settings = (s for value in given for s in (value if isinstance(value, tuple) else (value,)))
        return sum(len(values) for s in settings if isinstance(s, PerRow) for _, values in s.cases)

    def is_route(self, depths: Mapping[str, int]) -> bool:
        """Whether this is more than a merge of whole models.

        It is where layers are out of place, more or fewer than the base has, or scaled.

        Args:
            depths: Model name -> number of its layers. A base that is a stage is as deep as that; without the
                depth of the base only the places of the layers count.

        Returns:
            True for a route.
        """
        out_of_place = any(mix.sources[0][1] != i for i, mix in enumerate(self.layers))
        all_depths = {**depths, **{name: len(stage.layers) for name, stage in self.stages}}
        base_depth = all_depths.get(self.base, len(self.layers))
        return bool(self.scales) or out_of_place or len(self.layers) != base_depth

    @property
    def id(self) -> str:
        """16 hexadecimal digits of the SHA-256 of `canonical`: the same on every machine."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()[:16]

    def canonical(self) -> str:
        """Canonical JSON: sorted keys, no spaces, shortest exact floats; equal recipes give equal text."""
        return json.dumps(_plain(self), sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The recipe of a canonical text.

        Args:
            text: What `canonical` returned.

        Returns:
            An equal recipe.

        Raises:
            RecipeError: It is any other text.
        """
        try:
            return _recipe(json.loads(text))
        except (KeyError, TypeError, ValueError, RecursionError, RecipeError) as error:
            raise RecipeError(
                f"not a recipe in canonical JSON: {' '.join(str(error).split())[:_SHOWN]}"
            ) from error


def setting(value: Any, what: str) -> float:
    """A finite float from a number; booleans become 1.0 and 0.0, as in mergekit.

    Args:
        value: Anything.
        what: What it is called in the message.

    Returns:
        The number, never -0.0.

    Raises:
        RecipeError: It is no number, or not finite.
    """
    if isinstance(value, bool | int | float) and abs(value) <= sys.float_info.max:
        return float(value) + 0.0  # -0.0 and 0.0 are one recipe
    raise RecipeError(f"{what} must be a finite number, got {value!r}")


def _checked_scales(given: Iterable[float], layers: int) -> tuple[float, ...]:
    """The scales as floats; empty where all are 1."""
    scales = tuple(float(s) for s in given)
    if not scales:
        return ()
    if len(scales) != layers or scales[0] != 1 or not all(0 < s < math.inf for s in scales):
        raise RecipeError(
            f"scales are one number above 0 for each of the {layers} layers, the first 1; got {list(scales)}"
        )
    return scales if any(s != 1 for s in scales) else ()


def _normal(value: ParamValue) -> ParamValue:
    """The value with every number a float, and no -0.0: equal mixes have one text."""
    if isinstance(value, tuple):
        return tuple(v if isinstance(v, Filtered | PerRow) else float(v) + 0.0 for v in value)
    return value if isinstance(value, Filtered | PerRow) else float(value) + 0.0


def _is_one(value: ParamValue) -> bool:
    """Whether a parameter of a merge, or of its only source, is 1 for every tensor that it is given for."""
    (setting,) = value if isinstance(value, tuple) else (value,)
    if isinstance(setting, Filtered):
        return all(number == 1 for _, number in setting.cases)
    return setting == 1


def params(values: Mapping[str, ParamValue]) -> tuple[tuple[str, ParamValue], ...]:
    """The form of parameters that `Mix.params` holds.

    Args:
        values: Parameter name -> value.

    Returns:
        ((name, value), ...) sorted by name.
    """
    return tuple(sorted(values.items()))


def _plain(value: Any) -> Any:
    match value:
        case Recipe():
            return {
                "base": value.base,
                "layers": [_plain(m) for m in value.layers],
                "embeddings": _plain(value.embeddings),
                "head": _plain(value.head),
                "dtype": value.dtype,
                "out_dtype": value.out_dtype,
                "seed": value.seed,
                "policy": value.policy,
                "tokenizer": value.tokenizer.to_plain() if value.tokenizer else None,
                "chat_template": value.chat_template,
                "stages": [[name, _plain(stage)] for name, stage in value.stages],
                # left out where empty: the ids of recipes from before there were scales stay
                **({"scales": list(value.scales)} if value.scales else {}),
            }
        case Mix():
            return {
                "method": value.method,
                "sources": [list(s) for s in value.sources],
                "base": list(value.base) if value.base else None,
                "params": {name: _plain(v) for name, v in value.params},
            }
        case Filtered():
            return {"cases": [[text, number] for text, number in value.cases]}
        case PerRow():
            return {"rows": [[text, list(values)] for text, values in value.cases], "rest": value.rest}
        case tuple():
            return [_plain(v) for v in value]
    return value


def _recipe(data: Any) -> Recipe:
    names = "base layers embeddings head dtype out_dtype seed policy tokenizer chat_template stages"
    data = _fields(data, names + (" scales" if isinstance(data, dict) and "scales" in data else ""))
    if not _whole(data["seed"]):
        raise ValueError(f"seed must be a whole number of at least 0, got {data['seed']!r}")
    return Recipe(
        base=_text(data["base"]),
        layers=tuple(_mix(m) for m in data["layers"]),
        embeddings=_mix(data["embeddings"]),
        head=_mix(data["head"]),
        dtype=_text(data["dtype"]),
        out_dtype=_text(data["out_dtype"]),
        seed=data["seed"],
        policy=_text(data["policy"]),
        tokenizer=None if data["tokenizer"] is None else TokenizerSpec.from_plain(data["tokenizer"]),
        chat_template=None if data["chat_template"] is None else _text(data["chat_template"]),
        stages=tuple((_text(name), _recipe(stage)) for name, stage in data["stages"]),
        scales=tuple(_number(s) for s in data.get("scales", ())),
    )


def _mix(data: Any) -> Mix:
    data = _fields(data, "method sources base params")
    given = _fields(data["params"], None)
    return Mix(
        method=_text(data["method"]),
        sources=tuple(_source(s) for s in data["sources"]),
        base=None if data["base"] is None else _source(data["base"]),
        params=params({name: _value(v) for name, v in given.items()}),
    )


def _source(data: Any) -> Source:
    model, layer = data
    if layer is not None and not _whole(layer):
        raise ValueError(f"a layer is a whole number of at least 0 or null, got {layer!r}")
    return (_text(model), layer)


def _value(data: Any) -> ParamValue:
    if isinstance(data, list):
        return tuple(_setting(v) for v in data)
    return _setting(data)


def _setting(data: Any) -> Setting:
    if isinstance(data, dict) and "rows" in data:
        rows = [
            (_text(text), tuple(map(_number, values))) for text, values in _fields(data, "rows rest")["rows"]
        ]
        return PerRow(tuple(rows), _number(data["rest"]))
    if isinstance(data, dict):
        cases = [(text, _number(number)) for text, number in _fields(data, "cases")["cases"]]
        if not all(isinstance(text, str) for text, _ in cases):
            raise ValueError(f"a filter is a text, got {cases!r}")
        return Filtered(tuple(cases))
    return _number(data)


def _fields(data: Any, names: str | None) -> dict[str, Any]:
    """A mapping with exactly these fields."""
    if not isinstance(data, dict) or (names is not None and set(data) != set(names.split())):
        raise ValueError(f"expected a mapping{f' with {names}' if names else ''}, got {str(data)[:80]}")
    return data


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text, got {value!r}")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError(f"expected a number, got {value!r}")
    return setting(value, "a parameter")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
