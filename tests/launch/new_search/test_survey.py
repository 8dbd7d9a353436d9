"""The survey of models: which is the base, how far the others lie, how much their task vectors overlap."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.errors import CheckpointError, ConfigError
from evomerge.launch.new_search.survey import FAR, survey_models
from tests.support.toy import llama


def shifted(folder: Path, near: Path, directions: dict[int, float]) -> Path:
    """A model whose task vector is a sum of fixed, nearly orthogonal directions: seed -> factor."""
    llama(folder, 99, near=near, dtype=torch.float32)
    tensors = load_file(near / "model.safetensors")
    for position, name in enumerate(sorted(tensors)):
        for seed, factor in directions.items():
            generator = torch.Generator().manual_seed(1000 * seed + position)
            tensors[name] = tensors[name] + factor * torch.randn(tensors[name].shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return llama(tmp_path / "base", 0, dtype=torch.float32)


def test_the_model_in_the_middle_is_the_base_wherever_it_stands(tmp_path: Path, base: Path) -> None:
    experts = [shifted(tmp_path / f"e{i}", base, {i: 0.05}) for i in range(1, 4)]
    for position in range(4):
        folders = [*experts[:position], base, *experts[position:]]
        found = survey_models({folder.name: str(folder) for folder in folders})
        assert found.base == "base"
        assert found.has_shared_base
        assert set(found.distances) == {"e1", "e2", "e3"}


def test_distance_and_overlap_are_those_of_whole_matrices(tmp_path: Path, base: Path) -> None:
    folders = {
        "base": base,
        "one": shifted(tmp_path / "one", base, {1: 0.05}),
        "two": shifted(tmp_path / "two", base, {1: 0.03, 2: 0.04}),  # cosine .6
    }
    found = survey_models({name: str(path) for name, path in folders.items()}, "base")
    weights = {name: load_file(path / "model.safetensors") for name, path in folders.items()}
    matrices = [n for n, t in weights["base"].items() if t.ndim == 2 and ".layers." in n]
    flat = {name: torch.cat([w[n].flatten() for n in matrices]).double() for name, w in weights.items()}
    for name in ("one", "two"):
        exact = float((flat[name] - flat["base"]).norm() / flat["base"].norm())
        assert found.distances[name] == pytest.approx(exact, rel=0.2)  # 24 of 35 matrices are sampled
    assert found.overlap == pytest.approx(0.6, abs=0.1)


def test_models_trained_apart_have_no_shared_base(tmp_path: Path, base: Path) -> None:
    other = llama(tmp_path / "other", 7, dtype=torch.float32)
    found = survey_models({"base": str(base), "other": str(other)})
    assert found.distances["other"] == pytest.approx(math.sqrt(2), abs=0.2)
    assert found.distances["other"] > FAR
    assert not found.has_shared_base
    assert found.overlap is None


def test_the_cards_name_the_base_and_the_license(tmp_path: Path, base: Path) -> None:
    first = shifted(tmp_path / "first", base, {1: 0.05})
    folder = f"{base.parent.name}/{base.name}"
    (first / "README.md").write_text(f"---\nlicense: apache-2.0\nbase_model: {folder}\n---\n# First\n")
    found = survey_models({"first": str(first), "base": str(base)})
    assert (found.base, found.models["first"].license) == ("base", "apache-2.0")
    assert "cards" in found.base_reason
    assert found.models["base"].license is None


def test_a_model_that_equals_the_base_is_at_distance_zero(tmp_path: Path, base: Path) -> None:
    same = shifted(tmp_path / "same", base, {})
    found = survey_models(
        {"base": str(base), "same": str(same), "x": str(shifted(tmp_path / "x", base, {1: 0.1}))}
    )
    assert found.distances["same" if found.base == "base" else "base"] == 0
    assert found.overlap is None


def test_what_cannot_be_surveyed_is_said(tmp_path: Path, base: Path) -> None:
    with pytest.raises(ConfigError, match="two models"):
        survey_models({"base": str(base)})
    with pytest.raises(ConfigError, match="Did you mean 'base'"):
        survey_models({"base": str(base), "b": str(base)}, "bsae")
    with pytest.raises(CheckpointError, match=r"model 'gone'.*--unread"):
        survey_models({"base": str(base), "gone": str(tmp_path / "gone")})
    deeper = llama(tmp_path / "deeper", 3, layers=4, dtype=torch.float32)
    with pytest.raises(CheckpointError, match="4 layers"):
        survey_models({"base": str(base), "deeper": str(deeper)}, "base")
    narrow = tmp_path / "narrow"
    shifted(narrow, base, {1: 0.05})
    config = json.loads((narrow / "config.json").read_text())
    config["num_attention_heads"] = 1
    config["num_key_value_heads"] = 1
    (narrow / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="num_attention_heads"):
        survey_models({"base": str(base), "narrow": str(narrow)}, "base")
