"""Compiles the files in C beside this one on first use with the machine's C compiler, into the user's cache.

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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evomerge import _cache_folder

Array = np.ndarray[Any, np.dtype[Any]]
log = logging.getLogger(__name__)
_SOURCES = tuple(Path(__file__).with_name(name) for name in ("one_pass.c", "rows.c", "tables.c"))
_HEADER = Path(__file__).with_name("elements.h")
_FLAGS = (
    "-O3",
    "-march=native",
    "-mprefer-vector-width=512",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp-simd",
)
_LEAST_SPAN = 1 << 18  # elements that are worth a thread of their own
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
        " and ".join(source.name for source in _SOURCES),
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


def span(start: int, stop: int) -> tuple[object, object]:
    """Elements [start, stop) as two arguments of a C function.

    Args:
        start: First element.
        stop: The element after the last.

    Returns:
        Two 64-bit integers.
    """
    return ctypes.c_int64(start), ctypes.c_int64(stop)


def address(array: Array) -> ctypes.c_void_p:
    """Address of an array's data; the caller keeps the array alive.

    Args:
        array: A contiguous array.

    Returns:
        The address.
    """
    return ctypes.c_void_p(array.ctypes.data)


def span_of(n: int) -> int:
    """Elements that a thread takes, where every thread takes its part.

    Args:
        n: Number of elements.

    Returns:
        n by the number of torch's threads; no fewer than are worth a thread.
    """
    return max(_LEAST_SPAN, -(-n // torch.get_num_threads()))


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
    text = "".join(source.read_text(encoding="utf-8") for source in _SOURCES)
    for name in re.findall(r"^int (\w+)\(", text, re.MULTILINE):
        if not hasattr(library, name):
            raise OSError(f"the library has no function {name}")
    return library


def _compiled(compiler: str, flags: Sequence[str]) -> Path:
    """Path of the shared library for this source, compiler and processor; compiled beside and renamed."""
    texts = [source.read_text(encoding="utf-8") for source in (*_SOURCES, _HEADER)]
    parts = [*texts, _version(compiler), *flags, _processor()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    folder, is_trusted = _cache_folder.ours()
    target = folder / f"one_pass-{key}.so"
    if not (is_trusted and _cache_folder.is_ours_alone(target, stat.S_ISREG)):
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / target.name
            subprocess.run(
                [compiler, *flags, "-shared", "-fPIC", "-o", str(built), *map(str, _SOURCES), "-lm"],
                check=True,
                capture_output=True,
                timeout=300,
            )
            built.chmod(0o700)
            built.replace(target)
    return target


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
