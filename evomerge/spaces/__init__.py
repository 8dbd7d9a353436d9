"""Genome <-> recipe: the only place where a vector becomes a recipe, and the hand recipes to beat."""

from __future__ import annotations

from evomerge.spaces.base import Axis, SearchSpace
from evomerge.spaces.baselines import Baseline, baselines, soup
from evomerge.spaces.route_weights import RouteWeightSpace
from evomerge.spaces.weights import Range, WeightSpace

__all__ = ["Axis", "Baseline", "Range", "RouteWeightSpace", "SearchSpace", "WeightSpace", "baselines", "soup"]
