"""Compiles `one_pass.c` on first use with the machine's C compiler and caches it in the user's cache folder.

Optional: without a compiler, or with EVOMERGE_NATIVE=0, everything is done in torch, more slowly, with the
same bits. Nothing here knows what the functions compute.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("one_pass.c")
_FLAGS = (
    "-O3",
    "-march=native",
    "-mprefer-vector-width=512",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp-simd",
)
_LONGEST_VERSION = 10_000  # bytes of what a compiler says of itself
_PLAIN = ("-O3", "-ffp-contract=off", "-fno-math-errno")
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None where there is no compiler or the user wants none."""
    if os.environ.get("EVOMERGE_NATIVE", "1") == "0":
        return None
    compiler = _compiler()
    if compiler is None:
        log.info(
            "no C compiler found: merging in torch, about five times slower; install gcc or clang, or set CC"
        )
        return None
    for flags in (_FLAGS, _PLAIN):
        try:
            return _load(compiler, flags)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            log.debug("%s %s: %s", compiler, " ".join(flags), error)
    log.info(
        "the C compiler %s could not build %s: merging in torch, about five times slower",
        compiler,
        _SOURCE.name,
    )
    return None


def functions() -> ctypes.CDLL:
    """The compiled functions, where `fits` said that they are there."""
    compiled = library()
    assert compiled is not None
    return compiled


def fits(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the library is there and takes these tensors.

    Args:
        tensors: Any; None is taken for a tensor that is not there.

    Returns:
        True if all are on the CPU, contiguous and in a 16- or 32-bit float type.
    """
    return library() is not None and all(t is None or _is_readable(t) for t in tensors)


def pointer(tensor: Tensor | None) -> tuple[ctypes.c_void_p, int]:
    """A tensor as two arguments of a C function; the caller keeps the tensor alive.

    Args:
        tensor: A contiguous tensor on the CPU, or None.

    Returns:
        (address of its data, type code); (NULL, 0) for None; the code is -1 for a type that the library has
        none for.
    """
    if tensor is None:
        return ctypes.c_void_p(None), 0
    return ctypes.c_void_p(tensor.data_ptr()), _TYPES.get(tensor.dtype, -1)


def addresses(tensors: Sequence[Tensor | None]) -> Any:
    """A C array of tensors' addresses; the caller keeps the tensors alive.

    Args:
        tensors: Contiguous tensors on the CPU.

    Returns:
        The array, with NULL for None.
    """
    return (ctypes.c_void_p * len(tensors))(*[None if t is None else t.data_ptr() for t in tensors])


def integers(numbers: Sequence[int]) -> Any:
    """A C array of 32-bit integers.

    Args:
        numbers: Its entries.

    Returns:
        The array.
    """
    return (ctypes.c_int32 * len(numbers))(*numbers)


def floats(numbers: Sequence[float]) -> Any:
    """A C array of 32-bit floats.

    Args:
        numbers: Its entries.

    Returns:
        The array.
    """
    return (ctypes.c_float * len(numbers))(*numbers)


def type_codes(tensors: Sequence[Tensor]) -> Any:
    """A C array of the tensors' type codes.

    Args:
        tensors: In types that the library takes.

    Returns:
        The array.
    """
    return integers([_TYPES[t.dtype] for t in tensors])


def _is_readable(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype in _TYPES and tensor.is_contiguous()


def _compiler() -> str | None:
    """Path of the first C compiler there is: $CC, cc, gcc, clang."""
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        path = shutil.which(name) if name and "\0" not in name else None
        if path:
            return path
    return None


def _load(compiler: str, flags: Sequence[str]) -> ctypes.CDLL:
    """The library for these flags. Raises OSError where it lacks a function."""
    library = ctypes.CDLL(str(_compiled(compiler, flags)))
    for name in re.findall(r"^int (\w+)\(", _SOURCE.read_text(encoding="utf-8"), re.MULTILINE):
        if not hasattr(library, name):
            raise OSError(f"the library has no function {name}")
    return library


def _compiled(compiler: str, flags: Sequence[str]) -> Path:
    """Path of the shared library for this source, compiler and processor; compiled beside and renamed."""
    parts = [_SOURCE.read_text(encoding="utf-8"), _version(compiler), *flags, _processor()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    folder, is_trusted = _cache_folder()
    target = folder / f"one_pass-{key}.so"
    if not (is_trusted and _is_ours_alone(target, stat.S_ISREG)):
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / target.name
            subprocess.run(
                [compiler, *flags, "-shared", "-fPIC", "-o", str(built), str(_SOURCE), "-lm"],
                check=True,
                capture_output=True,
                timeout=120,
            )
            built.chmod(0o700)
            built.replace(target)
    return target


def _cache_folder() -> tuple[Path, bool]:
    """(folder of compiled files, whether nobody else could have written what it holds).

    In the user's cache, where no one else can write there or above; else one for this process.
    """
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        if not home.is_absolute():
            raise PermissionError(f"{home} is no absolute path")
        folder = home / "evomerge"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder = folder.resolve()
        if not all(_is_safe_above(above) for above in folder.parents):
            raise PermissionError(f"others can write above {folder}")
        if folder.stat().st_uid != os.getuid():
            raise PermissionError(f"{folder} belongs to someone else")
        is_trusted = _is_ours_alone(folder, stat.S_ISDIR)
        folder.chmod(0o700)
        return folder, is_trusted
    except (OSError, RuntimeError) as error:  # RuntimeError: no home
        log.debug("no cache of compiled functions: %s", error)
        return Path(_private_folder().name), False


@functools.cache
def _private_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder of this process alone, removed at its end."""
    return tempfile.TemporaryDirectory(prefix="evomerge-")


def _is_ours_alone(path: Path, is_kind: Callable[[int], bool]) -> bool:
    """Whether a file or folder is there, no link, and this user's, and no one else can write it."""
    try:
        status = path.lstat()
    except OSError:
        return False
    has_one_name = stat.S_ISDIR(status.st_mode) or status.st_nlink == 1
    is_closed = status.st_uid == os.getuid() and not status.st_mode & 0o022
    return is_kind(status.st_mode) and has_one_name and is_closed


def _is_safe_above(folder: Path) -> bool:
    """Whether no one but root, this user and his own group can rename what a folder holds."""
    status = folder.stat()
    is_sticky = bool(status.st_mode & stat.S_ISVTX)
    others = 0o002 if status.st_gid == os.getgid() else 0o022
    return status.st_uid in (0, os.getuid()) and (is_sticky or not status.st_mode & others)


def _version(compiler: str) -> str:
    """What a compiler says it is. Raises OSError for one that says nothing, ValueError for no text."""
    done = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=20)
    lines = done.stdout[:_LONGEST_VERSION].decode().splitlines()
    if not lines:
        raise OSError(f"{compiler} --version says nothing")
    return lines[0]


def _processor() -> str:
    """What -march=native depends on: a cache in a shared home must not serve another kind of machine."""
    told_apart_by = ("flags", "Features", "model name", "cpu family")
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(told_apart_by)}))
