"""mergekit as an independent witness: runs it on the same recipe in an environment of its own and compares the results."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from evomerge import _yaml
from evomerge.checkpoints import Checkpoint
from evomerge.errors import SetupError

_ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


@dataclass(frozen=True, slots=True)
class Comparison:
    """tensors, elements: compared; unequal: elements that differ; further: those that differ by more than one unit in the
    last place; largest: greatest absolute difference; only: names that one side alone has."""

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


def program(recipe: Path, environment: Path) -> Path:
    """The mergekit command of a virtual environment that merges a recipe. Raises SetupError if there is none."""
    if recipe.suffix == ".json":
        raise SetupError(
            f"mergekit cannot read {recipe}; with --check-against, merge by the recipe.yaml that was exported beside it"
        )
    several = len(_yaml.read_all(recipe)) > 1
    found = environment / "bin" / ("mergekit-multi" if several else "mergekit-yaml")
    if not found.is_file():
        raise SetupError(
            f"{found} is missing; --check-against takes a virtual environment with mergekit 0.1.5 (scripts/make_mergekit_env makes one)"
        )
    return found.absolute()


def against_mergekit(recipe: Path, ours: Path, environment: Path) -> Comparison:
    """Merges the recipe with the mergekit of a virtual environment, into a folder that is removed again, and compares.

    Raises SetupError if there is no mergekit, or if it fails on the recipe.
    """
    command = program(recipe, environment)
    with tempfile.TemporaryDirectory(dir=ours.parent, prefix=".mergekit-") as scratch:
        out = Path(scratch) / "out"
        several = command.name == "mergekit-multi"
        copy = Path(scratch) / "recipe.yaml"
        copy.write_text(
            yaml.safe_dump_all([_absolute(d.data) for d in _yaml.read_all(recipe)], sort_keys=False)
        )
        words = [
            str(command),
            str(copy),
            *(["--out-path", str(out), "-I", f"{scratch}/stages"] if several else [str(out)]),
        ]
        done = subprocess.run([*words, "--quiet"], capture_output=True, text=True, check=False)
        if done.returncode or not (out / "config.json").is_file():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise SetupError(f"mergekit failed on {recipe}: {last[:300]}")
        return compare(Checkpoint(ours), Checkpoint(out))


def _absolute(value: Any) -> Any:
    """The same document with folders by their full path: mergekit takes some relative ones for repositories."""
    if isinstance(value, dict):
        return {key: _absolute(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_absolute(entry) for entry in value]
    return (
        str(Path(value).absolute())
        if isinstance(value, str) and "/" in value and len(value) < 4096 and Path(value).is_dir()
        else value
    )


def compare(one: Checkpoint, other: Checkpoint) -> Comparison:
    """Element by element, over all tensors of two checkpoints."""
    only = tuple(sorted(one.tensors.keys() ^ other.tensors.keys()))
    shared = sorted(one.tensors.keys() & other.tensors.keys())
    elements = unequal = further = 0
    largest = 0.0
    for name in shared:
        a, b = one.tensor(name), other.tensor(name)
        if a.shape != b.shape:
            only += (f"{name} ({list(a.shape)} and {list(b.shape)})",)
            continue
        difference = (a.double() - b.double()).abs()
        unit = _unit(torch.maximum(a.double().abs(), b.double().abs()), [a.dtype, b.dtype])
        elements += a.numel()
        unequal += int((difference != 0).sum())
        further += int((~(difference <= unit)).sum())  # NaN is further
        largest = max(largest, float(difference.max())) if a.numel() else largest
    return Comparison(len(shared), elements, unequal, further, largest, only)


def _unit(size: torch.Tensor, kinds: Sequence[torch.dtype]) -> torch.Tensor:
    """One unit in the last place of numbers of this size, in the coarser of two types."""
    relative = max(_ULP.get(kind, 2.0**-52) for kind in kinds)
    return torch.exp2(torch.floor(torch.log2(size.clamp(min=2.0**-126)))) * relative
