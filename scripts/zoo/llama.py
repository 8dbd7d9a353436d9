"""A Llama as a function of its weights, the same mathematics as transformers' with fewer and larger matrix
products.

Knows the architecture and the names of weights; knows nothing of data or training. Queries, keys and values
are one matrix here, so are gate and up; `fuse` and `split` translate to and from the names of a Hugging Face
checkpoint.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.zoo.plan import Architecture

Weights = dict[str, Tensor]

OPENING = 2  # every text of the zoo begins with the two tokens of `Q:`

# our name -> the Hugging Face matrices it holds, one below the other; the first rows belong to the first
_LAYER: dict[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
    "attention_norm": ("input_layernorm",),
    "mlp_norm": ("post_attention_layernorm",),
}
_OUTER = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}


def _fused_names(layers: int) -> dict[str, tuple[str, ...]]:
    names = {
        f"{i}.{ours}": tuple(f"model.layers.{i}.{theirs}.weight" for theirs in fused)
        for i in range(layers)
        for ours, fused in _LAYER.items()
    }
    return {**names, **{ours: (f"{theirs}.weight",) for ours, theirs in _OUTER.items()}}


def fuse(weights: Weights, layers: int) -> Weights:
    """Hugging Face names to ours."""
    return {
        ours: torch.cat([weights[name] for name in names]) for ours, names in _fused_names(layers).items()
    }


def split(weights: Weights, architecture: Architecture) -> Weights:
    """Our names to those of a Hugging Face checkpoint."""
    shapes = _shapes(architecture, len(weights["embedding"]))
    checkpoint: Weights = {}
    for ours, names in _fused_names(architecture.layers).items():
        parts = torch.split(weights[ours], [shapes[name][0] for name in names])
        checkpoint.update((name, part.clone()) for name, part in zip(names, parts, strict=True))
    return checkpoint


def _shapes(a: Architecture, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Shapes by Hugging Face name, in the order of a checkpoint."""
    keys = a.kv_heads * a.head_size
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (a.hidden, a.hidden),
        "self_attn.k_proj": (keys, a.hidden),
        "self_attn.v_proj": (keys, a.hidden),
        "self_attn.o_proj": (a.hidden, a.hidden),
        "mlp.gate_proj": (a.intermediate, a.hidden),
        "mlp.up_proj": (a.intermediate, a.hidden),
        "mlp.down_proj": (a.hidden, a.intermediate),
        "input_layernorm": (a.hidden,),
        "post_attention_layernorm": (a.hidden,),
    }
    return {
        "model.embed_tokens.weight": (vocabulary, a.hidden),
        **{
            f"model.layers.{i}.{name}.weight": shape for i in range(a.layers) for name, shape in layer.items()
        },
        "model.norm.weight": (a.hidden,),
        "lm_head.weight": (vocabulary, a.hidden),
    }


def initial(architecture: Architecture, vocabulary: int, seed: int) -> Weights:
    """Normal weights of deviation .5 / sqrt(fan in), less by sqrt(layers) where a block writes; outer ones
    .02.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in _shapes(architecture, vocabulary).items():
        if len(shape) == 1:
            weights[name] = torch.ones(shape)
            continue
        deviation = 0.5 / math.sqrt(shape[1])
        if "o_proj" in name or "down_proj" in name:
            deviation /= math.sqrt(architecture.layers)
        if "layers" not in name:
            deviation = 0.02
        weights[name] = torch.randn(shape, generator=generator) * deviation
    return fuse(weights, architecture.layers)


@functools.cache
def _rope_and_mask(a: Architecture, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine and signed sine [length, 1, head size], the sign that of the half it multiplies, and the causal
    mask.
    """
    half = a.head_size // 2
    frequency = a.rope_theta ** (-torch.arange(half) / half)
    angle = torch.outer(torch.arange(length), frequency)[:, None]
    cos, sin = angle.cos(), angle.sin()
    mask = torch.full((length, length), -1e9).triu(1).repeat(a.heads // a.kv_heads, 1)
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype), mask.to(dtype)


def _norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, epsilon)


def _attention(qkv: Tensor, a: Architecture) -> Tensor:
    """Causal attention from queries, keys and values [batch, length, heads, head size]; [batch, length,
    hidden].

    Written out because torch's fused kernel is made for long sequences: at ten tokens its backward in
    bfloat16 takes three times as long.
    """
    batch, length = qkv.shape[:2]
    group = a.heads // a.kv_heads  # queries that share a key
    cos, sin, mask = _rope_and_mask(a, length, qkv.dtype)
    qk, v = torch.split(qkv, [a.heads + a.kv_heads, a.kv_heads], dim=2)
    qk = qk * cos + qk.roll(a.head_size // 2, -1) * sin
    q, k = (part.transpose(1, 2) for part in torch.split(qk, [a.heads, a.kv_heads], dim=2))
    q = q.reshape(batch * a.kv_heads, group * length, a.head_size)
    k = k.reshape(batch * a.kv_heads, length, a.head_size)
    v = v.transpose(1, 2).reshape(batch * a.kv_heads, length, a.head_size)
    shares = torch.baddbmm(mask, q, k.mT, alpha=a.head_size**-0.5).softmax(-1)
    return torch.bmm(shares, v).view(batch, a.heads, length, a.head_size).transpose(1, 2).flatten(2)


def features(
    weights: Weights, tokens: Tensor, architecture: Architecture, layers: int, positions: Tensor | None = None
) -> Tensor:
    """The residual stream after `layers` layers, for tokens [batch, length] padded on the right.

    All rows must begin with the same `OPENING` tokens: those are computed once, and the result is [n, hidden]
    for the n = `OPENING` + batch · (length - `OPENING`) tokens that differ (see `place`), or for the
    `positions` among them; the last layer then works at those positions only, beyond its keys and values.
    """
    a = architecture
    batch, length = tokens.shape
    x = F.embedding(torch.cat([tokens[0, :OPENING], tokens[:, OPENING:].flatten()]), weights["embedding"])
    for i in range(layers):
        qkv = F.linear(_norm(x, weights[f"{i}.attention_norm"], a.epsilon), weights[f"{i}.qkv"])
        opening, rest = torch.split(qkv.view(len(x), -1, a.head_size), [OPENING, len(x) - OPENING])
        rows = [opening.expand(batch, *opening.shape), rest.view(batch, length - OPENING, *rest.shape[1:])]
        attended = _attention(torch.cat(rows, dim=1), a)
        attended = torch.cat([attended[0, :OPENING], attended[:, OPENING:].flatten(0, 1)])
        if positions is not None and i == layers - 1:
            x, attended = x[positions], attended[positions]
        x = x + F.linear(attended, weights[f"{i}.out"])
        gate, up = F.linear(_norm(x, weights[f"{i}.mlp_norm"], a.epsilon), weights[f"{i}.gate_up"]).chunk(
            2, -1
        )
        x = x + F.linear(F.silu(gate) * up, weights[f"{i}.down"])
    return x


def place(row: int, column: int, length: int) -> int:
    """Where `features` puts token `column` of a row of `length` tokens."""
    return column if column < OPENING else OPENING + row * (length - OPENING) + column - OPENING


def logits(weights: Weights, tokens: Tensor, architecture: Architecture, positions: Tensor) -> Tensor:
    """Next-token logits [n, vocabulary] at `positions` (see `place`)."""
    x = features(weights, tokens, architecture, architecture.layers, positions)
    return F.linear(_norm(x, weights["norm"], architecture.epsilon), weights["head"])
