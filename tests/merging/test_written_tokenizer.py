"""The tokenizer of a merge: loadable by older readers, its files kept, and texts that end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.checkpoints import Checkpoint
from evomerge.export.recipe_file import merge_recipe_file
from evomerge.merging import written_tokenizer
from evomerge.merging.written_tokenizer import FAST, NEW_CLASSES, TURN_ENDS, end_tokens, stops
from tests.support.tiny_models import VOCABULARY, build

CHAT = "{% for m in messages %}<|im_start|> {{ m.content }} <|im_end|>{% endfor %}"


def words(folder: Path, *extra: str, end: str = "</s>", template: str | None = None, cls: str = FAST) -> Path:
    """Replaces a folder's tokenizer by one of words in which `extra` are the last special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    first = ["<pad>", "<s>", "</s>", "<unk>"]
    listed = [*first, *(f"w{i}" for i in range(VOCABULARY - len(first) - len(extra))), *extra]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(listed)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([*first, *extra])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token=end, unk_token="<unk>", pad_token="<pad>"
    )
    if template:
        fast.chat_template = template
    fast.save_pretrained(folder)
    edit(folder / "tokenizer_config.json", tokenizer_class=cls)
    return folder


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two models of one shape, whose generation ends at </s>."""
    paths = build(tmp_path / "models", torch.bfloat16, ("base", "math"))
    for path in paths.values():
        (path / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')
    return words(paths["base"]), words(paths["math"])


def merged(one: Path, other: Path, *lines: str) -> tuple[Path, tuple[str, ...]]:
    out = one.parent / f"out{len(list(one.parent.iterdir()))}"
    recipe = one.parent / "r.yaml"
    recipe.write_text(
        f"merge_method: linear\nbase_model: {one}\nmodels:\n"
        f"  - {{model: {one}, parameters: {{weight: 1}}}}\n"
        f"  - {{model: {other}, parameters: {{weight: 1}}}}\ndtype: bfloat16\n" + "\n".join(lines)
    )
    return out, merge_recipe_file(recipe, out)


def written_class(folder: Path) -> str:
    found: str = json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]
    return found


@pytest.mark.parametrize("line", ["", "tokenizer_source: base", "tokenizer_source: union"])
@pytest.mark.parametrize("cls", [FAST, *NEW_CLASSES[:2]])
def test_the_class_of_a_written_tokenizer_is_one_that_older_readers_know(
    cls: str, line: str, pair: tuple[Path, Path]
) -> None:
    import transformers

    one, other = words(pair[0], cls=cls), words(pair[1], "<|more|>", cls=cls)
    out, _ = merged(one, other, line)
    assert written_class(out) == FAST
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert ("<|more|>" in tokenizer.get_vocab()) == (line == "tokenizer_source: union")
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert not {"is_local", "local_files_only"} & set(config)
    assert not isinstance(config.get("extra_special_tokens"), list)


def test_further_special_tokens_stay_special_for_both_versions(pair: tuple[Path, Path]) -> None:
    import transformers

    edit(pair[0] / "tokenizer_config.json", extra_special_tokens=["w7"])
    out, _ = merged(*pair)
    assert json.loads((out / "tokenizer_config.json").read_text())["additional_special_tokens"] == ["w7"]
    assert "w7" in transformers.AutoTokenizer.from_pretrained(out).all_special_tokens


def test_a_tokenizer_that_stays_keeps_its_files(pair: tuple[Path, Path]) -> None:
    one, other = pair
    (one / "tekken.json").write_text("{}")
    other = words(other, "<|more|>")
    for line, kept in (("tokenizer_source: base", True), ("tokenizer_source: union", False)):
        out, _ = merged(one, other, line)
        assert (out / "tekken.json").is_file() == kept
        assert ((out / "tokenizer.json").read_bytes() == (one / "tokenizer.json").read_bytes()) == kept


# ---- texts that end


def test_generation_ends_at_the_end_of_a_tokenizer_taken_from_another_model(pair: tuple[Path, Path]) -> None:
    one, other = pair[0], words(pair[1], "<|im_start|>", "<|im_end|>", end="<|im_end|>", template=CHAT)
    out, _ = merged(one, other, f"tokenizer_source: {other}")
    number = VOCABULARY - 1
    assert end_tokens(out) == {"<|im_end|>": number}
    assert number in stops(out)
    assert number in json.loads((out / "config.json").read_text())["eos_token_id"]


@pytest.mark.parametrize("has_generation_config", [True, False])
def test_generation_ends_at_the_end_of_a_turn_of_the_recipes_template(
    has_generation_config: bool, pair: tuple[Path, Path]
) -> None:
    one, other = (words(path, "<|im_start|>", "<|im_end|>") for path in pair)
    if not has_generation_config:
        (one / "generation_config.json").unlink()
    out, _ = merged(one, other, "chat_template: chatml")
    assert set(stops(out)) == {2, VOCABULARY - 1}


@pytest.mark.parametrize("token", TURN_ENDS)
def test_every_known_end_of_a_turn_is_found_where_the_template_writes_it(token: str, tmp_path: Path) -> None:
    words(tmp_path, token, template=CHAT.replace("<|im_end|>", token))
    assert end_tokens(tmp_path)[token] == VOCABULARY - 1
    words(tmp_path, token, template="{{ messages }}")
    assert token not in end_tokens(tmp_path)


def test_files_that_are_the_bases_stay_and_what_may_never_end_is_named(pair: tuple[Path, Path]) -> None:
    one, other = pair
    assert merged(one, other)[1] == ()
    edit(other / "generation_config.json", eos_token_id=[2, 9])
    assert "generation with the settings of" in " ".join(merged(one, other)[1])
    edit(other / "generation_config.json", eos_token_id=2)
    edit(one / "generation_config.json", eos_token_id=9)
    out, warnings = merged(one, other)
    assert "'</s>' (2)" in " ".join(warnings)
    assert (out / "generation_config.json").read_bytes() == (one / "generation_config.json").read_bytes()


def test_numbers_of_tokens_are_found_in_every_form_of_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}}')
    for name, data in (
        ("added_tokens.json", {"</s>": 7}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"7": {"content": "</s>"}}}),
        ("tokenizer.json", {"model": {"vocab": {"</s>": 7}}}),
        ("tokenizer.json", {"model": {"vocab": [["a", 0.0]] * 7 + [["</s>", 0.0]]}}),
        ("tokenizer.json", {"added_tokens": [{"id": 7, "content": "</s>"}]}),
    ):
        folder = tmp_path / "one"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.copyfile(tmp_path / "special_tokens_map.json", folder / "special_tokens_map.json")
        (folder / name).write_text(json.dumps(data))
        assert end_tokens(folder) == {"</s>": 7}, name


def test_end_tokens_are_added_once(tmp_path: Path) -> None:
    words(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 9}')
    for _ in range(2):
        written_tokenizer.end_at_end_tokens(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text()) == {"eos_token_id": [9, 2]}


def test_the_same_files_of_a_form_that_needs_a_library_are_merged_without_it(
    pair: tuple[Path, Path], recwarn: pytest.WarningsRecorder
) -> None:
    for path in pair:
        (path / "tokenizer.json").unlink()
        (path / "tokenizer.model").write_bytes(b"pieces")
    out, warnings = merged(*pair)
    assert warnings == ()
    assert (out / "tokenizer.model").read_bytes() == b"pieces"
    assert Checkpoint(out).tensors
