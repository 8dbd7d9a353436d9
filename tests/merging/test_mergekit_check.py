"""mergekit as a witness, and the options of the verb merge: one clear line for whatever is wrong, before
anything is merged.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from evomerge.checkpoints import Checkpoint
from evomerge.merging.mergekit_check import compare
from tests.support.lora_adapters import PREFIX, Q, adapter, pair
from tests.support.sweeps import sweep
from tests.support.toy import REPO, in_process

ENVIRONMENT = Path(os.environ.get("EVOMERGE_MERGEKIT_ENV") or REPO / ".venv-mergekit")
UP, HEAD = "model.layers.2.mlp.up_proj.weight", "lm_head.weight"
# elements of a tiny model, counted by hand:
# 2 * 64 * 32 + 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32) + 32
SIZE = 35_104


@pytest.fixture
def recipe(tiny: dict[str, Path], tmp_path: Path) -> Path:
    models = [{"model": str(tiny[m]), "parameters": {"weight": 0.5}} for m in ("base", "math", "code")]
    file = tmp_path / "recipe.yaml"
    file.write_text(
        yaml.safe_dump(
            {"merge_method": "linear", "base_model": str(tiny["base"]), "models": models, "dtype": "bfloat16"}
        )
    )
    return file


# ---- element by element


def changed(path: Path, to: Path, bits: dict[tuple[str, int], int]) -> Checkpoint:
    """A copy with bit patterns of single elements moved up: a step in the last place each."""
    shutil.copytree(path, to)
    tensors = load_file(to / "model.safetensors")
    for (name, at), steps in bits.items():
        tensors[name].view(torch.int16).view(-1)[at] += steps
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint(to)


def test_differences_are_counted_in_steps_of_the_last_place(tiny: dict[str, Path], tmp_path: Path) -> None:
    own = Checkpoint(tiny["math"])
    same = compare(own, own)
    assert (same.tensors, same.elements, same.unequal, same.further, same.largest, same.agrees) == (
        len(own.tensors),
        SIZE,
        0,
        0,
        0.0,
        True,
    )
    near = compare(own, changed(tiny["math"], tmp_path / "near", {(UP, 3): 1, (UP, 9): -1, (HEAD, 0): 1}))
    assert (near.unequal, near.further, near.agrees) == (3, 0, True)
    far = compare(own, changed(tiny["math"], tmp_path / "far", {(UP, 3): 1, (HEAD, 0): 3}))
    assert (far.unequal, far.further, far.agrees) == (2, 1, False)
    moved = [own.tensor(name).view(-1)[at].double() for name, at in ((UP, 3), (HEAD, 0))]
    there = [
        Checkpoint(tmp_path / "far").tensor(name).view(-1)[at].double() for name, at in ((UP, 3), (HEAD, 0))
    ]
    assert far.largest == max(abs(float(a - b)) for a, b in zip(moved, there, strict=True))
    assert f"{SIZE:,} elements: 2 differ" in str(far)
    assert "1 by more than one unit" in str(far)


def test_nan_on_one_side_is_far_and_a_missing_tensor_is_named(tiny: dict[str, Path], tmp_path: Path) -> None:
    own, odd = Checkpoint(tiny["math"]), tmp_path / "nan"
    shutil.copytree(tiny["math"], odd)
    tensors = load_file(odd / "model.safetensors")
    tensors[UP][0, 0] = float("nan")
    save_file(tensors, odd / "model.safetensors", metadata={"format": "pt"})
    assert not compare(own, Checkpoint(odd)).agrees
    tensors = load_file(tiny["math"] / "model.safetensors")
    tensors["extra.weight"] = tensors.pop(HEAD)
    save_file(tensors, odd / "model.safetensors", metadata={"format": "pt"})
    found = compare(own, Checkpoint(odd))
    assert (found.only, found.agrees) == (("extra.weight", HEAD), False)
    assert "2 tensors are on one side alone, such as extra.weight" in str(found)
    tensors[HEAD] = tensors.pop("extra.weight")[:-1].clone()
    save_file(tensors, odd / "model.safetensors", metadata={"format": "pt"})
    assert compare(own, Checkpoint(odd)).only == (f"{HEAD} ([64, 32] and [63, 32])",)


# ---- the verb

WRONG: dict[str, tuple[tuple[str, ...], int, str, str]] = {
    "too little memory": (("--memory", "1K"), 3, "E200", r"more than the 0 MB allowed; raise --memory"),
    "memory that is a word": (
        ("--memory", "plenty"),
        2,
        "E100",
        r"--memory takes a size such as 8G or 500M, got 'plenty'",
    ),
    "memory of nothing": (("--memory", "0"), 2, "E100", r"--memory takes a size"),
    "memory below nothing": (("--memory=-3G",), 2, "E100", r"--memory takes a size"),
    "memory without a number": (("--memory", "G"), 2, "E100", r"--memory takes a size"),
    "memory that is no number": (("--memory", "nan"), 2, "E100", r"--memory takes a size"),
    "memory without end": (("--memory", "inf"), 2, "E100", r"--memory takes a size"),
    "no memory": (("--memory", ""), 2, "E100", r"--memory takes a size"),
    "a policy that is none": (
        ("--policy", "nonsense"),
        2,
        "E110",
        r"unknown arithmetic policy 'nonsense'\. Known: float32, mergekit",
    ),
    "a witness that is none": (
        ("--check-against", "evaluators"),
        3,
        "E200",
        r"evaluators/bin/mergekit-yaml is missing; .*make_mergekit_env",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_option_is_one_line_and_a_code_and_nothing_is_merged(
    case: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, code, name, message = WRONG[case]
    monkeypatch.chdir(REPO)
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, tensor: pytest.fail(f"{tensor} was read"))
    found, out, err = in_process("merge", recipe, tmp_path / "out", *words)
    assert (found, out) == (code, ""), err
    assert re.fullmatch(rf"error\[{name}\] .*{message}.*\n", err), err
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("size", ["1G", "1.5gb", "500 M", "500MiB", "1e6", " 2M "])
def test_sizes_are_read_as_people_write_them(size: str, recipe: Path, tmp_path: Path) -> None:
    code, out, err = in_process("merge", recipe, tmp_path / "out", "--memory", size)
    assert (code, err) == (0, "")
    assert out == f"{tmp_path / 'out'}: merged by {recipe}\n"


def test_a_warning_goes_to_standard_error_and_the_merge_goes_on(
    tiny: dict[str, Path], recipe: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny["math"], tmp_path / "math")
    text = (tmp_path / "math" / "tokenizer.json").read_text()
    (tmp_path / "math" / "tokenizer.json").write_text(text.replace('"w7"', '"seven"'))
    recipe.write_text(recipe.read_text().replace(str(tiny["math"]), str(tmp_path / "math")))
    code, out, err = in_process("merge", recipe, tmp_path / "out")
    assert (code, out) == (0, f"{tmp_path / 'out'}: merged by {recipe}\n")
    assert re.fullmatch(r"warning: the vocabularies of .* differ .*\n", err)


# ---- mergekit itself


@pytest.fixture
def mergekit(monkeypatch: pytest.MonkeyPatch) -> Path:
    if not (ENVIRONMENT / "bin" / "mergekit-yaml").is_file():
        pytest.skip(
            f"there is no mergekit in {ENVIRONMENT}; run scripts/make_mergekit_env (or point "
            "EVOMERGE_MERGEKIT_ENV to where it made one)"
        )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return ENVIRONMENT


@pytest.mark.sweep
def test_mergekit_bears_witness_to_merges_of_merges(
    mergekit: Path, tiny: dict[str, Path], tmp_path: Path
) -> None:
    """Stages in bfloat16. More recipes, through one mergekit process: integration/test_mergekit_parity.py."""
    base = {"base_model": str(tiny["base"]), "dtype": "bfloat16"}
    half = base | {
        "name": "half",
        "merge_method": "slerp",
        "models": [{"model": str(tiny["math"])}],
        "parameters": {"t": 0.5},
    }
    last = base | {
        "merge_method": "task_arithmetic",
        "models": [{"model": "half"}],
        "parameters": {"weight": 0.5},
    }
    file = tmp_path / "stages.yaml"
    file.write_text("---\n".join(map(yaml.safe_dump, (half, last))))
    code, out, err = in_process(
        "merge", file, tmp_path / "out", "--policy", "mergekit", "--check-against", mergekit
    )
    assert code == 0, out + err
    assert out.splitlines()[-1].startswith(f"against mergekit: 39 tensors, {SIZE:,} elements: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "stages.yaml"]


@pytest.mark.parametrize("form", sweep(["text", "relative", "mapping", "stage", "base"], ["mapping"]))
def test_mergekit_bears_witness_to_parents_with_an_adapter(
    form: str, mergekit: Path, tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny["base"], tmp_path / "base")
    lora = adapter(
        tmp_path / "lora",
        pair(Q) | {f"{PREFIX}{Q}.lora_magnitude_vector": torch.ones(32)},
        use_dora=True,
        base_model_name_or_path=str(tiny["base"]),
        task_type="CAUSAL_LM",
    )
    monkeypatch.chdir(tmp_path)
    text = f"{tmp_path}/base+{lora}"
    model: Any = {
        "relative": "./base+./lora",
        "mapping": {"model": {"path": "./base"}, "lora": {"path": str(lora)}},
    }.get(form, text)
    document: dict[str, Any] = {
        "merge_method": "task_arithmetic",
        "base_model": text if form == "base" else "./base",
        "dtype": "float32",
        "out_dtype": "bfloat16",
        "slices": [{"sources": [{"model": model, "layer_range": [0, 4]}], "parameters": {"weight": 0.5}}],
    }
    if form != "base":
        document["slices"][0]["sources"].append({"model": "./base", "layer_range": [0, 4]})
    documents = [document]
    if form == "stage":
        last = {"merge_method": "passthrough", "models": [{"model": "first"}]}
        documents = [{"name": "first", **document}, last]
    file = tmp_path / "recipe.yaml"
    file.write_text("---\n".join(yaml.safe_dump(d, sort_keys=False) for d in documents))
    code, out, err = in_process("merge", file, tmp_path / "out", "--check-against", mergekit)
    assert code == 0, out + err
    compared = (
        rf"against mergekit: 39 tensors, {SIZE:,} elements: .* 0 by more than one unit in the last place"
    )
    assert re.search(compared, out), out  # peft folds DoRA into bfloat16 with roundings between
    changed = [Checkpoint(folder).tensor(f"{Q}.weight") for folder in (tmp_path / "out", tiny["base"])]
    assert not torch.equal(*changed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "lora", "out", "recipe.yaml"]


# ---- a program in mergekit's place


def stand_in(folder: Path, script: str) -> Path:
    """An environment whose mergekit is a shell script; "$2" is the folder that it has to make."""
    program = folder / "env" / "bin" / "mergekit-yaml"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return folder / "env"


def test_a_witness_that_agrees_is_code_zero_and_a_difference_is_code_four(
    tiny: dict[str, Path], recipe: Path, tmp_path: Path
) -> None:
    code, _, err = in_process("merge", recipe, tmp_path / "own")
    assert code == 0, err
    for other, expected, differ in (
        (tmp_path / "own", 0, r"0 differ \(0.000%\), 0"),
        (tiny["math"], 4, r"[1-9][\d,]* differ"),
    ):
        shutil.rmtree(tmp_path / "env", ignore_errors=True)
        witness = stand_in(tmp_path, f'cp -r {other} "$2"')
        out_folder = tmp_path / f"code {expected}"
        code, out, err = in_process("merge", recipe, out_folder, "--check-against", witness)
        assert code == expected
        assert ("is not what mergekit makes of" in err) == (expected == 4), err
        assert re.search(rf"against mergekit: 39 tensors, {SIZE:,} elements: {differ}", out), out
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "code 0",
        "code 4",
        "env",
        "own",
        "recipe.yaml",
    ]


def test_what_mergekit_says_is_passed_on_and_what_it_left_is_removed(recipe: Path, tmp_path: Path) -> None:
    witness = stand_in(tmp_path, 'mkdir -p "$2"\necho wall >&2\necho "ValueError: of frames" >&2\nexit 1')
    code, _, err = in_process("merge", recipe, tmp_path / "out", "--check-against", witness)
    assert (code, err) == (3, f"error[E200] mergekit failed on {recipe}: ValueError: of frames\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["env", "out", "recipe.yaml"]


def test_an_exported_recipe_is_none_that_mergekit_reads(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("{}")
    code, out, err = in_process(
        "merge", tmp_path / "recipe.json", tmp_path / "out", "--check-against", tmp_path
    )
    assert (code, out) == (3, "")
    assert "merge by the recipe.yaml that was exported beside it" in err


def test_a_folder_that_mergekits_roundings_alone_set_apart_is_no_fault(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    """The default arithmetic rounds once, mergekit's at every step: that ended with the code of a bug.

    Its stand-in is the merge by its arithmetic, which integration/test_mergekit_parity.py compares with it.
    """
    document = {
        "merge_method": "task_arithmetic",
        "base_model": str(tiny["base"]),
        "models": [
            {"model": str(tiny[name]), "parameters": {"weight": weight}}
            for name, weight in (("math", 0.7), ("code", -0.6))
        ],
        "dtype": "bfloat16",
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(document))
    code, _, err = in_process("merge", file, tmp_path / "theirs", "--policy", "mergekit")
    assert code == 0, err
    witness = stand_in(tmp_path, f'cp -r {tmp_path / "theirs"} "$2"')
    code, out, err = in_process("merge", file, tmp_path / "out", "--check-against", witness)
    assert (code, err) == (0, ""), out
    first, second = out.splitlines()[-2:]
    found = re.search(r"([\d,]+) by more than one unit", first)
    assert found is not None
    assert int(found[1].replace(",", "")) > 0, "the recipe tells the two arithmetics apart"
    assert second.startswith("with mergekit's types and operations (--policy mergekit): 39 tensors")
    assert ": 0 differ (0.000%)" in second
    assert sorted(path.name for path in tmp_path.iterdir()) == ["env", "out", "recipe.yaml", "theirs"]


def test_random_masks_are_named_where_a_recipe_cannot_be_compared(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    document = {
        "merge_method": "dare_linear",
        "base_model": str(tiny["base"]),
        "models": [{"model": str(tiny["math"]), "parameters": {"weight": 1.0, "density": 0.5}}],
        "dtype": "bfloat16",
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(document))
    witness = stand_in(tmp_path, f'cp -r {tiny["math"]} "$2"')
    code, _, err = in_process("merge", file, tmp_path / "out", "--check-against", witness)
    assert code == 4
    assert "dare_linear draws random masks" in err
    assert (tmp_path / "out" / "model.safetensors").is_file()
