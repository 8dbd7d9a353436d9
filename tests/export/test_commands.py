"""Every command that an export prints or writes is run, of a study with a LoRA parent."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from evomerge.checkpoints import Checkpoint
from evomerge.merging.mergekit_check import compare
from evomerge.store import Store
from evomerge.store.paths import store_path
from tests.support.lora_adapters import adapter, noise
from tests.support.sweeps import sweep
from tests.support.toy import REPO, environment, in_process, zoo_folder

ENVIRONMENT = Path(os.environ.get("EVOMERGE_MERGEKIT_ENV") or REPO / ".venv-mergekit")
MODULE = "base_model.model.model.layers.{}.self_attn.q_proj"
UNRUN = ("vllm serve",)  # vLLM has an environment of its own


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """models/base, models/lora on it, and a finished study of them with an expert."""
    folder = tmp_path_factory.mktemp("with adapter")
    shutil.copytree(zoo_folder() / "base", folder / "models" / "base")
    base = Checkpoint(folder / "models" / "base")
    rows, columns = base.tensors["model.layers.0.self_attn.q_proj.weight"].shape
    tensors = {}
    for layer in range(base.layout.num_layers):
        tensors[f"{MODULE.format(layer)}.lora_A.weight"] = noise(4, columns, seed=layer)
        tensors[f"{MODULE.format(layer)}.lora_B.weight"] = noise(rows, 4, seed=100 + layer)
    adapter(
        folder / "models" / "lora",
        tensors,
        base_model_name_or_path=str(base.path),
        task_type="CAUSAL_LM",
    )
    document = {
        "study": "adapted",
        "models": {
            "base": "models/base",
            "math": str(zoo_folder() / "math"),
            "lora": "models/base+models/lora",
        },
        "base": "base",
        "method": "task_arithmetic",
        "space": {"groups": 1, "components": ["attention"]},
        "tasks": [{"task": "zoo_string"}],
        "evaluation": {"splits": "declared", "items": 8, "validation": 8, "test": 8, "batch_size": 64},
        "search": {"evaluations": 4, "population": 4, "finalists": 1},
    }
    (folder / "search.yaml").write_text(json.dumps(document, indent=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVOMERGE_THREADS", "1")
        patch.chdir(folder)
        code, _, err = in_process("run", "search.yaml", "--root", "results")
    assert code == 0, err
    return folder


def run(command: str, folder: Path) -> None:
    """As a user would, in a shell with the environments of evomerge and mergekit."""
    path = f"{REPO / '.venv' / 'bin'}:{ENVIRONMENT / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=500, check=False,
        env={**environment(), "PATH": path, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"


def commands_in(text: str) -> list[str]:
    """The commands that are printed one a line after 'build it:' and the like."""
    return [
        line.partition(": ")[2] for line in text.splitlines() if re.match(r"(build it|try it|or): ", line)
    ]


@pytest.mark.skipif(
    not (ENVIRONMENT / "bin" / "mergekit-yaml").is_file(), reason="needs scripts/make_mergekit_env"
)
@pytest.mark.parametrize("moved", sweep([False, True], [True]))
def test_every_command_that_an_export_prints_makes_the_model_that_was_scored(
    moved: bool, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a parent too that has moved since, with its adapter."""
    here = tmp_path / "with a space"
    here.mkdir()
    monkeypatch.chdir(here)
    root = project / "results"
    with Store.open(store_path("adapted", root)) as store:
        candidate = f"adapted/{max(trial.id for trial in store.trials() if trial.origin == 'sampled')}"
    given: list[object] = []
    if moved:
        for name in ("base", "lora"):
            shutil.copytree(project / "models" / name, here / "models" / name)
        (project / "models").rename(project / "hidden")
        given = ["--models", "base=models/base", "--models", "lora=models/base+models/lora"]
    try:
        printed = []
        for out, words in (("recipe", []), ("weights", ["--weights"])):
            code, text, err = in_process("export", candidate, out, *words, *given, "--root", root)
            assert code == 0, err
            printed += commands_in(text)
        programs = [re.search(r"evomerge|mergekit-yaml|lm_eval|vllm", command) for command in printed]
        assert [found and found[0] for found in programs] == ["evomerge", "mergekit-yaml", "lm_eval", "vllm"]
        for number, command in enumerate(printed):
            if moved and "lm_eval" in command:
                continue  # it reads the folder alone
            if not command.startswith(UNRUN):
                run(re.sub(r"\bOUT\b", f"OUT{number}", command), here)
        card = re.sub(r"^```.*?^```$", "", (here / "recipe" / "README.md").read_text(), flags=re.S | re.M)
        written = [c for c in re.findall(r"`([^`]+)`", card) if re.match(r"(evomerge|mergekit-\w+) ", c)]
        assert len(written) == 2
        assert written[0] in (here / "recipe" / "recipe.yaml").read_text()
        scored = Checkpoint(here / "weights")
        ours, theirs = Checkpoint(here / "OUT0"), Checkpoint(here / "recipe" / "OUT1")
        assert all(torch.equal(ours.tensor(name), scored.tensor(name)) for name in scored.tensors)
        assert compare(theirs, scored).agrees
        if not moved:
            for step in ("merge", "mergekit", "transformers"):
                run(f"bash commands.sh {step}", here / "recipe")
            made = Checkpoint(here / "recipe" / "model")
            assert all(torch.equal(made.tensor(name), scored.tensor(name)) for name in scored.tensors)
            assert compare(Checkpoint(here / "recipe" / "by-mergekit"), scored).agrees
            lines = (here / "recipe" / "commands.sh").read_text()
            assert written[0].replace("OUT", "by-mergekit") in lines, "the card's command is the script's"
            assert written[1].replace("OUT", "model") in lines
    finally:
        if moved:
            (project / "hidden").rename(project / "models")
