"""Tiny Llama models for tests: a base and three fine-tunes of it, with a tokenizer of words."""

from pathlib import Path

import torch

NAMES = ("base", "math", "code", "chat")
LAYERS, VOCABULARY = 4, 64
SAME_AS_BASE = {  # tensors a fine-tune never touched
    "math": ("model.layers.1.input_layernorm.weight",),
    "code": ("lm_head.weight", "model.layers.2.mlp.up_proj.weight", "model.layers.2.mlp.down_proj.weight"),
    "chat": ("model.embed_tokens.weight",),
}


def build(
    folder: Path,
    dtype: torch.dtype,
    names: tuple[str, ...] = NAMES,
    *,
    layers: int = LAYERS,
    tied: bool = False,
) -> dict[str, Path]:
    """Saves the models under a folder; model name -> its folder. The same arguments give the same bits."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).to(dtype)
    weights = {
        name: _random(0, i, tensor.shape, 0.05) + tensor * name.endswith("norm.weight")
        for i, (name, tensor) in enumerate(_own(model))
    }
    paths = {}
    for number, name in enumerate(names):
        with torch.no_grad():
            for i, (key, tensor) in enumerate(_own(model)):
                change = (
                    0.0
                    if number == 0 or key in SAME_AS_BASE.get(name, ())
                    else _random(number, i, tensor.shape, 0.01)
                )
                tensor.copy_(weights[key].to(dtype) + change)
        paths[name] = folder / name
        model.save_pretrained(paths[name])
        _tokenizer().save_pretrained(paths[name])
    return paths


def _own(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return list(model.named_parameters())


def _random(model: int, tensor: int, shape: torch.Size, scale: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * model + tensor)
    return torch.randn(shape, generator=generator) * scale


def _tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(VOCABULARY - 4))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
