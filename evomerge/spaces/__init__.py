"""Genome <-> recipe: the only place where a vector becomes a recipe, and the hand recipes to beat.

`weights` merges whole models by groups of layers, `method_choices` chooses the method of each group too,
`routes` stacks layers of several models, `route_weights` merges the layers of a given route. All of them are
a `SearchSpace` (`base`): axes with names, a start, `decode` and `encode`. `logistic_curve` maps a gene to a
value inside its bounds; `baselines` are parents and recipes written by hand. Optimizers know none of this:
they see vectors.
"""

from __future__ import annotations

from evomerge.spaces.base import Axis, SearchSpace
from evomerge.spaces.baselines import Baseline, baselines, soup
from evomerge.spaces.method_choices import MergeSpace, MethodChoiceSpace, first_method
from evomerge.spaces.route_weights import RouteWeightSpace
from evomerge.spaces.weights import Range, WeightSpace

__all__ = [
    "Axis",
    "Baseline",
    "MergeSpace",
    "MethodChoiceSpace",
    "Range",
    "RouteWeightSpace",
    "SearchSpace",
    "WeightSpace",
    "baselines",
    "first_method",
    "soup",
]
