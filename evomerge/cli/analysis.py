"""Verbs that inspect and start no search: plan, show, compare, sensitivity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from evomerge.cli import completion
from evomerge.cli.options import (
    AllowCode,
    AllowPython,
    AllowTasks,
    Json,
    Root,
    allowed,
    open_store,
    reading_store,
)
from evomerge.cli.output import note, put
from evomerge.errors import ConfigError
from evomerge.launch.references import split_reference


def plan(
    config: Annotated[
        str,
        typer.Argument(
            help="Search file, or the name of a shipped search space.", autocompletion=completion.search_files
        ),
    ],
    probe: Annotated[
        bool, typer.Option("--probe", help="Load the base, try the scoring techniques and time a candidate.")
    ] = False,
    cards: Annotated[
        str | None,
        typer.Option(
            "--cards",
            metavar="NUMBERxSIZE",
            help="Plan memory for such cards, e.g. 4x80GB, instead of this machine's.",
        ),
    ] = None,
    allow_python: AllowPython = False,
    allow_tasks: AllowTasks = False,
    allow_code: AllowCode = False,
    root: Root = None,
    as_json: Json = False,
) -> None:
    """Check a search before it starts.

    Shows its models, space, tasks with their items, the work that it is, what lies where in memory, and what
    it takes on disk, of the cluster and of money. Writes nothing.
    """
    note(f"checking {config}")
    from evomerge.cli import analysis_tables
    from evomerge.config import loading
    from evomerge.launch.dry_run import plan_search
    from evomerge.launch.memory import named_cards

    named = None if cards is None else named_cards(cards)
    settings, text = loading.load(config)
    loading.check_tasks(settings, text, config)
    permitted = allowed(allow_python, allow_tasks, allow_code)
    data = plan_search(settings, probe=probe, allowed=permitted, cards=named, root=root, show=note)
    put(json.dumps(data, indent=2) if as_json else analysis_tables.plan_text(data))


def show(
    candidate: Annotated[
        str,
        typer.Argument(
            help="STUDY/ID, STUDY/best, STUDY/LABEL of a parent or hand recipe, STUDY/pareto; "
            "STUDY with --csv or --parquet.",
            autocompletion=completion.candidates,
        ),
    ],
    whole: Annotated[bool, typer.Option("--all", help="Show every row of coefficients.")] = False,
    to_csv: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write all candidates into a CSV file.")
    ] = None,
    to_parquet: Annotated[
        Path | None,
        typer.Option("--parquet", metavar="FILE", help="Write all candidates into a Parquet file."),
    ] = None,
    root: Root = None,
    as_json: Json = False,
) -> None:
    """Show one candidate or the Pareto front, or write all candidates into a table.

    Of a candidate: where it comes from, its scores, how much of each model it takes, or why it failed. Of
    STUDY/pareto: the candidates that no other betters in every task.
    """
    if to_csv is not None or to_parquet is not None:
        _write_tables(candidate.partition("/")[0], root, to_csv, to_parquet)
        return
    from evomerge import reports
    from evomerge.cli import analysis_tables, study_tables

    study, reference = split_reference(candidate)
    with reading_store(study, root) as store:
        row = store.study()
        if reference == "pareto":
            front = reports.front(store)
            put(json.dumps(front, indent=2) if as_json else analysis_tables.front_table(front))
            return
        trial = reports.resolve(store, reference)
        data = reports.candidate(store, trial)
        recipe = store.recipe(trial.recipe_id)
        backends = dict(row.facts.backends) if row else {}
        if as_json:
            more = {"backends": backends, "recipe_body": json.loads(recipe.canonical())}
            put(json.dumps(data | more, indent=2))
        else:
            put(
                "\n".join(
                    [study_tables.candidate_text(data, whole), *analysis_tables.backend_lines(backends)]
                )
            )


def _write_tables(study: str, root: Path | None, to_csv: Path | None, to_parquet: Path | None) -> None:
    """Writes every candidate of a study into a table of each kind that is asked for."""
    from evomerge.reports.candidate_table import candidate_rows, write_candidates

    for file, suffix in ((to_csv, ".csv"), (to_parquet, ".parquet")):
        if file is not None and file.suffix.lower() != suffix:
            raise ConfigError(f"'{file}' is to end with {suffix}, which says what kind of table it is")
    with reading_store(study, root) as store:
        rows = candidate_rows(store)
    for file in (to_csv, to_parquet):
        if file is not None:
            write_candidates(rows, file)
            put(f"{file}: {len(rows)} candidates, {len(rows[0])} columns")


def compare(
    candidates: Annotated[
        list[str],
        typer.Argument(
            help="STUDY/ID, STUDY/best or STUDY/LABEL of a parent or hand recipe; two or more.",
            autocompletion=completion.candidates,
        ),
    ],
    role: Annotated[str, typer.Option(help="Items to compare on: test, validation or search.")] = "test",
    task: Annotated[str | None, typer.Option(help="One task only.")] = None,
    samples: Annotated[
        int | None,
        typer.Option(help="Show this many items with every model's output, those that differ first."),
    ] = None,
    score: Annotated[
        bool, typer.Option("--score", help="Score now what is missing; a look at test items is counted.")
    ] = False,
    allow_python: AllowPython = False,
    allow_tasks: AllowTasks = False,
    allow_code: AllowCode = False,
    root: Root = None,
    as_json: Json = False,
) -> None:
    """Compare candidates item by item.

    Of one study or several: their scores, and paired differences to the first; with --samples their outputs
    too.
    """
    from evomerge.cli import analysis_tables
    from evomerge.cli import progress as progress_module
    from evomerge.evaluation import ROLES
    from evomerge.launch import rescoring
    from evomerge.store.paths import root as studies_root

    if len(candidates) < 2:
        raise ConfigError(f"compare takes two candidates or more, got {len(candidates)}; for one, use show")
    if role not in ROLES:
        raise ConfigError(f"--role must be {', '.join(ROLES)}, got '{role}'")
    request = rescoring.CompareRequest(role, task, samples, score)
    with progress_module.bar("candidates") as progress:
        data = rescoring.compare(
            [(name, *split_reference(name)) for name in candidates],
            studies_root(root),
            request,
            allowed=allowed(allow_python, allow_tasks, allow_code),
            show=progress,
        )
    put(json.dumps(data, indent=2) if as_json else analysis_tables.comparison_table(data, role))


def sensitivity(
    candidate: Annotated[
        str, typer.Argument(help="STUDY/ID or STUDY/best.", autocompletion=completion.candidates)
    ],
    step: Annotated[float, typer.Option(help="Step of a coefficient, in its own units.")] = 0.1,
    span: Annotated[
        float, typer.Option(help="How far to both sides, within the coefficient's bounds.")
    ] = 0.3,
    axes: Annotated[
        str | None, typer.Option(help="Part of the axes' names, or a pattern with * and ?; all if left out.")
    ] = None,
    role: Annotated[str, typer.Option(help="Items to score on: search or validation.")] = "search",
    items: Annotated[
        int | None, typer.Option(help="Items of each task; as many as a generation has if left out.")
    ] = None,
    gradient: Annotated[
        bool,
        typer.Option("--gradient", help="Derivatives by all coefficients from one backward pass; no scan."),
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the curves into this .png, .svg or .pdf.")] = None,
    allow_python: AllowPython = False,
    allow_tasks: AllowTasks = False,
    allow_code: AllowCode = False,
    root: Root = None,
    as_json: Json = False,
) -> None:
    """Scan each coefficient of a candidate.

    Shows how its score depends on one coefficient, all others fixed. Points are stored; the same command goes
    on. With --gradient: the derivative of the right answers' probability by each, beside stored scans.
    """
    from evomerge.cli import analysis_tables
    from evomerge.cli import progress as progress_module
    from evomerge.evaluation import ROLES
    from evomerge.launch import derivatives, rescoring

    if role not in ROLES[:2]:
        raise ConfigError(
            f"--role must be search or validation, got '{role}'; test items are for the final score alone"
        )
    if gradient and plot is not None:
        raise ConfigError(
            "--plot draws the curves of a scan and --gradient makes none; leave one of them out"
        )
    study, reference = split_reference(candidate)
    request = rescoring.ScanRequest(step, span, axes, role, items)
    may = allowed(allow_python, allow_tasks, allow_code)
    if gradient:
        with reading_store(study, root) as store, progress_module.bar("shards of items") as progress:
            data = derivatives.differentiate(store, reference, request, allowed=may, show=progress)
        put(json.dumps(data, indent=2) if as_json else analysis_tables.derivatives_table(data))
        return
    with open_store(study, root, write=True) as store, progress_module.bar("points") as progress:
        data = rescoring.sensitivity(
            store,
            reference,
            request,
            plot=plot,
            allowed=may,
            show=progress,
        )
    put(json.dumps(data, indent=2) if as_json else analysis_tables.sensitivity_table(data))
