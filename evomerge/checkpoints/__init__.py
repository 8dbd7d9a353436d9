"""Parent models on disk: headers, tensor names, adapters, the Hub's cache. Every file is taken to be a stranger's."""

from __future__ import annotations

from evomerge.checkpoints.checkpoint import Checkpoint
from evomerge.checkpoints.hub import locate
from evomerge.checkpoints.parent import COMPONENTS, Parent, Place, check_compatible
from evomerge.checkpoints.reference import open_parent

__all__ = ["COMPONENTS", "Checkpoint", "Parent", "Place", "check_compatible", "locate", "open_parent"]
