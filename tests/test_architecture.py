"""The structure of the repository, read from its source: imports, lengths, docstrings, places of tests."""

from __future__ import annotations

import ast
import gc
import inspect
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support.toy import REPO, environment

PACKAGE = REPO / "evomerge"
PACKAGES = (  # in import order: each imports only from those before it
    *(
        "_escaping",
        "errors",
        "_resources",
        "_redaction",
        "_yaml",
        "_cache_folder",
        "methods",
        "recipes",
        "checkpoints",
        "merging",
    ),
    *("evaluation", "spaces", "optimizers", "workers", "store", "search", "reports", "export"),
    *("config", "launch", "cli"),
)
TOP_LEVEL = ("__init__", "__main__")  # import from any package; only __version__ may be imported from them
PLACES = {  # third-party library -> the only package that imports it
    "ray": "workers/ray_pool",
    "lm_eval": "evaluation/lm_harness",
    "sqlite3": "store",
    "cma": "optimizers",
    "cmaes": "optimizers",
    "pydantic": "config",
    "typer": "cli",
    "matplotlib": "reports",
    "starlette": "reports/dashboard",
    "uvicorn": "reports/dashboard",
}
LIGHT = ("recipes", "evaluation", "optimizers", "workers", "store", "reports", "config")  # load no torch
HEAVY = {
    *("torch", "ray", "cma", "cmaes", "lm_eval", "transformers", "numpy", "pydantic", "datasets"),
    *("safetensors", "huggingface_hub", "yaml", "matplotlib"),
}
TEST_FOLDERS = ("contracts", "docs", "integration", "scripts")  # tests of more than one package
FILE_LINES, FUNCTION_LINES, WIDTH = 450, 60, 110
PRAGMA = re.compile(r"  # (type: ignore|noqa).*$")  # does not count as a part of a line's width
# not yet brought to the rules of length, width and docstrings
PENDING: set[str] = set()

FILES = sorted(PACKAGE.rglob("*.py"))
PROGRAMS = sorted(p for folder in ("evomerge", "tests", "scripts") for p in (REPO / folder).rglob("*.py"))
TEXTS = sorted(
    path
    for folder in ("evomerge", "tests", "scripts", "search_spaces")
    for path in (REPO / folder).rglob("*")
    if path.suffix in (".py", ".c", ".sh", ".yaml", ".toml", ".slurm")
    or (path.parent == REPO / "scripts" and path.suffix == "" and path.is_file())
)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def shown(path: Path) -> str:
    """A path of the repository as it is written in messages and test names."""
    return str(path.relative_to(REPO))


def package_of(file: Path) -> str:
    """'spaces' of evomerge/spaces/weights.py, 'errors' of evomerge/errors.py."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def done(paths: list[Path]) -> list[Path]:
    """The files whose package, or top-level folder outside evomerge, is not pending."""
    return [
        p
        for p in paths
        if (package_of(p) if p.is_relative_to(PACKAGE) else p.relative_to(REPO).parts[0]) not in PENDING
    ]


@pytest.fixture(scope="module", autouse=True)
def no_garbage_collection() -> Iterator[None]:
    """The collector would walk the many nodes of the kept trees again and again, and find nothing."""
    gc.disable()
    yield
    gc.enable()


@cache
def tree_of(file: Path) -> ast.Module:
    """The syntax tree of a file, which the tests only read."""
    return ast.parse(file.read_text())


@cache
def nodes_of(file: Path) -> tuple[ast.AST, ...]:
    """All nodes of a file."""
    return tuple(ast.walk(tree_of(file)))


# ---- imports -----------------------------------------------------------------------------------------------


def module_name(file: Path) -> str:
    """'evomerge.spaces' of evomerge/spaces/__init__.py."""
    return ".".join(file.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(file): file for file in FILES}


def imported(nodes: Iterable[ast.AST], file: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of each import among the nodes; `from package import module` gives the module."""
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"{shown(file)}:{node.lineno}: imports are absolute"
            assert node.level == 0, f"{shown(file)}:{node.lineno}: imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield node.lineno, full if full in MODULES else node.module


@cache
def imports(file: Path) -> tuple[tuple[int, str], ...]:
    """(line, dotted module) of every import of a file, those inside functions included."""
    return tuple(imported(nodes_of(file), file))


def test_the_top_level_is_the_table_of_contents() -> None:
    names = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert names - set(TOP_LEVEL) == set(PACKAGES)


def test_a_package_imports_only_from_those_before_it() -> None:
    order = {name: position for position, name in enumerate(PACKAGES)}
    wrong = []
    for file in FILES:
        package = package_of(file)
        if package in TOP_LEVEL:
            continue
        for line, name in imports(file):
            parts = name.split(".")
            if parts[0] != "evomerge" or parts == ["evomerge"]:
                continue  # `from evomerge import __version__`: every package of that form is spelled out
            if order[parts[1]] > order[package]:
                wrong.append(f"{shown(file)}:{line}: {package} imports {name}, which comes after it")
    assert not wrong, "\n".join(wrong)


def test_from_the_top_level_only_the_version_is_imported() -> None:
    wrong = [
        f"{shown(file)}:{node.lineno}"
        for file in FILES
        if package_of(file) not in TOP_LEVEL
        for node in nodes_of(file)
        if isinstance(node, ast.ImportFrom) and node.module == "evomerge"
        for alias in node.names
        if alias.name != "__version__" and f"evomerge.{alias.name}" not in MODULES
    ]
    assert not wrong


def module_level_imports(file: Path) -> set[str]:
    """Modules of ours that are loaded as a file is: their packages' faces too, its own package's excepted."""
    loaded = set()
    for _, name in imported(tree_of(file).body, file):
        parts = name.split(".")
        loaded |= {".".join(parts[:n]) for n in range(2, len(parts) + 1)}
    module = module_name(file)
    return {name for name in loaded if name in MODULES and not f"{module}.".startswith(f"{name}.")}


def test_no_two_modules_import_each_other() -> None:
    """Modules that import no other remaining module are removed one by one; what remains is circles."""
    left = {name: module_level_imports(file) for name, file in MODULES.items()}
    while leaves := {name for name, others in left.items() if not others & left.keys()}:
        left = {name: others for name, others in left.items() if name not in leaves}
    assert not left, {name: sorted(others & left.keys()) for name, others in left.items()}


@pytest.mark.parametrize("library", PLACES)
def test_a_third_party_library_is_imported_in_one_package(library: str) -> None:
    importers = {file for file in FILES for _, name in imports(file) if name.split(".")[0] == library}
    assert importers, f"nothing imports {library}"
    outside = [shown(f) for f in importers if not f.is_relative_to(PACKAGE / PLACES[library])]
    assert not outside


def loaded_after(code: str, *words: str) -> set[str]:
    """Top-level names of sys.modules after a program, which may end by itself."""
    report = "atexit.register(lambda: print('LOADED', *{n.split('.')[0] for n in sys.modules}))"
    whole = f"import atexit, sys\n{report}\n{code}"
    finished = subprocess.run(
        [sys.executable, "-c", whole, *words],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    lines = finished.stdout.splitlines()
    assert lines, finished.stderr
    assert lines[-1].startswith("LOADED "), finished.stderr
    usage = {"usage shown"} if "Usage" in finished.stdout + finished.stderr else set()
    return set(lines[-1].split()[1:]) | usage


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["status", "--help"], []])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    loaded = loaded_after("sys.argv[0] = 'evomerge'; from evomerge.cli import main; main()", *words)
    assert {"usage shown", "typer"} <= loaded
    allowed = {"pydantic"} if len(words) == 2 else set()  # newest releases of typer read annotations with it
    assert loaded & HEAVY <= allowed


def test_packages_that_need_no_torch_load_none() -> None:
    """So `status`, `show` and everything that only reads a study start at once."""
    code = f"""
import importlib
for package in {LIGHT}:
    importlib.import_module("evomerge." + package)
    heavy = {{"torch", "transformers", "lm_eval", "ray"}} & sys.modules.keys()
    assert not heavy, f"{{package}} loads {{heavy}}"
"""
    assert "evomerge" in loaded_after(code)


# ---- length, width, docstrings -----------------------------------------------------------------------------


def functions(file: Path) -> list[Function]:
    """Every function of a file, methods and inner functions included."""
    return [node for node in nodes_of(file) if isinstance(node, Function)]


def length(function: Function) -> int:
    """Lines of a function without its docstring."""
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = (
        (first.end_lineno or 0) - first.lineno + 1 if documented and ast.get_docstring(function) else 0
    )
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


def test_a_line_is_at_most_110_columns() -> None:
    wrong = [
        f"{shown(file)}:{number}: {len(line)} columns"
        for file in done(TEXTS)
        for number, raw in enumerate(file.read_text().splitlines(), 1)
        if len(raw) > WIDTH and len(line := PRAGMA.sub("", raw)) > WIDTH
    ]
    assert not wrong, "\n".join(wrong)


def test_a_function_is_at_most_60_lines() -> None:
    wrong = [
        f"{shown(file)}:{f.lineno} {f.name}: {length(f)} lines"
        for file in done(PROGRAMS)
        for f in functions(file)
        if length(f) > FUNCTION_LINES
    ]
    assert not wrong, "\n".join(wrong)


def test_a_file_is_described_and_is_short() -> None:
    wrong = [f"{shown(file)} has no docstring" for file in FILES if not ast.get_docstring(tree_of(file))]
    counts = {file: len(file.read_text().splitlines()) for file in done(FILES)}
    wrong += [f"{shown(file)} has {count} lines" for file, count in counts.items() if count > FILE_LINES]
    assert not wrong, "\n".join(wrong)


def test_only_the_command_line_prints() -> None:
    wrong = [
        f"{shown(file)}:{node.lineno}"
        for file in FILES
        if package_of(file) != "cli"
        for node in nodes_of(file)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not wrong, "\n".join(wrong)


def test_everything_public_has_a_docstring() -> None:
    wrong = [
        f"{shown(file)}:{node.lineno} {node.name}"
        for file in FILES
        for _, node in public(tree_of(file))
        if not ast.get_docstring(node)
    ]
    assert not wrong, "\n".join(wrong)


def test_a_docstring_names_the_arguments_and_what_is_returned() -> None:
    verbs, wrong = verbs_of_the_command_line(), []
    for file in done(FILES):
        for owner, node in public(tree_of(file)):
            if isinstance(node, Function) and not (package_of(file) == "cli" and node.name in verbs):
                wrong += [
                    f"{shown(file)}:{node.lineno} {node.name}: {fault}" for fault in faults(node, owner)
                ]
    assert not wrong, "\n".join(wrong)


def verbs_of_the_command_line() -> set[str]:
    """Functions whose docstring is a help text, and whose options describe themselves."""
    from evomerge.cli.app import app

    return {c.callback.__name__ for c in app.registered_commands if c.callback}


def public(tree: ast.Module | ast.ClassDef, owner: str = "") -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """(its class, node) of public functions, public classes and the public methods of those classes."""
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield owner, node
            if isinstance(node, ast.ClassDef):
                yield from public(node, node.name)


def faults(function: Function, owner: str) -> Iterator[str]:
    """What the docstring of a function, or of a method of the class `owner`, lacks."""
    decorators = {ast.unparse(d).split("(")[0].rpartition(".")[2] for d in function.decorator_list}
    if decorators & {"property", "cached_property", "overload", "setter", "command", "callback"}:
        return  # a docstring of a command is its help text
    given = function.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    names += [a.arg for a in (given.vararg, given.kwarg) if a]
    if owner and names and "staticmethod" not in decorators:
        names = names[1:]
    docstring = inspect.cleandoc(ast.get_docstring(function) or "")
    if not names or re.search(r"See `[\w.]+`[.:]", docstring):  # it implements a documented protocol
        return
    described = described_arguments(docstring)
    for name in names:
        if name not in described:
            yield f"'{name}' is not in its Args section"
    nothing = function.returns is not None and ast.unparse(function.returns) in ("None", "NoReturn", "Never")
    if not nothing and not re.search(r"^(Returns|Yields):$", docstring, re.MULTILINE):
        yield "has no section Returns"


def described_arguments(docstring: str) -> set[str]:
    """Names before the colons of the section Args; 'x, y: ...' describes two."""
    section = re.search(r"^Args:\n((?:(?:[ ].*)?(?:\n|$))+)", docstring, re.MULTILINE)
    if section is None:
        return set()
    heads = re.findall(r"^ {4}([\w*, ]+?)(?: \([^)]*\))?:", section[1], re.MULTILINE)
    return {name.strip(" *") for head in heads for name in head.split(",")}


# ---- tests -------------------------------------------------------------------------------------------------


def test_tests_are_where_their_package_is() -> None:
    wrong = []
    for file in sorted((REPO / "tests").rglob("test_*.py")):
        folder = file.parent.relative_to(REPO / "tests")
        if folder.parts and folder.parts[0] not in TEST_FOLDERS and not (PACKAGE / folder).is_dir():
            wrong.append(f"{shown(file)}: evomerge/{folder} is no package")
    assert not wrong, "\n".join(wrong)


@pytest.mark.skipif("tests" in PENDING, reason="helpers of several test files are not yet in tests/support")
def test_tests_import_no_other_test_file() -> None:
    wrong = [
        f"{shown(file)}:{line} imports {name}"
        for file in sorted((REPO / "tests").rglob("*.py"))
        for line, name in imports(file)
        if name.startswith("tests.") and name.rpartition(".")[2].startswith("test_")
    ]
    assert not wrong, "\n".join(wrong)
