"""mergekit-evolve files: the shapes of genome that mergekit's docs/evolve.md shows, on models with layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from evomerge import _yaml
from evomerge.checkpoints import Checkpoint, Parent
from evomerge.config import Config, loading
from evomerge.errors import ConfigError
from evomerge.launch.new_search.mergekit_evolve import read_evolve
from evomerge.launch.new_search.proposal import propose
from evomerge.launch.new_search.survey import survey_models
from evomerge.launch.weight_space import make_space
from tests.support.toy import llama

LAYERS = 8
PARAMETERS = {"linear": 1, "task_arithmetic": 1, "ties": 2, "dare_ties": 2}
"""Method -> numbers of a model that mergekit-evolve searches in a layer group and filter."""


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    base = llama(folder / "base", 0, layers=LAYERS, dtype=torch.float32)
    for seed, name in enumerate(("model_1", "model_2", "model_3"), 1):
        llama(folder / name, seed, layers=LAYERS, near=base, dtype=torch.float32)
    return folder


def genome_file(zoo: Path, tmp_path: Path, genome: dict[str, Any], **top: Any) -> Path:
    models = [str(zoo / name) for name in genome.pop("of", ("model_1", "model_2", "model_3"))]
    document = {
        "genome": {"models": models, "base_model": str(zoo / "base"), **genome},
        "tasks": [{"name": "first"}],
        **top,
    }
    file = tmp_path / "evolve.yaml"
    file.write_text(yaml.safe_dump(document))
    return file


def converted(file: Path) -> tuple[Config, tuple[str, ...]]:
    wishes = read_evolve(file)
    survey = survey_models(wishes.models, wishes.base)
    draft = propose(wishes, survey, ("hash", "as it is"))
    return loading.check(_yaml.parse(draft.text(), "draft")), wishes.notes


def opened(settings: Config) -> dict[str, Parent]:
    return {name: Checkpoint(Path(model.path)) for name, model in settings.models.items()}


@pytest.mark.parametrize("method", sorted(PARAMETERS))
@pytest.mark.parametrize("granularity", [0, 1, 2, 8])
@pytest.mark.parametrize("filters", [None, ["self_attn", "mlp"]])
def test_layers_have_as_many_genes_as_in_mergekit_evolve(
    method: str, granularity: int, filters: list[str] | None, zoo: Path, tmp_path: Path
) -> None:
    genome = {"merge_method": method, "filters": filters}
    if granularity:
        genome["layer_granularity"] = granularity
    settings, _ = converted(genome_file(zoo, tmp_path, genome))
    axes = [axis for axis in make_space(settings, opened(settings)).axes if axis.component is not None]
    groups = LAYERS // granularity if granularity else 1
    sets = 1 if filters is None else len(filters) + 1  # one more for all other tensors
    assert len(axes) == groups * sets * 3 * PARAMETERS[method]


def test_the_file_of_the_documentation_is_carried_over(zoo: Path, tmp_path: Path) -> None:
    """The example of docs/evolve.md with its optional keys, on models of ours."""
    text = f"""
genome:
    models:
       - {zoo}/model_1
       - {zoo}/model_2
       - {zoo}/model_3
    merge_method: dare_ties
    base_model: {zoo}/base
    tokenizer_source: null # optional
    layer_granularity: 8

    # optional:
    normalize: false
    allow_negative_weights: false
    smooth: false
    filters:
      - self_attn
      - mlp
tasks:
  - name: lm_eval_task_name
    weight: 1.0 # optional
    metric: "acc,none" # defaults to acc,none
  - name: another
"""
    file = tmp_path / "evolve.yaml"
    file.write_text(text)
    settings, notes = converted(file)
    assert settings.parents == ("model_1", "model_2", "model_3")
    assert (settings.base, settings.method) == ("base", "dare_ties")
    assert (settings.space.groups, settings.space.components) == (1, ("attention", "mlp", "other"))
    weight = settings.space.parameters["weight"]
    assert (weight.low, weight.start) == (0.0, pytest.approx(1 / 3, abs=1e-4))  # type: ignore[union-attr]
    assert settings.space.parameters["normalize"] is False
    assert [(t.task, t.metric, t.filter, t.weight) for t in settings.tasks] == [
        ("lm_eval_task_name", "acc", None, 1.0),
        ("another", "acc", None, 1.0),
    ]
    assert [note.partition(" ")[0].rstrip(":") for note in notes] == ["limit"]


def test_what_the_keys_mean_is_kept(zoo: Path, tmp_path: Path) -> None:
    genome = {"merge_method": "task_arithmetic", "allow_negative_weights": True}
    tasks = [
        "plain",
        {"name": "gsm8k", "metric": "exact_match,strict-match", "weight": 2},
        {"name": "wiki", "metric": "word_perplexity,none", "weight": -0.5},
    ]
    file = genome_file(zoo, tmp_path, genome, tasks=tasks, limit=40, num_fewshot=3, random_init=True)
    settings, notes = converted(file)
    weight = settings.space.parameters["weight"]
    assert weight.low == -weight.high  # type: ignore[union-attr]
    assert settings.space.parameters["normalize"] is False  # mergekit-evolve's default for this method
    assert [(t.task, t.metric, t.filter, t.weight, t.num_fewshot) for t in settings.tasks] == [
        ("plain", "acc", None, 1.0, 3),
        ("gsm8k", "exact_match", "strict-match", 2.0, 3),
        ("wiki", "word_perplexity", None, 0.5, 3),
    ]
    assert settings.evaluation.items == 40
    assert settings.search.sigma == 0.3
    assert not settings.evaluation.apply_chat_template, "the base has no template"
    text = " ".join(notes)
    assert "tasks.2.weight" in text
    assert "random_init" in text


@pytest.mark.parametrize(
    ("genome", "method", "models"),
    [
        ({"merge_method": "slerp", "of": ["model_1", "model_2"], "base_model": None}, "slerp", 2),
        ({"merge_method": "slerp"}, "multislerp", 4),
        ({"merge_method": "linear", "base_model": None, "of": ["model_1", "model_2"]}, "linear", 2),
        ({"merge_method": "ties", "of": ["base", "model_1"]}, "ties", 2),
    ],
)
def test_bases_and_slerp(genome: dict[str, Any], method: str, models: int, zoo: Path, tmp_path: Path) -> None:
    settings, notes = converted(genome_file(zoo, tmp_path, genome))
    assert (settings.method, len(settings.models)) == (method, models)
    assert make_space(settings, opened(settings)).axes
    if method in ("multislerp", "linear", "ties"):
        assert any(note.startswith("genome.") for note in notes)


def test_models_are_read_in_the_forms_of_mergekit(zoo: Path, tmp_path: Path) -> None:
    genome = {
        "merge_method": "linear",
        "of": [],
        "models": [
            {"model": {"path": "org/a", "revision": "main"}},
            {"model": {"path": "org/b"}, "lora": {"path": "org/lora"}},
            "org/c@v1",
        ],
    }
    wishes = read_evolve(genome_file(zoo, tmp_path, genome))
    assert list(wishes.models.values())[1:] == ["org/a@main", "org/b+org/lora", "org/c@v1"]


@pytest.mark.parametrize("key", ["smooth", "tokenizer_source", "filters", "layer_granularty"])
def test_what_cannot_be_carried_over_is_named_with_its_line(key: str, zoo: Path, tmp_path: Path) -> None:
    value = {"smooth": True, "tokenizer_source": "union", "filters": ["q_proj_norm", "mlp"]}.get(key, 2)
    file = genome_file(zoo, tmp_path, {"merge_method": "ties", key: value})
    _, notes = converted(file)
    lines = file.read_text().splitlines()
    (note,) = [note for note in notes if note.startswith(f"genome.{key}")]
    line = int(note.partition("(line ")[2].partition(")")[0])
    assert key in lines[line - 1] or value[0] in lines[line - 1]  # type: ignore[index]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"genome": {"merge_method": "ties", "models": []}}, "one entry at least"),
        ({"genome": {"merge_method": "della", "models": ["a"]}}, "merge_method is one of"),
        ({"genome": {"merge_method": "ties", "models": ["a"]}}, "base_model"),
        ({"genome": 3}, "no `genome` mapping"),
        ({"tasks": []}, "tasks is a list"),
        ({"tasks": [{"weight": 1}]}, "a task is a name"),
        ({"tasks": [{"name": "x", "weight": 0}]}, "other than 0"),
        ({"limit": -3}, "whole number"),
    ],
)
def test_a_broken_file_is_one_error_with_its_place(
    change: dict[str, Any], words: str, zoo: Path, tmp_path: Path
) -> None:
    file = genome_file(zoo, tmp_path, {"merge_method": "ties"})
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **change}))
    with pytest.raises(ConfigError, match=rf"evolve\.yaml:\d+:\d+ .*{words}"):
        read_evolve(file)
