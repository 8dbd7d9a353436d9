"""Recipe files for a cell of the parity matrix: (method, number of parents, types, form, architecture) -> one
YAML.

A file names its models $base, $math, $code and $chat (string.Template). Numbers differ from cell to cell, so
that a matrix tries many of them, and the same cell always gives the same file.
"""

import functools
import itertools
import json
import os
import random
import subprocess
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from evomerge import _yaml
from evomerge.checkpoints import Parent, open_parent, stored_dtype
from evomerge.merging import merge
from evomerge.methods import METHODS, Param
from evomerge.recipes import Mix, Recipe, mergekit_yaml

REPO = Path(__file__).resolve().parents[2]
ENVIRONMENT = Path(os.environ.get("EVOMERGE_MERGEKIT_ENV") or REPO / ".venv-mergekit")
DRIVER = """
import json, sys
import torch, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

torch.set_num_threads(1)
errors = {}
for file, folder, seed in json.load(sys.stdin):
    try:
        config = MergeConfiguration.model_validate(yaml.safe_load(open(file, encoding="utf-8")))
        options = {"lazy_unpickle": True, "quiet": True, "write_model_card": False, "random_seed": seed}
        run_merge(config, folder, MergeOptions(**options))
    except Exception as error:
        errors[folder] = f"{type(error).__name__}: {error}"
print("ERRORS" + json.dumps(errors))
"""
ARCHITECTURES = ("llama", "qwen3", "gemma2", "gpt2", "mixtral", "mixtral fused", "qwen3_moe fused")
"""fused: experts on disk as in transformers 5, one tensor for all of a layer; otherwise as on the hub."""
FORMS = ("whole", "filters", "gradients", "slices")
TYPES = {  # name -> (type of the parents, the file's first lines)
    "float32": ("float32", "dtype: float32"),
    "bfloat16": ("bfloat16", "dtype: bfloat16"),
    "float32 to bfloat16": ("bfloat16", "dtype: float32\nout_dtype: bfloat16"),
    "bfloat16 to float32": ("bfloat16", "dtype: bfloat16\nout_dtype: float32"),
    "stored": ("bfloat16", ""),
    "stored, mixed": ("mixed", "out_dtype: bfloat16"),
}
VARIANTS = (*METHODS, "nuslerp with a base", "multislerp with a base")
PARENTS = ("math", "code", "chat")
_LAYERS = 4
_RANGES = {  # of the values that a cell tries; each is where mergekit is defined
    "weight": (0.2, 1.2),
    "lambda": (0.7, 1.3),
    "density": (0.3, 0.7),
    "gamma": (0.03, 0.08),
    "epsilon": (0.05, 0.2),
    "t": (0.1, 0.9),
    "select_topk": (0.4, 0.9),
    "scale": (0.5, 1.5),
    "r": (0.1, 0.9),
    "alpha": (0.1, 0.9),
}
_FIXED = {"tol": [1e-5], "eps": [1e-8], "max_iter": [10, 3]}
_NEAR = {
    "t": (0.001, 0.02),
    "epsilon": (0.002, 0.01),
}  # of nearswap's t and ram's epsilon: the size of the fine-tunes' changes


@dataclass(frozen=True, order=True)
class Cell:
    """One point of the matrix. variant: a method, or one with its optional base."""

    variant: str
    parents: int
    types: str
    form: str
    architecture: str

    @property
    def method(self) -> str:
        return self.variant.removesuffix(" with a base")

    @property
    def exists(self) -> bool:
        """Whether the method takes so many models."""
        least, most = METHODS[self.method].models
        return least <= self.parents <= most

    @property
    def seed(self) -> int:
        """Of its own, so that deviations of many cells are independent."""
        return zlib.crc32(str(self).encode())

    @property
    def arithmetic(self) -> str:
        """Type of mergekit's arithmetic, or 'stored'."""
        return self.types.split(",")[0].split(" to ")[0]

    @property
    def other_names(self) -> bool:
        """Whether filters see other names: mergekit's are those of transformers 5, in which Mixtral's experts
        are under 'mlp'.
        """
        return self.architecture == "mixtral" and self.form == "filters"

    @property
    def other_unit(self) -> bool:
        """Whether the two merge other tensors: mergekit first makes one of a layer's experts."""
        elementwise = self.method in ("linear", "task_arithmetic", "nearswap", "ram", "passthrough")
        return self.architecture == "mixtral" and not elementwise

    def __str__(self) -> str:
        return f"{self.variant}, {self.parents}, {self.types}, {self.form}, {self.architecture}"


def matrix() -> Iterator[Cell]:
    """Every cell, those that cannot be among them: both main types on all architectures, the other types on
    one.
    """
    for variant, parents, types, form, architecture in itertools.product(
        VARIANTS, (1, 2, 3), TYPES, FORMS, ARCHITECTURES
    ):
        if types in ("float32", "bfloat16") or architecture == "llama":
            yield Cell(variant, parents, types, form, architecture)


def covering(seed: int = 0) -> list[Cell]:
    """Cells in which every pair of values of two dimensions occurs that can; found greedily."""
    cells = [
        c
        for c in (Cell(*p) for p in itertools.product(VARIANTS, (1, 2, 3), TYPES, FORMS, ARCHITECTURES))
        if c.exists
    ]
    random.Random(seed).shuffle(cells)
    pairs = {c: _pairs(c) for c in cells}
    wanted = set().union(*pairs.values())
    chosen = []
    while wanted:
        best = max(random.Random(len(wanted)).sample(cells, 400), key=lambda c: len(pairs[c] & wanted))
        if not pairs[best] & wanted:
            best = max(cells, key=lambda c: len(pairs[c] & wanted))
        wanted -= pairs[best]
        chosen.append(best)
    return chosen


def _pairs(cell: Cell) -> set[tuple[tuple[str, object], ...]]:
    return set(
        itertools.combinations(
            zip(("variant", "parents", "types", "form", "architecture"), astuple(cell), strict=True), 2
        )
    )


class _Plain(yaml.SafeDumper):
    """Writes no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def text(cell: Cell) -> str:
    """The recipe file of a cell."""
    rule, pick = METHODS[cell.method], random.Random(str(cell))
    based = rule.needs_base or cell.variant.endswith("with a base")
    names = PARENTS[: cell.parents]
    whole = {
        p.name: _setting(p, cell, pick)
        for p in rule.params
        if p.per == "merge" and p.name in _RANGES | _FIXED
    }
    whole |= {p.name: pick.random() < 0.5 for p in rule.params if p.flag}
    own = {name: {p.name: _setting(p, cell, pick) for p in rule.params if p.per == "model"} for name in names}
    head: dict[str, Any] = yaml.safe_load(TYPES[cell.types][1]) or {}
    head["merge_method"] = cell.method
    if based:
        head["base_model"] = "$base"
    elif cell.method in (
        "linear",
        "karcher",
    ):  # their base is one of the models; without one mergekit's donor depends on a hash
        head["base_model"] = "$math"
    if whole:
        head["parameters"] = whole
    if cell.form == "slices":
        head["slices"] = [_slice(names, own, based, first, pick) for first in (0, 2)]
    else:
        head["models"] = [_entry(name, own[name]) for name in names]
        if based and pick.random() < 0.5:
            head["models"].insert(0, {"model": "$base"})
    return yaml.dump(head, Dumper=_Plain, sort_keys=False)


def _slice(
    names: Sequence[str], own: dict[str, dict[str, Any]], based: bool, first: int, pick: random.Random
) -> dict[str, Any]:
    """Two layers, from other places in some of the models."""
    sources = []
    for i, name in enumerate([*names, *(["base"] if based else [])]):
        start = (first + pick.randrange(3)) % (_LAYERS - 1) if i else first
        sources.append({**_entry(name, own.get(name, {})), "layer_range": [start, start + 2]})
    return {"sources": sources}


def _entry(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {"model": f"${name}"} | ({"parameters": parameters} if parameters else {})


def _setting(param: Param, cell: Cell, pick: random.Random) -> Any:
    """A number, a list over the depth, or a list of filters; of a kind that the cell's form asks for."""

    def number() -> float:
        if param.name in _FIXED:
            return pick.choice(_FIXED[param.name])
        near = _NEAR.get(param.name) if cell.method in ("nearswap", "ram", "ramplus_tl") else None
        low, high = near or _RANGES[param.name]
        return round(pick.uniform(low, high), 4)

    if param.name in _FIXED or cell.form == "whole":
        return number()
    if cell.form == "gradients" or (cell.form == "slices" and pick.random() < 0.5):
        return [number() for _ in range(pick.randrange(2, 6))]
    if cell.form == "filters":
        values = [("attn", number()), ("mlp", [number(), number()]), ("norm", number())]
        return [*({"filter": name, "value": value} for name, value in values), {"value": number()}]
    return number()


def models(folder: Path, architecture: str, types: str) -> dict[str, Path]:
    """Base and fine-tunes for a cell; built once under the folder."""
    from tests.support.architectures import build

    kind = TYPES[types][0]
    if kind == "mixed":
        plain, wide = (models(folder, architecture, t) for t in ("bfloat16", "float32"))
        return plain | {"base": wide["base"], "code": wide["code"]}
    target = folder / f"{architecture.replace(' ', '-')}-{kind}"
    paths = {n: target / n for n in ("base", *PARENTS)}
    if not target.exists():
        build(target, architecture.removesuffix(" fused"), getattr(torch, kind), tuple(paths))
        for path in paths.values() if architecture.endswith(" fused") else ():
            save_file(fused(tensors(path)), path / "model.safetensors", metadata={"format": "pt"})
    return paths


def start(jobs: Sequence[tuple[Path, Path]], seeds: Sequence[int] = ()) -> "subprocess.Popen[str]":
    """One mergekit process at work on (file, folder) pairs, with seed 7 if none are given; `finish` waits for
    it.
    """
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        raise FileNotFoundError(
            f"there is no mergekit in {ENVIRONMENT}; run scripts/make_mergekit_env (or point "
            "EVOMERGE_MERGEKIT_ENV to one)"
        )
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONHASHSEED": "0",
    }
    process = subprocess.Popen(
        [python, "-W", "ignore", "-c", DRIVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | quiet,
    )
    assert process.stdin is not None
    json.dump(
        [
            (str(file), str(folder), seed)
            for (file, folder), seed in zip(jobs, seeds or [7] * len(jobs), strict=True)
        ],
        process.stdin,
    )
    process.stdin.flush()
    return process


def finish(process: "subprocess.Popen[str]") -> dict[str, str]:
    """Folder -> what mergekit said of it, for those it could not merge."""
    out, _ = process.communicate()
    found = [line.removeprefix("ERRORS") for line in out.splitlines() if line.startswith("ERRORS")]
    if process.returncode or not found:
        raise RuntimeError(f"the mergekit process ended with {process.returncode} and no answer")
    answer: dict[str, str] = json.loads(found[0])
    return answer


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a merged folder, GPT-2's under the hub's names."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return {name.removeprefix("transformer."): tensor for name, tensor in found.items()}


def fused(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors with the experts of a layer as one, under the names of transformers 5; mergekit writes them
    so.
    """
    out: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    for name, tensor in tensors.items():
        name = name.replace("block_sparse_moe", "mlp")
        stem, _, rest = name.partition(".mlp.experts.")
        if not rest or not rest[0].isdigit():
            out[name] = tensor
            continue
        number, which = rest.split(".")[:2]
        which = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(which, which)
        experts.setdefault(stem, {}).setdefault(int(number), {})[which] = tensor
    for stem, of in experts.items():
        rows = [of[i] for i in range(len(of))]
        out[f"{stem}.mlp.experts.gate_up_proj"] = torch.stack(
            [torch.cat([e["gate_proj"], e["up_proj"]]) for e in rows]
        )
        out[f"{stem}.mlp.experts.down_proj"] = torch.stack([e["down_proj"] for e in rows])
    return out


def ulps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Distance in units in the last place: how many numbers of the type lie between, 0 and -0 being one."""
    kind = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}[a.dtype]

    def rank(x: torch.Tensor) -> torch.Tensor:
        bits = x.contiguous().view(kind).long()
        return torch.where(bits < 0, torch.iinfo(kind).min - bits, bits)

    return (rank(a) - rank(b)).abs()


@dataclass(frozen=True)
class Difference:
    """Of two merges.

    worst: most units in the last place; unequal, further: shares of the elements that differ, that differ by
    more than one unit; relative: largest difference, in units of the largest entry of its tensor; widened:
    theirs is in a wider type than ours.
    """

    worst: int
    unequal: float
    further: float
    relative: float
    widened: bool


def difference(ours: Path, theirs: Path) -> Difference:
    """Raises AssertionError if there is a tensor on one side alone, but for GPT-2's causal masks, which
    mergekit drops.
    """
    a = {name: tensor for name, tensor in fused(tensors(ours)).items() if not name.endswith(".attn.bias")}
    b = tensors(theirs)
    assert a.keys() == b.keys(), f"on one side alone: {sorted(a.keys() ^ b.keys())[:5]}"
    worst = unequal = further = total = 0
    relative, widened = 0.0, False
    for name, x in a.items():
        y = b[name]
        assert x.shape == y.shape, f"{name} is {list(x.shape)} and {list(y.shape)}"
        widened |= y.dtype != x.dtype
        distance = ulps(x, y.to(x.dtype))
        worst, total = max(worst, int(distance.max())), total + x.numel()
        unequal, further = unequal + int((distance > 0).sum()), further + int((distance > 1).sum())
        relative = max(
            relative,
            float(
                (x.double() - y.to(x.dtype).double()).abs().max() / y.double().abs().max().clamp(min=1e-30)
            ),
        )
    return Difference(worst, unequal / total, further / total, relative, widened)


def read(file: Path, policy: str) -> tuple[Recipe, dict[str, Parent]]:
    """The recipe of a file, and its models."""
    parent = functools.cache(open_parent)
    recipe = mergekit_yaml.load(
        _yaml.read_all(file), lambda n: parent(n).layout.num_layers, lambda n: stored_dtype(parent(n)), policy
    )
    return recipe, {name: parent(name) for name in recipe.models}


def deviations(cell: Cell, file: Path, theirs: Path, draws: int = 8) -> dict[str, float]:
    """mergekit's one draw of a random method against ours of other seeds: for each measure of the change from
    the base, how many standard deviations of a draw it lies from our mean (Student's t with draws - 1 degrees
    of freedom).
    """
    recipe, opened = read(file, "mergekit")
    drawn = [
        dict(merge.merged_tensors(replace(recipe, seed=seed), opened))
        for seed in range(cell.seed, cell.seed + draws)
    ]
    matrix = (
        flat({name: torch.full_like(tensor, float(tensor.dim() > 1)) for name, tensor in drawn[0].items()})
        > 0
    )
    dense = replace(
        recipe,
        layers=tuple(_dense(m) for m in recipe.layers),
        embeddings=_dense(recipe.embeddings),
        head=_dense(recipe.head),
    )
    whole, b = flat(dict(merge.merged_tensors(dense, opened))), flat(_bases(recipe, opened))
    ours, one = [flat(t) for t in drawn], flat(tensors(theirs))
    found = {}
    for name, measure in {
        "kept": lambda t: (t != b).double().mean(),
        "L1": lambda t: (t - b).abs()[matrix].sum(),  # a vector of 8 entries may lose all of them
        "signs": lambda t: ((t - b).sign() == (whole - b).sign())[t != b].double().mean(),
        "along the whole": lambda t: ((t - b) * (whole - b)).sum(),
    }.items():
        seen = torch.stack([measure(t) for t in ours])
        spread = float(seen.std() * (1 + 1 / draws) ** 0.5) + 1e-4 * float(
            seen.abs().mean()
        )  # rounding, where rescaling leaves nothing to chance
        found[name] = float(measure(one) - seen.mean()) / spread
    return found


def flat(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """All elements in float64, in the order of names, without GPT-2's causal masks."""
    found = fused({name.removeprefix("transformer."): tensor for name, tensor in tensors.items()})
    return torch.cat(
        [found[name].reshape(-1).double() for name in sorted(found) if not name.endswith(".attn.bias")]
    )


def _dense(mix: Mix) -> Mix:
    return replace(
        mix, params=tuple((name, 1.0 if name == "density" else value) for name, value in mix.params)
    )


def _bases(recipe: Recipe, parents: Mapping[str, Parent]) -> dict[str, torch.Tensor]:
    """What a merge that changes nothing gives: the same recipe with lambda 0."""
    none = [
        replace(
            m, params=tuple((name, 0.0 if name == "lambda" else value) for name, value in _dense(m).params)
        )
        for m in recipe.mixes
    ]
    return dict(
        merge.merged_tensors(
            replace(recipe, embeddings=none[0], layers=tuple(none[1:-1]), head=none[-1]), parents
        )
    )


def refused_by_both(cell: Cell, error: str) -> bool:
    """Whether evomerge refuses for what mergekit would: multislerp of equal tensors, here GPT-2's causal
    masks, which mergekit drops.
    """
    return cell.method == "multislerp" and cell.architecture == "gpt2" and "cancel" in error
