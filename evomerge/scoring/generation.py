"""Greedy generation on a live model: everything its callers need.

`probe_decoders` finds what the model can be trusted with, `choose_decoder` takes the fastest of it, `refusal` says which
settings have to be left to HFLM, `Generator` compiles prompts into a plan and runs it on candidate after candidate.
"""

from evomerge.scoring.generator import Generator
from evomerge.scoring.processors import refusal
from evomerge.scoring.regret import choose_decoder, probe_decoders

__all__ = ["Generator", "choose_decoder", "probe_decoders", "refusal"]
