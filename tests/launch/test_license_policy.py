"""A search file's constraint on licenses is checked before anything is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from evomerge.config import loading
from evomerge.errors import ConfigError
from evomerge.launch.license_policy import check_licenses
from evomerge.launch.opening import open_parents
from tests.support.toy import in_process, search_file, zoo_folder


def searched(folder: Path, licenses: dict[str, str | None], **keys: Any) -> Path:
    """A search file over copies of the zoo's models, each with a card of its license."""
    models = {}
    for name, license in licenses.items():
        path = folder / "models" / name
        path.mkdir(parents=True)
        for file in (zoo_folder() / name).iterdir():
            shutil.copy(file, path)
        if license is not None:
            (path / "README.md").write_text(f"---\nlicense: {license}\n---\n")
        models[name] = f"models/{name}"
    file = search_file(folder, "licensed", evaluations=4, population=4)
    document = json.loads(file.read_text()) | {"models": models}
    document["models"] |= keys.pop("in_models", {})
    file.write_text(json.dumps(document | keys))
    return file


@pytest.mark.parametrize(
    ("keys", "licenses", "said"),
    [
        ({"license": "permissive"}, {"base": "apache-2.0", "math": "llama3.1"}, "'math' is llama3.1"),
        ({"in_models": {"license": "permissive"}}, {"base": "mit", "math": None}, "'math' is unknown"),
        ({"license": ["llama3.1"]}, {"base": "llama3.1", "math": "mit"}, "allows llama3.1"),
    ],
)
def test_a_model_of_another_license_is_refused_by_plan_and_run(
    keys: dict[str, Any], licenses: dict[str, str | None], said: str, tmp_path: Path
) -> None:
    file = searched(tmp_path, licenses, **keys)
    for verb in ("plan", "run"):
        code, out, err = in_process(verb, file, *(["--root", tmp_path] if verb == "run" else []))
        assert (code, out) == (2, "")
        assert said in err
    assert not (tmp_path / "licensed").exists()


def test_models_of_allowed_licenses_pass(tmp_path: Path) -> None:
    file = searched(tmp_path, {"base": "mit", "math": "apache-2.0"}, in_models={"license": "permissive"})
    settings, _ = loading.load(str(file))
    parents = open_parents({name: (model.path, None) for name, model in settings.models.items()})
    check_licenses(settings, parents)
    with pytest.raises(ConfigError, match=r"'math' is apache-2\.0"):
        check_licenses(settings.model_copy(update={"license": ("mit",)}), parents)


def test_the_constraint_is_read_in_both_places_and_once(tmp_path: Path) -> None:
    file = search_file(tmp_path, "trial", evaluations=4, population=4)
    document = json.loads(file.read_text())
    for license in ("permissive", ["mit", "gemma"]):
        forms = [
            document | {"license": license},
            document | {"models": document["models"] | {"license": license}},
        ]
        read = []
        for form in forms:
            file.write_text(json.dumps(form))
            read.append(loading.load(str(file))[0])
        assert read[0] == read[1]
        assert read[0].license == (tuple(license) if isinstance(license, list) else license)
    file.write_text(json.dumps(forms[1] | {"license": "any"}))
    with pytest.raises(ConfigError, match=r"trial\.yaml:\d+:\d+ 'license' is there twice"):
        loading.load(str(file))


def test_a_model_called_license_stays_a_model(tmp_path: Path) -> None:
    file = search_file(tmp_path, "trial", evaluations=4, population=4)
    document = json.loads(file.read_text())
    document["models"]["license"] = document["models"]["math"]
    file.write_text(json.dumps(document))
    settings, _ = loading.load(str(file))
    assert "license" in settings.models
    assert settings.license == "any"
