"""Genome <-> route: spaces whose points are stacks of layers taken from several models, perhaps scaled.

Genes are in units of the first sample's standard deviation, so one sigma, 1, fits all of them. Knows nothing of optimizers,
tensors or files.
"""

from __future__ import annotations

from evomerge.spaces.routes.hand_routes import hand_routes
from evomerge.spaces.routes.layer_indicators import LayerIndicatorSpace
from evomerge.spaces.routes.position_choices import PositionChoiceSpace

__all__ = ["LayerIndicatorSpace", "PositionChoiceSpace", "hand_routes"]
