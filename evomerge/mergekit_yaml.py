"""Recipe <-> mergekit's YAML (version 0.1.5). Knows the language, runs nothing.

Reading resolves gradients and precedence into one number (or filter list) per output layer. Writing spells out
everything mergekit would otherwise guess: base, dtype, switches, filters with a catch-all, embeddings and head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from evomerge.documents import Document, Key
from evomerge.errors import RecipeError, suggest
from evomerge.methods import Method, Param, method
from evomerge.recipe import Filtered, Mix, ParamValue, Recipe, Setting, Source, params, setting

_TOP = ("merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source")
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_IGNORED = ("int8_mask",)  # memory-saving switches that do not change the result
_BLOCK = {"models": ("model", "parameters"), "slices": ("sources", "base_model", "parameters"), "sources": ("model", "layer_range", "parameters")}


@dataclass(frozen=True, slots=True)
class _Part:
    """One slice: its sources as (model, first layer, parameters), its length, base and own parameters."""

    sources: tuple[tuple[str, int, Mapping[str, Any]], ...]
    length: int
    base: str | None
    parameters: Mapping[str, Any]


def load(document: Document, num_layers: Callable[[str], int], dtype: Callable[[str], str] = lambda reference: "bfloat16") -> Recipe:
    """The recipe in a mergekit document; model names are its references as written.

    num_layers: model reference -> depth; dtype: model reference -> type of its tensors, for files that name none.
    Raises RecipeError, with line and column, for what mergekit would reject, silently ignore or guess.
    """
    return _Reader(document, num_layers, dtype).recipe()


def dump(recipe: Recipe, references: Mapping[str, str], header: Sequence[str] = ()) -> str:
    """mergekit YAML that rebuilds the recipe. references: model name -> what to write for it; header: comment lines.

    Raises RecipeError for a recipe that one mergekit file cannot express.
    """
    methods = sorted({mix.method for mix in recipe.mixes})
    if len(methods) > 1:
        raise RecipeError(f"one mergekit file has one method, this recipe has {', '.join(methods)}")
    parts = _parts(recipe)
    for end, mix in ((0, recipe.embeddings), (-1, recipe.head)):
        near = recipe.layers[end]
        if [m for m, _ in mix.sources] != [m for m, _ in near.sources] or (mix.base or (None,))[0] != (near.base or (None,))[0]:
            raise RecipeError("mergekit takes embeddings from the first slice's models and the head from the last slice's; this recipe does not")
    rule = method(methods[0])
    slices = []
    for number, (first, length) in enumerate(parts):
        outer = [recipe.embeddings] if number == 0 else []
        outer += [recipe.head] if number == len(parts) - 1 else []
        slices.append(_slice(rule, recipe.layers[first], length, outer, references, recipe.base))
    data: dict[str, Any] = {"merge_method": rule.name, "base_model": references[recipe.base], "dtype": recipe.dtype, "out_dtype": recipe.out_dtype}
    shared = _shared(slices)
    if shared:
        data["parameters"] = shared
    data["slices"] = slices
    body = yaml.dump(data, sort_keys=False, default_flow_style=False, width=120, Dumper=_Dumper)
    return "".join(f"# {line}\n" for text in header for line in text.splitlines() or [""]) + body


def with_outer_filters(recipe: Recipe, embeddings: Sequence[str], head: Sequence[str]) -> Recipe:
    """The same recipe with the outer mixes' settings keyed by their tensors' full names.

    mergekit resolves those tensors with the first and last slice's parameters; naming them keeps the two apart.
    """

    def named(mix: Mix, names: Sequence[str]) -> Mix:
        def key(param: str, value: Setting) -> Setting:
            rule = method(mix.method).param(param)
            default = rule.default if rule else 0.0
            cases = []
            for name in names:
                found = value.at(name) if isinstance(value, Filtered) else value
                cases.append((name, default if found is None else found))
            return Filtered(tuple(cases))

        keyed = {k: tuple(key(k, s) for s in v) if isinstance(v, tuple) else key(k, v) for k, v in mix.params}
        return replace(mix, params=params(keyed)) if names else mix

    return replace(recipe, embeddings=named(recipe.embeddings, embeddings), head=named(recipe.head, head))


class _Dumper(yaml.SafeDumper):
    """Lists of numbers and filter entries on one line."""

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
        if isinstance(mapping, dict) and set(mapping) == {"filter", "value"}:
            flow_style = True
        return super().represent_mapping(tag, mapping, flow_style)

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        if all(isinstance(e, int | float) for e in sequence):
            flow_style = True
        return super().represent_sequence(tag, sequence, flow_style)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _parts(recipe: Recipe) -> list[tuple[int, int]]:
    """(first output layer, length) of maximal runs of layers that differ only by consecutive source layers."""
    parts: list[tuple[int, int]] = []
    for index, mix in enumerate(recipe.layers):
        if parts:
            first, length = parts[-1]
            if _shift(recipe.layers[first], length) == mix:
                parts[-1] = (first, length + 1)
                continue
        parts.append((index, 1))
    return parts


def _shift(mix: Mix, by: int) -> Mix:
    def move(source: Source) -> Source:
        return (source[0], (source[1] or 0) + by)

    return replace(mix, sources=tuple(move(s) for s in mix.sources), base=move(mix.base) if mix.base else None)


def _slice(rule: Method, mix: Mix, length: int, outer: Sequence[Mix], references: Mapping[str, str], base: str) -> dict[str, Any]:
    def written(param: Param, source: int | None) -> Any:
        return _write([_of(o, param, source) for o in outer], _of(mix, param, source), param)

    own = [{p.name: written(p, i) for p in rule.params if p.per == "model"} for i in range(len(mix.sources))]
    sources = [_source(references[model], layer, length, values) for (model, layer), values in zip(mix.sources, own, strict=True)]
    if mix.base is not None:
        sources.append(_source(references[mix.base[0]], mix.base[1], length, {}))
    shared = {p.name: written(p, None) for p in rule.params if p.per == "merge"}
    for name in [p.name for p in rule.params if p.flag]:
        shared[name] = [{**e, "value": bool(e["value"])} for e in shared[name]] if isinstance(shared[name], list) else bool(shared[name])
    out: dict[str, Any] = {"sources": sources}
    if mix.base is not None and mix.base[0] != base:
        out["base_model"] = references[mix.base[0]]
    return out | ({"parameters": shared} if shared else {})


def _shared(slices: list[dict[str, Any]]) -> dict[str, Any]:
    """Moves per-merge parameters that all slices agree on to the top."""
    first = slices[0].get("parameters", {})
    common = {k: v for k, v in first.items() if all(s.get("parameters", {}).get(k) == v for s in slices)}
    for s in slices:
        rest = {k: v for k, v in s.get("parameters", {}).items() if k not in common}
        s.pop("parameters", None)
        if rest:
            s["parameters"] = rest
    return common


def _of(mix: Mix, param: Param, source: int | None) -> Setting:
    value = dict(mix.params).get(param.name, param.default)
    if isinstance(value, tuple):
        assert source is not None
        return value[source]
    return value


def _write(outer: Sequence[Setting], inner: Setting, param: Param) -> Any:
    """A setting as mergekit writes it: a number, or a filter list with the catch-all last.

    outer: settings of the tensors outside the stack that this slice decides, by full name (see `with_outer_filters`).
    """
    if isinstance(inner, Filtered) and not any(text == "*" for text, _ in inner.cases):
        inner = Filtered((*inner.cases, ("*", param.default)))
    cases = []
    for setting_ in outer:
        if setting_ == inner:
            continue
        if not isinstance(setting_, Filtered) or any(text in ("*", "") for text, _ in setting_.cases):
            raise RecipeError(f"embeddings or head have a {param.name} of their own; write it with the names of their tensors")
        cases += [case for case in setting_.cases if not _says(inner, *case)]
    if not cases and not isinstance(inner, Filtered):
        return inner
    cases += list(inner.cases) if isinstance(inner, Filtered) else [("*", inner)]
    return [{"filter": text, "value": value} for text, value in cases]


def _says(inner: Setting, tensor: str, value: float) -> bool:
    """Whether a setting gives that value for that tensor anyway."""
    return (inner.at(tensor) if isinstance(inner, Filtered) else inner) == value


def _source(reference: str, layer: int | None, length: int, own: dict[str, Any]) -> dict[str, Any]:
    assert layer is not None
    out: dict[str, Any] = {"model": reference, "layer_range": [layer, layer + length]}
    if own:
        out["parameters"] = own
    return out


class _Reader:
    """Reads one document. Methods raise RecipeError that names the place."""

    def __init__(self, document: Document, num_layers: Callable[[str], int], dtype: Callable[[str], str]) -> None:
        self.document, self.num_layers, self.dtype = document, num_layers, dtype
        if not isinstance(document.data, dict):
            raise self.fail((), "a recipe is a mapping with merge_method and models or slices")
        self.data: dict[str, Any] = document.data
        self._keys((), self.data, _TOP)
        try:
            self.rule = method(self._text(("merge_method",), self.data.get("merge_method"), "merge_method"))
        except RecipeError as error:
            raise error if str(error).startswith(document.name) else self.fail(("merge_method",), str(error)) from None
        base = self.data.get("base_model")
        self.base = None if base is None else self._model(("base_model",), base)

    def fail(self, path: Key, message: str) -> RecipeError:
        return RecipeError(f"{self.document.where(path)} {message}")

    def recipe(self) -> Recipe:
        if self.data.get("tokenizer_source", "base") not in ("base", self.base):
            raise self.fail(("tokenizer_source",), "only the base's tokenizer can be used yet; remove tokenizer_source or set it to base")
        if ("models" in self.data) == ("slices" in self.data):
            raise self.fail((), "give exactly one of models and slices")
        parts = self._slices() if "slices" in self.data else [self._models()]
        first, last = parts[0], parts[-1]
        if len(last.sources) > len(first.sources):
            raise self.fail(("slices", len(parts) - 1), "the last slice has more sources than the first; mergekit then reads the head from some only")
        layers = [self._mix(part, index, index / (part.length - 1) if part.length > 1 else 1.0) for part in parts for index in range(part.length)]
        for key in ("dtype", "out_dtype"):
            if self.data.get(key) not in (None, *_DTYPES):
                raise self.fail((key,), f"unknown {key} {self.data[key]!r}. Known: {', '.join(_DTYPES)}")
        donor = self.base or first.sources[0][0]
        out_dtype = self.data.get("out_dtype") or self.data.get("dtype") or self.dtype(donor)
        return Recipe(
            base=donor,
            layers=tuple(layers),
            embeddings=self._mix(first, None, 0.0),
            head=self._mix(last, None, 0.0),
            out_dtype=self._text(("out_dtype",), out_dtype, "out_dtype"),
        )

    def _models(self) -> _Part:
        sources = []
        for i, entry in enumerate(self._list(("models",), self.data["models"])):
            path: Key = ("models", i)
            self._keys(path, entry, _BLOCK["models"])
            sources.append((self._model((*path, "model"), entry.get("model")), 0, self._parameters(path, entry)))
        if self.base and not self.rule.needs_base and self.base not in [name for name, _, _ in sources]:
            sources.append((self.base, 0, {}))  # as mergekit does: a base_model is one of the models
        depths = {m: self.num_layers(m) for m in [s[0] for s in sources] + ([self.base] if self.base else [])}
        if len(set(depths.values())) > 1:
            raise self.fail(("models",), f"models differ in depth: {', '.join(f'{m} has {n}' for m, n in depths.items())} layers; use slices")
        return self._checked(("models",), _Part(tuple(sources), next(iter(depths.values())), self.base, {}), base_added=True)

    def _slices(self) -> list[_Part]:
        parts = []
        for i, entry in enumerate(self._list(("slices",), self.data["slices"])):
            path: Key = ("slices", i)
            self._keys(path, entry, _BLOCK["slices"])
            sources, lengths = [], set()
            for j, source in enumerate(self._list((*path, "sources"), entry.get("sources"))):
                at: Key = (*path, "sources", j)
                self._keys(at, source, _BLOCK["sources"])
                model = self._model((*at, "model"), source.get("model"))
                first, end = self._range((*at, "layer_range"), source.get("layer_range"), model)
                lengths.add(end - first)
                sources.append((model, first, self._parameters(at, source)))
            if len(lengths) != 1:
                raise self.fail(path, f"all sources of a slice span the same number of layers, got {sorted(lengths)}")
            base = self._model((*path, "base_model"), entry["base_model"]) if "base_model" in entry else self.base
            parts.append(self._checked(path, _Part(tuple(sources), lengths.pop(), base, self._parameters(path, entry)), base_added=False))
        return parts

    def _checked(self, path: Key, part: _Part, *, base_added: bool) -> _Part:
        names = [name for name, _, _ in part.sources]
        mixed = len([n for n in names if not (self.rule.needs_base and n == part.base)])
        least, most = self.rule.models
        if not least <= mixed <= most:
            wanted = f"{least} source model{'s' * (most > 1)}" + (" or more" if most > least else "")
            raise self.fail(path, f"{self.rule.name} takes {wanted}{' besides the base' * self.rule.needs_base}, got {mixed}")
        for name in names:
            if names.count(name) > 1:
                raise self.fail(path, f"model '{name}' is listed twice in one slice; give it one entry")
        if self.rule.needs_base:
            if part.base is None:
                raise self.fail(path, f"{self.rule.name} needs base_model")
            if part.base not in names and not base_added:
                raise self.fail(path, f"{self.rule.name} needs the base '{part.base}' among the sources of every slice; add it with its layer_range")
        return part

    def _mix(self, part: _Part, index: int | None, t: float) -> Mix:
        """The mix of a slice's layer, or of the tensors outside the stack where index is None."""

        def place(first: int) -> int | None:
            return None if index is None else first + index

        mixed = [s for s in part.sources if not (self.rule.needs_base and s[0] == part.base)]
        values: dict[str, ParamValue] = {}
        levels = [part.parameters, self._parameters((), self.data)]
        for param in self.rule.params:
            if param.per == "merge":
                values[param.name] = self._setting(param, levels, t)
            else:
                values[param.name] = tuple(self._setting(param, [own, *levels], t) for _, _, own in mixed)
        base: Source | None = None
        if self.rule.needs_base:
            assert part.base is not None
            base = (part.base, place(next((first for name, first, _ in part.sources if name == part.base), 0)))
        return Mix(self.rule.name, tuple((name, place(first)) for name, first, _ in mixed), base, params(values))

    def _setting(self, param: Param, levels: Sequence[Mapping[str, Any]], t: float) -> Setting:
        """Precedence: the first level that has a value; a filter list that may miss falls through to the next."""
        name, default = param.name, param.default
        if param.required and not any(name in level for level in levels):
            raise self.fail((), f"{self.rule.name} needs {name}; give it under parameters")
        cases: list[tuple[str, float]] = []
        for level in levels:
            if name not in level:
                continue
            value = level[name]
            if not (isinstance(value, list) and value and isinstance(value[0], dict)):
                cases.append(("*", _gradient(value, t, name)))
            for case in value if isinstance(value, list) and value and isinstance(value[0], dict) else ():
                cases.append((str(case.get("filter") or "*"), _gradient(case["value"], t, name)))
            if cases[-1][0] == "*":
                break
        else:
            if param.required:
                raise self.fail((), f"{name} has no value for tensors that its filters miss; add an entry without filter at the end")
            cases.append(("*", default))
        stop = next(i for i, (text, _) in enumerate(cases) if text == "*")
        cases = cases[: stop + 1]
        return cases[0][1] if len(cases) == 1 else Filtered(tuple(cases))

    def _parameters(self, path: Key, entry: Mapping[str, Any]) -> Mapping[str, Any]:
        given = entry.get("parameters") or {}
        at = (*path, "parameters")
        if not isinstance(given, dict):
            raise self.fail(at, "parameters is a mapping from names to values")
        inside_model = bool(path) and path[0] in ("models", "slices") and "model" in entry
        out = {}
        for name, value in given.items():
            if name in _IGNORED:
                continue
            param = self.rule.param(name)
            if param is None:
                raise self.fail((*at, name), f"{self.rule.name} has no parameter '{name}'. {suggest(name, [p.name for p in self.rule.params])}")
            if inside_model and param.per == "merge":
                raise self.fail((*at, name), f"{name} belongs to the whole merge; mergekit ignores it under a model, move it to the top parameters")
            self._check_value((*at, name), name, value, param.check)
            out[name] = value
        return out

    def _check_value(self, path: Key, name: str, value: Any, check: Callable[[float, str], float]) -> None:
        if isinstance(value, dict):
            raise self.fail(path, f"{name} has a single filter entry; write a list: - filter: …")
        entries = value if isinstance(value, list) else [value]
        if not entries:
            raise self.fail(path, f"{name} is an empty list")
        conditional = [isinstance(e, dict) for e in entries]
        if any(conditional) and not all(conditional):
            raise self.fail(path, f"{name} mixes numbers and filter entries; use one form")
        for i, entry in enumerate(entries):
            at = (*path, i) if isinstance(value, list) else path
            if isinstance(entry, dict):
                self._keys(at, entry, ("filter", "value"))
                if not isinstance(entry.get("filter"), str | None):
                    raise self.fail((*at, "filter"), f"a filter is text, got {entry['filter']!r}")
                numbers = entry.get("value") if isinstance(entry.get("value"), list) else [entry.get("value")]
            else:
                numbers = [entry]
            for number in numbers or [None]:
                try:
                    check(setting(number, name), self.rule.name)
                except RecipeError as error:
                    raise self.fail(at, str(error)) from None

    def _range(self, path: Key, value: Any, model: str) -> tuple[int, int]:
        ok = isinstance(value, list) and len(value) == 2 and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
        depth = self.num_layers(model)
        if not ok or not 0 <= value[0] < value[1] <= depth:
            raise self.fail(path, f"layer_range must be [first, end] with 0 <= first < end <= {depth} for {model}, got {value!r}")
        return value[0], value[1]

    def _model(self, path: Key, value: Any) -> str:
        if isinstance(value, str) and "+" in value:
            raise self.fail(path, f"LoRA adapters as parents ('{value}') cannot be read yet; merge the adapter first")
        return self._text(path, value, "a model")

    def _text(self, path: Key, value: Any, what: str) -> str:
        if not isinstance(value, str) or not value:
            raise self.fail(path, f"{what} must be text, got {value!r}")
        return value

    def _list(self, path: Key, value: Any) -> list[Any]:
        if not isinstance(value, list) or not value or not all(isinstance(e, dict) for e in value):
            raise self.fail(path, f"{path[-1]} must be a list of mappings with at least one entry")
        return value

    def _keys(self, path: Key, value: Mapping[str, Any], known: Sequence[str]) -> None:
        for key in value:
            if key not in known:
                hint = " (numbers such as weight go under parameters)" if "parameters" in known and method_has(self.data, key) else ""
                raise self.fail((*path, key), f"unknown key '{key}'{hint}; mergekit would ignore it. {suggest(str(key), known)}")


def method_has(data: Mapping[str, Any], name: str) -> bool:
    """Whether the document's merge method declares a parameter of that name."""
    try:
        return method(str(data.get("merge_method"))).param(name) is not None
    except RecipeError:
        return False


def _gradient(value: Any, t: float, name: str) -> float:
    """mergekit's gradient: n numbers over depth t in [0, 1], linear between neighbours."""
    if not isinstance(value, list):
        return setting(value, name)
    if all(isinstance(v, bool) for v in value):
        return setting(value[int(t * (len(value) - 1))], name)
    scaled = t * (len(value) - 1)
    low = int(scaled)
    high = min(len(value) - 1, low + 1)
    share = scaled - low
    return (1 - share) * setting(value[low], name) + share * setting(value[high], name)
