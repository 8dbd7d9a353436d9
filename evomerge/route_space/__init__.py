"""Genome <-> route: spaces whose points are stacks of layers taken from several models, perhaps scaled.

Genes are in units of the first sample's standard deviation, so one sigma, 1, fits all of them. Knows nothing of optimizers,
tensors or files.
"""

from __future__ import annotations

from evomerge.route_space.conditional import ConditionalSpace
from evomerge.route_space.hand import hand_routes
from evomerge.route_space.indicator import IndicatorSpace

__all__ = ["ConditionalSpace", "IndicatorSpace", "hand_routes"]
