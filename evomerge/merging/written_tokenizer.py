"""The tokenizer of a written folder: made loadable by older readers, and generation made to end at its end.

transformers 5 writes names into tokenizer_config.json that transformers 4, vLLM's and llama.cpp's conversions
do not know. Generation ends at the numbers of generation_config.json, whatever the tokenizer's end token is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from evomerge.checkpoints import Parent
from evomerge.checkpoints.safetensors_headers import read_json_object
from evomerge.errors import CheckpointError

NEW_CLASSES = ("TokenizersBackend", "PythonBackend", "SentencePieceBackend")
"""Names of tokenizer classes that transformers 4 lacks."""
FAST = "PreTrainedTokenizerFast"
"""The class that any tokenizer.json can be loaded with, in transformers 4 and 5."""
TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eot|>",
    "<|end|>",
    "<|return|>",
    "<|endofturn|>",
    "<|end_of_turn|>",
    "<end_of_turn>",
    "<turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|END_RESPONSE|>",
    "<|role_end|>",
    "<|assistant_end|>",
)
"""Tokens by which models end their turn of a chat."""
_OF_LOADING = ("is_local", "local_files_only")  # arguments of the call that transformers 5 stores


def make_loadable_everywhere(directory: Path, donor: Mapping[str, Any] | None = None) -> None:
    """Rewrites what only transformers 5 understands in the tokenizer_config.json of a folder.

    Args:
        directory: The folder; one without a tokenizer.json is left as it is.
        donor: The tokenizer_config.json of the model whose tokenizer it was made from, whose class is taken
            if older readers know it.
    """
    file = directory / "tokenizer_config.json"
    if not file.is_file() or not (directory / "tokenizer.json").is_file():
        return
    before = read_json_object(file, "")
    data = {key: value for key, value in before.items() if key not in _OF_LOADING}
    if data.get("tokenizer_class") in (None, *NEW_CLASSES):
        own = (donor or {}).get("tokenizer_class")
        data["tokenizer_class"] = FAST if own in (None, *NEW_CLASSES) else own
    further = data.get("extra_special_tokens")
    if isinstance(further, list):  # a mapping in transformers 4, which has a list under another name
        data["additional_special_tokens"] = data.pop("extra_special_tokens")
    if data != before:
        file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def end_at_end_tokens(directory: Path) -> None:
    """Adds the end tokens of a folder's tokenizer to those that its generation settings stop at.

    Args:
        directory: The folder, with config.json; generation_config.json is changed where there is one.
    """
    ends = end_tokens(directory)
    config_file, generation_file = directory / "config.json", directory / "generation_config.json"
    config = read_json_object(config_file, "")
    text = config.get("text_config")
    holders = [part for part in (config, text) if isinstance(part, dict) and "eos_token_id" in part]
    changed = [_add(part, list(ends.values())) for part in holders or [config]]
    if any(changed):
        config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if generation_file.is_file():
        generation = read_json_object(generation_file, "")
        if _add(generation, list(ends.values())):
            generation_file.write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def end_tokens(folder: Path) -> dict[str, int]:
    """The tokens that end a text or a turn, by the tokenizer's files.

    Args:
        folder: A folder with a tokenizer.

    Returns:
        Token -> number: the tokenizer's end token, and tokens of `TURN_ENDS` that its chat template writes;
        without those that have no number in a JSON file.

    Raises:
        CheckpointError: A file of the tokenizer is broken; names the folder.
    """
    try:
        return _end_tokens(folder)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"the tokenizer files in {folder} are broken ({' '.join(str(error).split())[:200]}); fetch them "
            "again"
        ) from None


def _end_tokens(folder: Path) -> dict[str, int]:
    """See `end_tokens`."""
    config = _optional(folder / "tokenizer_config.json")
    end = config.get("eos_token") or _optional(folder / "special_tokens_map.json").get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    template = chat_template_text(folder)
    tokens = [*([end] if isinstance(end, str) else []), *(t for t in TURN_ENDS if t in template)]
    numbers = _token_numbers(folder, config)
    return {token: numbers[token] for token in tokens if token in numbers}


def end_doubts(parents: Mapping[str, Parent], base: str) -> Iterator[str]:
    """Finds where a merge with the files of its base may never end a text.

    Args:
        parents: Name -> parent, the base among them.
        base: Name of the base.

    Yields:
        Sentences.
    """
    known = stops(parents[base].path)
    try:
        ends = end_tokens(parents[base].path)
    except CheckpointError:
        ends = {}  # whoever reads the tokenizer says what is wrong with it
    lost = [f"{token!r} ({number})" for token, number in ends.items() if number not in known]
    if lost:
        yield (
            f"generation with the settings of '{base}' ends at {known or 'no token'}, not at "
            f"{' or '.join(lost)} of its tokenizer and chat template: texts of the merge may never end; add "
            "it to eos_token_id in generation_config.json"
        )
    for name, parent in parents.items():
        own = [number for number in stops(parent.path) if number not in known]
        if name != base and own and not set(own) <= set(ends.values()):
            yield (
                f"generation with the settings of '{name}' ends at {own}, with those of base '{base}' at "
                f"{known or 'no token'}, which the merge has: it may not end where '{name}' does; add it to "
                "eos_token_id in generation_config.json, or take the tokenizer of that model "
                "(tokenizer_source)"
            )


def stops(folder: Path) -> list[int]:
    """The token numbers that generation with a folder's settings ends at.

    Args:
        folder: A model folder.

    Returns:
        Those of generation_config.json; of config.json where there is none.
    """
    file = folder / "generation_config.json"
    settings = _optional(file) if file.is_file() else _optional(folder / "config.json")
    text = settings.get("text_config")
    value = settings.get("eos_token_id", text.get("eos_token_id") if isinstance(text, dict) else None)
    return [number for number in (value if isinstance(value, list) else [value]) if type(number) is int]


def chat_template_text(folder: Path) -> str:
    """The text of a folder's chat templates.

    Args:
        folder: A folder with a tokenizer.

    Returns:
        All of them, one after the other; empty without any.
    """
    files = [folder / "chat_template.jinja", *sorted((folder / "additional_chat_templates").glob("*.jinja"))]
    texts = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
    for name in ("tokenizer_config.json", "chat_template.json"):
        template = _optional(folder / name).get("chat_template")
        texts.append(json.dumps(template, ensure_ascii=False) if template else "")
    return "\n".join(texts)


def _optional(file: Path) -> dict[str, Any]:
    """The object of a JSON file; empty if there is none."""
    return read_json_object(file, "") if file.is_file() else {}


def _token_numbers(folder: Path, config: Mapping[str, Any]) -> dict[str, int]:
    """Token -> number, from the tokenizer's JSON files."""
    numbers: dict[str, Any] = {}
    data = _whole_tokenizer(folder / "tokenizer.json")
    model = data.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        numbers |= vocabulary
    elif isinstance(vocabulary, list):  # Unigram: [token, score] in the order of numbers
        numbers |= {str(entry[0]): number for number, entry in enumerate(vocabulary) if entry}
    numbers |= _optional(folder / "added_tokens.json")
    decoder, added = config.get("added_tokens_decoder"), data.get("added_tokens")
    entries = [(entry, number) for number, entry in (decoder.items() if isinstance(decoder, dict) else ())]
    entries += [(entry, None) for entry in (added if isinstance(added, list) else ())]
    for entry, number in entries:
        if isinstance(entry, dict):
            numbers[str(entry.get("content"))] = entry.get("id") if number is None else int(number)
    return {token: number for token, number in numbers.items() if type(number) is int}


def _whole_tokenizer(file: Path) -> dict[str, Any]:
    """A tokenizer.json, which may be larger than other JSON files; `check_tokenizer` bounds it."""
    if not file.is_file():
        return {}
    data = json.loads(file.read_text(encoding="utf-8"))
    return data if isinstance(data, dict) else {}


def _add(settings: dict[str, Any], ends: list[int]) -> bool:
    """Adds numbers to the end tokens of generation settings; whether any was new."""
    value = settings.get("eos_token_id")
    known = value if isinstance(value, list) else [] if value is None else [value]
    new = [number for number in dict.fromkeys(ends) if number not in known]
    if new:
        together = [*known, *new]
        settings["eos_token_id"] = together if len(together) > 1 else together[0]
    return bool(new)
