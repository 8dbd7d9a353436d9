"""Recipe -> mergekit's YAML (version 0.1.5), with all written out that mergekit would guess."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import yaml

from evomerge.errors import RecipeError
from evomerge.methods import Method, Param, method
from evomerge.recipes.mergekit_yaml.method_stages import by_method
from evomerge.recipes.recipe import STORED, Filtered, Mix, ParamValue, PerRow, Recipe, Setting, Source, params
from evomerge.recipes.tokenizer_spec import ZERO, TokenDonor, TokenizerSpec


def dump(
    recipe: Recipe, references: Mapping[str, str], header: Sequence[str] = (), name: str | None = None
) -> str:
    """mergekit YAML that rebuilds a recipe.

    Args:
        recipe: A recipe; its stages become documents of their own, for mergekit-multi, and so do its methods
            where it has several.
        references: Model name -> what to write for it.
        header: Comment lines.
        name: What other documents call the recipe's; None for the last document of a file.

    Returns:
        The text of the file.

    Raises:
        RecipeError: mergekit cannot express the recipe.
    """
    _refuse_rows(recipe)
    divided = by_method(recipe, name or "merge")
    named = {**references, **{stage: stage for stage, _ in divided.stages}}
    documents = [{"name": stage, **_document(part, named)} for stage, part in divided.stages]
    documents.append(({} if name is None else {"name": name}) | _document(divided, named))
    head = "".join(f"# {line}\n" for text in header for line in text.splitlines() or [""])
    return head + dump_documents(documents)


def dump_documents(documents: Sequence[Any]) -> str:
    """YAML of plain data that any reader of YAML reads alike.

    Args:
        documents: What each document holds.

    Returns:
        The text of the file.
    """
    return "---\n".join(
        yaml.dump(d, sort_keys=False, default_flow_style=False, width=120, Dumper=_Dumper, allow_unicode=True)
        for d in documents
    )


def _refuse_rows(recipe: Recipe) -> None:
    if recipe.row_numbers:
        raise RecipeError(
            f"mergekit has no weights for rows, and this recipe has {recipe.row_numbers:,} of them"
        )


def _document(recipe: Recipe, references: Mapping[str, str]) -> dict[str, Any]:
    rule = method(recipe.layers[0].method)
    pins = _pins(recipe, references)
    parts = _parts(recipe)
    slices = []
    for number, (first, length) in enumerate(parts):
        outer = [recipe.embeddings] if number == 0 and not pins else []
        outer += [recipe.head] if number == len(parts) - 1 and not pins else []
        slices.append(_slice(rule, recipe.layers[first], length, outer, references, recipe.base))
    slices = [*pins[:1], *slices, *pins[1:]]
    data: dict[str, Any] = {"merge_method": rule.name}
    if not rule.takes_base or any(mix.base for mix in recipe.mixes):  # else it would take differences from it
        data["base_model"] = references[recipe.base]
    if recipe.dtype != STORED:
        data["dtype"] = recipe.dtype
    data["out_dtype"] = recipe.out_dtype
    if recipe.tokenizer is not None:
        data["tokenizer"] = _tokenizer(recipe.tokenizer, references)
    if recipe.chat_template is not None:
        data["chat_template"] = recipe.chat_template
    shared = _shared(slices)
    if shared:
        data["parameters"] = shared
    data["slices"] = slices
    return data


def _pins(recipe: Recipe, references: Mapping[str, str]) -> list[dict[str, Any]]:
    """Slices without layers, first and last, for embeddings and head of other models than those beside them.

    mergekit takes embeddings from the first slice's models and the head from the last slice's.
    """

    def models(mix: Mix) -> tuple[list[str], str | None]:
        return [name for name, _ in mix.sources], mix.base[0] if mix.base else None

    first, last, outer = recipe.layers[0], recipe.layers[-1], (recipe.embeddings, recipe.head)
    if [models(mix) for mix in outer] == [models(first), models(last)]:
        return []
    passed = [mix.passed for mix in outer]
    if None in (mix.passed for mix in recipe.mixes):
        raise RecipeError(
            "mergekit takes embeddings from the first slice's models and the head from the last slice's; "
            "this recipe does not"
        )
    return [{"sources": [_source(references[one[0]], 0, 0, {})]} for one in passed if one is not None]


def _tokenizer(spec: TokenizerSpec, references: Mapping[str, str]) -> dict[str, Any]:
    out: dict[str, Any] = {"source": references.get(spec.source, spec.source)}
    if spec.tokens:
        out["tokens"] = {token: _donor(token, donor, references) for token, donor in spec.tokens}
    if spec.pad_to_multiple_of is not None:
        out["pad_to_multiple_of"] = spec.pad_to_multiple_of
    return out


def _donor(token: str, donor: TokenDonor, references: Mapping[str, str]) -> dict[str, Any]:
    match donor.source:
        case None:
            raise RecipeError(f"mergekit needs a source for token {token!r}")
        case str(name):
            source: Any = {"kind": "zero"} if name == ZERO else references[name]
        case (name, str(other)):
            source = {"kind": "model_token", "model": references[name], "token": other}
        case (name, row):
            source = {"kind": "model_token", "model": references[name], "token_id": row}
    return {"source": source} | ({"force": True} if donor.force else {})


def with_outer_filters(recipe: Recipe, embeddings: Sequence[str], head: Sequence[str]) -> Recipe:
    """The same recipe with the outer mixes' settings keyed by their tensors' full names.

    mergekit resolves those tensors with the first and last slice's parameters; naming them keeps the two
    apart.

    Args:
        recipe: Any recipe.
        embeddings: Names of the tensors before the layer stack.
        head: Names of those after it.

    Returns:
        A recipe that merges to the same tensors.

    Raises:
        RecipeError: It has weights for rows.
    """
    _refuse_rows(recipe)

    def named(mix: Mix, names: Sequence[str]) -> Mix:
        def by_name(param: str, value: Setting) -> Setting:
            assert not isinstance(value, PerRow)
            declared = method(mix.method).param(param)
            default = declared.default if declared else 0.0
            cases = []
            for name in names:
                number = value.at(name) if isinstance(value, Filtered) else value
                cases.append((name, default if number is None else number))
            return Filtered(tuple(cases))

        if not names:
            return mix
        keyed: dict[str, ParamValue] = {}
        for param, value in mix.params:
            keyed[param] = (
                tuple(by_name(param, s) for s in value) if isinstance(value, tuple) else by_name(param, value)
            )
        return replace(mix, params=params(keyed))

    return replace(recipe, embeddings=named(recipe.embeddings, embeddings), head=named(recipe.head, head))


class _Dumper(yaml.SafeDumper):
    """Lists of numbers and filter entries on one line."""

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
        if isinstance(mapping, dict) and set(mapping) == {"filter", "value"}:
            flow_style = True
        return super().represent_mapping(tag, mapping, flow_style)

    def represent_sequence(
        self, tag: str, sequence: Any, flow_style: bool | None = None
    ) -> yaml.SequenceNode:
        if all(isinstance(e, int | float) for e in sequence):
            flow_style = True
        return super().represent_sequence(tag, sequence, flow_style)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _parts(recipe: Recipe) -> list[tuple[int, int]]:
    """(first output layer, length) of the longest runs of layers whose source layers are consecutive."""
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

    return replace(
        mix, sources=tuple(move(s) for s in mix.sources), base=move(mix.base) if mix.base else None
    )


def _slice(
    rule: Method, mix: Mix, length: int, outer: Sequence[Mix], references: Mapping[str, str], base: str
) -> dict[str, Any]:
    def written(param: Param, source: int | None) -> Any:
        return _write([_of(o, param, source) for o in outer], _of(mix, param, source), param)

    sources = []
    for i, (model, layer) in enumerate(mix.sources):
        values = {p.name: written(p, i) for p in rule.params if p.per == "model"}
        sources.append(_source(references[model], layer, length, values))
    if mix.base is not None:
        sources.append(_source(references[mix.base[0]], mix.base[1], length, {}))
    shared = {p.name: _whole(p, written(p, None)) for p in rule.params if p.per == "merge"}
    for name in [p.name for p in rule.params if p.flag]:
        shared[name] = (
            [{**e, "value": bool(e["value"])} for e in shared[name]]
            if isinstance(shared[name], list)
            else bool(shared[name])
        )
    out: dict[str, Any] = {"sources": sources}
    if mix.base is not None and mix.base[0] != base:
        out["base_model"] = references[mix.base[0]]
    return out | ({"parameters": shared} if shared else {})


def _whole(param: Param, value: Any) -> Any:
    """Whole numbers as such, for parameters that take no other."""
    if param.digits or param.flag:
        return value
    return (
        [{**case, "value": int(case["value"])} for case in value] if isinstance(value, list) else int(value)
    )


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

    outer: settings of the tensors outside the stack that this slice decides, by full name (see
    `with_outer_filters`).
    """
    if isinstance(inner, Filtered) and not any(text == "*" for text, _ in inner.cases):
        inner = Filtered((*inner.cases, ("*", param.default)))
    cases = []
    for setting_ in outer:
        if setting_ == inner:
            continue
        if not isinstance(setting_, Filtered) or any(text in ("*", "") for text, _ in setting_.cases):
            raise RecipeError(
                f"embeddings or head have a {param.name} of their own; "
                "write it with the names of their tensors"
            )
        cases += [case for case in setting_.cases if not _gives(inner, *case)]
    if not cases and not isinstance(inner, Filtered):
        return inner
    assert not isinstance(inner, PerRow)
    cases += list(inner.cases) if isinstance(inner, Filtered) else [("*", inner)]
    return [{"filter": text, "value": value} for text, value in cases]


def _gives(inner: Setting, tensor: str, value: float) -> bool:
    """Whether a setting gives that value for that tensor anyway."""
    return (inner.at(tensor) if isinstance(inner, Filtered) else inner) == value


def _source(reference: str, layer: int | None, length: int, parameters: dict[str, Any]) -> dict[str, Any]:
    assert layer is not None
    out: dict[str, Any] = {"model": reference, "layer_range": [layer, layer + length]}
    if parameters:
        out["parameters"] = parameters
    return out
