"""The files beside a checkpoint's weights: tokenizer, processors, chat template, generation settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from evomerge.checkpoints.safetensors_headers import read_json_object
from evomerge.merging.folder_files import Fate, companions
from evomerge.merging.merge import Merge
from evomerge.merging.written_tokenizer import end_at_end_tokens, make_loadable_everywhere
from evomerge.recipes import chat_templates

_GENERATION = "generation_config.json"


def copy_companion_files(donor: Path, directory: Path) -> None:
    """Copies what `folder_files.RULES` says of a model: tokenizer, processors, programs, generation settings.

    Args:
        donor: Folder of the model.
        directory: A folder that exists.

    Raises:
        CheckpointError: A file that the tokenizer or a program needs is a link that leaves the folder.
    """
    _copy_tokenizer(donor, directory)
    _copy(donor, directory, "copied")
    make_loadable_everywhere(directory)
    if (donor / _GENERATION).is_file():
        shutil.copyfile(donor / _GENERATION, directory / _GENERATION)


def write_companion_files(merge: Merge, directory: Path) -> None:
    """Writes the files beside the weights of a merge.

    They are the base's, but for a tokenizer or a chat template of the recipe; generation then ends at the
    end tokens of what was written.

    Args:
        merge: The merge.
        directory: A folder that exists and holds the merge's weights and config.
    """
    donor = merge.parents[merge.recipe.base].path
    if merge.vocabulary is None:
        copy_companion_files(donor, directory)
    else:
        _write_tokenizer(merge, directory)
    if merge.recipe.chat_template is not None:
        _write_chat_template(merge, directory, merge.recipe.chat_template)
    if merge.vocabulary is not None or merge.recipe.chat_template is not None:
        end_at_end_tokens(directory)


def _write_tokenizer(merge: Merge, directory: Path) -> None:
    """The base's companions and the tokenizer of the recipe, whose files are copied if it is a model's."""
    assert merge.vocabulary is not None
    donor = merge.parents[merge.recipe.base].path
    _copy(donor, directory, "program", "copied")
    generation = donor / _GENERATION
    if generation.is_file():
        config = merge.vocabulary.config(read_json_object(generation, ""))
        (directory / _GENERATION).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    source = merge.parents[merge.vocabulary.source].path
    if merge.vocabulary.is_as_in_source:
        _copy_tokenizer(source, directory)
    else:
        merge.vocabulary.save(directory)
    stated = source / "tokenizer_config.json"
    make_loadable_everywhere(directory, read_json_object(stated, "") if stated.is_file() else None)


def _copy_tokenizer(donor: Path, directory: Path) -> None:
    """Copies a tokenizer and the programs that it may need. Raises CheckpointError for a broken config."""
    config = donor / "tokenizer_config.json"
    if config.is_file():
        read_json_object(config, "")  # here an error names the model's own file
    _copy(donor, directory, "tokenizer", "program")


def _copy(donor: Path, directory: Path, *fates: Fate) -> None:
    for file in companions(donor, *fates):
        target = directory / file.relative_to(donor)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


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
