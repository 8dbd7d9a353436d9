"""The files beside a checkpoint's weights: tokenizer, processors, chat template, generation settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from evomerge.checkpoints.safetensors_headers import read_json_object
from evomerge.merging.merge import Merge
from evomerge.recipes import chat_templates

TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "added_tokens.json",
    "*.jinja",
    "chat_template.json",
)
"""Patterns of the files that hold a tokenizer and its chat template."""
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""Names of the files that hold image and video processors."""
_GENERATION = "generation_config.json"


def copy_companion_files(donor: Path, directory: Path) -> None:
    """Copies tokenizer, chat template, processor files and generation settings of a model.

    Args:
        donor: Folder of the model.
        directory: A folder that exists.
    """
    _copy(donor, directory, (*TOKENIZER, *PROCESSORS, _GENERATION))


def write_companion_files(merge: Merge, directory: Path) -> None:
    """Writes the files beside the weights of a merge.

    They are the base's, but for a tokenizer or a chat template of the recipe.

    Args:
        merge: The merge.
        directory: A folder that exists and holds the merge's weights.
    """
    donor = merge.parents[merge.recipe.base].path
    if merge.vocabulary is None:
        copy_companion_files(donor, directory)
    else:
        _copy(donor, directory, PROCESSORS)
        generation = donor / _GENERATION
        if generation.is_file():
            config = merge.vocabulary.config(read_json_object(generation, ""))
            (directory / _GENERATION).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        merge.vocabulary.save(directory)
    if merge.recipe.chat_template is not None:
        _write_chat_template(merge, directory, merge.recipe.chat_template)


def _copy(donor: Path, directory: Path, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        for file in sorted(donor.glob(pattern)):
            shutil.copyfile(file, directory / file.name)


def _write_chat_template(merge: Merge, directory: Path, requested: str) -> None:
    """Replaces the chat template of a folder by the one that the recipe asks for."""
    templates = [_chat_template(merge.parents[model].path) for model in merge.recipe.models]
    text = chat_templates.text(requested, [template for template in templates if template is not None])
    if text is None:
        return
    config = directory / "tokenizer_config.json"
    if config.is_file():
        data = read_json_object(config, "")
        data.pop("chat_template", None)
        config.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (directory / "chat_template.json").unlink(missing_ok=True)
    (directory / "chat_template.jinja").write_text(text, encoding="utf-8")


def _chat_template(path: Path) -> str | None:
    """A model's chat template: a file of its own, or an entry of the tokenizer's config."""
    file, config = path / "chat_template.jinja", path / "tokenizer_config.json"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = read_json_object(config, "").get("chat_template") if config.is_file() else None
    return template if isinstance(template, str) else None
