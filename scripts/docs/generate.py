"""Writes docs/reference from the code: search file, merge methods, optimizers, registries, commands.

python scripts/docs/generate.py           # writes the pages
python scripts/docs/generate.py --check   # exit 1 if a page differs from what would be written
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import typer

from evomerge.cli.app import app
from evomerge.config.reference import rows as key_rows
from evomerge.config.stage_kinds import STAGES
from evomerge.evaluation.lm_harness.backends import BACKENDS
from evomerge.methods import METHODS
from evomerge.methods.fused.one_pass import BACKENDS as KERNEL_BACKENDS
from evomerge.optimizers import OPTIMIZERS
from evomerge.workers.registry import POOLS

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "reference"
NOTE = "<!-- Written by scripts/docs/generate.py; do not edit. -->\n"


def cell(text: object) -> str:
    """Text as one cell of a Markdown table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell(value) for value in line) + " |" for line in lines) + "\n"


def code(text: object) -> str:
    """Text as inline code; nothing for an empty text."""
    return f"`{text}`" if str(text) else ""


def search_file() -> str:
    """The page of the search file: every key with type, default and one line."""
    header = ("key", "type", "default", "meaning")
    blocks: dict[str, list[Sequence[object]]] = {}
    for row in key_rows():
        block, _, _ = row.path.partition(".")
        name = block if "." in row.path else ""
        text = row.description
        if row.renamed_from:
            text += f" (formerly `{row.renamed_from}`)"
        blocks.setdefault(name, []).append((code(row.path), row.type, code(row.default), text))
    parts = [
        "# Search file",
        "Every key. [A search file, explained](../search-file.md) goes through a complete one. "
        "Renamed keys are read under their former name for one version, with a warning.",
    ]
    for name, rows in blocks.items():
        parts += [f"## `{name}`" if name else "## Top level", table(header, rows)]
    return "\n\n".join(parts)


def interval(low: float, high: float) -> str:
    """Bounds of a parameter."""
    return f"{low:g} to {high:g}"


def methods() -> str:
    """The page of merge methods: declarations as tables."""
    header = ("method", "what it does", "parameters", "source")
    rows = [
        (code(m.name), m.summary, ", ".join(code(p.name) for p in m.params), m.paper)
        for m in METHODS.values()
    ]
    parts = [
        "# Merge methods",
        table(header, rows),
        "## Parameters",
        "*Searched* says whether the parameter is searched where the search file does not name it; any "
        "parameter that is no switch can be given a range or a fixed number under `space.parameters`.",
    ]
    for m in METHODS.values():
        if not m.params:
            continue
        lines = [
            (
                code(p.name),
                "each model" if p.per == "model" else "the merge",
                "switch" if p.flag else interval(p.low, p.high),
                "required" if p.required else f"{p.default:g}",
                "yes" if p.searched else "no",
            )
            for p in m.params
        ]
        parts += [f"### `{m.name}`", table(("parameter", "one for", "range", "default", "searched"), lines)]
    return "\n\n".join(parts)


def optimizers() -> str:
    """The page of optimizers."""
    header = ("optimizer", "what it does", "takes numbers", "takes choices")
    rows = [
        (code(name), o.summary, "yes" if o.takes_numbers else "no", "yes" if o.takes_categories else "no")
        for name, o in OPTIMIZERS.items()
    ]
    return "\n\n".join(
        (
            "# Optimizers",
            "`search.optimizer` names the optimizer of a stage of weights, `routes.optimizer` that of a "
            "stage of routes. Both are given numbers where the genome is numbers, choices where it is "
            "choices.",
            table(header, rows),
        )
    )


def summary(entry: Any) -> str:
    """One line about a registry entry; of a module, the first sentence of its docstring."""
    return entry.summary if hasattr(entry, "summary") else (entry.__doc__ or "").split("\n\n")[0]


def registries() -> str:
    """The page of stages, evaluation backends, kernel backends and pools."""
    sections: list[tuple[str, str, Iterable[tuple[str, Any]]]] = [
        ("Stages", "Kinds of stages, the values of `stages: [{stage: ...}]`.", STAGES.items()),
        ("Evaluation backends", "Values of `evaluation.backend`.", BACKENDS.items()),
        (
            "Kernel backends",
            "The first that fits a tensor merges it.",
            ((backend.name, backend) for backend in KERNEL_BACKENDS),
        ),
        ("Pools", "Where candidates are evaluated.", POOLS.items()),
    ]
    parts = ["# Stages, backends and pools"]
    for title, text, entries in sections:
        rows = [(code(name), summary(entry)) for name, entry in entries]
        parts += [f"## {title}", text, table(("name", "what it is"), rows)]
    return "\n\n".join(parts)


def commands() -> str:
    """The page of the command line, from typer's own description of it."""
    parts = ["# Commands", "`evomerge --help` lists the verbs, `evomerge VERB --help` the options of one."]
    group = typer.main.get_command(app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option"]
        shown = [p.name.upper() if p.required else f"[{p.name.upper()}]" for p in arguments]
        usage = " ".join([f"evomerge {name}", *shown, "[OPTIONS]"])
        parts += [f"## evomerge {name}", code(usage), command.help or ""]
        rows = [(code(p.name.upper()), getattr(p, "help", "") or "") for p in arguments]
        rows += [(", ".join(code(o) for o in (*p.opts, *p.secondary_opts)), p.help or "") for p in options]
        parts.append(table(("argument or option", "meaning"), rows))
    return "\n\n".join(parts)


PAGES: dict[str, Callable[[], str]] = {
    "search-file.md": search_file,
    "methods.md": methods,
    "optimizers.md": optimizers,
    "registries.md": registries,
    "cli.md": commands,
}


def main() -> int:
    """Writes or checks the pages; 1 where a check fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page differs")
    check = parser.parse_args().check
    stale = []
    for name, page in PAGES.items():
        text = NOTE + "\n" + page().rstrip() + "\n"
        file = REFERENCE / name
        if check and (not file.exists() or file.read_text() != text):
            stale.append(name)
        elif not check:
            file.write_text(text)
    if stale:
        print(
            f"docs/reference is stale: {', '.join(stale)}; run python scripts/docs/generate.py",
            file=sys.stderr,
        )
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
