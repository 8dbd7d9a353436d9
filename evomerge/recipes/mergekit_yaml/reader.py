"""One document of mergekit's YAML -> recipe. Names the place of what mergekit would reject or guess.

What mergekit ignores is ignored here too, and noted with its place.

Tensors are those on disk, and filters see their names there. mergekit merges, and its filters see, what
transformers 5 makes of them: of experts that the hub has one by one, one tensor for a layer (in Mixtral,
under 'mlp' and not under 'block_sparse_moe'), and GPT-2's with the prefix 'transformer.'. Methods that
measure a whole tensor differ by that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evomerge._yaml import Document, Key
from evomerge.errors import RecipeError
from evomerge.methods import method
from evomerge.recipes import chat_templates
from evomerge.recipes.file_kinds import other_file
from evomerge.recipes.mergekit_yaml import references
from evomerge.recipes.mergekit_yaml.document_checks import DocumentChecks
from evomerge.recipes.mergekit_yaml.filters import TensorNames, idle_filters, names_to_depth
from evomerge.recipes.mergekit_yaml.parameters import Levels, Owner, ParameterReader
from evomerge.recipes.recipe import STORED, Mix, ParamValue, Recipe, Source, params
from evomerge.recipes.tokenizer_spec import WHOLE, TokenizerSpec

_FORMS = ("models", "slices", "modules")
_TOP = (
    *("name", "merge_method", "base_model", *_FORMS, "parameters", "dtype", "out_dtype"),
    *("tokenizer_source", "tokenizer", "chat_template"),
)
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_KEYS = {  # of the mappings inside
    "models": ("model", "parameters"),
    "slices": ("sources", "base_model", "parameters"),
    "sources": ("model", "layer_range", "parameters"),
    "modules": ("models", "slices", "parameters"),
}
_LANGUAGE_MODULES = (
    "default",
    "text_decoder",
    "decoder",
    "language_model",
)  # mergekit's names, by preference


@dataclass(frozen=True, slots=True)
class _SliceSource:
    """A model of a slice, from its layer `first` on; path: key path of its entry."""

    model: str
    first: int
    parameters: Mapping[str, Any]
    path: Key


@dataclass(frozen=True, slots=True)
class _Slice:
    """Consecutive output layers of the same sources; path: key path of its entry."""

    sources: tuple[_SliceSource, ...]
    length: int
    base: str | None
    parameters: Mapping[str, Any]
    path: Key

    @property
    def models(self) -> list[str]:
        return [source.model for source in self.sources]


@dataclass(frozen=True, slots=True)
class _Block:
    """The mapping that has `models` or `slices`: the document, or its language model's module."""

    data: Mapping[str, Any]
    path: Key = ()
    parameters: tuple[Mapping[str, Any], ...] = ()


class DocumentReader:
    """Reads one document; every error names its place."""

    def __init__(
        self, document: Document, num_layers: Callable[[str], int], dtype: Callable[[str], str], policy: str
    ) -> None:
        """Checks the document's keys, method and base.

        Args:
            document: The parsed document.
            num_layers: Model reference -> number of its layers.
            dtype: Model reference -> type of its tensors, for a file that names none.
            policy: Of the arithmetic, see `Recipe.policy`.

        Raises:
            RecipeError: It is no recipe, or has no merge method that is known.
        """
        self._num_layers = num_layers
        self._dtype = dtype
        self._policy = policy
        self._checks = DocumentChecks(document)
        if not isinstance(document.data, dict):
            raise self._checks.fail((), "a recipe is a mapping with merge_method and models or slices")
        other = other_file(document.data, "recipe")
        if other is not None:
            raise self._checks.fail((), other)
        self._data: dict[str, Any] = document.data
        self._check_keys((), document.data, _TOP)
        self._method = self._checks.at(("merge_method",), lambda: method(self._top_text("merge_method")))
        self._parameters = ParameterReader(self._checks, self._method)
        self._models: list[str] = []
        self._depth = 0
        base = self._data.get("base_model")
        self._base = None if base is None else self._checks.model(("base_model",), base)

    def ignored(self, tensor_names: TensorNames | None) -> list[tuple[str, str]]:
        """What stands in the document and changes nothing; asked after `recipe`.

        Args:
            tensor_names: Model reference -> names of its tensors; None: filters are not compared with them.

        Returns:
            (place, sentence) of each, in the order of reading.
        """
        for place, sentence in idle_filters(self._parameters.filters, self._names_seen(tensor_names)):
            self._checks.ignore(place, sentence)
        return self._checks.ignored

    def _names_seen(self, tensor_names: TensorNames | None) -> set[str] | None:
        """Names of tensors that filters may be compared with; None if they are not known."""
        if tensor_names is None:
            return None
        own = {name for model in self._models for name in tensor_names(model)}
        depths = {self._num_layers(model) for model in self._models}
        return own if depths == {self._depth} else names_to_depth(own, self._depth)

    def recipe(self) -> Recipe:
        """The recipe in the document.

        Raises:
            RecipeError: For what mergekit would reject or guess.
        """
        block = self._block()
        has_slices = block.data.get("slices") is not None
        slices = self._slices(block) if has_slices else [self._whole_models(block)]
        first, last = slices[0], slices[-1]
        if len(last.sources) > len(first.sources):
            raise self._checks.fail(
                ("slices", len(slices) - 1),
                "the last slice has more sources than the first; mergekit then reads the head from some only",
            )
        shared = [*block.parameters, self._parameters.given((), self._data)]
        layers = []
        for part in slices:
            for index in range(part.length):
                t = index / (part.length - 1) if part.length > 1 else 1.0
                layers.append(self._mix(part, index, t, shared))
        base = self._base or first.sources[0].model
        self._models = list(dict.fromkeys([base, *(model for part in slices for model in part.models)]))
        self._depth = len(layers)
        dtype, out_dtype = self._dtypes(base)
        return Recipe(
            base=base,
            layers=tuple(layers),
            embeddings=self._mix(first, None, 0.0, shared),
            head=self._mix(last, None, 0.0, shared),
            dtype=dtype,
            out_dtype=out_dtype,
            policy=self._policy,
            tokenizer=self._tokenizer(),
            chat_template=self._chat_template(),
        )

    # ---- the top level

    def _check_keys(self, path: Key, value: Mapping[str, Any], allowed: Sequence[str]) -> None:
        """Of a mapping that may have `parameters`: numbers that belong there get a hint."""
        for key in value:
            is_parameter = _declares(self._data.get("merge_method"), key)
            hint = " (numbers such as weight go under parameters)" if is_parameter else ""
            if key == "residual_weight" and allowed is _KEYS["slices"]:
                self._checks.ignore((*path, key), "residual_weight has no effect in mergekit either")
            else:
                self._checks.keys(path, {key: None}, allowed, hint)

    def _top_text(self, key: str) -> str:
        return self._checks.text((key,), self._data.get(key), key)

    def _dtypes(self, base: str) -> tuple[str, str]:
        """(arithmetic type, type of the result)."""
        for key in ("dtype", "out_dtype"):
            if self._data.get(key) not in (None, *_DTYPES):
                raise self._checks.fail(
                    (key,), f"unknown {key} {self._data[key]!r}. Known: {', '.join(_DTYPES)}"
                )
        named = self._data.get("dtype")
        out_dtype = self._data.get("out_dtype") or named or self._dtype(base)
        dtype = "float32" if self._policy == "float32" else named or STORED
        return (
            self._checks.text(("dtype",), dtype, "dtype"),
            self._checks.text(("out_dtype",), out_dtype, "out_dtype"),
        )

    def _tokenizer(self) -> TokenizerSpec | None:
        source, spec = self._data.get("tokenizer_source"), self._data.get("tokenizer")
        if source is not None and spec is not None:
            raise self._checks.fail(("tokenizer",), "give one of tokenizer_source and tokenizer")
        if source is not None:
            name = source if source in WHOLE else self._checks.model(("tokenizer_source",), source)
            return TokenizerSpec(name)
        if spec is None:
            return None

        def model(value: Any) -> str:
            return self._checks.model(("tokenizer",), value)

        def ignore(sentence: str) -> None:
            self._checks.ignore(("tokenizer",), sentence)

        return self._checks.at(("tokenizer",), lambda: references.tokenizer(spec, model, ignore))

    def _chat_template(self) -> str | None:
        if self._data.get("chat_template") is None:
            return None
        template = self._top_text("chat_template")
        self._checks.at(("chat_template",), lambda: chat_templates.check(template))
        return template

    # ---- models, slices, modules

    def _block(self) -> _Block:
        forms = [form for form in _FORMS if self._data.get(form) is not None]
        if len(forms) != 1:
            listed = " and ".join(forms) or "none"
            raise self._checks.fail((), f"give exactly one of models, slices and modules, got {listed}")
        return self._language_module() if forms == ["modules"] else _Block(self._data)

    def _language_module(self) -> _Block:
        """The language model's module; the others come from the base as they are."""
        modules = self._data["modules"]
        if not isinstance(modules, dict) or not all(isinstance(m, dict) for m in modules.values()):
            raise self._checks.fail(
                ("modules",), "modules is a mapping from module names to mappings with models or slices"
            )
        name = next((n for n in _LANGUAGE_MODULES if n in modules), None)
        if name is None and len(modules) == 1:
            name = next(iter(modules))
        if name is None:
            raise self._checks.fail(
                ("modules",),
                f"none of the modules {', '.join(modules) or '(none)'} is the language model, "
                "which is called text_decoder",
            )
        for other, module in modules.items():
            self._check_module(other, module, is_language_model=other == name)
        path: Key = ("modules", name)
        return _Block(modules[name], path, (self._parameters.given(path, modules[name]),))

    def _check_module(self, name: str, module: Mapping[str, Any], *, is_language_model: bool) -> None:
        path: Key = ("modules", name)
        self._check_keys(path, module, _KEYS["modules"])
        if ("models" in module) == ("slices" in module):
            raise self._checks.fail(path, "a module has exactly one of models and slices")
        if is_language_model:
            return
        if "models" in module:
            sources = self._checks.mappings((*path, "models"), module["models"])
        else:
            sources = self._sources_of_slices(module, path)
        models = {self._checks.model((*path, "model"), source.get("model")) for source in sources}
        if models != {self._base}:
            raise self._checks.fail(
                path,
                f"module '{name}' is not the language model: it comes from the base unmerged; "
                "list the base alone here",
            )

    def _sources_of_slices(self, block: Mapping[str, Any], path: Key) -> list[Any]:
        sources = []
        for i, entry in enumerate(self._checks.mappings((*path, "slices"), block["slices"])):
            sources += self._checks.mappings((*path, "slices", i, "sources"), entry.get("sources"))
        return sources

    def _whole_models(self, block: _Block) -> _Slice:
        """`models`: one slice of all layers."""
        place: Key = (*block.path, "models")
        sources = []
        for i, entry in enumerate(self._checks.mappings(place, block.data["models"])):
            path: Key = (*place, i)
            self._check_keys(path, entry, _KEYS["models"])
            model = self._checks.model((*path, "model"), entry.get("model"))
            given = self._parameters.given(path, entry, is_base=self._is_set_apart(model, self._base))
            sources.append(_SliceSource(model, 0, given, path))
        models = [source.model for source in sources]
        base_is_a_source = not self._method.needs_base and not self._method.takes_base
        if self._base and base_is_a_source and self._base not in models:
            # as mergekit does: a base_model is one of the models
            sources.append(_SliceSource(self._base, 0, {}, ("base_model",)))
            models.append(self._base)
        depths = {m: self._num_layers(m) for m in models + ([self._base] if self._base else [])}
        if len(set(depths.values())) > 1:
            listed = ", ".join(f"{m} has {n}" for m, n in depths.items())
            raise self._checks.fail(place, f"models differ in depth: {listed} layers; use slices")
        whole = _Slice(tuple(sources), next(iter(depths.values())), self._base, {}, block.path)
        self._check_slice(place, whole, base_is_added=True)
        return whole

    def _slices(self, block: _Block) -> list[_Slice]:
        place: Key = (*block.path, "slices")
        entries = self._checks.mappings(place, block.data["slices"])
        return [self._slice((*place, i), entry) for i, entry in enumerate(entries)]

    def _slice(self, path: Key, entry: Mapping[str, Any]) -> _Slice:
        self._check_keys(path, entry, _KEYS["slices"])
        base = self._base
        if entry.get("base_model") is not None:
            base = self._checks.model((*path, "base_model"), entry["base_model"])
        sources, lengths = [], set()
        for i, source in enumerate(self._checks.mappings((*path, "sources"), entry.get("sources"))):
            place: Key = (*path, "sources", i)
            self._check_keys(place, source, _KEYS["sources"])
            model = self._checks.model((*place, "model"), source.get("model"))
            first, end = self._layer_range((*place, "layer_range"), source.get("layer_range"), model)
            lengths.add(end - first)
            given = self._parameters.given(place, source, is_base=self._is_set_apart(model, base))
            sources.append(_SliceSource(model, first, given, place))
        if len(lengths) != 1:
            raise self._checks.fail(
                path, f"all sources of a slice span the same number of layers, got {sorted(lengths)}"
            )
        part = _Slice(tuple(sources), lengths.pop(), base, self._parameters.given(path, entry), path)
        self._check_slice(path, part, base_is_added=False)
        return part

    def _layer_range(self, path: Key, value: Any, model: str) -> tuple[int, int]:
        is_pair = (
            isinstance(value, list)
            and len(value) == 2
            and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
        )
        depth = self._num_layers(model)
        # a slice without layers says whose embeddings or head a stack has
        fewest = 0 if self._method.name == "passthrough" else 1
        if not is_pair or not 0 <= value[0] <= value[1] - fewest <= depth - fewest:
            raise self._checks.fail(
                path,
                f"layer_range must be [first, end] with 0 <= first < end <= {depth} for {model}, "
                f"got {value!r}",
            )
        return value[0], value[1]

    def _check_slice(self, path: Key, part: _Slice, *, base_is_added: bool) -> None:
        """Checks that the method takes these models."""
        mixed = len(self._mixed_sources(part))
        least, most = self._method.models
        if not least <= mixed <= most and not (mixed == 0 and self._takes_base_alone):
            wanted = f"{least} source model{'s' * (most > 1)}"
            if most > least:
                wanted += " or more"
            if self._method.needs_base:
                wanted += " besides the base"
            raise self._checks.fail(path, f"{self._method.name} takes {wanted}, got {mixed}")
        for name in part.models:
            if part.models.count(name) > 1:
                raise self._checks.fail(
                    path, f"model '{name}' is listed twice in one slice; give it one entry"
                )
        if self._method.needs_base and part.base is None:
            raise self._checks.fail(path, f"{self._method.name} needs base_model")
        if self._has_base(part) and part.base not in part.models and not base_is_added:
            raise self._checks.fail(
                path,
                f"{self._method.name} needs the base '{part.base}' among the sources of every slice; "
                "add it with its layer_range",
            )

    # ---- mixes

    def _is_set_apart(self, model: str, base: str | None) -> bool:
        """Whether a model is the base, whose differences the method merges."""
        return model == base and (self._method.needs_base or self._method.takes_base)

    @property
    def _takes_base_alone(self) -> bool:
        """Whether a base with nothing added to it is a merge: of a method that adds any number of models."""
        least, most = self._method.models
        return self._method.needs_base and least == 1 and most > 1

    def _has_base(self, part: _Slice) -> bool:
        """Whether the slice's base is set apart from its sources."""
        return self._method.needs_base or (self._method.takes_base and part.base is not None)

    def _mixed_sources(self, part: _Slice) -> list[_SliceSource]:
        """The sources without a base that is set apart."""
        base = part.base if self._has_base(part) else None
        return [source for source in part.sources if base is None or source.model != base]

    def _mix(self, part: _Slice, index: int | None, t: float, shared: Levels) -> Mix:
        """The mix of a slice's layer at depth t, or of the tensors outside the stack where index is None."""

        def layer(first: int) -> int | None:
            return None if index is None else first + index

        sources = self._mixed_sources(part)
        levels = [part.parameters, *shared]
        values: dict[str, ParamValue] = {}
        for param in self._method.params:
            if param.per == "merge":
                values[param.name] = self._parameters.setting(param, levels, t, Owner(part.path))
            else:
                values[param.name] = tuple(
                    self._parameters.setting(
                        param, [source.parameters, *levels], t, Owner(source.path, source.model)
                    )
                    for source in sources
                )
        base: Source | None = None
        if self._has_base(part):
            assert part.base is not None
            first = next((source.first for source in part.sources if source.model == part.base), 0)
            base = (part.base, layer(first))
        named = tuple((source.model, layer(source.first)) for source in sources)
        if not named:  # nothing is added to the base, such as a model with its adapter folded in
            assert base is not None
            return Mix("passthrough", (base,), params=params({"scale": (1.0,)}))
        return Mix(self._method.name, named, base, params(values))


def _declares(name: Any, param: str) -> bool:
    """Whether the merge method of that name declares a parameter."""
    try:
        return method(str(name)).param(param) is not None
    except RecipeError:
        return False
