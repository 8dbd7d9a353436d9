"""The house rules, read from the source: who may import whom, and what every file owes its reader."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.toy import REPO, environment

PACKAGE = REPO / "evomerge"
FILES = sorted(PACKAGE.rglob("*.py"))
FLOORS = {
    "__init__": 0, "errors": 0, "recipe": 0, "documents": 0, "data": 0, "study_files": 0, "tokens": 0, "naming": 0, "schema": 0,
    "attempts": 0, "secrets": 0, "faults": 0, "doctor": 1,
    "methods": 1, "fused": 1, "checkpoint": 1, "headers": 1, "lora": 1, "optimizers": 1, "evaluation": 1, "chat_templates": 1, "scoring": 1,
    "overlap": 1, "stacks": 1, "degrees": 1, "gathering": 1,
    "statistics": 1, "subset_selection": 1,
    "config": 2, "mergekit_yaml": 2, "space": 2, "merge": 2, "resident": 2, "lm_harness": 2, "store": 2, "baselines": 2, "placement": 2,
    "vocabulary": 2, "racing": 2, "python_tasks": 2, "several": 2, "folding": 2, "routing": 2, "expressible": 2, "gate": 2, "hop_space": 3,
    "route_space": 2,
    "folder": 3, "selection": 3, "live": 3, "stages": 3, "worker": 4, "report": 3, "oracle": 3, "sensitivity": 3,
    "comparing": 4, "plots": 4, "reloaded": 3, "route_export": 4, "route_yaml": 5, "route_files": 6,
    "pools": 2, "process_pool": 3, "slots": 3, "ray_pool": 4, "earlier": 3, "dispatch": 3, "generations": 4, "study": 5, "pooling": 5,
    "task_sets": 5, "staging": 6,
    "launch": 7,
    "looking": 8, "planning": 8, "export": 8, "merging": 8,
    "cli": 9,
}  # fmt: skip
SAME_FLOOR = {
    ("recipe", "errors"): "everyone raises our exceptions",
    ("documents", "errors"): "everyone raises our exceptions",
    ("study_files", "errors"): "everyone raises our exceptions",
    ("tokens", "errors"): "everyone raises our exceptions",
    ("checkpoint", "headers"): "a folder's headers are read without torch",
    ("lora", "headers"): "an adapter's files are read as a checkpoint's",
    ("lora", "checkpoint"): "an adapter changes the tensors of a checkpoint",
    ("recipe", "tokens"): "a recipe says what its tokenizer is made of",
    ("merge", "resident"): "a merge into a live model asks where a tensor lands",
    ("merge", "vocabulary"): "a merge of different vocabularies aligns them first",
    ("gathering", "stacks"): "what a config says of a stack's layers",
    ("routing", "folding"): "a routed layer has the weights that its export has",
    ("expressible", "routing"): "a routed module says what it is a stack of",
    ("fused", "methods"): "a method says what it is a sum of",
    ("baselines", "space"): "a hand recipe is a point of a space under another method",
    ("statistics", "evaluation"): "estimates rest on per-item scores",
}
ONE_ROOM = {
    "ray": {"ray_pool"}, "lm_eval": {"lm_harness"}, "sqlite3": {"store"}, "cma": {"optimizers"}, "pydantic": {"config"}, "typer": {"cli"},
    "matplotlib": {"plots"}, "cmaes": {"optimizers"},
}  # fmt: skip
HEAVY = {
    "torch",
    "ray",
    "cma",
    "cmaes",
    "lm_eval",
    "transformers",
    "numpy",
    "pydantic",
    "datasets",
    "safetensors",
    "huggingface_hub",
    "yaml",
    "matplotlib",
}


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path) -> list[tuple[int, str]]:
    """(line, dotted module) of every import in a file, inside functions too; names from the package itself spelled out."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute"
            assert node.module is not None
            if node.module == "evomerge":
                found += [
                    (node.lineno, f"evomerge.{alias.name if alias.name in FLOORS else '__init__'}")
                    for alias in node.names
                ]
            else:
                found.append((node.lineno, node.module))
    return found


def test_every_file_is_in_a_room_of_the_table() -> None:
    assert {room(file) for file in FILES} == set(FLOORS)


def test_a_room_imports_only_from_floors_below() -> None:
    used, wrong = set(), []
    for file in FILES:
        for line, name in imports(file):
            if not name.startswith("evomerge"):
                continue
            own, other = room(file), name.split(".")[1]
            assert other in FLOORS, f"{file}:{line} imports {name}, which is in no room"
            if other == own or FLOORS[other] < FLOORS[own]:
                continue
            used.add((own, other))
            if (own, other) not in SAME_FLOOR or FLOORS[other] > FLOORS[own]:
                wrong.append(
                    f"{file.relative_to(REPO)}:{line}: {own} (floor {FLOORS[own]}) imports {other} (floor {FLOORS[other]})"
                )
    assert not wrong, "\n".join(wrong)
    assert used == set(SAME_FLOOR), "an exception that is no longer needed goes"


@pytest.mark.parametrize("library", ONE_ROOM)
def test_a_library_is_imported_in_its_own_room_alone(library: str) -> None:
    assert {
        room(file) for file in FILES for _, name in imports(file) if name.split(".")[0] == library
    } == ONE_ROOM[library]


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["status", "--help"], []])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = "import sys; sys.argv[0] = 'evomerge'; from evomerge.cli import main; main()"
    program = [sys.executable, "-X", "importtime", "-c", code, *words]
    done = subprocess.run(program, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    loaded = {
        line.rpartition("|")[2].strip().split(".")[0]
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert "Usage" in done.stdout + done.stderr
    assert "typer" in loaded, "the list of imports was read"
    own = (
        {"pydantic"} if len(words) == 2 else set()
    )  # typer's newest releases read a verb's annotations with it
    assert loaded & HEAVY <= own


@pytest.mark.parametrize(
    "modules", ["store", "report", "statistics selection dispatch pools slots", "several sensitivity"]
)
def test_what_reads_a_study_or_schedules_its_work_loads_no_torch(modules: str) -> None:
    listed = ", ".join(f"evomerge.{name}" for name in modules.split())
    code = f"import sys, {listed}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    loaded = set(done.stdout.split())
    assert "evomerge" in loaded
    assert loaded & {"torch", "transformers", "lm_eval", "ray"} == set()


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_a_file_keeps_the_rules(file: Path) -> None:
    text = file.read_text()
    tree = ast.parse(text)
    where = file.relative_to(REPO)
    assert len(text.splitlines()) <= 450, f"{where} has {len(text.splitlines())} lines"
    assert ast.get_docstring(tree) or room(file) == "__init__", f"{where} has no docstring"
    if room(file) != "cli":
        calls = [
            node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        ]
        assert [c.lineno for c in calls if c.func.id == "print"] == [], f"{where} prints"  # type: ignore[attr-defined]
    bare = [f"{where}:{node.lineno} {node.name}" for node in public(tree) if not ast.get_docstring(node)]
    assert not bare, f"without a docstring: {bare}"


def public(tree: ast.Module | ast.ClassDef) -> list[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Public functions and classes, and the public methods of those classes."""
    found: list[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef] = []
    for node in tree.body:
        if isinstance(
            node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        ) and not node.name.startswith("_"):
            found.append(node)
            if isinstance(node, ast.ClassDef):
                found += public(node)
    return found
