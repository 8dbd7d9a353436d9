"""Where the models of a stored study are now: folders with a '+' in their path, adapters, moved ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomerge.config.locations import found_models
from evomerge.errors import CheckpointError


def folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def found(path: str, study: Path) -> str:
    return found_models({"m": (path, None)}, {}, study)["m"][0]


@pytest.mark.parametrize("name", ["base", "a+b/base", "a/b+c", "a+b/c+d"])
def test_a_model_below_a_folder_with_a_plus_was_taken_for_one_with_an_adapter(
    name: str, tmp_path: Path
) -> None:
    model, adapter = folder(tmp_path / name), folder(tmp_path / "lora")
    study = tmp_path / "results" / "study"
    assert found(str(model), study) == str(model)
    assert found(f"{model}+{adapter}", study) == f"{model}+{adapter}"
    assert found(f"{adapter}+{model}", study) == f"{adapter}+{model}"


@pytest.mark.parametrize("name", ["base", "a+b/base", "a+b/c+d"])
def test_models_that_moved_are_found_whatever_their_names(name: str, tmp_path: Path) -> None:
    now, was, study = tmp_path / "now", tmp_path / "was", tmp_path / "now" / "study"
    model, adapter = folder(now / name), folder(now / "lora")
    assert found(str(was / name), study) == str(model)
    if "+" not in name:
        assert found(f"{was / name}+{was / 'lora'}", study) == f"{model}+{adapter}"


def test_what_is_nowhere_is_named(tmp_path: Path) -> None:
    base = folder(tmp_path / "base")
    with pytest.raises(CheckpointError, match=rf"'m' is not at {tmp_path}/none any more"):
        found(f"{base}+{tmp_path}/none", tmp_path / "study")
    assert found("owner/name+owner/adapter", tmp_path / "study") == "owner/name+owner/adapter"
