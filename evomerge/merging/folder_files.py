"""What becomes of each file of a model folder in the folder of a merge made of it.

A file reaches the merge where something that loads the folder would read it, and does not where it holds or
describes weights that the merge does not have. `RULES` is the whole list, each with its reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from evomerge.checkpoints.licenses import LICENSE_FILES
from evomerge.checkpoints.safetensors_headers import check_file
from evomerge.errors import CheckpointError

Fate = Literal["written", "tokenizer", "program", "copied", "left out"]


@dataclass(frozen=True, slots=True)
class FileRule:
    """What becomes of the files that a pattern names.

    Attributes:
        pattern: Of the path inside the folder, as `fnmatch` reads it; letters match in either case.
        fate: 'written': made anew for the merge; 'tokenizer': copied where the tokenizer stays as it is, else
            written with it; 'program': copied where a config of the folder names a program; 'copied'; 'left
            out'.
        reason: Why.
    """

    pattern: str
    fate: Fate
    reason: str


_TABLE: tuple[tuple[Fate, str, tuple[str, ...]], ...] = (
    ("written", "follows the recipe", ("config.json",)),
    (
        "written",
        "is the base's, with the numbers of the tokenizer that is written",
        ("generation_config.json",),
    ),
    (
        "written",
        "holds the merged weights",
        ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    ),
    ("written", "says what the merge is made of", ("README.md", "mergekit_config.y*ml")),
    (
        "left out",
        "says how the base was made",
        (
            *("mergekit_*.y*ml", "recipe.json", "recipe.yaml", "lineage.json", "training_args.*"),
            *("modelfile", "citation.bib", "environment.txt", "commands.sh", "verify.json"),
            *("trainer_state.json", "*_results.json", "all_results*", "train*.json", "eval*.json", "*.log"),
        ),
    ),
    (
        "left out",
        "holds or describes other weights than the merged ones",
        (
            *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth"),
            *("*.ckpt", "*.pkl", "*.h5", "*.h5.index.json", "*.msgpack", "*.msgpack.index.json", "*.gguf"),
            *("*.ggml", "*.onnx*", "*.npz", "*.npy", "*.tflite", "*.zip", "*.tar*", "params.json"),
            *("quant*_config.json", "hf_quant_config.json", "adapter_config.json"),
        ),
    ),
    (
        "tokenizer",
        "holds the tokenizer or its chat template",
        (
            *("tokenizer*.json", "tokenizer.model*", "special_tokens_map.json", "added_tokens.json"),
            *("vocab.*", "merges.txt", "*.model", "*.spm", "*.tiktoken", "tekken.json", "*.jinja"),
            *("chat_template.json", "additional_chat_templates/*.jinja"),
        ),
    ),
    ("program", "is run by whoever loads the model with trust_remote_code", ("*.py",)),
    (
        "copied",
        "is a license of the base, which holds for what is made of it",
        LICENSE_FILES,
    ),
    (
        "copied",
        "says how images, sounds, videos or sentences become inputs",
        (
            *("*preprocessor_config.json", "processor_config.json", "modules.json"),
            *("sentence_bert_config.json", "config_sentence_transformers.json", "*_pooling/config.json"),
        ),
    ),
    ("left out", "is read by people or tools, not by what loads a model", ("*.md", ".*")),
    ("left out", "lies in a folder that nothing reads which loads the model", ("*/*",)),
    (
        "copied",
        "is data that what loads the model may read",
        ("*.json", "*.txt", "*.bpe", "*.yml", "*.yaml"),
    ),
)
RULES = tuple(FileRule(pattern, fate, reason) for fate, reason, patterns in _TABLE for pattern in patterns)
"""The first rule that fits a file is its rule."""
UNKNOWN = FileRule("*", "program", "is read by programs of the folder, if by anything")
"""The rule of a file that no other fits."""
MOST_BYTES = 250_000_000
"""A larger file is no companion of weights and is left out."""
_WITH_PROGRAMS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
_FOLDERS = ("additional_chat_templates", "*_[Pp]ooling")


def rule_of(name: str) -> FileRule:
    """Finds what becomes of a file.

    Args:
        name: Its path inside the model's folder, with '/'.

    Returns:
        Its rule.
    """
    low = name.lower()
    return next((rule for rule in RULES if fnmatchcase(low, rule.pattern.lower())), UNKNOWN)


def companions(folder: Path, *fates: Fate) -> Iterator[Path]:
    """Finds the files of a folder that share a fate and can be copied.

    Args:
        folder: The model's folder.
        fates: The fates; files of the fate 'program' are found only where a config of the folder names one.

    Yields:
        Regular files of the folder of at most `MOST_BYTES`, sorted.

    Raises:
        CheckpointError: A file that a tokenizer or a program needs is a link that leaves the folder.
    """
    has_programs = names_program(folder)
    inside = [path for pattern in _FOLDERS for path in folder.glob(f"{pattern}/*")]
    for path in sorted([*folder.iterdir(), *inside]):
        fate = rule_of(path.relative_to(folder).as_posix()).fate
        if fate not in fates or path.is_dir() or (fate == "program" and not has_programs):
            continue
        try:
            check_file(path)
        except CheckpointError:
            if fate == "copied":
                continue
            raise
        if path.stat().st_size <= MOST_BYTES:
            yield path


def names_program(folder: Path) -> bool:
    """Whether a config of a folder names a program of its own (auto_map), which trust_remote_code runs.

    Args:
        folder: The model's folder.

    Returns:
        True if one does.
    """
    for name in _WITH_PROGRAMS:
        try:
            if json.loads((folder / name).read_text(encoding="utf-8")).get("auto_map"):
                return True
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
    return False
