"""What a merge is, as values: recipes, the tokenizers they specify, chat templates and mergekit's YAML.

Nothing here loads torch or reads a model: a `Recipe` is the only thing that travels between the packages of a
search.
"""

from __future__ import annotations

from evomerge.recipes.recipe import (
    STORED,
    Filtered,
    Mix,
    ParamValue,
    PerRow,
    Recipe,
    Setting,
    Source,
    params,
    setting,
)
from evomerge.recipes.tokenizer_spec import WHOLE, ZERO, TokenDonor, TokenizerSpec

__all__ = [
    "STORED",
    "WHOLE",
    "ZERO",
    "Filtered",
    "Mix",
    "ParamValue",
    "PerRow",
    "Recipe",
    "Setting",
    "Source",
    "TokenDonor",
    "TokenizerSpec",
    "params",
    "setting",
]
