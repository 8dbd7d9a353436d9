"""Experiment trackers that a search is written to: TensorBoard, Weights & Biases, trackio, MLflow.

- `tracker`: `Tracker`, a protocol of three methods, and `TRACKERS`, the registry
- `tracking`: `Tracking`, the listener that runs one tracker in a thread of its own, so that none can end or
  delay a search
- `tensorboard`, `weights_and_biases`, `trackio_runs`, `mlflow_runs`: one tracker each

Steps are evaluations: candidates that count for the budget. Loads no tracker before a search names one.
"""

from __future__ import annotations

from evomerge.reports.trackers.tracker import TRACKERS, Place, Tracker, TrackerKind
from evomerge.reports.trackers.tracking import Tracking, open_tracking

__all__ = ["TRACKERS", "Place", "Tracker", "TrackerKind", "Tracking", "open_tracking"]
