"""The `evomerge` command line: each verb parses its options, makes one library call and prints.

- `app`: the verbs in their groups, and the edge where an exception becomes one line and an exit code
- `run` (run, resume), `control` (status, stop), `analysis` (plan, show, compare, sensitivity), `ship`
  (export, merge), `doctor`: the verbs
- `options`: what several verbs take; `screen`: what a running search shows; `progress`: signals meanwhile
- `study_tables`, `analysis_tables`: plain data -> text for the terminal

Heavy imports (torch, rich, the store) stay inside the verbs, so that `--help` starts at once.
"""

from evomerge.cli.app import main

__all__ = ["main"]
