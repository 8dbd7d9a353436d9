"""LoRA adapters as parents: a base checkpoint whose tensors are read with the adapter folded in.

W + s (B A), in float32 and rounded once to the type of W; s = alpha / r, or alpha / sqrt(r) with
rank-stabilised scaling. With DoRA, what feeds each output (a row of a linear layer's weight) is then scaled
to the length that was trained for it.

An adapter that trains the head of a base whose head is its embeddings has learned the two apart: the parent
has a head of its own then, and its config says so.

References:
    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1.
    Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv:2312.03732.
    Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353, section 4.1.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from evomerge.checkpoints import safetensors_headers
from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.checkpoints.layout import Layout, layout_of
from evomerge.checkpoints.lora_config import LoraConfig
from evomerge.checkpoints.parent import Parent
from evomerge.checkpoints.safetensors_headers import TensorInfo
from evomerge.errors import CheckpointError

_PREFIX = "base_model.model."
_MAGNITUDES = (".lora_magnitude_vector", ".lora_magnitude_vector.weight")
HEAD = "lm_head.weight"
"""Name of the output head that is written where an adapter unties it from the embeddings."""
_BARE = ("layers", "h", "blocks")  # stacks of decoders without their language model
_PAIRS = {  # ending of the name of an A -> ending of the name of its B
    ".lora_A.weight": ".lora_B.weight",
    ".lora_embedding_A": ".lora_embedding_B",
}


@dataclass(frozen=True, slots=True)
class LowRank:
    """A difference of two tensors as left @ right, in float32.

    Attributes:
        left: [out, r], scaled.
        right: [r, in].
    """

    left: Tensor
    right: Tensor


@dataclass(frozen=True, slots=True)
class _Change:
    """What an adapter does to one base tensor: replace it, then add scale (B A), transposed or not.

    replacement, a, b and magnitude are names of the adapter's tensors; magnitude: of the lengths that the
    weights of each output are scaled to in the end.
    """

    replacement: str | None
    a: str | None
    b: str | None
    scale: float
    transposed: bool
    magnitude: str | None = None


@dataclass(frozen=True, slots=True)
class _Pair:
    """A [r, in] and B [out, r] of one module.

    stem: what their names share; is_embedding: whether A has one column a token; magnitude: name of the
    module's lengths, None without DoRA.
    """

    stem: str
    a: str
    b: str
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    is_embedding: bool
    magnitude: str | None

    @property
    def module(self) -> str:
        """Dotted name of the module inside the adapter's model."""
        return self.stem.removeprefix(_PREFIX)


class AdaptedCheckpoint:
    """A parent: a checkpoint whose tensors are read with a LoRA adapter folded in.

        adapted = AdaptedCheckpoint(Checkpoint(Path("models/base")), Path("adapters/math"))
        weight = adapted.tensor("model.layers.0.self_attn.q_proj.weight")

    Attributes:
        adapter: Folder of the adapter.
        path: Folder of the base.
        config: The base's config.json; of a head that the adapter unties, with tie_word_embeddings false.
        tensors: The base's, and a head that the adapter unties from the embeddings.
        layout: The base's, with that head.
        files: The base's files and the adapter's.
    """

    def __init__(self, base: Checkpoint, adapter_dir: Path) -> None:
        """Opens an adapter; reads headers only.

        Args:
            base: The checkpoint that the adapter was trained on.
            adapter_dir: Folder with adapter_config.json and adapter_model.safetensors.

        Raises:
            CheckpointError: The adapter does not fit the base, is more than LoRA, or a file is broken.
        """
        self.adapter = adapter_dir
        self._base = base
        self._file = adapter_dir / "adapter_model.safetensors"
        if not self._file.exists() and (adapter_dir / "adapter_model.bin").exists():
            raise CheckpointError(
                f"{adapter_dir} has adapter_model.bin only, a pickle; load it with peft and save it with "
                "save_pretrained"
            )
        config = LoraConfig(adapter_dir / "adapter_config.json")
        header = safetensors_headers.read_header(self._file)
        self._tied = _trained_head_of_tied(base, header)
        self.path, self.config = base.path, base.config
        self.tensors, self.layout = base.tensors, base.layout
        if self._tied is not None:
            self.config, self.tensors, self.layout = _untied(base, self._tied)
        self._changes = _changes(self, header, config, self._file)
        self._handle = _open(self._file)
        self.files = (*base.files, self._file)

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the base's tensors that the adapter changes, sorted."""
        return tuple(sorted(self._changes))

    def tensor(self, name: str) -> Tensor:
        """See `Parent.tensor`.

        Returns:
            The tensor; the base's own where the adapter leaves it alone.
        """
        is_untied = self._tied is not None and name == HEAD
        weight = self._base.tensor(self._tied if is_untied and self._tied is not None else name)
        change = self._changes.get(name)
        if change is None:
            return weight
        start = self._read(change.replacement) if change.replacement else weight
        if change.a and change.b:
            wide = torch.promote_types(weight.dtype, torch.float32)
            a = self._read(change.a).to(wide)  # [r, in]
            b = self._read(change.b).to(wide)  # [out, r]
            left, right = (a.T, b.T) if change.transposed else (b, a)
            start = torch.addmm(start.to(wide), left, right, alpha=change.scale)
        if change.magnitude:
            inputs = 0 if change.transposed else 1
            length = start.norm(dim=inputs, keepdim=True).clamp(min=torch.finfo(start.dtype).tiny)
            start = start * (self._read(change.magnitude).to(start.dtype).unsqueeze(inputs) / length)
        return start.to(weight.dtype)

    def low_rank(self, name: str) -> LowRank | None:
        """Returns what the adapter adds to a matrix of the base, before the sum is rounded to its type.

        Args:
            name: Name of the tensor on disk.

        Returns:
            The difference, of rank 0 where the adapter leaves the tensor alone; None where it replaces it or
            scales its rows, or where it is no matrix of the base.
        """
        shape, change = self.tensors[name].shape, self._changes.get(name)
        if len(shape) != 2 or name not in self._base.tensors:
            return None
        if change is not None and (change.replacement is not None or change.magnitude is not None):
            return None
        if change is None or not change.a or not change.b:
            return LowRank(torch.zeros(shape[0], 0), torch.zeros(0, shape[1]))
        a, b = self._read(change.a).float(), self._read(change.b).float() * change.scale
        return LowRank(a.T, b.T) if change.transposed else LowRank(b, a)

    def content_hash(self) -> str:
        """SHA-256 over the base, the adapter's tensors and what the adapter's config makes of them."""
        changes: list[tuple[object, ...]] = []
        for name, c in sorted(self._changes.items()):  # without DoRA as it was before there was DoRA
            magnitude = () if c.magnitude is None else (c.magnitude,)
            changes.append((name, c.replacement, c.a, c.b, c.scale, c.transposed, *magnitude))
        digest = hashlib.sha256((self._base.content_hash() + json.dumps(changes)).encode())
        with self._file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    def _read(self, name: str) -> Tensor:
        tensor: Tensor = self._handle.get_tensor(name)
        return tensor


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{file} is not a readable safetensors file ({reason}); save it again"
        ) from None


def _changes(
    base: Parent, tensors: Mapping[str, TensorInfo], config: LoraConfig, file: Path
) -> dict[str, _Change]:
    """Base tensor -> what the adapter does to it. Every tensor of the adapter is used, or it is refused."""
    changes: dict[str, _Change] = {}
    rest = dict(tensors)
    inputs_first = _keeps_inputs_first(base)
    for name, info in tensors.items():
        if info.dtype not in ("F64", "F32", "F16", "BF16"):
            raise CheckpointError(
                f"{file} holds '{name}' as {info.dtype}; an adapter is floating point, save it again"
            )
        ending = next((ending for ending in _PAIRS if name.endswith(ending)), None)
        if ending is None:
            continue
        pair = _take_pair(rest, name, ending, config, file)
        target = _target(base, pair.module + ".weight", name, file)
        transposed = _is_transposed(base, target, pair, inputs_first, file)
        if target in changes:
            raise CheckpointError(
                f"{file} changes '{target}' twice, by '{changes[target].a}' and '{name}'; save the adapter "
                "again"
            )
        scale = config.scale(pair.module, pair.a_shape[0])
        changes[target] = _Change(None, pair.a, pair.b, scale, transposed, pair.magnitude)
    for name, info in rest.items():
        _replace_whole(changes, base, name, info, config, file)
    return changes


def _take_pair(rest: dict[str, TensorInfo], name: str, ending: str, config: LoraConfig, file: Path) -> _Pair:
    """The pair of an A, whose tensors are removed from `rest`."""
    stem = name.removesuffix(ending)
    other = stem + _PAIRS[ending]
    b = rest.pop(other, None)
    a = rest.pop(name)
    if b is None:
        raise CheckpointError(
            f"{file} has '{name}' without its '{_PAIRS[ending].strip('.')}'; save the adapter again"
        )
    magnitude = _take_magnitude(rest, stem, b.shape, config, file)
    return _Pair(stem, name, other, a.shape, b.shape, ending == ".lora_embedding_A", magnitude)


def _take_magnitude(
    rest: dict[str, TensorInfo], stem: str, b_shape: tuple[int, ...], config: LoraConfig, file: Path
) -> str | None:
    """Name of the lengths of a module's outputs, removed from `rest`; None without DoRA."""
    names = [stem + ending for ending in _MAGNITUDES if stem + ending in rest]
    if not config.has_magnitudes:
        if names:
            raise CheckpointError(
                f"{file} has '{names[0]}', a vector of DoRA, and {config.file} does not set use_dora; "
                "save the adapter again"
            )
        return None
    if not names:
        raise CheckpointError(
            f"{file} has '{stem}' without its lora_magnitude_vector, and {config.file} sets use_dora; "
            "save the adapter again"
        )
    shape = rest.pop(names[0]).shape
    if shape != b_shape[:1]:
        raise CheckpointError(
            f"'{names[0]}' of {file} is {list(shape)}, expected is one number for each of the {b_shape[0]} "
            "outputs; save the adapter again"
        )
    return names[0]


def _replace_whole(
    changes: dict[str, _Change], base: Parent, name: str, info: TensorInfo, config: LoraConfig, file: Path
) -> None:
    """Notes in `changes` a tensor of the adapter that replaces one of the base: a bias, a saved module."""
    plain = name.removeprefix(_PREFIX)
    tensor = plain.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
    target = _target(base, tensor, name, file)
    if info.shape != base.tensors[target].shape:
        raise _misfit(f"'{name}' of {file} is {list(info.shape)}", base, target)
    before = changes.get(target, _Change(None, None, None, 0.0, False))
    if before.replacement is not None:
        raise CheckpointError(f"{file} has both '{before.replacement}' and '{name}'; save the adapter again")
    changes[target] = replace(before, replacement=name)
    owner = tensor.rpartition(".")[0]
    is_saved = any(owner == module or owner.endswith("." + module) for module in config.saved)
    if is_saved and _is_tied(base, target):
        raise CheckpointError(
            f"{file} replaces '{target}', which base {base.path} shares with its head; untie the base first"
        )


def _target(base: Parent, wanted: str, name: str, file: Path) -> str:
    """The base's tensor that a name inside the adapter's model means.

    A checkpoint of the bare decoder lacks the first word of the name, an adapter of the bare decoder lacks
    the base's.
    """
    for candidate in (wanted, wanted.partition(".")[2], f"{base.layout.stack.split('.')[0]}.{wanted}"):
        if candidate in base.tensors:
            return candidate
    if wanted == HEAD:
        raise CheckpointError(
            f"'{name}' of {file} is of an output head, and base {base.path} has none of its own but shares "
            "its embeddings; save the base as a whole language model with tie_word_embeddings: false first"
        )
    raise CheckpointError(
        f"'{name}' of {file} matches no tensor of base {base.path}; give the base that the adapter was "
        "trained on"
    )


def _is_transposed(base: Parent, target: str, pair: _Pair, inputs_first: bool, file: Path) -> bool:
    """Whether A [r, in] and B [out, r] fit a base tensor transposed, [in, out].

    Raises CheckpointError where they do not fit at all.
    """
    shape, a, b = base.tensors[target].shape, pair.a_shape, pair.b_shape
    are_factors = len(a) == 2 and len(b) == 2 and a[0] == b[1] and a[0] != 0
    fits = are_factors and shape in ((b[0], a[1]), (a[1], b[0]))
    if fits and pair.is_embedding:
        fits = shape == (a[1], b[0])
    if not fits:
        raise _misfit(f"'{pair.stem}' of {file} has A {list(a)} and B {list(b)}", base, target)
    if pair.is_embedding:
        return True
    if a[1] != b[0]:
        return shape == (a[1], b[0])
    return inputs_first and base.layout.place(target).part == "layer"


def _trained_head_of_tied(base: Checkpoint, tensors: Mapping[str, TensorInfo]) -> str | None:
    """Name of the base's embeddings where an adapter trains a head of which the base has none.

    None where the adapter trains no head, the base has one, the config says that they are not tied, or the
    base is a bare decoder, whose names leave no place for a head.
    """
    trained = [name.removeprefix(_PREFIX).split(".") for name in tensors]
    if HEAD in base.tensors or not any(HEAD.split(".")[0] in words for words in trained):
        return None
    text = base.config.get("text_config", base.config)
    if not text.get("tie_word_embeddings", base.config.get("tie_word_embeddings", True)):
        return None
    tied = [name for name in base.layout.outer_names("embeddings") if _is_tied(base, name)]
    is_bare = base.layout.stack in _BARE
    # of GPT-2's two embeddings, that of the tokens
    return None if is_bare or not tied else max(tied, key=lambda name: base.tensors[name].shape[0])


def _untied(base: Checkpoint, tied: str) -> tuple[dict[str, Any], dict[str, TensorInfo], Layout]:
    """(config, tensors, layout) of a base with a head of its own."""
    tensors = {**base.tensors, HEAD: base.tensors[tied]}
    layout = base.layout
    untied = layout_of(tensors, layout.stack, layout.num_layers, layout.towers, layout.owner)
    config = copy.deepcopy(base.config)
    for block in (config, config.get("text_config")):
        if isinstance(block, dict) and (block is config or "tie_word_embeddings" in block):
            block["tie_word_embeddings"] = False
    return config, tensors, untied


def _keeps_inputs_first(base: Parent) -> bool:
    """Whether the stack's weights are [in, out], as GPT-2's: an oblong one has a bias as long as its columns.

    A square weight does not show it, and an adapter's fan_in_fan_out may be wrong: peft goes by the layer's
    class.
    """
    for name, info in base.tensors.items():
        bias = base.tensors.get(name.removesuffix("weight") + "bias")
        is_weight = name.startswith(base.layout.stack + ".") and name.endswith(".weight")
        if is_weight and bias and len(info.shape) == 2 and info.shape[0] != info.shape[1]:
            return bias.shape == info.shape[1:]
    return False


def _is_tied(base: Parent, target: str) -> bool:
    """Whether a tensor outside the stack is embedding and head at once: no other one has its shape."""
    shape = base.tensors[target].shape
    if len(shape) != 2 or base.layout.place(target).part == "layer":
        return False
    outside = (*base.layout.outer_names("embeddings"), *base.layout.outer_names("head"))
    return sum(base.tensors[name].shape == shape for name in outside) == 1


def _misfit(what: str, base: Parent, target: str) -> CheckpointError:
    shape = list(base.tensors[target].shape)
    return CheckpointError(
        f"{what}, '{target}' of base {base.path} is {shape}; give the base that the adapter was trained on"
    )
