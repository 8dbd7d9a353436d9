"""LoRA adapters as parents: a base checkpoint whose tensors are read with the adapter folded in, one at a time.

W + s (B A), in float32 and rounded once to the type of W; s = alpha / r, or alpha / sqrt(r) with rank-stabilised scaling.

References: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1.
Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv:2312.03732.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from evomerge.checkpoints import safetensors_headers
from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.checkpoints.parent import Parent, equal
from evomerge.checkpoints.safetensors_headers import TensorInfo
from evomerge.errors import CheckpointError

_PREFIX = "base_model.model."
_PAIRS = {
    ".lora_A.weight": ".lora_B.weight",
    ".lora_embedding_A": ".lora_embedding_B",
}  # endings of A's and B's names
_REFUSED = {  # a config entry that is set -> what it is
    "use_dora": "DoRA",
    "target_parameters": "LoRA on parameters that are no layers",
    "trainable_token_indices": "trained rows of an embedding",
    "layer_replication": "a stack with repeated layers",
    "lora_bias": "a bias inside the adapter",
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "activated LoRA, which no weights can express",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "a mixture of adapters",
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA",
}
_PLAIN_STARTS = (
    None,
    True,
    False,
    "gaussian",
    "eva",
    "orthogonal",
)  # the others change the base's weights on loading


@dataclass(frozen=True, slots=True)
class _Change:
    """What an adapter does to one base tensor: replace it, then add scale (B A), transposed or not. Fields: adapter's tensor names."""

    whole: str | None
    a: str | None
    b: str | None
    scale: float
    transposed: bool


class AdaptedCheckpoint:
    """A checkpoint with a LoRA adapter folded in as its tensors are read. The same interface as a Checkpoint."""

    def __init__(self, base: Checkpoint, adapter_dir: Path) -> None:
        """Reads headers only. Raises CheckpointError for an adapter that does not fit the base, or that is more than LoRA."""
        self.adapter = adapter_dir
        self._base = base
        file = adapter_dir / "adapter_model.safetensors"
        if not file.exists() and (adapter_dir / "adapter_model.bin").exists():
            raise CheckpointError(
                f"{adapter_dir} has adapter_model.bin only, a pickle; load it with peft and save it with save_pretrained"
            )
        rule = _Rule(adapter_dir / "adapter_config.json")
        self._changes = _plan(base, safetensors_headers.read(file), rule, file)
        try:
            self._file: Any = safe_open(file, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} is not a readable safetensors file ({' '.join(str(error).split())}); save it again"
            ) from None
        # an adapter changes values alone: all that names and headers say is the base's
        self.path, self.config, self.tensors = base.path, base.config, base.tensors
        self.num_layers, self.stack, self.dtype = base.num_layers, base.stack, base.dtype
        self.nbytes, self.largest = base.nbytes, base.largest
        self.place, self.layer_name = base.place, base.layer_name
        self.layer_suffixes, self.outer_names = base.layer_suffixes, base.outer_names

    @property
    def files(self) -> tuple[Path, ...]:
        """The base's files and the adapter's."""
        return (*self._base.files, self.adapter / "adapter_model.safetensors")

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the base's tensors that the adapter changes, sorted."""
        return tuple(sorted(self._changes))

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name with the adapter folded in; the base's own where the adapter leaves it alone."""
        weight = self._base.tensor(name)
        change = self._changes.get(name)
        if change is None:
            return weight
        start = self._read(change.whole) if change.whole else weight
        if change.a and change.b:
            wide = torch.promote_types(weight.dtype, torch.float32)
            a, b = self._read(change.a).to(wide), self._read(change.b).to(wide)  # [r, in], [out, r]
            left, right = (a.T, b.T) if change.transposed else (b, a)
            start = torch.addmm(start.to(wide), left, right, alpha=change.scale)
        return start.to(weight.dtype)

    def _read(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def content_hash(self) -> str:
        """SHA-256 over the base, the adapter's tensors and what the adapter's config makes of them."""
        changes = [
            (name, c.whole, c.a, c.b, c.scale, c.transposed) for name, c in sorted(self._changes.items())
        ]
        digest = hashlib.sha256((self._base.content_hash() + json.dumps(changes)).encode())
        with (self.adapter / "adapter_model.safetensors").open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    def equal_tensors(self, other: Parent) -> Iterator[str]:
        """Names of the tensors that are the same, bit for bit, in both."""
        return equal(self, other)


class _Rule:
    """adapter_config.json, checked: a module's rank and scale, and which modules were trained whole."""

    def __init__(self, file: Path) -> None:
        data = safetensors_headers.json_object(file, "give the folder of a LoRA adapter, which has one")
        self.file = file
        kind = data.get("peft_type")
        if kind != "LORA":
            raise CheckpointError(
                f"{file}: peft_type is {kind!r:.60}; only LORA can be folded into a base, so merge the adapter with peft first"
            )
        for key, what in _REFUSED.items():
            if data.get(key):
                raise CheckpointError(
                    f"{file} sets {key} ({what}), which cannot be folded in as plain LoRA; merge the adapter with peft first"
                )
        start = data.get("init_lora_weights")
        if not any(start is plain or (isinstance(start, str) and start == plain) for plain in _PLAIN_STARTS):
            raise CheckpointError(
                f"{file}: init_lora_weights is {start!r:.60}, which changes the base's weights as it loads; merge the adapter with peft first"
            )
        if data.get("bias", "none") not in ("none", "lora_only", "all"):
            raise CheckpointError(
                f"{file}: bias must be none, lora_only or all, got {data['bias']!r:.60}; save the adapter again"
            )
        self.stable = bool(data.get("use_rslora"))
        self.rank, self.alpha = (
            _number(data.get("r", 8), "r", file),
            _number(data.get("lora_alpha", 8), "lora_alpha", file),
        )
        self.ranks, self.alphas = (
            _patterns(data, "rank_pattern", file),
            _patterns(data, "alpha_pattern", file),
        )
        saved = data.get("modules_to_save") or []
        if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
            raise CheckpointError(f"{file}: modules_to_save must be a list of names, got {saved!r:.60}")
        self.saved: list[str] = saved

    def scale(self, module: str, rank: int) -> float:
        """Factor of B A in a module whose A has `rank` rows."""
        said = _by_pattern(self.ranks, module, self.rank)
        if said != rank:
            raise CheckpointError(
                f"{self.file} gives {module} the rank {said:g}, its tensors have {rank}; save the adapter again"
            )
        return _by_pattern(self.alphas, module, self.alpha) / (math.sqrt(rank) if self.stable else rank)


def _plan(base: Checkpoint, tensors: Mapping[str, TensorInfo], rule: _Rule, file: Path) -> dict[str, _Change]:
    """Base tensor -> what the adapter does to it. Every tensor of the adapter is used, or it is refused."""
    changes: dict[str, _Change] = {}
    left = dict(tensors)
    inputs_first = _keeps_inputs_first(base)
    for name, info in tensors.items():
        if info.dtype not in ("F64", "F32", "F16", "BF16"):
            raise CheckpointError(
                f"{file} holds '{name}' as {info.dtype}; an adapter is floating point, save it again"
            )
        ending = next((ending for ending in _PAIRS if name.endswith(ending)), None)
        if ending is None:
            continue
        stem = name.removesuffix(ending)
        b = left.pop(stem + _PAIRS[ending], None)
        a = left.pop(name)
        if b is None:
            raise CheckpointError(
                f"{file} has '{name}' without its '{_PAIRS[ending].strip('.')}'; save the adapter again"
            )
        module = stem.removeprefix(_PREFIX)
        target = _target(base, module + ".weight", name, file)
        transposed = _fit(
            base, target, a.shape, b.shape, ending == ".lora_embedding_A", inputs_first, f"'{stem}' of {file}"
        )
        if target in changes:
            raise CheckpointError(
                f"{file} changes '{target}' twice, by '{changes[target].a}' and '{name}'; save the adapter again"
            )
        changes[target] = _Change(
            None, name, stem + _PAIRS[ending], rule.scale(module, a.shape[0]), transposed
        )
    for name in left:
        plain = name.removeprefix(_PREFIX)
        module = plain.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        target = _target(base, module, name, file)
        if tensors[name].shape != base.tensors[target].shape:
            raise _misfit(f"'{name}' of {file} is {list(tensors[name].shape)}", base, target)
        before = changes.get(target, _Change(None, None, None, 0.0, False))
        if before.whole is not None:
            raise CheckpointError(f"{file} has both '{before.whole}' and '{name}'; save the adapter again")
        changes[target] = _Change(name, before.a, before.b, before.scale, before.transposed)
        owner = module.rpartition(".")[0]
        if _is_tied(base, target) and any(
            owner == saved or owner.endswith("." + saved) for saved in rule.saved
        ):
            raise CheckpointError(
                f"{file} replaces '{target}', which base {base.path} shares with its head; untie the base first"
            )
    return changes


def _target(base: Checkpoint, wanted: str, name: str, file: Path) -> str:
    """The base's tensor that a name inside the adapter's model means.

    A checkpoint of the bare decoder lacks the first word of the name, an adapter of the bare decoder lacks the base's.
    """
    for candidate in (wanted, wanted.partition(".")[2], f"{base.stack.split('.')[0]}.{wanted}"):
        if candidate in base.tensors:
            return candidate
    raise CheckpointError(
        f"'{name}' of {file} matches no tensor of base {base.path}; give the base that the adapter was trained on"
    )


def _fit(
    base: Checkpoint,
    target: str,
    a: tuple[int, ...],
    b: tuple[int, ...],
    embedding: bool,
    inputs_first: bool,
    what: str,
) -> bool:
    """Whether A [r, in] and B [out, r] fit a base tensor transposed, [in, out]; raises CheckpointError where they do not fit at all."""
    shape = base.tensors[target].shape
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] == 0 or shape not in ((b[0], a[1]), (a[1], b[0])):
        raise _misfit(f"{what} has A {list(a)} and B {list(b)}", base, target)
    if embedding and shape != (a[1], b[0]):
        raise _misfit(f"{what} has A {list(a)} and B {list(b)}", base, target)
    if embedding or a[1] != b[0]:
        return embedding or shape == (a[1], b[0])
    return inputs_first and base.place(target).part == "layer"


def _keeps_inputs_first(base: Checkpoint) -> bool:
    """Whether the stack's weights are [in, out], as GPT-2's: some oblong weight has a bias as long as its columns.

    A square weight does not show it, and an adapter's fan_in_fan_out may be wrong: peft goes by the layer's class.
    """
    for name, info in base.tensors.items():
        bias = base.tensors.get(name.removesuffix("weight") + "bias")
        if (
            name.startswith(base.stack + ".")
            and name.endswith(".weight")
            and len(info.shape) == 2
            and bias
            and info.shape[0] != info.shape[1]
        ):
            return bias.shape == info.shape[1:]
    return False


def _is_tied(base: Checkpoint, target: str) -> bool:
    """Whether a tensor outside the stack is embedding and head at once: no other one has its shape."""
    shape = base.tensors[target].shape
    if len(shape) != 2 or base.place(target).part == "layer":
        return False
    return (
        sum(
            base.tensors[name].shape == shape
            for name in (*base.outer_names("embeddings"), *base.outer_names("head"))
        )
        == 1
    )


def _misfit(what: str, base: Checkpoint, target: str) -> CheckpointError:
    shape = list(base.tensors[target].shape)
    return CheckpointError(
        f"{what}, '{target}' of base {base.path} is {shape}; give the base that the adapter was trained on"
    )


def _number(value: Any, name: str, file: Path) -> float:
    if type(value) not in (int, float) or not 0 < value < 1e9:
        raise CheckpointError(
            f"{file}: {name} must be a positive number, got {value!r:.60}; save the adapter again"
        )
    return float(value)


def _patterns(data: Mapping[str, Any], name: str, file: Path) -> list[tuple[re.Pattern[str], float]]:
    """(expression that ends a module's name, number), in the file's order: the first that fits counts."""
    given = data.get(name) or {}
    if not isinstance(given, dict):
        raise CheckpointError(
            f"{file}: {name} must be an object, got {type(given).__name__}; save the adapter again"
        )
    try:
        return [
            (re.compile(rf"(?:.*\.)?(?:{text})$"), _number(value, name, file))
            for text, value in given.items()
        ]
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(
            f"{file}: {name} has a key that is no regular expression ({error}); save the adapter again"
        ) from None


def _by_pattern(patterns: list[tuple[re.Pattern[str], float]], module: str, default: float) -> float:
    return next((value for pattern, value in patterns if pattern.match(module)), default)
