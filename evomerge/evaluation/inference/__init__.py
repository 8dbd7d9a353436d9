"""Log-likelihoods and greedy generation on a live transformers model, fast and exactly, from token ids.

- `loglikelihood`, `loglikelihood_plan`, `loglikelihood_probe`: scoring of continuations, its plans, and the
  verification of its optimizations (shared prefixes, forks of a cache, token trees).
- `generation`, `generation_plan`, `generation_probe`: greedy decoding, its plans, and the verification of its
  decoders; `continuous_batching` and `static_batching` are the two ways to decode, `device_batching` the
  first with its state on an accelerator.
- `cuda_graphs`, `plan_replay`: what a card runs again without Python. `budgets`: how much a forward may hold.
- `forward`, `selected_logits`, `kv_cache`, `attention_masks`: one forward of a model. `prefix_tree`,
  `shared_prefill`: what prompts share. `logits_processors`, `stop_strings`: what transformers' `generate` and
  lm-eval do beside decoding.

Which optimizations a model can be trusted with is measured, not read off a list of names. Token ids in,
numbers and token ids out: this package knows nothing of lm-eval, tasks or merging.
"""

from __future__ import annotations

from evomerge.evaluation.inference.generation import GenerationLimits, Generator, TextRules
from evomerge.evaluation.inference.generation_probe import choose_decoder, probe_decoders
from evomerge.evaluation.inference.logits_processors import unsupported_reason

__all__ = [
    "GenerationLimits",
    "Generator",
    "TextRules",
    "choose_decoder",
    "probe_decoders",
    "unsupported_reason",
]
