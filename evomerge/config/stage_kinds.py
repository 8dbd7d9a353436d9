"""The kinds of stages that a search is made of, by name; loads nothing heavy.

A new kind is a file in `evomerge.launch` with its opener, and an entry of `STAGES` here: the search file, its
checks, the dry run and the search read this registry.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True, slots=True)
class StageKind:
    """A kind of stage: what it searches and what opens it.

    Attributes:
        name: What a search file calls it.
        summary: What it searches, in one line.
        opener: 'module:function' of the function that opens it, see `evomerge.launch.stages.StageRequest`;
            imported when a
            search is opened, since it loads torch.
        blocks: The blocks of the search file that it reads beside `search` and its own entry of `stages`.
        at_most: How many stages of this kind a search may have; two never follow one another.
        of_weights: Whether it searches coefficients of a merge of whole models.
        is_learned: Whether it learns by gradients: its budget is `steps`, and it has no population.
    """

    name: str
    summary: str
    opener: str
    blocks: tuple[str, ...]
    at_most: int
    of_weights: bool = False
    is_learned: bool = False

    def load_opener(self) -> Callable[..., Any]:
        """The opener, imported."""
        module, _, function = self.opener.partition(":")
        opener: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return opener


STAGES: dict[str, StageKind] = {
    kind.name: kind
    for kind in (
        StageKind(
            "weights",
            "the parameters of a merge method by layer group; after routes, those of the best route's hops",
            "evomerge.launch.weight_stages:open_weight_stage",
            blocks=("method", "space"),
            at_most=2,
            of_weights=True,
        ),
        StageKind(
            "learned",
            "the weights of a merge by tensor or coarser, by the gradient of the right answers' probability",
            "evomerge.launch.learned_stage:open_learned_stage",
            blocks=("method", "space"),
            at_most=2,
            of_weights=True,
            is_learned=True,
        ),
        StageKind(
            "routes",
            "which layers of which models a hidden state passes, in which order",
            "evomerge.launch.route_stages:open_route_stage",
            blocks=("routes",),
            at_most=1,
        ),
    )
}
"""Name in the search file -> kind."""
LEARNED_STEPS = 40
"""Steps of a learned stage where the search file does not say."""


def check_sequence(kinds: Sequence[str]) -> str:
    """Checks the order of a search's stages.

    Args:
        kinds: Their names, each a key of `STAGES`, at least one.

    Returns:
        A sentence that says what is wrong and what is allowed; '' where nothing is.
    """
    for before, after in pairwise(kinds):
        if before == after and not STAGES[before].is_learned:
            return f"two stages of {after} follow one another; give the first one more evaluations"
    if "learned" in kinds and "routes" in kinds[: kinds.index("learned")]:
        return "a route has no derivatives yet; put the learned stage before the stage of routes"
    for name in kinds:
        count, at_most = kinds.count(name), STAGES[name].at_most
        if count > at_most:
            times = "once" if at_most == 1 else f"{at_most} times"
            return f"a search has stages of {name} at most {times}, got {count}"
    return ""
