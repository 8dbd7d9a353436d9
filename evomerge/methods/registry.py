"""Merge methods: one declaration and one kernel each, one paper a file.

`METHODS` is the only list of methods; axes of a search, validation, YAML keys, documentation and the property
tests derive from it.
"""

from __future__ import annotations

from evomerge.errors import RecipeError, suggest
from evomerge.methods.arcee_fusion import ARCEE_FUSION
from evomerge.methods.breadcrumbs import BREADCRUMBS, BREADCRUMBS_TIES
from evomerge.methods.dare import DARE_LINEAR, DARE_TIES
from evomerge.methods.declaration import Method
from evomerge.methods.della import DELLA, DELLA_LINEAR
from evomerge.methods.karcher import KARCHER
from evomerge.methods.linear import LINEAR
from evomerge.methods.model_stock import MODEL_STOCK
from evomerge.methods.multislerp import MULTISLERP
from evomerge.methods.nearswap import NEARSWAP
from evomerge.methods.nuslerp import NUSLERP
from evomerge.methods.passthrough import PASSTHROUGH
from evomerge.methods.ram import RAM, RAMPLUS_TL
from evomerge.methods.sce import SCE
from evomerge.methods.slerp import SLERP
from evomerge.methods.task_arithmetic import TASK_ARITHMETIC
from evomerge.methods.ties import TIES

METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        *(LINEAR, SLERP, NUSLERP, MULTISLERP, KARCHER),
        *(TASK_ARITHMETIC, TIES, DARE_LINEAR, DARE_TIES, BREADCRUMBS, BREADCRUMBS_TIES, DELLA, DELLA_LINEAR),
        *(SCE, RAM, RAMPLUS_TL, MODEL_STOCK),
        *(NEARSWAP, ARCEE_FUSION, PASSTHROUGH),
    )
}


def method(name: str) -> Method:
    """The method of that name; raises RecipeError with the nearest known name."""
    try:
        return METHODS[name]
    except KeyError:
        raise RecipeError(f"unknown merge method {name[:80]!r}. {suggest(name, METHODS)}") from None
