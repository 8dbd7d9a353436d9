"""Anchors, aliases and merge keys: what PyYAML makes of them, within the bounds of a file without them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import yaml

from evomerge import _yaml
from evomerge.config import loading
from evomerge.errors import ConfigError
from evomerge.recipes import mergekit_yaml

TIES = "merge_method: ties\nbase_model: base\n"
RECIPES = {
    "a merge key": TIES + "models:\n"
    "- {model: math, parameters: &p {weight: 0.5, density: 0.5}}\n"
    "- {model: code, parameters: {<<: *p, weight: 0.3}}\n",
    "a merge key after what it gives way to": TIES + "models:\n"
    "- {model: math, parameters: &p {weight: 0.5, density: 0.5}}\n"
    "- {model: code, parameters: {weight: 0.3, <<: *p}}\n",
    "two in one merge key": TIES + "models:\n"
    "- {model: math, parameters: &p {weight: 0.5}}\n"
    "- {model: code, parameters: &q {weight: 0.4, density: 0.2}}\n"
    "- {model: chat, parameters: {<<: [*p, *q]}}\n",
    "two merge keys": TIES + "models:\n"
    "- {model: math, parameters: &p {weight: 0.5}}\n"
    "- {model: code, parameters: &q {weight: 0.4, density: 0.2}}\n"
    "- model: chat\n  parameters:\n    <<: *p\n    <<: *q\n",
    "a merge of a merge": TIES + "models:\n"
    "- {model: math, parameters: &p {weight: 0.5}}\n"
    "- {model: code, parameters: &q {<<: *p, density: 0.2}}\n"
    "- {model: chat, parameters: {<<: *q, weight: 0.1}}\n",
    "numbers and models": "merge_method: linear\nbase_model: &b math\nmodels:\n"
    "- {model: *b, parameters: {weight: &w 0.25}}\n- {model: code, parameters: {weight: *w}}\n",
    "sources of slices": "merge_method: passthrough\nslices:\n"
    "- &s {sources: [{model: math, layer_range: [0, 4]}]}\n"
    "- *s\n- <<: *s\n",
    "a gradient and filters": TIES + "models:\n"
    "- {model: math, parameters: {weight: &g [0.1, 0.9], "
    "density: &f [{filter: mlp, value: *g}, {value: 1}]}}\n"
    "- {model: code, parameters: {weight: *g, density: *f}}\n",
    "over two documents": "name: one\nmerge_method: linear\n"
    "models: [{model: math, parameters: &p {weight: 1}}]\n"
    "---\nmerge_method: linear\nmodels: [{model: one, parameters: &p {weight: 1}}, "
    "{model: code, parameters: *p}]\n",
    "a quoted sign is a key": TIES + "models: [{model: math}]\nparameters: {weight: 1, '<<': 2}\n",
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_with_anchors_is_the_one_that_pyyaml_writes_out(name: str) -> None:
    text = RECIPES[name]
    plain = "---\n".join(_written_out(data) for data in yaml.safe_load_all(text))
    read, expected = (
        mergekit_yaml.load(_yaml.parse_all(t, "recipe.yaml"), lambda reference: 4) for t in (text, plain)
    )
    assert read == expected


def _written_out(data: Any) -> str:
    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    return yaml.dump(data, Dumper=Dumper, sort_keys=False)


def test_any_document_with_anchors_is_read_as_pyyaml_reads_it() -> None:
    rng = random.Random(3)
    aliased = 0
    for _ in range(400):
        text = "\n".join(_lines(rng))
        assert _yaml.parse(text, "text").data == yaml.safe_load(text), text
        assert list(_yaml.parse(text, "text").data) == list(yaml.safe_load(text)), "the order counts too"
        aliased += "*" in text
    assert aliased > 300


def _lines(rng: random.Random) -> list[str]:
    """Mappings with anchors, each of which may merge and name those before it."""
    lines: list[str] = []
    for number in range(rng.randint(2, 8)):
        anchors = [f"*m{i}" for i in range(number)]
        entries = []
        if anchors and rng.random() < 0.8:
            chosen = rng.sample(anchors, rng.randint(1, min(3, number)))
            entries.append("<<: " + (chosen[0] if len(chosen) == 1 else f"[{', '.join(chosen)}]"))
        for key in rng.sample("abcdef", rng.randint(0, 4)):
            value = rng.choice([str(rng.randint(0, 9)), "[1, 2]", "{x: 1}", "text", *anchors])
            entries.append(f"{key}: {value} ")
        rng.shuffle(entries)
        lines.append(f"k{number}: &m{number} {{{', '.join(entries)}}}")
    return lines


def test_a_mistake_in_what_an_alias_stands_for_is_named_where_it_is_written() -> None:
    text = TIES + "models:\n- {model: math, parameters: &p {weight: high}}\n- {model: code, parameters: *p}\n"
    with pytest.raises(ConfigError, match=r"^recipe\.yaml:4:33 weight must be a finite number, got 'high'"):
        mergekit_yaml.load(_yaml.parse_all(text, "recipe.yaml"), lambda reference: 4)


def test_a_repeated_key_stays_an_error_beside_a_merge_key() -> None:
    for text in ("a: {<<: {x: 1}, x: 2, x: 3}", "a: {<<: {x: 1, x: 2}}"):
        with pytest.raises(ConfigError, match="repeats the key 'x'"):
            _yaml.parse(text, "text")


def test_what_aliases_stand_for_counts_each_time() -> None:
    many = "a: &a [" + "1, " * 999 + "1]\nb: ["
    assert _yaml.parse(many + ", ".join(["*a"] * 20) + "]", "text").data["b"][19][999] == 1
    with pytest.raises(ConfigError, match="is past the first 30,000 keys and values"):
        _yaml.parse(many + ", ".join(["*a"] * 40) + "]", "text")


def test_a_search_file_may_use_anchors() -> None:
    text = (
        "study: s\nmodels: {base: a, math: b}\nbase: base\nmethod: ties\nspace:\n  parameters:\n"
        "    weight: &range {low: 0.0, high: 1.0, start: 0.5}\n    density: {<<: *range, high: 0.9}\n"
        "tasks: [{task: first}]\nsearch: {evaluations: 8}\n"
    )
    settings = loading.check(_yaml.parse(text, "search.yaml"))
    assert settings.space.parameters["density"].high == 0.9
    assert settings.space.parameters["weight"].low == settings.space.parameters["density"].low == 0.0
    assert loading.rename(text, "other")[0].study == "other"
