"""An exported candidate is made again by mergekit, and both folders are scored again."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evomerge.checkpoints import Checkpoint, Parent
from evomerge.errors import CheckpointError, ConfigError, SetupError
from evomerge.evaluation import Evaluation, Items, ItemScore
from evomerge.evaluation.intervals import lead_interval
from evomerge.export import route_mergekit
from evomerge.export.recipe_file import merge_recipe_file
from evomerge.export.stored_candidate import StoredCandidate
from evomerge.export.verification import Rescore, Verification
from evomerge.launch.opening import Allowed, Opened, device_name, open_stored_search
from evomerge.merging import mergekit_check
from evomerge.merging.mergekit_check import Comparison
from evomerge.merging.model_loading import load_model
from evomerge.methods import method
from evomerge.store import Scored, Store, Trial

ENVIRONMENT = "EVOMERGE_MERGEKIT_ENV"
"""Variable that names mergekit's virtual environment."""
_DEFAULT = ".venv-mergekit"
_ROLES = ("test", "validation", "search")
"""Roles whose items are scored again, the first that the candidate was scored on: test items are not looked
at for a candidate that no test has seen."""


@dataclass(frozen=True, slots=True)
class VerificationRequest:
    """How an export is verified.

    Attributes:
        environment: Virtual environment with mergekit 0.1.5.
        models: 'NAME=PATH' of models that have moved.
        allowed: What the tasks may do.
    """

    environment: Path
    models: Sequence[str] = ()
    allowed: Allowed | None = None


def mergekit_environment(given: Path | None) -> Path:
    """Finds mergekit's environment before anything is written.

    Args:
        given: The one that a user names; None for $EVOMERGE_MERGEKIT_ENV, else .venv-mergekit.

    Returns:
        The environment.

    Raises:
        SetupError: There is no mergekit in it.
    """
    environment = given or Path(os.environ.get(ENVIRONMENT) or _DEFAULT)
    program = environment / "bin" / "mergekit-yaml"
    if not program.is_file():
        raise SetupError(
            f"{program} is missing; --verify takes a virtual environment with mergekit 0.1.5 "
            "(scripts/make_mergekit_env makes one)"
        )
    return environment


def verify_export(
    store: Store,
    trial: Trial,
    parents: Mapping[str, Parent],
    directory: Path,
    request: VerificationRequest,
    note: Callable[[str], None] = lambda text: None,
) -> Verification:
    """Makes an exported candidate again from its folder, compares, scores and writes what was found there.

    Args:
        store: The store of the candidate's study.
        trial: The candidate.
        parents: The study's models, open.
        directory: The folder that it was exported to.
        request: How to verify.
        note: Called with what is done next.

    Returns:
        What was found; also in verify.json and on the card.

    Raises:
        StudyError: If a model or a task is no longer what it was.
        CheckpointError: If a folder cannot be loaded.
        ConfigError: If the tasks ask for what is not allowed.
    """
    candidate = StoredCandidate.of(store, trial, parents)
    role, stored = _stored(store, trial)
    opened = open_stored_search(store, request.allowed, request.models)
    with tempfile.TemporaryDirectory(dir=directory.absolute().parent, prefix=".verify-") as scratch:
        ours = directory
        if not any(directory.glob("*.safetensors")):
            note("making the model from the folder's recipe.json")
            ours = Path(scratch) / "ours"
            merge_recipe_file(directory / "recipe.json", ours)
        note("making it with mergekit")
        theirs = Path(scratch) / "by-mergekit"
        reason = _merge_with_mergekit(directory / "recipe.yaml", theirs, request.environment)
        comparison = None if reason else _compare(candidate, ours, theirs)
        note(f"scoring on {len(stored.evaluation.items)} {role} items")
        rescored = {"exported": _rescore(opened, stored, ours)}
        if comparison is not None:
            rescored["mergekit"] = _rescore(opened, stored, theirs)
    found = Verification(
        recipe_id=candidate.recipe.id,
        role=role,
        items=len(stored.evaluation.items),
        stored=_objective(opened, stored.evaluation),
        rescored=rescored,
        comparison=comparison,
        reason=reason,
        is_randomized=any(method(name).randomized for name in candidate.methods),
        mergekit=mergekit_check.version(request.environment),
    )
    found.write(directory)
    return found


def _stored(store: Store, trial: Trial) -> tuple[str, Scored]:
    """(role, last evaluation) that is scored again."""
    last = {str(role): scored for role, scored in store.evaluations(trial.recipe_id)}
    for role in _ROLES:
        if role in last and last[role].evaluation.error is None and last[role].evaluation.items:
            return role, last[role]
    raise ConfigError(f"candidate {trial.id} was scored on no items, so that nothing can be scored again")


def _merge_with_mergekit(recipe: Path, out: Path, environment: Path) -> str:
    """Why mergekit did not make the model, '' if it did."""
    if not recipe.is_file():
        return "it has no words for the recipe"
    try:
        program = mergekit_check.find_program(recipe, environment)
        mergekit_check.run_mergekit(program, recipe, out, in_own_folder=True)
    except SetupError as error:
        return str(error)
    return ""


def _compare(candidate: StoredCandidate, ours: Path, theirs: Path) -> Comparison:
    if candidate.is_route:
        return route_mergekit.compare_checkpoints(ours, theirs)
    return mergekit_check.compare(Checkpoint(ours), Checkpoint(theirs))


def _rescore(opened: Opened, stored: Scored, folder: Path) -> Rescore:
    """Scores a folder as transformers loads it on the items of a stored evaluation."""
    loaded = load_model(folder, opened.settings.out_dtype)
    if loaded.faults:
        raise CheckpointError(f"{folder} cannot be scored: {loaded.faults[0]}")
    before = stored.evaluation
    scores, metrics = opened.harness.score(loaded.model.to(device_name()), _items(before.items))
    after = Evaluation(before.recipe_id, scores, metrics, {})
    values = {(score.task, score.item): score.value for score in before.items}
    differing = sum(values.get((score.task, score.item)) != score.value for score in scores)
    score = _objective(opened, after)
    interval = None
    if opened.objective.is_mean_of_items:
        lead = score - _objective(opened, before)
        interval = lead_interval(scores, before.items, opened.objective.shares(), lead)
    return Rescore(score, differing, interval)


def _items(scores: Sequence[ItemScore]) -> Items:
    items: dict[str, list[str]] = {}
    for score in scores:
        items.setdefault(score.task, []).append(score.item)
    return {task: tuple(ids) for task, ids in items.items()}


def _objective(opened: Opened, evaluation: Evaluation) -> float:
    score = opened.objective.reported_score(evaluation)
    if score is None:
        raise CheckpointError("the objective of what was scored again is not finite")
    return score
