"""Parent models on disk.

No file is trusted, and no code from a model folder is run.

* `parent`: the interface of a parent, and functions over it (sizes, equality).
* `comparison`: two models side by side, the first true difference and what speaks against a merge.
* `layout`: where each tensor belongs: embeddings, layer, head, another tower.
* `checkpoint`: a model folder with memory-mapped safetensors files.
* `lora`, `lora_config`: a LoRA adapter folded into a base as its tensors are read.
* `reference`, `hub`: 'model[@revision][+adapter]' -> an opened parent, from a folder or the Hugging Face
  cache.
* `safetensors_headers`, `tensor_names`: what headers and names say before a weight is read.
"""

from __future__ import annotations

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.checkpoints.comparison import check_compatible
from evomerge.checkpoints.hub import locate
from evomerge.checkpoints.layout import COMPONENTS, Layout, TensorPlace
from evomerge.checkpoints.parent import Parent, equal_tensors, stored_dtype, total_bytes
from evomerge.checkpoints.reference import open_parent

__all__ = [
    "COMPONENTS",
    "Checkpoint",
    "Layout",
    "Parent",
    "TensorPlace",
    "check_compatible",
    "equal_tensors",
    "locate",
    "open_parent",
    "stored_dtype",
    "total_bytes",
]
