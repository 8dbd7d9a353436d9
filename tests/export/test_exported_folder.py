"""What lies in an exported folder beside the recipe: read by the tools that it is for."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from evomerge.export.commands import OLLAMA_READS
from tests.support.toy import in_process

STEPS = ("merge", "mergekit", "transformers", "score", "vllm", "ollama", "gguf", "upload")


@pytest.fixture(scope="module")
def folders(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The winner of the finished study as a folder without weights and as one with them."""
    here = tmp_path_factory.mktemp("with a space")
    for name, words in (("recipe", []), ("weights", ["--weights"])):
        code, _, err = in_process("export", "small/best", here / name, *words, "--root", finished)
        assert code == 0, err
    return {name: here / name for name in ("recipe", "weights")}


def test_the_recipe_lies_beside_the_weights_under_the_hubs_name(folders: dict[str, Path]) -> None:
    recipe = (folders["weights"] / "recipe.yaml").read_text()
    assert (folders["weights"] / "mergekit_config.yml").read_text() == recipe
    assert not (folders["recipe"] / "mergekit_config.yml").exists()


@pytest.mark.parametrize("kind", ["recipe", "weights"])
def test_commands_sh_is_a_script_that_says_its_steps(kind: str, folders: dict[str, Path]) -> None:
    script = folders[kind] / "commands.sh"
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    usage = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False)
    assert usage.returncode == 2
    assert usage.stderr == f"usage: bash commands.sh {'|'.join(STEPS)}\n"
    upload = subprocess.run(["bash", str(script), "upload"], capture_output=True, text=True, check=False)
    assert "USER/NAME on the Hub" in upload.stderr


@pytest.mark.parametrize("kind", ["recipe", "weights"])
def test_a_step_names_the_folder_that_the_model_is_in(kind: str, folders: dict[str, Path]) -> None:
    """The words that each program is given, by programs of those names that write them down."""
    fakes = folders[kind].parent / f"fakes-{kind}"
    fakes.mkdir()
    for name in ("vllm", "ollama", "python", "lm_eval"):
        (fakes / name).write_text('#!/bin/sh\nprintf "%s|" "$PWD" "$0" "$@"\necho\n')
        (fakes / name).chmod(0o755)
    expected = folders[kind] if kind == "weights" else folders[kind] / "model"
    told = {}
    for step in ("vllm", "ollama", "gguf", "score"):
        done = subprocess.run(
            ["bash", "commands.sh", step], cwd=folders[kind], capture_output=True, text=True, check=False,
            env={"PATH": f"{fakes}:/usr/bin:/bin", "LLAMA_CPP": "/opt/llama.cpp"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        told[step] = [line.split("|")[2:-1] for line in done.stdout.splitlines()]
    assert told["vllm"][0][0] == "serve"
    assert Path(told["vllm"][0][1]).resolve() == expected.resolve()
    create, run = told["ollama"]
    assert create[:1] + create[2:] == ["create", "-f", "Modelfile"]
    assert run == ["run", create[1]]
    assert re.fullmatch(r"[a-z0-9][a-z0-9._-]*", create[1])
    assert (folders[kind] / told["gguf"][0][1]).resolve() == expected.resolve()
    model = next(word for word in told["score"][0] if word.startswith("pretrained="))
    assert Path(model.removeprefix("pretrained=")).resolve() == expected.resolve()


def test_the_modelfile_names_the_weights_and_the_terms(folders: dict[str, Path]) -> None:
    for kind, source in (("recipe", "./model"), ("weights", ".")):
        lines = (folders[kind] / "Modelfile").read_text().splitlines()
        assert f"FROM {source}" in lines
        assert [line for line in lines if line.startswith('LICENSE """') and line.endswith('"""')]
    config = json.loads((folders["weights"] / "config.json").read_text())
    assert config["architectures"][0] in OLLAMA_READS, "no advice about GGUF is needed"


def test_the_versions_are_requirements_that_pip_reads(folders: dict[str, Path]) -> None:
    facts = json.loads((folders["recipe"] / "lineage.json").read_text())["facts"]["versions"]
    lines = (folders["recipe"] / "environment.txt").read_text().splitlines()
    found = [Requirement(line.partition("#")[0]) for line in lines if not line.startswith("#")]
    pinned = {requirement.name: str(requirement.specifier).removeprefix("==") for requirement in found}
    assert pinned == {name: text.partition("+")[0] for name, text in facts.items() if name != "python"}


def test_the_bibliography_is_bibtex_with_the_methods_paper(folders: dict[str, Path]) -> None:
    text = (folders["recipe"] / "CITATION.bib").read_text()
    entries = re.findall(r"^@\w+\{([^,]+),\n(?:  \w+ = \{.*\},\n)+\}$", text, re.M)
    assert len(entries) == text.count("@")
    assert entries[:1] == ["evomerge"]
    assert len(set(entries)) == len(entries)
    method = json.loads((folders["recipe"] / "lineage.json").read_text())["config"]["method"]
    numbers = {"task_arithmetic": "2212.04089", "linear": "2203.05482"}
    assert f"arxiv-{numbers.get(method, '2403.13257')}" in entries


def test_lineage_names_the_models_with_their_licenses_and_the_search_file(folders: dict[str, Path]) -> None:
    lineage = json.loads((folders["recipe"] / "lineage.json").read_text())
    assert len(lineage["config_sha256"]) == 64
    assert {model["license"] for model in lineage["models"]} == {None}
    assert {model["name"] for model in lineage["models"]} <= set(lineage["facts"]["parents"])
