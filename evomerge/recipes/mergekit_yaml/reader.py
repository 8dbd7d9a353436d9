"""mergekit's YAML -> recipe. Names the place of whatever mergekit would reject, silently ignore or guess.

Tensors are those on disk, and filters see their names there. mergekit merges, and its filters see, what
transformers 5 makes of them: of experts that the hub has one by one, one tensor for a layer (in Mixtral,
under 'mlp' and not under 'block_sparse_moe'), and GPT-2's with the prefix 'transformer.'. Methods that
measure a whole tensor differ by that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from evomerge._yaml import Document, Key
from evomerge.errors import RecipeError, suggest
from evomerge.methods import Param, method
from evomerge.recipes import chat_templates
from evomerge.recipes.mergekit_yaml import references
from evomerge.recipes.recipe import (
    STORED,
    Filtered,
    Mix,
    ParamValue,
    Recipe,
    Setting,
    Source,
    params,
    setting,
)
from evomerge.recipes.tokenizer_spec import WHOLE, TokenizerSpec

T = TypeVar("T")
_FORMS = ("models", "slices", "modules")
_TOP = (
    "name",
    "merge_method",
    "base_model",
    *_FORMS,
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
)
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_SHOWN = 500  # characters of an error that quotes the file
_IGNORED = ("int8_mask",)  # memory-saving switches that do not change the result
_BLOCK = {
    "models": ("model", "parameters"),
    "slices": ("sources", "base_model", "parameters"),
    "sources": ("model", "layer_range", "parameters"),
    "modules": ("models", "slices", "parameters"),
}
_LANGUAGE = (
    "default",
    "text_decoder",
    "decoder",
    "language_model",
)  # mergekit's names for the module that is the language model


@dataclass(frozen=True, slots=True)
class _Part:
    """One slice: its sources as (model, first layer, parameters), its length, base and own parameters."""

    sources: tuple[tuple[str, int, Mapping[str, Any]], ...]
    length: int
    base: str | None
    parameters: Mapping[str, Any]


def load(
    documents: Document | Sequence[Document],
    num_layers: Callable[[str], int],
    dtype: Callable[[str], str] = lambda reference: "bfloat16",
    policy: str = "float32",
) -> Recipe:
    """The recipe in a mergekit file; model names are its references as written.

    documents: one, or several as mergekit-multi takes them: each with a `name` is a stage that the others can
    read like a model; the one without a name, or else the last, is the result. num_layers: model reference ->
    depth; dtype: model reference -> type of its tensors, for files that name none; policy: of the arithmetic.
    Raises RecipeError, with line and column, for what mergekit would reject, silently ignore or guess.
    """
    documents = [documents] if isinstance(documents, Document) else list(documents)
    return _File(documents, num_layers, dtype, policy).recipe()


class _File:
    """All documents of a file: stages are read when another document names them."""

    def __init__(
        self,
        documents: Sequence[Document],
        num_layers: Callable[[str], int],
        dtype: Callable[[str], str],
        policy: str,
    ) -> None:
        self._depth, self._dtype, self._policy = num_layers, dtype, policy
        self._named: dict[str, Document] = {}
        unnamed = []
        for document in documents:
            name = document.data.get("name") if isinstance(document.data, dict) else None
            if name is None:
                unnamed.append(document)
            elif not isinstance(name, str) or not name or name in self._named:
                raise RecipeError(
                    f"{document.where(('name',))} name must be a text that no other document has, got {name!r:.80}"
                )
            else:
                self._named[name] = document
        if len(unnamed) > 1:
            raise RecipeError(
                f"{unnamed[1].where()} is the second document without a name; name all stages but the last"
            )
        if not documents:
            raise RecipeError("the file holds no document; write a mergekit recipe")
        self._last = unnamed[0] if unnamed else documents[-1]
        if not unnamed and isinstance(self._last.data, dict):
            self._named.pop(self._last.data["name"])
        self._stages: dict[str, Recipe] = {}
        self._open: list[str] = []

    def recipe(self) -> Recipe:
        last = self._read(self._last)
        for name, document in self._named.items():
            if name not in self._stages:
                raise RecipeError(
                    f"{document.where(('name',))} stage '{name}' is read by none of the others; remove it or use it"
                )
        return replace(last, stages=tuple(self._stages.items()))

    def _read(self, document: Document) -> Recipe:
        return _Reader(document, self._num_layers, self._dtype_of, self._policy).recipe()

    def _stage(self, name: str) -> Recipe:
        if name in self._open:
            raise RecipeError(
                f"{self._named[name].where(('name',))} stage '{name}' needs itself, by way of {' and '.join(self._open)}"
            )
        if name not in self._stages:
            self._open.append(name)
            found = self._read(self._named[name])
            self._open.pop()
            self._stages[name] = found
        return self._stages[name]

    def _num_layers(self, reference: str) -> int:
        return len(self._stage(reference).layers) if reference in self._named else self._depth(reference)

    def _dtype_of(self, reference: str) -> str:
        return self._stage(reference).out_dtype if reference in self._named else self._dtype(reference)


class _Reader:
    """Reads one document. Methods raise RecipeError that names the place."""

    def __init__(
        self, document: Document, num_layers: Callable[[str], int], dtype: Callable[[str], str], policy: str
    ) -> None:
        self.document, self.num_layers, self.dtype, self.policy = document, num_layers, dtype, policy
        if not isinstance(document.data, dict):
            raise self.fail((), "a recipe is a mapping with merge_method and models or slices")
        self.data: dict[str, Any] = document.data
        self._keys((), self.data, _TOP)
        self.rule = self._placed(
            ("merge_method",),
            lambda: method(self._text(("merge_method",), self.data.get("merge_method"), "merge_method")),
        )
        base = self.data.get("base_model")
        self.base = None if base is None else self._model(("base_model",), base)

    def fail(self, path: Key, message: str) -> RecipeError:
        said = " ".join(message.split())
        return RecipeError(
            f"{self.document.where(path)} {said if len(said) <= _SHOWN else said[:_SHOWN] + ' …'}"
        )

    def _placed(self, path: Key, read: Callable[[], T]) -> T:
        """What `read` gives; an error of its own that names no place gets that of `path`."""
        try:
            return read()
        except RecipeError as error:
            raise (
                error if str(error).startswith(self.document.name) else self.fail(path, str(error))
            ) from None

    def recipe(self) -> Recipe:
        given = [form for form in _FORMS if form in self.data]
        if len(given) != 1:
            raise self.fail(
                (), f"give exactly one of models, slices and modules, got {' and '.join(given) or 'none'}"
            )
        block, at, own = (self.data, (), None) if given != ["modules"] else self._module()
        parts = self._slices(block, at) if "slices" in block else [self._models(block, at)]
        first, last = parts[0], parts[-1]
        if len(last.sources) > len(first.sources):
            raise self.fail(
                ("slices", len(parts) - 1),
                "the last slice has more sources than the first; mergekit then reads the head from some only",
            )
        self.shared = [*([own] if own else []), self._parameters((), self.data)]
        layers = [
            self._mix(part, index, index / (part.length - 1) if part.length > 1 else 1.0)
            for part in parts
            for index in range(part.length)
        ]
        for key in ("dtype", "out_dtype"):
            if self.data.get(key) not in (None, *_DTYPES):
                raise self.fail((key,), f"unknown {key} {self.data[key]!r}. Known: {', '.join(_DTYPES)}")
        donor = self.base or first.sources[0][0]
        out_dtype = self.data.get("out_dtype") or self.data.get("dtype") or self.dtype(donor)
        dtype = "float32" if self.policy == "float32" else self.data.get("dtype") or STORED
        return Recipe(
            base=donor,
            layers=tuple(layers),
            embeddings=self._mix(first, None, 0.0),
            head=self._mix(last, None, 0.0),
            dtype=self._text(("dtype",), dtype, "dtype"),
            out_dtype=self._text(("out_dtype",), out_dtype, "out_dtype"),
            policy=self.policy,
            tokenizer=self._tokenizer(),
            chat_template=self._chat_template(),
        )

    def _module(self) -> tuple[Mapping[str, Any], Key, Mapping[str, Any]]:
        """(block, its place, its parameters) of the language model's module; the others come from the base as they are."""
        modules = self.data["modules"]
        if not isinstance(modules, dict) or not all(isinstance(m, dict) for m in modules.values()):
            raise self.fail(
                ("modules",), "modules is a mapping from module names to mappings with models or slices"
            )
        name = next((n for n in _LANGUAGE if n in modules), None) or (
            next(iter(modules)) if len(modules) == 1 else None
        )
        if name is None:
            raise self.fail(
                ("modules",),
                f"none of the modules {', '.join(modules) or '(none)'} is the language model, which is called text_decoder",
            )
        for other, block in modules.items():
            at: Key = ("modules", other)
            self._keys(at, block, _BLOCK["modules"])
            if ("models" in block) == ("slices" in block):
                raise self.fail(at, "a module has exactly one of models and slices")
            if other != name:
                sources = (
                    self._list((*at, "models"), block["models"])
                    if "models" in block
                    else self._slice_sources(block, at)
                )
                if {self._model((*at, "model"), source.get("model")) for source in sources} != {self.base}:
                    raise self.fail(
                        at,
                        f"module '{other}' is not the language model: it comes from the base unmerged; list the base alone here",
                    )
        return modules[name], ("modules", name), self._parameters(("modules", name), modules[name])

    def _slice_sources(self, block: Mapping[str, Any], at: Key) -> list[Any]:
        found = []
        for i, entry in enumerate(self._list((*at, "slices"), block["slices"])):
            found += self._list((*at, "slices", i, "sources"), entry.get("sources"))
        return found

    def _tokenizer(self) -> TokenizerSpec | None:
        source, spec = self.data.get("tokenizer_source"), self.data.get("tokenizer")
        if source is not None and spec is not None:
            raise self.fail(("tokenizer",), "give one of tokenizer_source and tokenizer")
        if source is not None:
            return TokenizerSpec(source if source in WHOLE else self._model(("tokenizer_source",), source))
        if spec is None:
            return None
        return self._placed(
            ("tokenizer",),
            lambda: references.tokenizer(spec, lambda value: self._model(("tokenizer",), value)),
        )

    def _chat_template(self) -> str | None:
        if self.data.get("chat_template") is None:
            return None
        wish = self._text(("chat_template",), self.data["chat_template"], "chat_template")
        self._placed(("chat_template",), lambda: chat_templates.check(wish))
        return wish

    def _models(self, block: Mapping[str, Any], place: Key) -> _Part:
        sources = []
        for i, entry in enumerate(self._list((*place, "models"), block["models"])):
            path: Key = (*place, "models", i)
            self._keys(path, entry, _BLOCK["models"])
            sources.append(
                (self._model((*path, "model"), entry.get("model")), 0, self._parameters(path, entry))
            )
        if (
            self.base
            and not self.rule.needs_base
            and not self.rule.takes_base
            and self.base not in [name for name, _, _ in sources]
        ):
            sources.append((self.base, 0, {}))  # as mergekit does: a base_model is one of the models
        depths = {m: self.num_layers(m) for m in [s[0] for s in sources] + ([self.base] if self.base else [])}
        if len(set(depths.values())) > 1:
            raise self.fail(
                (*place, "models"),
                f"models differ in depth: {', '.join(f'{m} has {n}' for m, n in depths.items())} layers; use slices",
            )
        return self._checked(
            (*place, "models"),
            _Part(tuple(sources), next(iter(depths.values())), self.base, {}),
            base_added=True,
        )

    def _slices(self, block: Mapping[str, Any], place: Key) -> list[_Part]:
        parts = []
        for i, entry in enumerate(self._list((*place, "slices"), block["slices"])):
            path: Key = (*place, "slices", i)
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
                raise self.fail(
                    path, f"all sources of a slice span the same number of layers, got {sorted(lengths)}"
                )
            base = (
                self._model((*path, "base_model"), entry["base_model"])
                if "base_model" in entry
                else self.base
            )
            parts.append(
                self._checked(
                    path,
                    _Part(tuple(sources), lengths.pop(), base, self._parameters(path, entry)),
                    base_added=False,
                )
            )
        return parts

    def _checked(self, path: Key, part: _Part, *, base_added: bool) -> _Part:
        names = [name for name, _, _ in part.sources]
        mixed = len([n for n in names if not (self._based(part) and n == part.base)])
        least, most = self.rule.models
        if not least <= mixed <= most:
            wanted = f"{least} source model{'s' * (most > 1)}" + (" or more" if most > least else "")
            raise self.fail(
                path,
                f"{self.rule.name} takes {wanted}{' besides the base' * self.rule.needs_base}, got {mixed}",
            )
        for name in names:
            if names.count(name) > 1:
                raise self.fail(path, f"model '{name}' is listed twice in one slice; give it one entry")
        if self.rule.needs_base and part.base is None:
            raise self.fail(path, f"{self.rule.name} needs base_model")
        if self._based(part) and part.base not in names and not base_added:
            raise self.fail(
                path,
                f"{self.rule.name} needs the base '{part.base}' among the sources of every slice; add it with its layer_range",
            )
        return part

    def _based(self, part: _Part) -> bool:
        """Whether the slice's base is set apart from its sources."""
        return self.rule.needs_base or (self.rule.takes_base and part.base is not None)

    def _mix(self, part: _Part, index: int | None, t: float) -> Mix:
        """The mix of a slice's layer, or of the tensors outside the stack where index is None."""

        def place(first: int) -> int | None:
            return None if index is None else first + index

        mixed = [s for s in part.sources if not (self._based(part) and s[0] == part.base)]
        values: dict[str, ParamValue] = {}
        levels = [part.parameters, *self.shared]
        for param in self.rule.params:
            if param.per == "merge":
                values[param.name] = self._setting(param, levels, t)
            else:
                values[param.name] = tuple(self._setting(param, [own, *levels], t) for _, _, own in mixed)
        base: Source | None = None
        if self._based(part):
            assert part.base is not None
            base = (
                part.base,
                place(next((first for name, first, _ in part.sources if name == part.base), 0)),
            )
        return Mix(
            self.rule.name, tuple((name, place(first)) for name, first, _ in mixed), base, params(values)
        )

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
            value = [value] if isinstance(value, dict) else value
            if not (isinstance(value, list) and value and isinstance(value[0], dict)):
                cases.append(("*", _gradient(value, t, name)))
            for case in value if isinstance(value, list) and value and isinstance(value[0], dict) else ():
                cases.append((str(case.get("filter") or "*"), _gradient(case["value"], t, name)))
            if cases[-1][0] == "*":
                break
        else:
            if param.required:
                raise self.fail(
                    (),
                    f"{name} has no value for tensors that its filters miss; add an entry without filter at the end",
                )
            cases.append(("*", default))
        stop = next(i for i, (text, _) in enumerate(cases) if text == "*")
        cases = cases[: stop + 1]
        return cases[0][1] if len(cases) == 1 else Filtered(tuple(cases))

    def _parameters(self, path: Key, entry: Mapping[str, Any]) -> Mapping[str, Any]:
        given = entry.get("parameters") or {}
        at = (*path, "parameters")
        if not isinstance(given, dict):
            raise self.fail(at, "parameters is a mapping from names to values")
        inside_model = bool(path) and "model" in entry
        out = {}
        for name, value in given.items():
            if name in _IGNORED:
                continue
            param = self.rule.param(name)
            if param is None:
                raise self.fail(
                    (*at, name),
                    f"{self.rule.name} has no parameter '{name}'. {suggest(name, [p.name for p in self.rule.params])}",
                )
            if inside_model and param.per == "merge":
                raise self.fail(
                    (*at, name),
                    f"{name} belongs to the whole merge; mergekit ignores it under a model, move it to the top parameters",
                )
            self._check_value((*at, name), name, value, param.check)
            out[name] = value
        return out

    def _check_value(self, path: Key, name: str, value: Any, check: Callable[[float, str], float]) -> None:
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
        ok = (
            isinstance(value, list)
            and len(value) == 2
            and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
        )
        depth = self.num_layers(model)
        if not ok or not 0 <= value[0] < value[1] <= depth:
            raise self.fail(
                path,
                f"layer_range must be [first, end] with 0 <= first < end <= {depth} for {model}, got {value!r}",
            )
        return value[0], value[1]

    def _model(self, path: Key, value: Any) -> str:
        if isinstance(value, dict):
            return self._placed(path, lambda: references.text(value))
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
                hint = (
                    " (numbers such as weight go under parameters)"
                    if "parameters" in known and method_has(self.data, key)
                    else ""
                )
                raise self.fail(
                    (*path, key),
                    f"unknown key '{key}'{hint}; mergekit would ignore it. {suggest(str(key), known)}",
                )


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
