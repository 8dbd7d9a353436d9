"""Stages with a tokenizer or chat template of their own: the same as merging them to folders one by one."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from evomerge.checkpoints import Checkpoint
from evomerge.errors import EvomergeError, SetupError
from evomerge.export.recipe_file import merge_recipe_file
from tests.support.toy import REPO, environment

MERGEKIT = REPO / ".venv-mergekit" / "bin" / "mergekit-multi"
LISTED = {"source": "base", "tokens": {"<new>": {"source": {"kind": "zero"}}}}
TEMPLATE = "{{ messages[0].content }}"


@pytest.fixture(scope="module")
def models(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three models; one has two words that the others have not."""
    other = tmp_path_factory.mktemp("models") / "other"
    shutil.copytree(tiny["code"], other)
    tokens = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(tokens.replace('"w7"', '"seven"').replace('"w9"', '"nine"'))
    return {"base": tiny["base"], "math": tiny["math"], "other": other}


def linear(*models: object, base: object = None, **more: Any) -> dict[str, Any]:
    listed = [{"model": str(model), "parameters": {"weight": 0.25 + i}} for i, model in enumerate(models)]
    top = {} if base is None else {"base_model": str(base)}
    return {"merge_method": "linear", **top, "dtype": "float32", "models": listed, **more}


def case_documents(name: str, models: dict[str, Path], first: object) -> list[dict[str, Any]]:
    """The last document of a case, and those between; `first` stands for the stage."""
    math, other = models["math"], models["other"]
    return {
        "the last takes it": [linear(first, math, tokenizer={"source": str(first)})],
        "it is the base": [linear(first, math, base=first, tokenizer_source="base")],
        "a union with it": [linear(math, first, base=math, tokenizer_source="union")],
        "the last has none": [linear(first, base=first)],
        "another model's": [linear(first, other, base=first, tokenizer={"source": str(other)})],
        "a stage between": [
            {"name": "between", **linear(first, base=first)},
            linear("between", first, base=first, tokenizer_source="base"),
        ],
        "a task vector of it": [
            {
                "merge_method": "task_arithmetic",
                "base_model": str(first),
                "models": [{"model": str(math), "parameters": {"weight": 0.5}}],
                "tokenizer": {"source": "base"},
                "dtype": "float32",
            }
        ],
    }[name]


CASES = (
    *("the last takes it", "it is the base", "a union with it", "the last has none"),
    *("another model's", "a stage between", "a task vector of it"),
)
STAGES = {
    "union": {"tokenizer_source": "union"},
    "listed": {"tokenizer": LISTED},
    "padded": {"tokenizer": {"source": "union", "pad_to_multiple_of": 8}},
    "template": {"chat_template": TEMPLATE},
    "both": {"tokenizer_source": "union", "chat_template": TEMPLATE},
}


def save(file: Path, *documents: dict[str, Any]) -> Path:
    file.write_text("---\n".join(yaml.safe_dump(document, sort_keys=False) for document in documents))
    return file


def rows_of_tokens(folder: Path) -> dict[str, int]:
    data = json.loads((folder / "tokenizer.json").read_text())
    return {**data["model"]["vocab"], **{token["content"]: token["id"] for token in data["added_tokens"]}}


def same_folders(one: Path, two: Path) -> None:
    first, second = Checkpoint(one), Checkpoint(two)
    assert list(first.tensors) == list(second.tensors)
    for name in first.tensors:
        assert torch.equal(first.tensor(name), second.tensor(name)), name
    assert first.config == second.config
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        texts = [(folder / file).read_text() if (folder / file).exists() else None for folder in (one, two)]
        assert texts[0] == texts[1], file


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", STAGES)
def test_a_stage_with_its_own_files_is_the_folder_that_it_would_be(
    kind: str, case: str, models: dict[str, Path], tmp_path: Path
) -> None:
    stage = linear(models["base"], models["other"], base=models["base"], **STAGES[kind])
    documents = case_documents(case, models, "first")
    together = save(tmp_path / "together.yaml", {"name": "first", **stage}, *documents)
    by_hand = tmp_path / "first"
    merge_recipe_file(save(tmp_path / "first.yaml", stage), by_hand)
    last = save(tmp_path / "last.yaml", *case_documents(case, models, by_hand))
    try:
        merge_recipe_file(last, tmp_path / "hand")
    except EvomergeError as error:  # rows that differ, and no tokenizer that says which is which
        with pytest.raises(type(error)):
            merge_recipe_file(together, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    else:
        merge_recipe_file(together, tmp_path / "out")
        same_folders(tmp_path / "out", tmp_path / "hand")
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"together.yaml", "first.yaml", "last.yaml", "first", "hand", "out"}


def test_most_of_these_cases_merge(models: dict[str, Path], tmp_path: Path) -> None:
    """Else the test above would compare refusals."""
    merged = 0
    for number, case in enumerate(CASES):
        stage = linear(models["base"], models["other"], base=models["base"], tokenizer_source="union")
        documents = case_documents(case, models, "first")
        file = save(tmp_path / f"{number}.yaml", {"name": "first", **stage}, *documents)
        merge_recipe_file(file, tmp_path / str(number))
        merged += "seven" in rows_of_tokens(tmp_path / str(number))
    assert merged == len(CASES)


def test_a_folder_that_exists_is_refused_before_a_stage_is_merged(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = linear(models["base"], models["other"], base=models["base"], tokenizer_source="union")
    file = save(tmp_path / "r.yaml", {"name": "first", **stage}, linear("first"))
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, tensor: pytest.fail(f"{tensor} was read"))
    with pytest.raises(SetupError, match="out exists"):
        merge_recipe_file(file, tmp_path / "out")


def test_mergekit_multi_makes_the_same_of_a_stage_with_a_tokenizer(
    models: dict[str, Path], tmp_path: Path
) -> None:
    if not MERGEKIT.is_file():
        pytest.skip("there is no mergekit; run scripts/make_mergekit_env")
    stage = linear(models["base"], models["other"], base=models["base"], tokenizer_source="union")
    file = save(
        tmp_path / "r.yaml",
        {"name": "first", **stage},
        linear("first", models["math"], tokenizer={"source": "first"}),
    )
    merge_recipe_file(file, tmp_path / "ours", policy="mergekit")
    words = ["--out-path", str(tmp_path / "theirs"), "-I", str(tmp_path / "stages"), "--quiet"]
    subprocess.run(
        [str(MERGEKIT), str(file), *words], check=True, capture_output=True, timeout=280, env=environment()
    )
    ours, theirs = Checkpoint(tmp_path / "ours"), Checkpoint(tmp_path / "theirs")
    assert set(ours.tensors) == set(theirs.tensors)
    numbers, others = rows_of_tokens(ours.path), rows_of_tokens(theirs.path)
    assert len(numbers) == 66
    assert set(numbers) == set(others)
    for name in ours.tensors:
        one, two = ours.tensor(name), theirs.tensor(name)
        if ours.layout.place(name).layer is None and one.dim() == 2:  # mergekit numbers new tokens by chance
            one = one[[numbers[token] for token in numbers]]
            two = two[[others[token] for token in numbers]]
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
