"""Genome <-> route: spaces whose points are stacks of layers taken from several models, perhaps scaled.

`layer_pool` holds the layers that a route may take and writes a route as a recipe. `layer_indicators` says of
every layer of every model whether it is on the route; `position_choices` changes single positions of one
model's path. `relaxation` has shares of the models at each depth in place of a choice, for a gradient.
`hand_routes` are the stacks that people write by hand.

Genes are in units of the first sample's standard deviation, so one sigma, 1, fits all of them. Knows nothing
of optimizers, tensors or files.
"""

from __future__ import annotations

from evomerge.spaces.routes.hand_routes import hand_routes
from evomerge.spaces.routes.layer_indicators import LayerIndicatorSpace
from evomerge.spaces.routes.layer_pool import LayerPool
from evomerge.spaces.routes.position_choices import PositionChoiceSpace

__all__ = ["LayerIndicatorSpace", "LayerPool", "PositionChoiceSpace", "hand_routes"]
