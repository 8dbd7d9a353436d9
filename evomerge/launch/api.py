"""The functions of `import evomerge`: plan and run searches, compare candidates, merge and export models."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.config import loading
from evomerge.errors import ConfigError
from evomerge.evaluation import ROLES, Role
from evomerge.launch.references import split_reference
from evomerge.launch.search_request import SearchRequest, load
from evomerge.launch.study_view import StudyView
from evomerge.launch.threads import set_thread_defaults
from evomerge.recipes import Recipe
from evomerge.store import Store, paths

if TYPE_CHECKING:
    from evomerge.search import Progress

SearchLike = SearchRequest | Mapping[str, Any] | str | Path
"""A search: what `load` gave, or what it takes."""


def plan(
    search: SearchLike,
    *,
    probe: bool = False,
    allow_python: bool = False,
    allow_tasks: bool = False,
    allow_code_execution: bool = False,
) -> dict[str, Any]:
    """Checks a search before it starts: its models, space, tasks with their items, and the work that it is.

    Args:
        search: What `load` gave, or what it takes.
        probe: Load the base too, try which scoring techniques it can be trusted with, and time a candidate.
        allow_python: Run the Python functions that the search names as tasks.
        allow_tasks: Load the task folders that the search includes; a task file is code.
        allow_code_execution: Run the programs that models write, where a task scores them so, in child
            processes with limits.

    Returns:
        Plain data, as `evomerge plan --json` prints it.

    Raises:
        EvomergeError: What starting the search would raise.
    """
    from evomerge.launch.dry_run import plan_search
    from evomerge.launch.opening import Allowed

    request = load(search)
    _check_tasks(request, search)
    allowed = Allowed(allow_python, allow_tasks, allow_code_execution)
    return plan_search(request.effective_settings, probe=probe, allowed=allowed)


def run(
    search: SearchLike,
    *,
    root: str | Path | None = None,
    resume: bool = False,
    workers: int = 1,
    on_progress: Callable[[Progress], None] | None = None,
    allow_python: bool = False,
    allow_tasks: bool = False,
    allow_code_execution: bool = False,
    allow_notify: bool = False,
    accept_floor: bool = False,
) -> StudyView:
    """Runs a search to its end.

    Args:
        search: What `load` gave, or what it takes.
        root: Folder of the studies; None for $EVOMERGE_ROOT, else results.
        resume: Go on with the study if it exists.
        workers: Processes of this machine that evaluate candidates; one is this process. A program that asks
            for more runs
            under `if __name__ == "__main__":`.
        on_progress: Called with what the search has done so far; its `note` is a line worth printing, or ''.
        allow_python: Run the Python functions that the search names as tasks.
        allow_tasks: Load the task folders that the search includes; a task file is code.
        allow_code_execution: Run the programs that models write, where a task scores them so, in child
            processes with limits.
        allow_notify: Run the commands and call the addresses that the search names under `notify`.
        accept_floor: Begin also where no parent has anything right in a task, or all answer it alike.

    Returns:
        The finished study.

    Raises:
        StudyError: If the study exists and `resume` is not set, or it was begun with other settings, models
            or tasks.
        TaskError: If no parent has anything right in a task, and that is not accepted.
        Paused: If another process asked the search to stop.
    """
    set_thread_defaults()
    from evomerge import reports
    from evomerge.launch.listeners import open_listeners
    from evomerge.launch.opening import Allowed
    from evomerge.launch.prepare import prepare_study
    from evomerge.launch.running import run_study

    request = load(search)
    _check_tasks(request, search)
    study = prepare_study(
        replace(request, resume=resume or request.resume),
        _root(root),
        allowed=Allowed(allow_python, allow_tasks, allow_code_execution, allow_notify),
        workers=workers,
        show=on_progress or _silent,
        accept_floor=accept_floor,
    )
    with study.store, contextlib.closing(study.pool):
        run_study(study, open_listeners(request.effective_settings, study.store), on_progress)
        study.store.path.with_name("report.md").write_text(
            reports.study_markdown(study.store), encoding="utf-8"
        )
    return StudyView(study.store.path)


def compare(
    candidates: Sequence[str],
    *,
    role: Role = "test",
    task: str | None = None,
    score: bool = False,
    root: str | Path | None = None,
) -> dict[str, Any]:
    """Compares candidates of one study or several on the items that all were scored on.

    Args:
        candidates: 'STUDY/ID', 'STUDY/best' or 'STUDY/LABEL' of each, two or more; the others are compared
            with the first.
        role: Whose items: 'search', 'validation' or 'test'.
        task: The only task to compare on; None for all, and the objective.
        score: Score now what is missing, which opens models; a look at test items is stored and counted.
        root: Folder of the studies; None for $EVOMERGE_ROOT, else results.

    Returns:
        Plain data, see `evomerge.reports.comparison.compare`.

    Raises:
        ConfigError: For fewer than two candidates or an unknown role.
        StudyError: If the studies have other tasks, or no items are shared.
    """
    from evomerge.launch import rescoring

    if len(candidates) < 2:
        raise ConfigError(f"compare takes two candidates or more, got {len(candidates)}")
    if role not in ROLES:
        raise ConfigError(f"role must be {', '.join(ROLES)}, got '{role}'")
    named = [(candidate, *split_reference(candidate)) for candidate in candidates]
    return rescoring.compare(named, _root(root), rescoring.CompareRequest(role, task, None, score))


def sensitivity(
    candidate: str,
    *,
    step: float = 0.1,
    span: float = 0.3,
    axes: str | None = None,
    role: Role = "search",
    items: int | None = None,
    root: str | Path | None = None,
) -> dict[str, Any]:
    """Scans how a candidate's score depends on each coefficient, all others fixed; points are stored.

    Args:
        candidate: 'STUDY/ID' or 'STUDY/best', of a search of weights.
        step: Distance of two points of a coefficient, in its own units.
        span: How far to both sides, within the coefficient's bounds.
        axes: Part of the axes' names, or a pattern with * and ?; None for all.
        role: Whose items: 'search' or 'validation'.
        items: Items of each task; None for as many as a generation has.
        root: Folder of the studies; None for $EVOMERGE_ROOT, else results.

    Returns:
        Plain data: the candidate's score, and for each axis its steps, slope and verdict.

    Raises:
        StudyError: If the candidate is of a stage of routes, or models or tasks have changed.
    """
    set_thread_defaults()
    from evomerge.launch import rescoring

    if role not in ROLES[:2]:
        raise ConfigError(f"role must be search or validation, got '{role}'")
    study, reference = split_reference(candidate)
    request = rescoring.ScanRequest(step, span, axes, role, items)
    with Store.open(paths.store_path(study, _root(root)), write=True) as store:
        return rescoring.sensitivity(store, reference, request)


def merge(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    models: Mapping[str, str] | None = None,
    policy: str = "float32",
    memory: int | None = None,
) -> tuple[str, ...]:
    """Merges by a recipe into a new Hugging Face folder.

    Args:
        recipe: A recipe, a mergekit YAML of any form, or an exported recipe.json.
        out: Folder to make; it appears whole or not at all.
        models: Of a `Recipe`: model name -> path or repository[@revision]; a name that is left out is one
            itself.
        policy: Arithmetic of a YAML: 'float32' rounds once, 'mergekit' has its types and operations.
        memory: Bytes that merging may hold beside the parents' mapped files; None for no limit.

    Returns:
        Warnings, each a sentence.

    Raises:
        RecipeError: For a recipe that cannot be merged.
        CheckpointError: For parents that do not fit.
        SetupError: If the folder exists.
    """
    from evomerge.checkpoints import open_parent
    from evomerge.export.merge_card import Origin
    from evomerge.export.recipe_file import merge_recipe, merge_recipe_file

    if not isinstance(recipe, Recipe):
        return merge_recipe_file(Path(recipe), Path(out), policy=policy, memory=memory)
    references = {name: (models or {}).get(name, name) for name in recipe.models}
    parents = {name: open_parent(reference) for name, reference in references.items()}
    return merge_recipe(Origin(recipe, references), parents, Path(out), memory=memory)


def export_candidate(
    study: StudyView | str | Path,
    candidate: int | str,
    out: str | Path,
    *,
    weights: bool = False,
    root: str | Path | None = None,
) -> Path:
    """Writes a candidate's mergekit recipe, model card and lineage, and its weights if asked.

    Args:
        study: What `open_study` or `run` gave, or what `open_study` takes.
        candidate: Its number, 'best', or the label of a parent or hand recipe.
        out: Folder to make; it appears whole or not at all.
        weights: Write the merged model too.
        root: Folder of the studies, for a study by name.

    Returns:
        The folder.

    Raises:
        StudyError: If there is no such study or candidate, or a parent has changed.
        NothingToExport: If the candidate failed.
        SetupError: If the folder exists.
    """
    from evomerge.launch.study_view import open_study

    view = study if isinstance(study, StudyView) else open_study(study, root=root)
    return view.export(candidate, out, weights=weights)


def _check_tasks(request: SearchRequest, search: SearchLike) -> None:
    """Raises ConfigError for a task's name that is written wrong, before anything is opened."""
    name = str(search) if isinstance(search, str | Path) else "the search file"
    loading.check_tasks(request.settings, request.text, name)


def _root(root: str | Path | None) -> Path:
    return paths.root(None if root is None else Path(root))


def _silent(progress: Progress) -> None:
    """Shows no progress."""
