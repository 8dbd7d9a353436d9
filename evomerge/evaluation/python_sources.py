"""What code a Python task is made of: the files of its folder by hash, installed packages by version.

Of the folder that the task's module is imported from, every Python file below it counts, imported or not,
since a function may import at any time. Of packages those count that the task's modules import, followed
through the files of that folder. Reads sources and imports nothing.
"""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path

_INSTALLED = ("site-packages", "dist-packages")


def sources_of(module: str, file: Path) -> dict[str, str]:
    """Describes the code that a module depends on.

    Args:
        module: Its full name.
        file: Its source file.

    Returns:
        File below the folder that the module is imported from, with '/', -> SHA-256; 'python' and each
        installed package that it imports -> version. For an installed module its own package alone.
    """
    file = file.resolve()
    if _is_installed(file):
        return _versions({module.partition(".")[0]})
    root = _import_root(module, file)
    found = {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in _python_files(root)
    }
    found |= {file.relative_to(root).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()}
    outside = _imports_outside(file, root)
    for name in sorted(outside):
        found |= _elsewhere(name, root)
    return dict(sorted((found | _versions(outside)).items()))


def _import_root(module: str, file: Path) -> Path:
    """The folder of sys.path that a module comes from: above its top package."""
    depth = module.count(".") + (file.name == "__init__.py")
    return file.parents[min(depth, len(file.parents) - 1)]


def _is_installed(file: Path) -> bool:
    standard = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")}
    return any(part in _INSTALLED for part in file.parts) or any(map(file.is_relative_to, standard))


def _python_files(root: Path) -> Iterator[Path]:
    """The Python files below a folder, without hidden folders, caches and environments."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith((".", "__pycache__"))
            and name not in (*_INSTALLED, "node_modules")
            and not (Path(folder) / name / "pyvenv.cfg").exists()
        )
        for name in sorted(files):
            path = Path(folder) / name
            if name.endswith(".py") and not name.startswith(".") and path.is_file():
                yield path


def _imports_outside(file: Path, root: Path) -> set[str]:
    """Top names of what a file, and the files of the folder that it imports, import from elsewhere."""
    outside: set[str] = set()
    seen: set[Path] = set()
    waiting = [file]
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        package = path.parent.relative_to(root).parts
        for name in _imported_names(path, package):
            local = list(_local_files(name, root))
            waiting += local
            if not local:
                outside.add(name.partition(".")[0])
    return outside - {""}


def _imported_names(path: Path, package: tuple[str, ...]) -> Iterator[str]:
    """Full names of what a file imports anywhere in it, of `from a import b` both a and a.b."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its syntax
        try:
            tree = ast.parse(path.read_bytes())
        except (
            SyntaxError,
            ValueError,
        ):  # an import will say so, if it ever runs
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            parent = ".".join((*above, *filter(None, (node.module,))))
            names = (f"{parent}.{alias.name}".lstrip(".") for alias in node.names)
            yield from (parent, *names) if parent else names


def _local_files(name: str, root: Path) -> Iterator[Path]:
    """The files of the folder that importing a name reads: packages on the way, and the module."""
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        place = root.joinpath(*parts[:count])
        for path in (place / "__init__.py", place.with_name(f"{place.name}.py")):
            if path.is_file():
                yield path


def _elsewhere(name: str, root: Path) -> dict[str, str]:
    """The files of an imported module that is neither installed nor in the folder, by hash."""
    if name in sys.stdlib_module_names or name == "evomerge":
        return {}
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        return {}
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return {}
    file = Path(spec.origin).resolve()
    if _is_installed(file) or file.is_relative_to(root):
        return {}
    files = _python_files(file.parent) if file.name == "__init__.py" else iter((file,))
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _versions(names: set[str]) -> dict[str, str]:
    """Python, and the installed packages that hold modules of these top names, with their versions."""
    distributions = packages_distributions()
    packages = {package for name in names for package in distributions.get(name, ())}
    return {"python": platform.python_version()} | {package: version(package) for package in packages}
