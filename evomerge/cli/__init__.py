"""The `evomerge` command: verbs parse, make one library call and print. Heavy imports stay inside the verbs."""

from evomerge.cli.main import main

__all__ = ["main"]
