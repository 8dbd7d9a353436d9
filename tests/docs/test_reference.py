"""The documents are complete and built from the code: every key, verb, option and registry entry is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from evomerge.cli.app import app
from evomerge.config.reference import rows
from evomerge.config.stage_kinds import STAGES
from evomerge.evaluation.lm_harness.backends import BACKENDS
from evomerge.methods import METHODS
from evomerge.methods.fused.one_pass import BACKENDS as KERNEL_BACKENDS
from evomerge.optimizers import OPTIMIZERS
from evomerge.workers.registry import POOLS
from tests.support.toy import REPO

DOCS = REPO / "docs"
REFERENCE = DOCS / "reference"


def test_the_generated_pages_are_those_of_the_code() -> None:
    program = [sys.executable, "scripts/docs/generate.py", "--check"]
    checked = subprocess.run(program, cwd=REPO, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_every_key_of_the_search_file_is_documented() -> None:
    text = (REFERENCE / "search-file.md").read_text()
    keys = [row.path for row in rows()]
    assert len(keys) > 80
    assert [key for key in keys if f"| `{key}` |" not in text] == []
    assert [row.path for row in rows() if not row.description] == []


def test_every_verb_and_option_is_documented() -> None:
    text = (REFERENCE / "cli.md").read_text()
    group = typer.main.get_command(app)
    missing = []
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        section = text.partition(f"## evomerge {name}\n")[2].partition("\n## ")[0]
        if not section:
            missing.append(name)
        for parameter in command.params:
            if parameter.param_type_name == "option":
                missing += [f"{name} {o}" for o in parameter.opts if f"`{o}`" not in section]
    assert missing == []


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("methods.md", list(METHODS)),
        ("optimizers.md", list(OPTIMIZERS)),
        ("registries.md", [*STAGES, *BACKENDS, *POOLS, *(backend.name for backend in KERNEL_BACKENDS)]),
    ],
)
def test_every_registry_entry_is_documented(page: str, names: list[str]) -> None:
    text = (REFERENCE / page).read_text()
    assert names
    assert [name for name in names if f"`{name}`" not in text] == []


def test_every_environment_variable_is_documented() -> None:
    text = (REFERENCE / "environment.md").read_text()
    files = [
        *(REPO / "evomerge").rglob("*.py"),
        *(REPO / "scripts" / "cluster").iterdir(),
        REPO / "scripts" / "setup",
    ]
    used = {name for file in files for name in re.findall(r"EVOMERGE_[A-Z_]+[A-Z]", file.read_text())}
    assert len(used) > 8
    assert sorted(name for name in used if f"`{name}`" not in text) == []


def test_every_error_code_is_explained() -> None:
    import evomerge.errors as errors

    text = (DOCS / "troubleshooting.md").read_text()
    classes = [
        c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.EvomergeError)
    ]
    assert len(classes) > 10
    assert [c.code for c in classes if f"| {c.code} | {c.exit_code} |" not in text] == []


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    program = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    built = subprocess.run(program, cwd=REPO, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    assert (tmp_path / "site" / "reference" / "api" / "index.html").stat().st_size > 20_000


def test_pages_name_files_that_exist() -> None:
    pages = [REPO / "README.md", REPO / "CONTRIBUTING.md", REPO / "SECURITY.md", *DOCS.rglob("*.md")]
    pattern = r"`((?:docs|evomerge|evaluators|results|scripts|search_spaces|tests)/[\w./-]+)`"
    made = {"results/demo/report.md", "results/demo/cost.svg"}
    missing = [
        f"{page.name}: {name}"
        for page in pages
        for name in re.findall(pattern, page.read_text())
        if name not in made and not (REPO / name).exists()
    ]
    assert missing == []


def test_the_readme_is_short() -> None:
    lines = (REPO / "README.md").read_text().splitlines()
    assert len(lines) <= 130
