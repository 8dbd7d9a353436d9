"""An independent check: mergekit runs the same recipe in an environment of its own, results are compared."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from evomerge import _yaml
from evomerge.checkpoints import Checkpoint
from evomerge.checkpoints.reference import split_reference
from evomerge.errors import ConfigError, SetupError

_LONGEST_PATH = 4096
_ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""One unit in the last place of a type, of the number."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two checkpoints, compared element by element.

    Attributes:
        tensors: Number of tensors compared.
        elements: Number of elements compared.
        unequal: Number of elements that differ.
        further: Number of elements that differ by more than one unit in the last place.
        largest: Greatest absolute difference.
        only: Names that one side alone has, and tensors whose shapes differ.
    """

    tensors: int
    elements: int
    unequal: int
    further: int
    largest: float
    only: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        """Same tensors, and no element further away than one unit in the last place."""
        return not self.only and self.further == 0

    def __str__(self) -> str:
        if self.only:
            return f"{len(self.only)} tensors are on one side alone, such as {self.only[0]}"
        share = self.unequal / max(1, self.elements)
        return (
            f"{self.tensors} tensors, {self.elements:,} elements: {self.unequal:,} differ ({share:.3%}), "
            f"{self.further:,} by more than one unit in the last place; largest difference {self.largest:.3g}"
        )


def find_program(recipe: Path, environment: Path) -> Path:
    """Finds the mergekit command that merges a recipe.

    Args:
        recipe: A mergekit YAML; one of several documents needs mergekit-multi.
        environment: A virtual environment with mergekit 0.1.5.

    Returns:
        The command.

    Raises:
        SetupError: There is no such command, or mergekit cannot read the recipe.
    """
    if recipe.suffix == ".json":
        raise SetupError(
            f"mergekit cannot read {recipe}; with --check-against, merge by the recipe.yaml that was "
            "exported beside it"
        )
    is_multi = len(_yaml.read_all(recipe)) > 1
    program = environment / "bin" / ("mergekit-multi" if is_multi else "mergekit-yaml")
    if not program.is_file():
        raise SetupError(
            f"{program} is missing; --check-against takes a virtual environment with mergekit 0.1.5 "
            "(scripts/make_mergekit_env makes one)"
        )
    return program.absolute()


def run_mergekit(
    program: Path, recipe: Path, out: Path, shown: Path | None = None, in_own_folder: bool = False
) -> None:
    """Merges a recipe with mergekit into a new folder.

    Intermediate merges, and models that mergekit writes for parents with an adapter, are removed again.

    Args:
        program: The command, as `find_program` finds it.
        recipe: The YAML.
        out: Folder to create.
        shown: The recipe that errors name, None for `recipe`.
        in_own_folder: Whether mergekit runs in the recipe's folder, so that paths relative to it are found,
            and offline; else it runs in the current folder and may fetch models.

    Raises:
        SetupError: mergekit fails.
    """
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        stages, adapted = (str(Path(scratch).absolute() / name) for name in ("stages", "adapted"))
        if program.name == "mergekit-multi":
            destination = ["--out-path", str(out.absolute()), "-I", stages]
        else:
            destination = [str(out.absolute())]
        destination += ["--lora-merge-cache", adapted]
        source = recipe.name if in_own_folder else str(recipe.absolute())
        finished = subprocess.run(
            [str(program), source, *destination, "--quiet"],
            cwd=recipe.parent if in_own_folder else None,
            env=os.environ | {"PYTHONSAFEPATH": "1"} | ({"HF_HUB_OFFLINE": "1"} if in_own_folder else {}),
            capture_output=True,
            text=True,
            check=False,
        )
    if finished.returncode or not (out / "config.json").is_file():
        last_line = (finished.stderr.strip().splitlines() or ["no message"])[-1]
        raise SetupError(f"mergekit failed on {shown or recipe}: {last_line[:300]}")


def version(environment: Path) -> str:
    """The version of mergekit in a virtual environment.

    Args:
        environment: The environment.

    Returns:
        Such as '0.1.5'; 'unknown' where it does not say.
    """
    program = "import importlib.metadata as m; print(m.version('mergekit'))"
    try:
        done = subprocess.run(
            [environment / "bin" / "python", "-P", "-c", program], capture_output=True, text=True, check=False
        )
    except OSError:
        return "unknown"
    text = done.stdout.strip()
    return text if done.returncode == 0 and text and text.isprintable() and len(text) < 40 else "unknown"


@contextmanager
def merged_by_mergekit(recipe: Path, beside: Path, environment: Path) -> Iterator[Path]:
    """A context with what mergekit makes of a recipe.

    Args:
        recipe: A mergekit YAML.
        beside: A folder; mergekit's is made beside it and removed again.
        environment: A virtual environment with mergekit 0.1.5.

    Yields:
        mergekit's folder.

    Raises:
        SetupError: There is no mergekit, or it fails on the recipe.
    """
    program = find_program(recipe, environment)
    with tempfile.TemporaryDirectory(dir=beside.parent, prefix=".mergekit-") as scratch:
        out = Path(scratch) / "out"
        copy = Path(scratch) / "recipe.yaml"
        documents = [_with_absolute_folders(document.data) for document in _yaml.read_all(recipe)]
        copy.write_text(yaml.safe_dump_all(documents, sort_keys=False), encoding="utf-8")
        run_mergekit(program, copy, out, shown=recipe)
        yield out


def compare(one: Checkpoint, other: Checkpoint) -> Comparison:
    """Compares two checkpoints element by element, over all tensors.

    Args:
        one: A checkpoint.
        other: Another one.

    Returns:
        The comparison; a NaN counts as further than one unit in the last place from anything.
    """
    only = sorted(one.tensors.keys() ^ other.tensors.keys())
    shared = sorted(one.tensors.keys() & other.tensors.keys())
    elements = unequal = further = 0
    largest = 0.0
    for name in shared:
        a, b = one.tensor(name), other.tensor(name)
        if a.shape != b.shape:
            only.append(f"{name} ({list(a.shape)} and {list(b.shape)})")
            continue
        difference = (a.double() - b.double()).abs()
        unit = _unit(torch.maximum(a.double().abs(), b.double().abs()), [a.dtype, b.dtype])
        elements += a.numel()
        unequal += int((difference != 0).sum())
        further += int((~(difference <= unit)).sum())  # NaN is further
        if a.numel():
            largest = max(largest, float(difference.max()))
    return Comparison(len(shared), elements, unequal, further, largest, tuple(only))


def _with_absolute_folders(value: Any) -> Any:
    """The document with full paths of folders: mergekit takes some relative ones for repositories."""
    if isinstance(value, dict):
        return {key: _with_absolute_folders(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_with_absolute_folders(entry) for entry in value]
    if isinstance(value, str) and "/" in value and len(value) < _LONGEST_PATH:
        return "+".join(_absolute(part) for part in _parts(value))
    return value


def _parts(reference: str) -> list[str]:
    """Model and adapter of a reference; the whole text where it is one folder, or no reference."""
    if Path(reference).is_dir() or "+" not in reference:
        return [reference]
    try:
        parts = split_reference(reference)
    except ConfigError:
        return [reference]
    is_local = parts.revision is None and parts.adapter_revision is None
    return [parts.model, parts.adapter] if is_local and parts.adapter is not None else [reference]


def _absolute(folder: str) -> str:
    return str(Path(folder).absolute()) if Path(folder).is_dir() else folder


def _unit(size: torch.Tensor, types: Sequence[torch.dtype]) -> torch.Tensor:
    """One unit in the last place of numbers of this size, in the coarser of two types."""
    relative = max(_ULP.get(dtype, 2.0**-52) for dtype in types)
    return torch.exp2(torch.floor(torch.log2(size.clamp(min=2.0**-126)))) * relative
