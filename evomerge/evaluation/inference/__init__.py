"""Log-likelihoods and greedy generation on a live transformers model, fast and exactly, from token ids.

Which optimizations a model can be trusted with (shared prefixes, cache forks, token trees, continuous batching) is decided
by numbers, not by a list of names. Knows nothing of lm-eval, tasks or merging: token ids in, numbers and token ids out.
"""

from __future__ import annotations

from evomerge.evaluation.inference.generation import Generator
from evomerge.evaluation.inference.generation_probe import choose_decoder, probe_decoders
from evomerge.evaluation.inference.logits_processors import refusal

__all__ = ["Generator", "choose_decoder", "probe_decoders", "refusal"]
