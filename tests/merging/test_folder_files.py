"""Every file of a model folder reaches a merge, is written anew, or is left out for a reason in the table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from evomerge.checkpoints import Checkpoint
from evomerge.errors import CheckpointError
from evomerge.export.recipe_file import merge_recipe_file
from evomerge.merging import checkpoint_writer, companion_files
from evomerge.merging.folder_files import RULES, UNKNOWN, Fate, companions, rule_of
from tests.support.merge_cases import candidate

FOLDER: dict[Fate, tuple[str, ...]] = {  # as the folders of published models have them
    "tokenizer": (
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v3", "spiece.model"),
        *("sentencepiece.bpe.model", "source.spm", "special_tokens_map.json", "added_tokens.json"),
        *("vocab.json", "vocab.txt", "vocab.bpe", "merges.txt", "qwen.tiktoken", "tekken.json"),
        *("chat_template.jinja", "chat_template.json", "additional_chat_templates/tool_use.jinja"),
    ),
    "program": ("modeling_own.py", "configuration_own.py", "tokenization_own.py", "own_tables.dat"),
    "copied": (
        *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
        *("modules.json", "sentence_bert_config.json", "1_Pooling/config.json", "LICENSE", "LICENSE.txt"),
        *("NOTICE", "USE_POLICY.md", "COPYING", "generation_config_for_text.json", "norms.txt"),
    ),
    "written": ("config.json", "generation_config.json", "README.md", "mergekit_config.yml"),
    "left out": (
        *("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors", "params.json"),
        *("model.gguf", "model.onnx", "flax_model.msgpack", "tf_model.h5", "training_args.bin"),
        *("trainer_state.json", "eval_results.json", "recipe.yaml", "lineage.json", ".gitattributes"),
        *("Modelfile", "CITATION.bib", "environment.txt", "commands.sh", "verify.json"),
        *("onnx/model.json", "original/params.json", "assets/figure.json", "quantize_config.json"),
    ),
}
AUTO_MAP = {"AutoModelForCausalLM": "modeling_own.OwnModel"}


def filled(folder: Path, tiny: dict[str, Path], **config: Any) -> Path:
    """A copy of the base with every file of `FOLDER` beside its weights, each with its name as content."""
    shutil.copytree(tiny["base"], folder)
    for names in FOLDER.values():
        for name in names:
            file = folder / name
            file.parent.mkdir(exist_ok=True)
            if not file.exists():
                file.write_text(json.dumps({"of": name}) if name.endswith(".json") else name)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("fate", FOLDER)
def test_every_file_of_a_published_folder_has_its_rule(fate: Fate) -> None:
    assert {name: rule_of(name).fate for name in FOLDER[fate]} == dict.fromkeys(FOLDER[fate], fate)


def test_every_rule_has_a_reason() -> None:
    assert all(len(rule.reason.split()) > 2 for rule in (*RULES, UNKNOWN))


@pytest.mark.parametrize("auto_map", [None, AUTO_MAP])
def test_every_file_of_the_base_reaches_a_merge_or_is_left_out_by_the_table(
    auto_map: dict[str, str] | None, tiny: dict[str, Path], tmp_path: Path
) -> None:
    given = {} if auto_map is None else {"auto_map": auto_map}
    base = filled(tmp_path / "base", tiny, **given)
    parents = {name: Checkpoint(path) for name, path in tiny.items()} | {"base": Checkpoint(base)}
    checkpoint_writer.write(candidate("linear"), parents, tmp_path / "out")
    before, after = content(base), content(tmp_path / "out")
    expected = {*FOLDER["tokenizer"], *FOLDER["copied"], *(FOLDER["program"] if auto_map else ())}
    written = {"config.json", "generation_config.json", "model.safetensors"}
    assert set(after) == expected | written
    changed = {name for name in expected if after[name] != before[name]}
    assert changed <= {"tokenizer_config.json"}, "its class, for transformers 4"


def test_a_merge_of_models_with_programs_of_their_own_loads_as_they_do(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    import transformers

    for name in ("base", "math"):
        shutil.copytree(tiny[name], tmp_path / name)
        file = tmp_path / name / "config.json"
        own = {
            "model_type": "ownllama",
            "architectures": ["OwnModel"],
            "auto_map": {
                "AutoConfig": "configuration_own.OwnConfig",
                "AutoModelForCausalLM": "modeling_own.OwnModel",
            },
        }
        file.write_text(json.dumps(json.loads(file.read_text()) | own))
        (tmp_path / name / "configuration_own.py").write_text(
            "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n"
            "    model_type = 'ownllama'\n"
        )
        (tmp_path / name / "modeling_own.py").write_text(
            "from transformers import LlamaForCausalLM\n\nfrom .configuration_own import OwnConfig\n\n\n"
            "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
        )
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"merge_method: linear\nbase_model: {tmp_path / 'base'}\nmodels:\n"
        f"  - {{model: {tmp_path / 'base'}, parameters: {{weight: 1}}}}\n"
        f"  - {{model: {tmp_path / 'math'}, parameters: {{weight: 1}}}}\ndtype: bfloat16\n"
    )
    merge_recipe_file(recipe, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"


def test_a_link_out_of_the_folder_is_not_followed(tiny: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    base = filled(tmp_path / "base", tiny)
    (base / "notes.txt").symlink_to(tmp_path / "secret.txt")
    assert "notes.txt" not in {file.name for file in companions(base, "copied")}
    (base / "extra.model").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(CheckpointError, match="is a link that leaves the model's folder"):
        companion_files.copy_companion_files(base, tmp_path)
