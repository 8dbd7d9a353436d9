"""The files beside a checkpoint's weights: tokenizer, processors, chat template, generation settings."""

from __future__ import annotations

import json
import shutil
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
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def write_companion_files(merge: Merge, directory: Path) -> None:
    """Tokenizer, generation config and chat template."""
    donor = merge.parents[merge.recipe.base]
    patterns = PROCESSORS if merge.vocabulary else (*TOKENIZER, *PROCESSORS)
    for pattern in patterns:
        for file in sorted(donor.path.glob(pattern)):
            shutil.copyfile(file, directory / file.name)
    generation = donor.path / "generation_config.json"
    if generation.is_file() and merge.vocabulary:
        config = merge.vocabulary.config(read_json_object(generation, ""))
        (directory / generation.name).write_text(json.dumps(config, indent=2) + "\n")
    elif generation.is_file():
        shutil.copyfile(generation, directory / generation.name)
    if merge.vocabulary:
        merge.vocabulary.save(directory)
    if merge.recipe.chat_template is not None:
        _template(merge, directory)


def _template(merge: Merge, directory: Path) -> None:
    wish = merge.recipe.chat_template
    assert wish is not None
    own = [
        found
        for model in merge.recipe.models
        if (found := _own_template(merge.parents[model].path)) is not None
    ]
    text = chat_templates.text(wish, own)
    if text is None:
        return
    config = directory / "tokenizer_config.json"
    if config.is_file():
        data = read_json_object(config, "")
        data.pop("chat_template", None)
        config.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    (directory / "chat_template.json").unlink(missing_ok=True)
    (directory / "chat_template.jinja").write_text(text)


def _own_template(path: Path) -> str | None:
    """A model's chat template: a file of its own, or an entry of the tokenizer's config."""
    file, config = path / "chat_template.jinja", path / "tokenizer_config.json"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = read_json_object(config, "").get("chat_template") if config.is_file() else None
    return found if isinstance(found, str) else None
