"""A merged folder says what it is made of, so that it can be made again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

import evomerge as em
from evomerge._escaping import markdown
from evomerge.checkpoints import open_parent
from evomerge.export.front_matter import front_matter
from evomerge.export.licenses import merged_license
from evomerge.export.merge_card import CONFIG, model_table
from evomerge.export.recipe_file import merge_recipe_file
from evomerge.export.source_models import base_models, source_models
from tests.support.merge_cases import candidate

RECIPE = """merge_method: linear
models:
  - {{model: {a}, parameters: {{weight: 0.5}}}}
  - {{model: {b}, parameters: {{weight: 1}}}}
dtype: bfloat16
"""


def head(folder: Path) -> dict[str, Any]:
    """The front matter of a folder's card."""
    found: dict[str, Any] = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    return found


def recipe_of(folder: Path, tiny: dict[str, Path], extra: str = "") -> Path:
    file = folder / "recipe.yaml"
    file.write_text(RECIPE.format(a=tiny["math"], b=tiny["code"]) + extra)
    return file


def test_the_recipe_in_the_folder_makes_the_same_weights(tiny: dict[str, Path], tmp_path: Path) -> None:
    merge_recipe_file(recipe_of(tmp_path, tiny, "# a remark\n"), tmp_path / "out")
    merge_recipe_file(tmp_path / "out" / CONFIG, tmp_path / "again")
    first, again = (tmp_path / name / "model.safetensors" for name in ("out", "again"))
    assert first.read_bytes() == again.read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / CONFIG).read_text() in card
    assert "remark" not in card
    assert head(tmp_path / "out") == {
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "mergekit", "evomerge"],
    }
    assert all(f"`{tiny[name]}`" in card for name in ("math", "code"))


def test_what_speaks_against_a_merge_is_on_its_card(tiny: dict[str, Path], tmp_path: Path) -> None:
    config = tiny["code"] / "config.json"
    before = config.read_text()
    try:
        config.write_text(json.dumps(json.loads(before) | {"rms_norm_eps": 0.5}))
        (warning,) = merge_recipe_file(recipe_of(tmp_path, tiny), tmp_path / "out")
    finally:
        config.write_text(before)
    assert markdown(warning) in (tmp_path / "out" / "README.md").read_text()
    assert "rms_norm_eps is 0.5" in warning


def test_a_recipe_of_several_documents_is_written_whole(tiny: dict[str, Path], tmp_path: Path) -> None:
    text = f"name: one\n{RECIPE.format(a=tiny['math'], b=tiny['code'])}---\nmerge_method: slerp\n"
    text += f"base_model: {tiny['base']}\nmodels: [{{model: one}}]\nparameters: {{t: 0.5}}\n"
    (tmp_path / "r.yaml").write_text(text)
    merge_recipe_file(tmp_path / "r.yaml", tmp_path / "out")
    documents = list(yaml.safe_load_all((tmp_path / "out" / CONFIG).read_text()))
    assert [document["merge_method"] for document in documents] == ["linear", "slerp"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f"`{tiny[name]}`" in card for name in ("base", "math", "code"))


def test_a_recipe_of_python_is_written_in_mergekits_language(tiny: dict[str, Path], tmp_path: Path) -> None:
    models = {name: str(path) for name, path in tiny.items()}
    em.merge(candidate("ties"), tmp_path / "out", models=models)
    document = yaml.safe_load((tmp_path / "out" / CONFIG).read_text())
    assert document["merge_method"] == "ties"
    assert document["base_model"] == models["base"]
    merge_recipe_file(tmp_path / "out" / CONFIG, tmp_path / "again")
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert first.keys() == again.keys()


def test_base_model_holds_repositories_alone(tiny: dict[str, Path], tmp_path: Path) -> None:
    """Of a snapshot in the Hub's cache its repository, of a folder what its card says, never a path."""
    cached = tmp_path / "models--org--cached" / "snapshots" / ("c" * 40)
    shutil.copytree(tiny["math"], cached)
    shutil.copytree(tiny["code"], tmp_path / "mine")
    (tmp_path / "mine" / "README.md").write_text(
        "---\nbase_model: [org/start, /home/me/other]\n---\n# Mine\n"
    )
    given = {"math": str(cached), "code": str(tmp_path / "mine")}
    parents = {name: open_parent(reference) for name, reference in given.items()}
    models = source_models(tuple(given), given, parents)
    assert [(model.repository, model.revision) for model in models] == [
        ("org/cached", "c" * 40),
        (None, None),
    ]
    assert base_models(models) == ("org/cached", "org/start")
    named = source_models(("math",), {"math": "org/model@main"}, parents)
    assert base_models(named) == ("org/cached",)


def test_a_secret_in_a_reference_is_hidden(tiny: dict[str, Path]) -> None:
    parents = {"math": open_parent(str(tiny["math"]))}
    (model,) = source_models(("math",), {"math": "https://me:hunter22@host/model"}, parents)
    assert "hunter22" not in "\n".join(
        [*model_table([model]), *front_matter([model], merged_license([model]))]
    )


@pytest.mark.parametrize("fence", ["```", "````"])
def test_a_fence_in_a_recipe_does_not_end_the_card(fence: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, tiny, f"chat_template: '{{{{ messages }}}} {fence} # heading'\n")
    merge_recipe_file(recipe, tmp_path / "out")
    assert f"\n{fence}`yaml\n" in (tmp_path / "out" / "README.md").read_text()
