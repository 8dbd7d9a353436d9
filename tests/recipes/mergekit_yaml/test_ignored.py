"""What stands in a recipe and changes nothing: every kind, at every place, named, and merged without it."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge import _yaml
from evomerge.config import loading
from evomerge.errors import ConfigError, RecipeError
from evomerge.methods import METHODS, Method
from evomerge.recipes import Recipe, mergekit_yaml

REPO = Path(__file__).resolve().parents[3]
ENVIRONMENT = Path(os.environ.get("EVOMERGE_MERGEKIT_ENV") or REPO / ".venv-mergekit")
FORMS = ("models", "slices", "module")
NAMES = [
    f"model.layers.{i}.{part}.weight"
    for i in range(4)
    for part in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")
] + ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
EVERY_PARAMETER = sorted({param.name for method in METHODS.values() for param in method.params})


def read(text: str) -> tuple[Recipe, list[str]]:
    """(recipe, what is said to change nothing)."""
    said: list[str] = []
    recipe = mergekit_yaml.load(
        _yaml.parse_all(text, "recipe.yaml"),
        lambda reference: 4,
        tensor_names=lambda reference: NAMES,
        warn=said.append,
    )
    return recipe, said


def read_data(data: dict[str, Any]) -> tuple[Recipe, list[str]]:
    return read(yaml.safe_dump(data, sort_keys=False))


def sources(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of the models of a document of any form."""
    block = data.get("modules", {}).get("text_decoder", data)
    return block["models"] if "models" in block else block["slices"][0]["sources"]


def document(method: Method, form: str = "models") -> dict[str, Any]:
    """A recipe of a method with all that it needs, the base listed where it is set apart."""
    least, most = method.models
    models = ["math", "code", "chat"][: max(least, min(most, 2))]
    listed = [*models, "base"] if method.needs_base else models
    entries: list[dict[str, Any]] = [{"model": model} for model in listed]
    data: dict[str, Any] = {"merge_method": method.name, "dtype": "float32"}
    if method.needs_base:
        data["base_model"] = "base"
    shared = {p.name: p.start_for(2) for p in method.params if p.required and p.per == "merge"}
    if shared:
        data["parameters"] = shared
    own = {p.name: 0.5 for p in method.params if p.required and p.per == "model"}
    for entry in entries:
        if entry["model"] != "base":
            entry["parameters"] = dict(own)
    if form == "slices":
        for entry in entries:
            entry["layer_range"] = [0, 4]
        data["slices"] = [{"sources": entries}]
    elif form == "module":
        data["modules"] = {"text_decoder": {"models": entries}}
    else:
        data["models"] = entries
    return data


def places(data: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, mapping that may have `parameters`) of every level of a document."""
    yield "top", data
    if "slices" in data:
        yield "slice", data["slices"][0]
    if "modules" in data:
        yield "module", data["modules"]["text_decoder"]
    yield "model", sources(data)[0]


# ---- parameters


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_of_another_method_is_named_at_every_level_and_left_out(name: str, form: str) -> None:
    method = METHODS[name]
    plain, said = read_data(document(method, form))
    assert said == []
    for parameter in [p for p in EVERY_PARAMETER if method.param(p) is None]:
        levels = [level for level, _ in places(document(method, form))]
        for level in levels:
            data = document(method, form)
            dict(places(data))[level].setdefault("parameters", {})[parameter] = 0.25
            recipe, said = read_data(data)
            assert recipe == plain
            assert len(said) == 1, (parameter, level, said)
            assert re.match(rf"recipe\.yaml:\d+:\d+ {name} has no parameter '{parameter}'", said[0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", METHODS)
def test_a_parameter_of_the_merge_under_a_model_and_a_models_under_the_base_are_named(
    name: str, form: str
) -> None:
    method = METHODS[name]
    plain, _ = read_data(document(method, form))
    for param in method.params:
        data = document(method, form)
        base = [entry for entry in sources(data) if entry["model"] == "base"]
        if param.per == "model" and not base:
            continue
        entry = base[0] if param.per == "model" else sources(data)[0]
        entry.setdefault("parameters", {})[param.name] = 0.0
        recipe, said = read_data(data)
        assert recipe == plain
        assert len(said) == 1
        assert re.match(rf"recipe\.yaml:\d+:\d+ {param.name} (belongs to the whole|of the base)", said[0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_outside_parameters_is_named_at_every_level(name: str, form: str) -> None:
    method = METHODS[name]
    plain, _ = read_data(document(method, form))
    for parameter in EVERY_PARAMETER:
        for level in [level for level, _ in places(document(method, form))]:
            data = document(method, form)
            dict(places(data))[level][parameter] = 0.25
            recipe, said = read_data(data)
            assert recipe == plain
            assert len(said) == 1
            assert f"unknown key '{parameter}'" in said[0]
            assert ("go under parameters" in said[0]) == (method.param(parameter) is not None)


@pytest.mark.parametrize("name", METHODS)
def test_mergekits_switch_for_memory_is_named_where_the_method_has_none(name: str) -> None:
    data = document(METHODS[name])
    data.setdefault("parameters", {})["int8_mask"] = True
    recipe, said = read_data(data)
    assert recipe == read_data(document(METHODS[name]))[0]
    assert (said == []) == (METHODS[name].param("lambda") is not None or name == "sce")


FORM = {
    "a number": (0.5, True),
    "a gradient": ([0.1, 0.9], True),
    "a text": ("high", True),
    "a truth": (True, True),
    "a filter": ({"filter": "mlp", "value": 0.5}, True),
    "filters": ([{"filter": "mlp", "value": [0, 1]}], True),
    "nothing": (None, False),
    "a mapping": ({"a": 1}, False),
    "lists in a list": ([[1, 2]], False),
    "numbers and filters": ([1, {"value": 2}], False),
    "a filter that is a number": ({"filter": 3, "value": 1}, False),
}


@pytest.mark.parametrize("what", FORM)
def test_a_parameter_that_is_left_out_still_has_a_form_that_mergekit_reads(what: str) -> None:
    value, is_read = FORM[what]
    data = document(METHODS["slerp"])
    data["parameters"]["density"] = value
    if is_read:
        assert "has no parameter 'density'" in read_data(data)[1][0]
    else:
        with pytest.raises(RecipeError, match=r"recipe\.yaml:\d+:\d+ density must be"):
            read_data(data)


# ---- keys

LINEAR = "merge_method: linear\nbase_model: math\n"
ONE = "models: [{model: math, parameters: {weight: 1}}]\n"
KEYS = {
    "a key with a typo": (LINEAR + ONE + "§dtpye: float32\n", "unknown key 'dtpye'.*Did you mean 'dtype'"),
    "layers of a whole model": (
        LINEAR + "models: [{model: math, §layer_range: [0, 2], parameters: {weight: 1}}]\n",
        "unknown key 'layer_range'",
    ),
    "a key of a slice": (
        "merge_method: passthrough\nslices:\n- sources: [{model: math, layer_range: [0, 4]}]\n  §layers: 4\n",
        "unknown key 'layers'",
    ),
    "a weight of residuals": (
        "merge_method: passthrough\nslices:\n- sources: [{model: math, layer_range: [0, 4]}]\n"
        "  §residual_weight: 0.5\n",
        "residual_weight has no effect in mergekit either",
    ),
    "a key of a module": (
        LINEAR + "modules:\n  text_decoder:\n    models: [{model: math, parameters: {weight: 1}}]\n"
        "    §paramters: {weight: 1}\n",
        "unknown key 'paramters'.*Did you mean 'parameters'",
    ),
    "a key of a filter": (
        LINEAR + "models: [{model: math}]\nparameters:\n  weight:\n  - value: 1\n    §fliter: mlp\n",
        "unknown key 'fliter'.*Did you mean 'filter'",
    ),
    "a key of a reference": (
        LINEAR + "models:\n- {§model: {model: math, lroa: x}, parameters: {weight: 1}}\n",
        "unknown key 'lroa'.*Did you mean 'lora'",
    ),
    "a key of a path": (
        LINEAR + "models:\n- {§model: {model: {path: math, rev: x}}, parameters: {weight: 1}}\n",
        "unknown key 'rev'.*Did you mean 'revision'",
    ),
    "a key of a tokenizer": (LINEAR + ONE + "§tokenizer: {sorce: base}\n", "unknown key 'sorce'.*'source'"),
    "a key of a token": (
        LINEAR + ONE + "§tokenizer: {tokens: {w: {source: math, forced: true}}}\n",
        "unknown key 'forced'.*'force'",
    ),
    "a key of a token's source": (
        LINEAR + ONE + "§tokenizer: {tokens: {w: {source: {kind: zero, modle: x}}}}\n",
        "unknown key 'modle'",
    ),
    "a key of a stage": (
        "name: first\n" + LINEAR + ONE + "§dtpye: float32\n---\n"
        "merge_method: passthrough\nmodels: [{model: first}]\n",
        "unknown key 'dtpye'",
    ),
}


@pytest.mark.parametrize("name", KEYS)
def test_an_unknown_key_is_named_with_its_place_and_merged_without(name: str) -> None:
    marked, message = KEYS[name]
    before, _, after = marked.partition("§")
    place = f"{before.count(chr(10)) + 1}:{len(before.rpartition(chr(10))[2]) + 1}"
    _, said = read(before + after)
    assert len(said) == 1
    assert re.match(rf"recipe\.yaml:{place} .*{message}", said[0]), said


def test_what_is_said_of_many_places_is_said_once() -> None:
    data = document(METHODS["model_stock"])
    for entry in data["models"]:
        entry["parameters"] = {"weight": 0.5}
    _, said = read_data(data)
    assert len(said) == 1
    assert re.search(r":\d+:\d+ model_stock has no parameter 'weight'.* \(lines \d+, \d+ too\)$", said[0])


# ---- filters

FILTERS = {
    "in no name": ("[{filter: modelnorm, value: 1}, {value: 2}]", ["filter 'modelnorm' is in no tensor's"]),
    "in no name, no list": ("{filter: q_prjo, value: 1}", ["filter 'q_prjo' is in no tensor's name"]),
    "a layer too high": ("[{filter: layers.4., value: 1}, {value: 2}]", ["filter 'layers.4.' is in no"]),
    "two": ("[{filter: a_b, value: 1}, {filter: c_d, value: 1}, {value: 2}]", ["'a_b'", "'c_d'"]),
    "after one for all": ("[{value: 2}, {filter: mlp, value: 1}]", ["filter 'mlp' is never read: an entry"]),
    "after a star": ("[{filter: '*', value: 2}, {value: 1}]", ["an entry for all tensors is never read"]),
    "inside an earlier one": (
        "[{filter: mlp, value: 2}, {filter: mlp.up, value: 1}, {value: 0}]",
        ["filter 'mlp.up' is never read: entries before"],
    ),
    "behind all that it names": (
        "[{filter: mlp.up, value: 2}, {filter: mlp, value: 1}, {filter: norm, value: 1}, {value: 0}]",
        ["filter 'mlp' is never read: entries before"],
    ),
    "every kind of tensor": (
        "[{filter: q_proj, value: 2}, {filter: mlp, value: 1}, {filter: norm, value: 1}, "
        "{filter: embed, value: 1}, {filter: lm_head, value: 1}, {value: 0}]",
        [],
    ),
    "no filter": ("[1, 2]", []),
}


@pytest.mark.parametrize("level", ["top", "slice", "model"])
@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_that_decides_nothing_is_named(name: str, level: str) -> None:
    """mlp has one tensor here, up_proj."""
    written, messages = FILTERS[name]
    data = document(METHODS["ties"], "slices")
    dict(places(data))[level].setdefault("parameters", {})["density"] = yaml.safe_load(
        written.replace("2", "0.9")
    )
    _, said = read_data(data)
    assert len(said) == len(messages)
    for sentence, message in zip(said, messages, strict=True):
        assert re.match(r"recipe\.yaml:\d+:\d+ ", sentence)
        assert message in sentence


def test_filters_of_a_deeper_stack_are_compared_with_its_own_layers() -> None:
    """A filter of a parameter of the whole merge sees the output's names."""
    entry = [{"sources": [{"model": "math", "layer_range": [0, 4]}]}]
    data = {"merge_method": "passthrough", "slices": entry * 2, "parameters": {"scale": 1.0}}
    for index, expected in ((7, 0), (8, 1)):
        filters = [{"filter": f"layers.{index}.", "value": 0.5}, {"value": 1.0}]
        _, said = read_data(data | {"parameters": {"scale": filters}})
        assert len(said) == expected


# ---- a weight that is missing


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if any(p.required for p in m.params)])
def test_a_parameter_that_is_missing_is_said_with_its_model(name: str, form: str) -> None:
    method = METHODS[name]
    for param in [p for p in method.params if p.required]:
        data = document(method, form)
        if param.per == "merge":
            del data["parameters"][param.name]
            with pytest.raises(RecipeError, match=rf"{name} needs {param.name}; give it under parameters"):
                read_data(data)
            continue
        for i, entry in enumerate(sources(data)):
            if entry["model"] == "base":
                continue
            for given in ({}, {param.name: [{"filter": "mlp", "value": 1}]}):
                broken = copy.deepcopy(data)
                sources(broken)[i]["parameters"] = given
                text = yaml.safe_dump(broken, sort_keys=False)
                lines = text.splitlines()
                line = next(n for n, line in enumerate(lines, 1) if f"model: {entry['model']}" in line)
                with pytest.raises(RecipeError) as caught:
                    read(text)
                assert re.match(rf"recipe\.yaml:{line}:", str(caught.value))
                assert f"{param.name} for model '{entry['model']}'" in str(caught.value)


def test_a_base_that_a_method_mixes_like_the_others_needs_a_weight_too() -> None:
    data = document(METHODS["linear"]) | {"base_model": "base"}
    with pytest.raises(RecipeError, match="linear needs weight for model 'base'"):
        read_data(data)


# ---- files of another kind

EVOLVE = {"genome": {"models": ["a"], "merge_method": "ties"}, "tasks": [{"name": "arc_easy"}]}
KINDS = {
    "mergekit-evolve": EVOLVE,
    "mergekit-evolve, genome alone": {"genome": {"models": ["a"], "merge_method": "ties"}},
    "mergekit-moe": {"base_model": "a", "gate_mode": "hidden", "experts": [{"source_model": "a"}]},
    "mergekit-moe, no gate": {"base_model": "a", "experts": [{"source_model": "a"}]},
    "mergekit-moe, a shared expert": {
        "base_model": "a", "architecture": "qwen", "gate_mode": "random", "experts_per_token": 2,
        "experts": [{"source_model": "a"}], "shared_experts": [{"source_model": "a"}],
    },
    "search file": {"study": "s", "models": {"a": "a"}, "base": "a", "method": "ties", "tasks": []},
    "mergekit recipe": {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1}}]},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_kind_is_called_what_it_is(kind: str) -> None:
    text = yaml.safe_dump(KINDS[kind], sort_keys=False)
    called = kind.partition(",")[0]
    if called != "mergekit recipe":
        with pytest.raises(RecipeError, match=rf"^recipe\.yaml:1:1 is a {called}"):
            read(text)
    if called != "search file":
        with pytest.raises(ConfigError, match=rf"^search\.yaml:1:1 is a {called}"):
            loading.check(_yaml.parse(text, "search.yaml"))


def test_what_to_write_for_a_mergekit_evolve_file_is_said() -> None:
    with pytest.raises(ConfigError) as caught:
        loading.check(_yaml.parse(yaml.safe_dump(EVOLVE), "evolve.yaml"))
    assert "evomerge init --from-mergekit-evolve FILE" in str(caught.value)


# ---- what mergekit has and accepts

DRIVER = """
import json, sys
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge_methods.registry import registered_methods

job = json.load(sys.stdin)
methods = {}
for method in registered_methods():
    spec = method.spec
    params = (*spec.shared_parameters, *spec.input_parameters)
    methods[spec.name] = {
        p.name: ["merge" if p.scope.value == "shared" else "model", p.required] for p in params
    }
alone = {}
for method in registered_methods():
    try:
        method.validate_inputs(["base"], "base", group_name="")
        alone[method.spec.name] = True
    except Exception:
        alone[method.spec.name] = False
accepted = []
for text in job:
    try:
        MergeConfiguration.model_validate(yaml.safe_load(text))
        accepted.append(True)
    except Exception:
        accepted.append(False)
json.dump({"methods": methods, "accepted": accepted, "alone": alone}, sys.stdout)
"""
WITHOUT_EFFECT = {  # mergekit declares them for task arithmetic too, which drops nothing and rescales nothing
    ("task_arithmetic", "density"), ("task_arithmetic", "rescale"),
    *((name, "int8_mask") for name in METHODS),
}  # fmt: skip


def test_the_parameters_that_count_are_mergekits_and_what_it_refuses_is_refused() -> None:
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        pytest.skip(f"there is no mergekit in {ENVIRONMENT}; run scripts/make_mergekit_env")
    texts = []
    for value, _ in FORM.values():
        data = document(METHODS["slerp"])
        data["parameters"]["density"] = value
        texts.append(yaml.safe_dump(data))
    ours = [is_read for _, is_read in FORM.values()]
    for marked, _ in KEYS.values():
        texts += [text.replace("§", "") for text in marked.split("---\n")]
        ours += [True] * len(marked.split("---\n"))
    done = subprocess.run(
        [str(python), "-c", DRIVER], input=json.dumps(texts), capture_output=True, text=True, timeout=280,
        check=True, env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    theirs = json.loads(done.stdout)
    assert theirs["accepted"] == ours
    for name, params in theirs["methods"].items():
        counted = {p: list(v) for p, v in params.items() if (name, p) not in WITHOUT_EFFECT}
        assert counted == {p.name: [p.per, p.required] for p in METHODS[name].params}, name
    ours_alone = {
        name: _takes_base_alone(METHODS[name]) for name in theirs["alone"] if METHODS[name].needs_base
    }
    assert ours_alone == {name: theirs["alone"][name] for name in ours_alone}


def _takes_base_alone(method: Method) -> bool:
    """Whether a recipe of the base alone is read; it then passes the base through."""
    data = document(method, "slices")
    data["slices"][0]["sources"] = [{"model": "base", "layer_range": [0, 4]}]
    try:
        recipe, _ = read_data(data)
    except RecipeError:
        return False
    assert [mix.passed for mix in recipe.mixes] == [("base", i) for i in (None, 0, 1, 2, 3, None)]
    return True
